// rms_norm and gated_group_rms_norm: one row at a time, sums in the accumulator dtype.
#include "norm.h"

#include <cmath>

#include "../dispatch.h"
#include "../params.h"
#include "parallel.h"
#include "scratch.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kRowElements = 1 << 14;  // elements a thread takes at least

// h + gate * delta of one row, stored; no gate: 1.
template <class T>
void add_delta(const T* h, const T* gate, const T* delta, int64_t n, T* sum) {
  using A = acc_t<T>;
  for_vectors<A>(n, [=](int64_t i, auto lanes) {
    const Vec<A> x = lanes.load(h + i), d = lanes.load(delta + i);
    lanes.store(sum + i, gate ? multiply_add(lanes.load(gate + i), d, x) : x + d);
  });
}

template <class T>
void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* const weight = p.weight.at<const T>();
  const bool before = p.modulate == Modulate::before, after = p.modulate == Modulate::after;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.L, l = row % p.L;
    const T* h = p.x.at<const T>(b, l);
    if (p.delta) {
      T* const sum = p.h.at<T>(b, l);
      add_delta(h, p.gate ? p.gate.at<const T>(b) : nullptr, p.delta.at<const T>(b, l), p.D, sum);
      h = sum;
    }
    const T* const shift = p.shift ? p.shift.at<const T>(b) : nullptr;
    const T* const scale = p.scale ? p.scale.at<const T>(b) : nullptr;
    const auto modulated = [=](Vec<A> v, int64_t i, auto lanes) {
      return multiply_add(v, 1 + lanes.load(scale + i), lanes.load(shift + i));
    };
    const auto normed_input = [=](int64_t i, auto lanes) {
      const Vec<A> v = lanes.load(h + i);
      return before ? modulated(v, i, lanes) : v;
    };

    Vec<A> squares = {};
    for_vectors<A>(p.D, [&](int64_t i, auto lanes) {
      const Vec<A> v = normed_input(i, lanes);
      squares = multiply_add(v, v, squares);
    });
    const Vec<A> inverse = splat(A(1) / std::sqrt(sum_lanes<A>(squares) / A(p.D) + A(p.eps)));
    T* const out = p.normed.at<T>(b, l);
    for_vectors<A>(p.D, [=](int64_t i, auto lanes) {
      const Vec<A> v = lanes.load(weight + i) * (normed_input(i, lanes) * inverse);
      lanes.store(out + i, after ? modulated(v, i, lanes) : v);
    });
  }
}

template <class T>
void gated_norm_rows(const GatedNormParams& p, int64_t begin, int64_t end) {
  const auto product = scratch<acc_t<T>>(p.group_size);
  const T* const weight = p.weight.at<const T>();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.L, l = row % p.L;
    for (int64_t i = 0; i < p.D; i += p.group_size)
      gated_norm(p.y.at<const T>(b, l) + i, p.z.at<const T>(b, l) + i, weight + i, p.group_size, p.eps, product.get(),
                 p.out.at<T>(b, l) + i);
  }
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void rms_norm(const RmsNormParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) {
    parallel_for(p.B * p.L, kRowElements / p.D, [&](int64_t begin, int64_t end) { rms_norm_rows<T>(p, begin, end); });
  });
}

void gated_group_rms_norm(const GatedNormParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) {
    parallel_for(p.B * p.L, kRowElements / p.D, [&](int64_t begin, int64_t end) { gated_norm_rows<T>(p, begin, end); });
  });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
