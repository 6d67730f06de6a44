// What a block of moe_stream.cuh keeps in shared memory, and the warp that fills it: an item's weights come as tiles,
// by the tensor memory accelerator, its tokens row by row from where they stand. Both arrive at the barrier of their
// stage.
#pragma once

#include <cstddef>

#include "moe_stream_queue.cuh"

namespace twotower::kernels {

template <class Traits>
struct StreamSmem {
  typename Traits::Stage stages[Traits::kStages];
  simt::Barrier full[Traits::kStages], empty[Traits::kStages];
  StreamItem items[Traits::kStages];  // which item starts in the stage
  simt::Barrier stored[Traits::kFinished], signalled[Traits::kFinished];
  StreamItem finished[Traits::kFinished];
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

// The rows of an item's tokens, or of their h: a lane has a chunk of 16 bytes of every fourth row, and keeps in
// registers where these rows are, since finding them in every step would take longer than the step.
template <class Traits>
struct TokenRows {
  using T = typename Traits::T;
  using Tile = simt::SharedTile<T, Traits::kNumbers * Traits::kTokens, Traits::kColumns>;
  static constexpr int kAtOnce = simt::kWarp / Tile::kChunks, kMost = Tile::kRows / kAtOnce;

  const std::byte* from;   // this lane's chunk of the next columns
  int count, mine;         // of the product's columns, of this lane's rows that are tokens of the item
  uint32_t chunks[kMost];  // row i of this lane starts so many chunks behind `from`

  __device__ TokenRows(const StreamParams& s, const StreamQueue<Traits>& queue, const StreamItem& item) {
    const ExpertsItem& at = item.at;
    const int numbers = item.down ? Traits::kNumbers : 1, present = at.count * numbers;
    const bool in_order = item.down || queue.is_shared(at.expert);
    const int64_t stride = (item.down ? queue.hidden_stride(at.expert) : s.x.stride[0]) / Tile::kChunk;
    count = product_width(at.count) * numbers;
    from = static_cast<const std::byte*>(s.x.data);
    if (item.down)
      from = reinterpret_cast<const std::byte*>(queue.hidden_row(at.expert, at.row));
    else if (in_order)
      from += (at.row - queue.pass.pairs) * stride * 16;
    from += simt::lane() % Tile::kChunks * 16;
    const int first = simt::lane() / Tile::kChunks;
    mine = (present - first + kAtOnce - 1) / kAtOnce;
    SIMT_UNROLL
    for (int i = 0; i < kMost; ++i) {
      const int row = i * kAtOnce + first;
      chunks[i] = i < mine ? static_cast<uint32_t>((in_order ? row : queue.pass.token_of[at.row + row]) * stride) : 0;
    }
  }
  // Starts the copies of the next kColumns columns, of which `left` exist; all else arrives as zeros.
  __device__ void copy(Tile& tile, int left) {
    if (left >= Traits::kColumns)
      copy_chunks(tile, [] { return 16; });
    else
      copy_chunks(tile, [&] { return simt::lane() % Tile::kChunks * Tile::kChunk < left ? 16 : 0; });
    from += Traits::kColumns * sizeof(T);
  }
  template <class Bytes>  // of this lane's chunks: a function, so that the compiler knows where it is always 16
  __device__ void copy_chunks(Tile& tile, Bytes&& bytes) const {
    const int chunk = simt::lane() % Tile::kChunks, row = simt::lane() / Tile::kChunks;
    const uint32_t to[2] = {simt::shared_address(tile.chunk(row, chunk)),
                            simt::shared_address(tile.chunk(row + kAtOnce, chunk))};
    SIMT_UNROLL
    for (int i = 0; i < kMost; ++i) {
      // Where products of one width end and those of the next have more.
      if ((i * kAtOnce == 8 || i * kAtOnce == 16 || i * kAtOnce % 32 == 0) && i * kAtOnce >= count) break;
      simt::cp_async(to[i % 2] + i / 2 * 2 * kAtOnce * 128, from + uint64_t{chunks[i]} * 16, i < mine ? bytes() : 0);
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
    simt::warp_sync();  // all lanes go on together
    ring.advance();
  };
  int column = 0;
  if (!ready) {
    for (; column < columns && column < Traits::kStages * kStep; column += kStep) weights(column);
    if (simt::lane() == 0) queue.wait(item);
  }
  simt::warp_sync();  // what the first lane has waited for is there for all
  TokenRows<Traits> rows(s, queue, item);
  const auto tokens = [&](int from) {
    rows.copy(smem.stages[behind.stage].tokens, columns - from);
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
      simt::cp_async_commit();
      simt::cp_async_wait<0>();  // no thread leaves with copies under way
      return;
    }
    const bool ready = simt::shuffle(simt::lane() == 0 && queue.is_ready(item, all_ready) ? 1 : 0, 0) != 0;
    copy_item(s, queue, item, ready, smem, ring);
    index = static_cast<int>(simt::block_count() + simt::shuffle(taken, 0));
  }
}

}  // namespace twotower::kernels
