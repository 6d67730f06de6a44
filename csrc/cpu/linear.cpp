// linear and stream_read: what the model and the benchmarks need beside the public ops.
#include "../dispatch.h"
#include "../params.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kRows = 64;     // rows of x that stay in the cache while a tile of the weight passes
constexpr int64_t kColumns = 64;  // rows of the weight that a work item takes

template <class T>
void linear_of(const LinearParams& p) {
  using A = acc_t<T>;
  using O = operand_t<T>;
  const int64_t stride = row_stride<O>(p.K);
  const Scratch<O> rows = scratch<O>(p.M * stride);
  const Scratch<const O*> x = scratch<const O*>(p.M);
  parallel_for(p.M, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) x[m] = lay_row<O>(p.x.at<const T>(m), p.K, rows.get() + m * stride);
  });
  parallel_for((p.N + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    A tile[kRows * kColumns];
    for (int64_t n = begin * kColumns; n < std::min(end * kColumns, p.N); n += kColumns) {
      const int64_t columns = std::min(kColumns, p.N - n);
      A bias[kColumns] = {};
      if (p.bias) convert(p.bias.at<const T>() + n, columns, bias);
      for (int64_t m = 0; m < p.M; m += kRows) {
        const int64_t count = std::min(kRows, p.M - m);
        product_nt(x.get() + m, count, p.weight.at<const T>(n), p.weight.stride[0], columns, p.K, tile, kColumns);
        for (int64_t i = 0; i < count; ++i) {
          T* y = p.y.at<T>(m + i) + n;
          for (int64_t j = 0; j < columns; ++j) y[j] = T(tile[i * kColumns + j] + bias[j]);
        }
      }
    }
  });
}

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void linear(const LinearParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { linear_of<T>(p); });
}

void stream_read(const StreamReadParams& p) {
  constexpr int64_t kBlock = 1 << 16;  // values
  constexpr int64_t kSums = 32, kAhead = 512;
  const int64_t blocks = (p.n + kBlock - 1) / kBlock;
  const Scratch<int64_t> sums = zeros<int64_t>(blocks);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t *data = p.data + b * kBlock, n = std::min(kBlock, p.n - b * kBlock);
      int64_t lanes[kSums] = {}, i = 0;
      for (; i + kSums <= n; i += kSums) {
        for (int64_t j = 0; j < kSums; j += 8) __builtin_prefetch(data + i + j + kAhead, 0, 0);
        for (int64_t j = 0; j < kSums; ++j) lanes[j] += data[i + j];
      }
      for (; i < n; ++i) lanes[0] += data[i];
      for (const int64_t lane : lanes) sums[b] += lane;
    }
  });
  *p.sum = 0;
  for (int64_t b = 0; b < blocks; ++b) *p.sum += sums[b];
}

}  // namespace twotower::cpu::TWOTOWER_ISA
