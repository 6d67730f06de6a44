// ssd_scan on the GPU, and the scan of mamba_block: a block takes some columns of one head through all rows, a chunk of
// rows at a time, in closed form (arXiv 2405.21060). With h the state before the chunk:
//
//   y_t = U_t C_t h + sum over s <= t of M_ts x_s,   M_ts = (C_t.B_s) L_ts dt_s, and D where s = t
//   h  <- U h + sum over s of (x_s A_s) B_s
//
// L_ts = the product of the decays of rows s + 1 .. t, U_t = of rows 0 .. t, A_s = L_last,s dt_s. All of it in float32.
// The state stays in registers from chunk to chunk. The chunk's own B is a few rows more of it: C times both gives C h
// and C.B at once.
#pragma once

#include "ssd_source.cuh"

namespace twotower::kernels {

// --- sizes -----------------------------------------------------------------------------------------------------------

// kRows rows a chunk at most. Eight lanes, a team, share rows of the state: four elements each, at every 32nd, kQuads
// times. A state of more elements than that passes through memory, a slice at a time.
template <class Input_, int kRows_, int kQuads_>
struct ScanTraits {
  using Input = Input_;  // ssd_source.cuh
  static constexpr int kRows = kRows_, kQuads = kQuads_;
  static constexpr int kThreads = kScanThreads, kLanes = 8, kTeams = kThreads / kLanes;
  static constexpr int kHeld = kScanColumns / kTeams;  // rows of the state a team: neighbours
  static constexpr int kSlice = kLanes * kQuads * 4;
  static constexpr int kBlocks = kRows == 1 ? 3 : 2;  // a multiprocessor: without a number ptxas spills for one more
  static constexpr int kOwn = kRows < kLanes ? 1 : kRows / kLanes;  // rows of y a lane finishes
  static_assert(kRows == 1 || kRows == kTeams, "a team has one row of B");
  static_assert(kHeld * kTeams == kScanColumns);
};

template <class Traits>
struct ScanShared {
  static constexpr int kRows = Traits::kRows;
  alignas(16) float keys[kRows * Traits::kSlice], queries[kRows * Traits::kSlice];  // B, C
  alignas(16) float x[kRows * kScanColumns];
  float between[kRows][kRows + 1];   // L_ts dt_s; a pitch that puts rows 2 apart into different banks
  float mix[kRows][kRows + 1];       // M
  float until[kRows], after[kRows];  // U_t, A_s
};

// --- load ------------------------------------------------------------------------------------------------------------

// The chunk's rows, unrounded: of a slice of B and C, with the first one also of x; zeros past the last column and row.
template <class Traits>
__device__ void stage(const typename Traits::Input& source, const ScanHead& head, int64_t begin, int rows,
                      int64_t first, ScanShared<Traits>& shared) {
  constexpr int kSlice = Traits::kSlice, kRows = Traits::kRows;
  // One loop for all, so that there is one copy of the convolution.
  for (int i = simt::thread_index(); i < 2 * kSlice + kScanColumns; i += Traits::kThreads) {
    const Part part = i < kSlice ? Part::keys : i < 2 * kSlice ? Part::queries : Part::x;
    if (part == Part::x && first > 0) continue;
    const int c = part == Part::keys ? i : part == Part::queries ? i - kSlice : i - 2 * kSlice;
    const int64_t column = (part == Part::x ? head.first : first) + c;
    const bool present = column < (part == Part::x ? source.heads.P : source.heads.N);
    float v[kRows];
    if (present) source.get(head, part, column, begin, v);
    float* to = (part == Part::keys ? shared.keys : part == Part::queries ? shared.queries : shared.x) + c;
    const int width = part == Part::x ? kScanColumns : kSlice;
    SIMT_UNROLL
    for (int t = 0; t < kRows; ++t) to[t * width] = present && t < rows ? v[t] : 0.f;
  }
}

// What a chunk's rows do to the state, by one warp. Collective.
template <class Traits>
__device__ void steps(const typename Traits::Input& source, const ScanHead& head, int64_t begin, int rows,
                      ScanShared<Traits>& shared) {
  const int lane = simt::lane();
  float step = 0, decay = 1;
  if (lane < rows) {
    const float raw = source.dt(head, begin + lane) + head.dt_bias;
    step = (raw > 0 ? raw : 0.f) + log1pf(expf(-fabsf(raw)));  // softplus
    decay = expf(head.rate * step);
  }
  float until = 1, between = 1;
  SIMT_UNROLL
  for (int t = 0; t < Traits::kRows; ++t) {
    const float d = simt::shuffle(decay, t);
    if (t <= lane) until *= d;
    if (t > lane) between *= d;
    if (lane < Traits::kRows) shared.between[t][lane] = between * step;
  }
  if (lane < Traits::kRows) {
    shared.until[lane] = until;
    shared.after[lane] = between * step;
  }
}

// A thread's part of the state: elements [first + 4 (lane + 8 i), ... + 4) of the rows of its team, i < kQuads.
template <class Traits>
struct StatePart {
  float at[Traits::kHeld][Traits::kQuads][4];

