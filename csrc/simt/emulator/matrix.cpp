// ldmatrix, stmatrix and mma.sync, from the fragment layouts of the PTX ISA (sections on warp-level matrix
// instructions).
#include <algorithm>

#include "runtime.h"

#define PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace twotower::simt::emulated {
namespace {

constexpr int kRow = 16;  // bytes of a matrix row: 8 elements

std::byte* row_of(const Collective& call, int matrix, int row) {
  const Arena& arena = machine.running->block->arena;
  return arena.checked(call.argument[8 * matrix + row], kRow, kRow, call.name);
}

// Rows of a matrix that lie in the same 16-byte column of the 32 banks are read one after another.
void count_conflicts(const Collective& call, int matrix) {
  int in_column[8] = {}, deepest = 1;
  for (int r = 0; r < 8; ++r) {
    const uint32_t at = call.argument[8 * matrix + r];
    bool again = false;  // equal addresses are read once
    for (int q = 0; q < r; ++q) again = again || call.argument[8 * matrix + q] == at;
    if (!again) deepest = std::max(deepest, ++in_column[at / kRow % 8]);
  }
  machine.ldmatrix_conflicts += deepest - 1;
}

template <int kCount>
void load_body(Collective& call) {
  for (int m = 0; m < kCount; ++m) {
    count_conflicts(call, m);
    for (int l = 0; l < kWarp; ++l)
      std::memcpy(static_cast<uint32_t*>(call.out[l]) + m, row_of(call, m, l / 4) + 4 * (l % 4), 4);
  }
}

void load_transposed_body(Collective& call) {
  for (int m = 0; m < 4; ++m) {
    count_conflicts(call, m);
    for (int l = 0; l < kWarp; ++l) {
      std::byte* to = static_cast<std::byte*>(call.out[l]) + 4 * m;
      for (int i = 0; i < 2; ++i) std::memcpy(to + 2 * i, row_of(call, m, 2 * (l % 4) + i) + 2 * (l / 4), 2);
    }
  }
}

template <int kCount>
void store_transposed_body(Collective& call) {
  for (int m = 0; m < kCount; ++m) {
    for (int l = 0; l < kWarp; ++l) {
      uint16_t elements[2];
      std::memcpy(elements, static_cast<const uint32_t*>(call.in[l]) + m, 4);
      for (int i = 0; i < 2; ++i) std::memcpy(row_of(call, m, 2 * (l % 4) + i) + 2 * (l / 4), &elements[i], 2);
    }
  }
}

struct Operands {
  const uint32_t *a, *b;
};

// The two 16-bit elements of a register.
template <class T>
void unpack(uint32_t packed, float* first, float* second) {
  T low, high;
  low.bits = static_cast<uint16_t>(packed);
  high.bits = static_cast<uint16_t>(packed >> 16);
  *first = float(low);
  *second = float(high);
}

template <class T>
void multiply_body(Collective& call) {
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const Operands& in = *static_cast<const Operands*>(call.in[l]);
    const float* mine = static_cast<const float*>(call.out[l]);
    const int g = l / 4, c = 2 * (l % 4);
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, column = c + i / 2 * 8;
      unpack<T>(in.a[i], &a[row][column], &a[row][column + 1]);
      d[g + i / 2 * 8][c + i % 2] = mine[i];
    }
    for (int i = 0; i < 2; ++i) unpack<T>(in.b[i], &b[c + 8 * i][g], &b[c + 8 * i + 1][g]);
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < kWarp; ++l) {
    float* mine = static_cast<float*>(call.out[l]);
    for (int i = 0; i < 4; ++i) mine[i] = d[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
  }
}

}  // namespace

void load_matrices(uint32_t* matrices, int count, uint32_t row) {
  const Arena& arena = machine.running->block->arena;
  std::byte* at = arena.checked(row, kRow, kRow, "ldmatrix");
  if (machine.running->lane() < 8 * count) note_access(at, kRow, Access::read, PC);
  meet_in_collective("ldmatrix", count == 4 ? load_body<4> : load_body<2>, nullptr, matrices, row, PC);
}

void load_matrices_transposed(uint32_t* matrices, uint32_t row) {
  const Arena& arena = machine.running->block->arena;
  std::byte* at = arena.checked(row, kRow, kRow, "ldmatrix_transposed");
  note_access(at, kRow, Access::read, PC);
  meet_in_collective("ldmatrix_transposed", load_transposed_body, nullptr, matrices, row, PC);
}

void store_matrices_transposed(uint32_t row, const uint32_t* matrices, int count) {
  if (count != 2) fail("stmatrix_transposed of %d matrices", count);
  const Arena& arena = machine.running->block->arena;
  std::byte* at = arena.checked(row, kRow, kRow, "stmatrix_transposed");
  if (machine.running->lane() < 8 * count) note_access(at, kRow, Access::write, PC);
  meet_in_collective("stmatrix_transposed", store_transposed_body<2>, matrices, nullptr, row, PC);
}

void multiply_bfloat16(float* d, const uint32_t* a, const uint32_t* b) {
  const Operands operands{a, b};
  meet_in_collective("mma", multiply_body<bfloat16>, &operands, d, 0, PC);
}

void multiply_float16(float* d, const uint32_t* a, const uint32_t* b) {
  const Operands operands{a, b};
  meet_in_collective("mma", multiply_body<float16>, &operands, d, 0, PC);
}

}  // namespace twotower::simt::emulated
