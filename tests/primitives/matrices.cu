// Matrices of 16-bit elements: one warp each.
#include "primitives.h"

namespace twotower::primitives {
namespace {

using Row = simt::Vector<uint32_t, 4>;  // 8 elements

// in: 8 N rows of 4 words; then for each of them at which of the rows in shared memory it lies. out: matrix[i] of each
// lane at N * lane + i. The lanes that give no row's address give that of row 0.
template <int N>
__global__ void ldmatrix(const uint32_t* in, uint32_t* out, int64_t) {
  SIMT_SHARED(Row, rows, 8 * N);
  const int lane = simt::lane();
  const bool addresses = lane < 8 * N;
  const uint32_t at = addresses ? in[32 * N + lane] : 0;
  if (addresses) rows[at] = simt::load<uint32_t, 4>(in + 4 * lane);
  simt::warp_sync();
  uint32_t matrix[N];
  simt::ldmatrix(matrix, simt::shared_address(rows + at));
  for (int i = 0; i < N; ++i) out[N * lane + i] = matrix[i];
}

// As ldmatrix<4>.
__global__ void ldmatrix_transposed(const uint32_t* in, uint32_t* out, int64_t) {
  SIMT_SHARED(Row, rows, 32);
  const int lane = simt::lane();
  rows[in[128 + lane]] = simt::load<uint32_t, 4>(in + 4 * lane);
  simt::warp_sync();
  uint32_t matrix[4];
  simt::ldmatrix_transposed(matrix, simt::shared_address(rows + in[128 + lane]));
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = matrix[i];
}

// in: matrix[0] and matrix[1] of each lane; then at which of the 16 rows in shared memory each row shall lie. out:
// those 16 rows of shared memory.
__global__ void stmatrix_transposed(const uint32_t* in, uint32_t* out, int64_t) {
  SIMT_SHARED(Row, rows, 16);
  const int lane = simt::lane();
  const uint32_t matrix[2] = {in[2 * lane], in[2 * lane + 1]};
  simt::stmatrix_transposed(simt::shared_address(rows + (lane < 16 ? in[64 + lane] : 0)), matrix);
  simt::warp_sync();
  if (lane < 16) simt::store(out + 4 * lane, rows[lane]);
}

// in: a, b and d of each lane, 4, 2 and 4 words. out: d of each lane after n products.
template <class T>
__global__ void mma(const uint32_t* in, uint32_t* out, int64_t n) {
  const uint32_t* mine = in + 10 * simt::lane();
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]}, b[2] = {mine[4], mine[5]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = reinterpret_cast<const float*>(mine)[6 + i];
  for (int64_t i = 0; i < n; ++i) simt::mma<T>(d, a, b);
  for (int i = 0; i < 4; ++i) reinterpret_cast<float*>(out)[4 * simt::lane() + i] = d[i];
}

constexpr Entry kEntries[] = {
    {"ldmatrix_4", ldmatrix<4>, 1, simt::kWarp},
    {"ldmatrix_2", ldmatrix<2>, 1, simt::kWarp},
    {"ldmatrix_transposed", ldmatrix_transposed, 1, simt::kWarp},
    {"stmatrix_transposed", stmatrix_transposed, 1, simt::kWarp},
    {"mma_bfloat16", mma<simt::bfloat16>, 1, simt::kWarp},
    {"mma_float16", mma<simt::float16>, 1, simt::kWarp},
};

}  // namespace

std::span<const Entry> matrix_entries() {
  return kEntries;
}

}  // namespace twotower::primitives