  __device__ static int element(int i) { return 4 * (simt::lane() % Traits::kLanes + Traits::kLanes * i); }

  // From rows `row`, row + 1, ... of the head's state, zeros past its end; no state at all: zeros.
  __device__ void load(const StateRows& from, int64_t row, int64_t first) {
    SIMT_UNROLL
    for (int r = 0; r < Traits::kHeld; ++r) {
      SIMT_UNROLL
      for (int i = 0; i < Traits::kQuads; ++i) from.load(row + r, first + element(i), at[r][i]);
    }
  }
  __device__ void store(const StateRows& to, int64_t row, int64_t first) const {
    SIMT_UNROLL
    for (int r = 0; r < Traits::kHeld; ++r) {
      SIMT_UNROLL
      for (int i = 0; i < Traits::kQuads; ++i) to.store(row + r, first + element(i), at[r][i]);
    }
  }
};

// --- the chunk -------------------------------------------------------------------------------------------------------

// Sums of a row of C times each row that the team holds: its kHeld rows of the state, then its row of B.
template <class Traits>
struct Products {
  static constexpr int kCount = Traits::kHeld + 1;
  float at[Traits::kRows][kCount];

  // Of the thread's elements of a slice.
  __device__ Products(const StatePart<Traits>& state, const ScanShared<Traits>& shared, int team) : at{} {
    using Part = StatePart<Traits>;
    simt::Vector<float, 4> key[Traits::kQuads];
    SIMT_UNROLL
    for (int i = 0; i < Traits::kQuads; ++i)
      key[i] =
          simt::load<float, 4>(shared.keys + (team < Traits::kRows ? team : 0) * Traits::kSlice + Part::element(i));
    SIMT_UNROLL
    for (int t = 0; t < Traits::kRows; ++t) {
      SIMT_UNROLL
      for (int i = 0; i < Traits::kQuads; ++i) {
        const auto query = simt::load<float, 4>(shared.queries + t * Traits::kSlice + Part::element(i));
        SIMT_UNROLL
        for (int e = 0; e < 4; ++e) {
          SIMT_UNROLL
          for (int r = 0; r < Traits::kHeld; ++r) at[t][r] += state.at[r][i][e] * query.at[e];
          at[t][Traits::kHeld] += key[i].at[e] * query.at[e];
        }
      }
    }
  }
  // Sums over the team, of which kLanes lanes are left to be added and kLeft rows to be shared out among them. A lane
  // keeps kOwn rows from first_row() on, which are then at [0, kOwn). Collective.
  template <int kLanes = Traits::kLanes, int kLeft = Traits::kRows>
  __device__ void fold() {
    if constexpr (kLanes > 1) {
      constexpr int kMask = kLanes / 2, kKept = kLeft > 1 ? kLeft / 2 : 1;
      const bool upper = (simt::lane() & kMask) != 0;
      SIMT_UNROLL
      for (int t = 0; t < kKept; ++t) {
        SIMT_UNROLL
        for (int r = 0; r < kCount; ++r) {
          const float low = at[t][r], high = at[t + kLeft - kKept][r];
          at[t][r] = (upper ? high : low) + simt::shuffle_xor(upper ? low : high, kMask);
        }
      }
      fold<kMask, kKept>();
    }
  }
  // Lanes that are left over own no row: theirs is kRows or more.
  __device__ static int first_row() { return simt::lane() % Traits::kLanes * Traits::kOwn; }
};

// h <- U h + sum of (x_s A_s) B_s, for the thread's elements. Rounded as written, whatever the number of rows.
template <class Traits>
__device__ void advance(StatePart<Traits>& state, const ScanShared<Traits>& shared, int column) {
  using Part = StatePart<Traits>;
  const float total = shared.until[Traits::kRows - 1];
  SIMT_UNROLL
  for (int r = 0; r < Traits::kHeld; ++r) {
    SIMT_UNROLL
    for (int i = 0; i < Traits::kQuads * 4; ++i) state.at[r][i / 4][i % 4] *= total;
  }
  SIMT_UNROLL_BY(4)
  for (int s = 0; s < Traits::kRows; ++s) {
    float inflow[Traits::kHeld];
    SIMT_UNROLL
    for (int r = 0; r < Traits::kHeld; ++r) inflow[r] = shared.x[s * kScanColumns + column + r] * shared.after[s];
    SIMT_UNROLL
    for (int i = 0; i < Traits::kQuads; ++i) {
      const auto key = simt::load<float, 4>(shared.keys + s * Traits::kSlice + Part::element(i));
      SIMT_UNROLL
      for (int r = 0; r < Traits::kHeld; ++r) {
        SIMT_UNROLL
        for (int e = 0; e < 4; ++e) state.at[r][i][e] = fmaf(inflow[r], key.at[e], state.at[r][i][e]);
      }
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks) scan_kernel(const typename Traits::Input source) {
  constexpr int kRows = Traits::kRows, kSlice = Traits::kSlice, kHeld = Traits::kHeld;
  SIMT_SHARED(ScanShared<Traits>, memory, 1);
  ScanShared<Traits>& shared = *memory;
  const ScanHead head = source.heads.at(simt::block_index());
  const int team = simt::thread_index() / Traits::kLanes, column = team * kHeld;  // of the block's columns
  const int64_t N = source.heads.N, L = source.rows(), row = head.first + column;
  const bool in_registers = N <= kSlice;

  source.store_conv_state(head);
  StatePart<Traits> state;
  int64_t begin = 0;
  do {
    const int rows = source.chunk_rows(begin, kRows);
    const int64_t end = begin + rows;
    if (begin > 0) simt::block_sync();                              // the chunk before has been read
    if (begin == 0 && in_registers) state.load(head.from, row, 0);  // on its way while rows are staged
    if (simt::warp() == Traits::kThreads / simt::kWarp - 1) steps<Traits>(source, head, begin, rows, shared);

    float own[Traits::kOwn][kHeld + 1] = {};  // C h and C.B of the rows that this lane finishes
    for (int64_t first = 0; first < N; first += kSlice) {
      if (first > 0) simt::block_sync();  // the slice before has been read
      stage<Traits>(source, head, begin, rows, first, shared);
      if (!in_registers && begin == 0) state.load(head.from, row, first);
      if (!in_registers && begin > 0) state.load(head.to, row, first);  // what this thread has stored
      simt::block_sync();
      Products<Traits> products(state, shared, team);
      products.fold();
      SIMT_UNROLL
      for (int i = 0; i < Traits::kOwn * (kHeld + 1); ++i)
        own[i / (kHeld + 1)][i % (kHeld + 1)] += products.at[i / (kHeld + 1)][i % (kHeld + 1)];
      if (!source.state_is_wanted() && end == L) continue;
      advance(state, shared, column);
      if (!in_registers || end == L) state.store(head.to, row, first);
      if (source.state_is_kept(end)) state.store(source.kept(head, end), row, first);
    }

    const int row_of_y = Products<Traits>::first_row();
    SIMT_UNROLL
    for (int i = 0; i < Traits::kOwn; ++i) {
      const int t = row_of_y + i;
      if (t < kRows && team < kRows)
        shared.mix[t][team] = own[i][kHeld] * shared.between[t][team] + (t == team ? head.D : 0.f);
    }
    simt::block_sync();
    SIMT_UNROLL
    for (int i = 0; i < Traits::kOwn; ++i) {
      const int t = row_of_y + i;
      if (t >= rows) continue;
      float y[kHeld];
      SIMT_UNROLL
      for (int r = 0; r < kHeld; ++r) y[r] = shared.until[t] * own[i][r];
      for (int s = 0; s <= t; ++s) {
        SIMT_UNROLL
        for (int r = 0; r < kHeld; ++r) y[r] = fmaf(shared.mix[t][s], shared.x[s * kScanColumns + column + r], y[r]);
      }
      SIMT_UNROLL
      for (int r = 0; r < kHeld; ++r)
        if (column + r < head.columns) source.store_y(head, begin + t, column + r, y[r]);
    }
    begin = end;
  } while (begin < L);
}

}  // namespace twotower::kernels
