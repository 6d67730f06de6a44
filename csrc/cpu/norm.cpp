// rms_norm and gated_group_rms_norm: one row at a time, sums in the accumulator dtype.
#include <cmath>

#include "../dispatch.h"
#include "../params.h"
#include "math.h"
#include "parallel.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kRowElements = 1 << 14;  // elements a thread takes at least

template <class T>
void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* weight = p.weight.at<const T>();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.L, l = row % p.L;
    const T* h = p.x.at<const T>(b, l);
    if (p.delta) {
      const T* delta = p.delta.at<const T>(b, l);
      const T* gate = p.gate ? p.gate.at<const T>(b) : nullptr;
      T* sum = p.h.at<T>(b, l);
      for (int64_t i = 0; i < p.D; ++i) sum[i] = T(A(h[i]) + (gate ? A(gate[i]) : A(1)) * A(delta[i]));
      h = sum;
    }
    const T* shift = p.shift ? p.shift.at<const T>(b) : nullptr;
    const T* scale = p.scale ? p.scale.at<const T>(b) : nullptr;
    const bool before = p.modulate == Modulate::before, after = p.modulate == Modulate::after;
    const auto normed_input = [&](int64_t i) {
      return before ? A(h[i]) * (A(1) + A(scale[i])) + A(shift[i]) : A(h[i]);
    };

    A squares = 0;
    for (int64_t i = 0; i < p.D; ++i) squares += normed_input(i) * normed_input(i);
    const A inverse = A(1) / std::sqrt(squares / A(p.D) + A(p.eps));
    T* out = p.normed.at<T>(b, l);
    for (int64_t i = 0; i < p.D; ++i) {
      const A v = A(weight[i]) * (normed_input(i) * inverse);
      out[i] = T(after ? v * (A(1) + A(scale[i])) + A(shift[i]) : v);
    }
  }
}

template <class T>
void gated_norm_rows(const GatedNormParams& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* weight = p.weight.at<const T>();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.L, l = row % p.L;
    const T* y = p.y.at<const T>(b, l);
    const T* z = p.z.at<const T>(b, l);
    T* out = p.out.at<T>(b, l);
    for (int64_t first = 0; first < p.D; first += p.group_size) {
      const int64_t last = first + p.group_size;
      A squares = 0;
      for (int64_t i = first; i < last; ++i) {
        const A v = gated(A(y[i]), A(z[i]));
        squares += v * v;
      }
      const A inverse = A(1) / std::sqrt(squares / A(p.group_size) + A(p.eps));
      for (int64_t i = first; i < last; ++i) out[i] = T(A(weight[i]) * (gated(A(y[i]), A(z[i])) * inverse));
    }
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
