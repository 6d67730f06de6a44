// Where the scan's rows come from, and where its results go: ssd_scan's own tensors, or within mamba_block what the
// convolution makes of the projected rows.
#pragma once

#include "../params.h"
#include "conv.cuh"

namespace twotower::kernels {

constexpr int kScanThreads = 128;  // of a block
constexpr int kScanColumns = 32;   // of a head, a block

// The rows of one head's state in memory; none: data is null.
struct StateRows {
  float* data = nullptr;
  int64_t stride = 0, rows = 0, size = 0;
  bool aligned = false;  // every row starts at a multiple of 16 bytes

  // Elements [first, first + 4) of a row; zeros where there are none.
  __device__ void load(int64_t row, int64_t first, float (&v)[4]) const {
    const bool present = data != nullptr && row < rows;
    if (!present) {
      SIMT_UNROLL
      for (int e = 0; e < 4; ++e) v[e] = 0.f;
      return;
    }
    const float* from = simt::global(data) + row * stride + first;
    if (aligned && first + 4 <= size) {
      const auto quad = simt::load<float, 4>(from);
      SIMT_UNROLL
      for (int e = 0; e < 4; ++e) v[e] = quad.at[e];
    } else {
      SIMT_UNROLL
      for (int e = 0; e < 4; ++e) v[e] = first + e < size ? from[e] : 0.f;
    }
  }
  __device__ void store(int64_t row, int64_t first, const float (&v)[4]) const {
    if (row >= rows) return;
    float* to = simt::global(data) + row * stride + first;
    if (aligned && first + 4 <= size) {
      simt::store(to, simt::Vector<float, 4>{v[0], v[1], v[2], v[3]});
    } else {
      SIMT_UNROLL
      for (int e = 0; e < 4; ++e)
        if (first + e < size) to[e] = v[e];
    }
  }
};

// What a block works on: columns [first, first + columns) of a head.
struct ScanHead {
  int64_t b, h, g, first, columns;
  float rate, D, dt_bias;  // rate: -exp(A_log)
  StateRows from, to;
};

// What both ops have of their heads.
struct ScanHeads {
  int64_t H, P, G, N;
  uint32_t tiles;             // of a head's columns, a block each
  Rows<0> A_log, D, dt_bias;  // float [h]; D and dt_bias optional
  Rows<3> from, to;           // float [b, h, p, n]; from: optional; to: none where no state is stored
  bool from_aligned, to_aligned;

  __device__ ScanHead at(int64_t block) const {
    const int64_t h = block / tiles % H, b = block / tiles / H, first = block % tiles * kScanColumns;
    const int64_t left = P - first;
    return {b,
            h,
            h / (H / G),
            first,
            left < kScanColumns ? left : kScanColumns,
            -expf(value(A_log, h)),
            value(D, h),
            value(dt_bias, h),
            state(from, b, h, from_aligned),
            state(to, b, h, to_aligned)};
  }

 private:
  __device__ static float value(const Rows<0>& values, int64_t h) { return values ? values.at<const float>()[h] : 0.f; }
  __device__ StateRows state(const Rows<3>& rows, int64_t b, int64_t h, bool aligned) const {
    if (!rows) return {};
    return {rows.at<float>(b, h, 0), rows.stride[2], P, N, aligned};
  }
};

// What is staged of a chunk's rows.
enum class Part : int { x, keys, queries };  // keys: B, queries: C

// The arguments of ssd_scan.
template <class T_>
struct ScanSource {
  using T = T_;
  ScanHeads heads;
  ScanParams p;
  bool kept_aligned;

