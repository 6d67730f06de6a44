// What a block of moe_stream.cuh keeps in shared memory, and the warp that fills it: an item's weights come as tiles,
// by the tensor memory accelerator, its tokens row by row from where they stand. Both arrive at the barrier of their
// stage.
#pragma once

#include "moe_stream_queue.cuh"

namespace twotower::kernels {

template <class Traits>
struct StreamSmem {
  typename Traits::Stage stages[Traits::kStages];
  simt::Barrier full[Traits::kStages], empty[Traits::kStages];
  StreamItem items[Traits::kStages];  // which item starts in the stage
  simt::Barrier stored[Traits::kFinished], signalled[Traits::kFinished];
  StreamItem finished[Traits::kFinished];
  int operand[Traits::kNumbers * Traits::kTokens];  // of each row of tokens that is copied: its number, -1 for none
  // Copies of the pass's: finding an item among them takes a fraction of a microsecond, of which an item has some ten.
  int32_t start[kMaxStreamedExperts + 1], tiles[kMaxStreamedExperts + 1];
};

// A place in a ring of so many stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;  // of the phase in which the stage is filled
  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Where the rows of an item's tokens are, or of their h: row `operand` at from + operand * stride.
template <class Traits>
struct TokenRows {
  const typename Traits::T* from;
  int64_t stride;
  int count;  // of the product's columns

  // Collective of the warp.
  __device__ TokenRows(const StreamParams& s, const StreamQueue<Traits>& queue, const StreamItem& item,
                       StreamSmem<Traits>& smem) {
    const ExpertsItem& at = item.at;
    const int numbers = item.down ? Traits::kNumbers : 1, present = at.count * numbers;
    const bool in_order = item.down || queue.is_shared(at.expert);
    count = product_width(at.count) * numbers;
    stride = item.down ? queue.hidden_stride(at.expert) : s.x.stride[0];
    from = static_cast<const typename Traits::T*>(s.x.data);
    if (item.down)
      from = reinterpret_cast<const typename Traits::T*>(queue.hidden_row(at.expert, at.row));
    else if (in_order)
      from += (at.row - queue.pass.pairs) * stride;
    for (int row = simt::lane(); row < count; row += simt::kWarp)
      smem.operand[row] = row >= present ? -1 : in_order ? row : queue.pass.token_of[at.row + row];
    simt::warp_sync();
  }
  // Starts the copies of kColumns columns, of which `left` exist; all else arrives as zeros.
  __device__ void copy(simt::SharedTile<typename Traits::T, Traits::kNumbers * Traits::kTokens, Traits::kColumns>& tile,
                       const StreamSmem<Traits>& smem, int column, int left) const {
    using Tile = std::remove_reference_t<decltype(tile)>;
    constexpr int kRowsAtOnce = simt::kWarp / Tile::kChunks;
    const int chunk = simt::lane() % Tile::kChunks, within = chunk * Tile::kChunk;
    const uint32_t to = simt::shared_address(&tile);
    SIMT_UNROLL_BY(4)
    for (int row = simt::lane() / Tile::kChunks; row < count; row += kRowsAtOnce) {
      const int operand = smem.operand[row];
      const bool copied = operand >= 0 && within < left;
      const typename Traits::T* source = copied ? from + operand * stride + column + within : from;
      simt::cp_async(to + Tile::place(row, chunk) * int{sizeof(typename Traits::T)}, source, copied ? 16 : 0);
    }
  }
};

// One thread: starts the copy of a step's weights. Axes of the maps: column, row, -, -, expert; of those of gated `up`:
// column, row in 8, gate or value, group of 8 rows, expert, so that 8 gate rows and their 8 value rows follow one
// another.
template <class Traits>
__device__ void copy_weights(const StreamParams& s, const StreamQueue<Traits>& queue, const StreamItem& item,
                             int column,
                             const simt::SharedTile<typename Traits::T, Traits::kRows, Traits::kColumns>& tile,
                             simt::Barrier& full) {
  const bool shared = queue.is_shared(item.at.expert), grouped = !item.down && queue.gated();
  const simt::TensorMap& weights = item.down ? (shared ? s.shared_down : s.down) : (shared ? s.shared_up : s.up);
  const int output = item.at.output, expert = shared ? 0 : item.at.expert;
  full.arrive_expecting(sizeof tile);
  simt::copy_tile(simt::shared_address(&tile), weights, full,
                  {column, grouped ? 0 : output, 0, grouped ? output / 8 : 0, expert});
}

// `ready`: h is there, where the item reads it. Else weights are copied as far ahead as there are stages, until it is.
template <class Traits>
__device__ void copy_item(const StreamParams& s, const StreamQueue<Traits>& queue, const StreamItem& item, bool ready,
                          StreamSmem<Traits>& smem, Ring<Traits::kStages>& ring) {
  constexpr int kStep = Traits::kColumns;
  Ring<Traits::kStages> behind = ring;  // of the stages whose tokens are missing
  const int columns = queue.columns(item);
  const auto weights = [&](int column) {
    smem.empty[ring.stage].wait(ring.parity ^ 1);
    if (simt::lane() == 0) {
      if (column == 0) smem.items[ring.stage] = item;
      copy_weights(s, queue, item, column, smem.stages[ring.stage].weights, smem.full[ring.stage]);
    }
    ring.advance();
  };
  int column = 0;
  if (!ready) {
    for (; column < columns && column < Traits::kStages * kStep; column += kStep) weights(column);
    if (simt::lane() == 0) queue.wait(item);
  }
  simt::warp_sync();  // what the first lane has waited for is there for all; none reads the rows before any more
  const TokenRows<Traits> rows(s, queue, item, smem);
  const auto tokens = [&](int from) {
    rows.copy(smem.stages[behind.stage].tokens, smem, from, columns - from);
    smem.full[behind.stage].arrive_when_copied();
    behind.advance();
  };
  for (int from = 0; from < column; from += kStep) tokens(from);
  for (; column < columns; column += kStep) {
    weights(column);
    tokens(column);
  }
}

template <class Traits>
__device__ void copy_items(const StreamParams& s, const StreamQueue<Traits>& queue, StreamSmem<Traits>& smem) {
  Ring<Traits::kStages> ring;
  bool all_ready = false;
  int index = static_cast<int>(simt::block_index());
  for (;;) {
    // Asked for before it is needed, and so while this item's copies wait for room.
    uint32_t taken = 0;
    if (simt::lane() == 0) taken = simt::atomic_add(queue.pass.taken, 1u);
    const StreamItem item = queue.find(index);
    if (item.at.expert < 0) {
      smem.empty[ring.stage].wait(ring.parity ^ 1);
      if (simt::lane() == 0) {
        smem.items[ring.stage] = item;
        smem.full[ring.stage].arrive();
      }
      smem.full[ring.stage].arrive_when_copied();
      return;
    }
    const bool ready = simt::shuffle(simt::lane() == 0 && queue.is_ready(item, all_ready) ? 1 : 0, 0) != 0;
    copy_item(s, queue, item, ready, smem, ring);
    index = static_cast<int>(simt::block_count() + simt::shuffle(taken, 0));
  }
}

}  // namespace twotower::kernels