  __device__ int64_t rows() const { return p.L; }
  __device__ bool state_is_wanted() const { return true; }
  // Rows [begin, begin + kRows) of a column: of the head's, or an element of the group's B or C. Rows from L on are of
  // no meaning.
  template <int kRows>
  __device__ void get(const ScanHead& head, Part part, int64_t column, int64_t begin, float (&v)[kRows]) const {
    const Rows<3>& rows = part == Part::x ? p.x : part == Part::keys ? p.Bm : p.Cm;
    const T* row = rows.at<const T>(head.b, begin, part == Part::x ? head.h : head.g) + column;
    SIMT_UNROLL
    for (int t = 0; t < kRows; ++t, row += rows.stride[1]) v[t] = begin + t < p.L ? float(*row) : 0.f;
  }
  __device__ float dt(const ScanHead& head, int64_t row) const { return float(p.dt.at<const T>(head.b, row)[head.h]); }
  __device__ void store_y(const ScanHead& head, int64_t row, int64_t column, float y) const {
    p.y.at<T>(head.b, row, head.h)[head.first + column] = T(y);
  }
  __device__ void store_conv_state(const ScanHead&) const {}

  // A chunk ends where a state is to be kept.
  __device__ int chunk_rows(int64_t begin, int most) const {
    int64_t rows = p.L - begin < most ? p.L - begin : most;
    if (p.states_every > 0) {
      const int64_t left = p.states_every - begin % p.states_every;
      rows = left < rows ? left : rows;
    }
    return static_cast<int>(rows);
  }
  __device__ bool state_is_kept(int64_t end) const {
    return p.states_every > 0 && end > 0 && (end % p.states_every == 0 || end == p.L);
  }
  __device__ StateRows kept(const ScanHead& head, int64_t end) const {
    float* to = p.states.at<float>(head.b, (end - 1) / p.states_every, head.h, 0);
    return {to, p.states.stride[3], p.P, p.N, kept_aligned};
  }
};

// The arguments of mamba_block; y goes to `y`, float [b, l, h*p], to be normed.
template <class T_>
struct BlockSource {
  using T = T_;
  ScanHeads heads;
  MambaBlockParams p;
  float* y;

  __device__ int64_t rows() const { return p.L; }
  __device__ bool state_is_wanted() const { return bool(p.new_ssm_state); }
  // The same, after the convolution.
  template <int kRows>
  __device__ void get(const ScanHead& head, Part part, int64_t column, int64_t begin, float (&v)[kRows]) const {
    convolve<T>(p.conv, head.b, channel(head, part) + column, begin, v);
  }
  __device__ float dt(const ScanHead& head, int64_t row) const {
    return float(p.conv.x.at<const T>(head.b, row)[p.conv.C + head.h]);
  }
  __device__ void store_y(const ScanHead& head, int64_t row, int64_t column, float value) const {
    y[((head.b * p.L + row) * p.H + head.h) * p.P + head.first + column] = value;
  }
  // The last raw rows of the block's channels; those of B and C by the group's first block.
  __device__ void store_conv_state(const ScanHead& head) const {
    if (!p.conv.final_state) return;
    const auto store = [&](int64_t channel, int64_t count) {
      for (int64_t c = simt::thread_index(); c < count; c += kScanThreads)
        kernels::store_conv_state<T>(p.conv, head.b, channel + c);
    };
    store(channel(head, Part::x) + head.first, head.columns);
    if (head.first > 0 || head.h % (p.H / p.G) != 0) return;
    store(channel(head, Part::keys), p.N);
    store(channel(head, Part::queries), p.N);
  }
  __device__ int chunk_rows(int64_t begin, int most) const {
    return static_cast<int>(p.L - begin < most ? p.L - begin : most);
  }
  __device__ bool state_is_kept(int64_t) const { return false; }
  __device__ StateRows kept(const ScanHead&, int64_t) const { return {}; }

 private:
  // The first one of the head's or the group's.
  __device__ int64_t channel(const ScanHead& head, Part part) const {
    const int64_t group = part == Part::keys ? head.g : p.G + head.g;
    return part == Part::x ? head.h * p.P : p.H * p.P + group * p.N;
  }
};

}  // namespace twotower::kernels
