// The experts' two products on the GPU, in one persistent launch. Blocks take items (expert, weight rows, token tile)
// from a queue: first all of h = activation(up x), then all of out = down h; then they share out y = the weighted sum
// of out. An item's weights are the m16 operand and its tokens the n8 operand of mma.sync, so that few tokens waste
// little.
//
// No wait can deadlock. All blocks are on the device, and every item is some block's: the first of each block is that
// of its number, the next ones are counted off. Items of the first product wait for nothing, so all of them are
// finished. A block starts with the second product when it has finished its items of the first, and waits for items of
// the first alone, so all of the second product's are finished too. The sums wait for those, and nothing waits for the
// sums.
//
// A token's result depends on nothing but the token: each element of a product adds its terms in steps of kColumns, the
// same in every tile, and the sum over a token's experts goes by slot.
#pragma once

#include <type_traits>

#include "moe_combine.cuh"
#include "moe_products.cuh"

namespace twotower::kernels {

// A tile of kRows rows of weights and kTokens tokens, shared out over kWarpsM x kWarpsN warps.
template <class T_, int kRows_, int kTokens_, int kWarpsM_, int kWarpsN_, int kStages_>
struct ExpertsTraits {
  using T = T_;
  // What h is kept as. In float16 a square would overflow easily.
  using Hidden = std::conditional_t<std::is_same_v<T, simt::bfloat16>, T, float>;
  static constexpr int kRows = kRows_, kTokens = kTokens_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr int kThreads = kWarpsM * kWarpsN * simt::kWarp;
  static constexpr int kColumns = 128 / sizeof(T);  // of K in a step: 128 bytes of each row of weights
  static constexpr int kM = kRows / kWarpsM / 16, kN = kTokens / kWarpsN / 8;  // a warp's fragments
  // Whether a step's copies are started among its products: where these are many, and no copy is needed in the next
  // step.
  static constexpr bool kHidesCopies = kM * kN >= 24 && kStages > 2;
  static_assert(kRows % (16 * kWarpsM) == 0 && kTokens % (16 * kWarpsN) == 0 && kStages >= 2);
  using Accumulators = simt::Fragments<kM, kN>;

  __device__ static int warp_m() { return simt::warp() % kWarpsM; }
  __device__ static int warp_n() { return simt::warp() / kWarpsM; }
  __device__ static int warp_row() { return warp_m() * kM * 16; }   // its first row of the tile of weights
  __device__ static int warp_token() { return warp_n() * kN * 8; }  // its first row of the tile of tokens
  // Which token of the item stands in a row of the tile: the warps take fragments of 8 tokens in turn, so that a tile
  // that is filled in part is equal work for all.
  __device__ static int token_in_row(int row) { return (row % (kN * 8) / 8 * kWarpsN + row / (kN * 8)) * 8 + row % 8; }
};

// kColumns columns of an item's weights and tokens.
template <class Traits, class Operand>
struct ExpertsStage {
  simt::SharedTile<typename Traits::T, Traits::kRows, Traits::kColumns> weights;
  simt::SharedTile<Operand, Traits::kTokens, Traits::kColumns> tokens;
};

template <class Traits>
struct ExpertsSmem {
  union {  // one product at a time
    ExpertsStage<Traits, typename Traits::T> up[Traits::kStages];
    ExpertsStage<Traits, typename Traits::Hidden> down[Traits::kStages];
  };
  ExpertsItem next;
  int operand[Traits::kTokens];  // of each row of its tile of tokens: operand_index, -1 for none
};

// What the steps of an item are copied from, as far as this thread copies it.
template <class Traits, class Product>
struct ItemSource {
  using Stage = ExpertsStage<Traits, typename Product::Operand>;
  using WeightCopies = simt::RowCopies<Traits::kThreads, decltype(Stage::weights)>;
  using TokenCopies = simt::RowCopies<Traits::kThreads, decltype(Stage::tokens)>;
  static_assert(WeightCopies::kPass % 16 == 0, "so that a thread has gate rows alone or value rows alone");
  static constexpr int kSlices = Traits::kColumns / 16;

  int columns, steps;
  const typename Traits::T* weights;  // the first row of weights; the next are weights_step elements apart
  int64_t weights_step;
  const typename Product::Operand* tokens[TokenCopies::kCount];
  uint32_t weights_present, tokens_present;  // bit i: there is an i-th row

  // Takes the next item and starts its first steps.
  __device__ void open(const Product& product, const ExpertsSmem<Traits>& smem, Stage (&stages)[Traits::kStages]) {
    const ExpertsItem item = smem.next;
    columns = product.columns(item.expert);
    steps = ceil_div(columns, Traits::kColumns);
    const int row = WeightCopies::row(0), output = product.output(item, row);
    const int outputs = product.outputs_of_rows(WeightCopies::kPass);
    weights = product.weight_row(item, row);
    weights_step = int64_t{outputs} * columns;
    weights_present = tokens_present = 0;
    SIMT_UNROLL
    for (int i = 0; i < WeightCopies::kCount; ++i)
      weights_present |= uint32_t{output + i * outputs < product.outputs(item.expert)} << i;
    SIMT_UNROLL
    for (int i = 0; i < TokenCopies::kCount; ++i) {
      const int index = smem.operand[TokenCopies::row(i)];
      tokens[i] = product.operand_row(item, index < 0 ? smem.operand[0] : index);
      tokens_present |= uint32_t{index >= 0} << i;
    }
    SIMT_UNROLL_BY(1)
    for (int s = 0; s < Traits::kStages - 1; ++s) start(product, stages[s], s);
  }
  // Starts the copies of a step as one group of cp.async, an empty one behind the last step.
  __device__ void start(const Product& product, Stage& stage, int step) const {
    if (step < steps) {
      const int column = step * Traits::kColumns;
      const typename Traits::T* from[WeightCopies::kCount] = {weights + column};
      SIMT_UNROLL
      for (int i = 1; i < WeightCopies::kCount; ++i) from[i] = from[i - 1] + weights_step;
      WeightCopies::start(stage.weights, columns - column, product.weights_aligned(), weights_present,
                          [&](int i) { return from[i]; });
      TokenCopies::start(stage.tokens, columns - column, product.tokens_aligned(), tokens_present,
                         [&](int i) { return tokens[i] + column; });
    }
    simt::cp_async_commit();
  }
  // Whether the step has all its columns, and rows of both operands start at multiples of 16 bytes: its copies can then
  // be started in kSlices parts instead.
  __device__ bool in_slices(const Product& product, int step) const {
    return Traits::kHidesCopies && (step + 1) * Traits::kColumns <= columns && product.weights_aligned() &&
           product.tokens_aligned();
  }
  __device__ void start_slice(Stage& stage, int step, int slice) const {
    const int column = step * Traits::kColumns;
    SIMT_UNROLL
    for (int i = 0; i < WeightCopies::kCount; ++i)
      if (i % kSlices == slice)
        WeightCopies::start_row(stage.weights, i, weights_present >> i & 1, weights + i * weights_step + column);
    SIMT_UNROLL
    for (int i = 0; i < TokenCopies::kCount; ++i)
      if ((i + 2) % kSlices == slice)
        TokenCopies::start_row(stage.tokens, i, tokens_present >> i & 1, tokens[i] + column);
  }
};

// The first warp: looks up item `index`, and waits until its operands are there.
template <class Traits, class Product>
__device__ void prepare(const Product& product, ExpertsSmem<Traits>& smem, int index) {
  const ExpertsItem item = product.find(index);
  if (item.expert >= 0) {
    for (int row = simt::lane(); row < Traits::kTokens; row += simt::kWarp) {
      const int token = Traits::token_in_row(row);
      smem.operand[row] = token < item.count ? product.operand_index(item, item.row + token) : -1;
    }
  }
  if (simt::lane() == 0) {
    smem.next = item;
    if (item.expert >= 0) product.wait(item);
  }
}
// The same for the next item that no block has taken, of which the first lane has the number.
template <class Traits, class Product>
__device__ void prepare_taken(const Product& product, ExpertsSmem<Traits>& smem, uint32_t taken) {
  prepare<Traits>(product, smem, static_cast<int>(simt::block_count() + simt::shuffle(taken, 0)));
  simt::warp_sync();  // the first lane may have waited, and collectives follow
}

// acc += weights tokens over one step, for as many of the warp's fragments of tokens as hold any: `used` rounded up to
// a quarter of them. between(slice) is called among the products of each 16 columns.
template <class Traits, int kUsed = Traits::kN, class Stage, class Between>
__device__ void multiply_used(typename Traits::Accumulators& acc, const Stage& stage, int used, Between&& between) {
  constexpr int kQuarter = Traits::kN > 4 ? Traits::kN / 4 : 1;
  if constexpr (kUsed > 0) {
    if (used <= kUsed - kQuarter) return multiply_used<Traits, kUsed - kQuarter>(acc, stage, used, between);
    simt::multiply<kUsed>(acc, stage.weights, Traits::warp_row(), stage.tokens, Traits::warp_token(), between);
  } else {
    SIMT_UNROLL
    for (int slice = 0; slice < Traits::kColumns / 16; ++slice) between(slice);
  }
}

// All items of one product. Copies run kStages - 1 steps ahead; an item's first are started before the item before it
// is stored.
template <class Traits, class Product, class Stage>
__device__ void run(const Product& product, ExpertsSmem<Traits>& smem, Stage (&stages)[Traits::kStages]) {
  constexpr int kStages = Traits::kStages;
  ExpertsItem item{.expert = -1};
  ItemSource<Traits, Product> source;
  typename Traits::Accumulators acc;
  uint32_t taken = 0;  // by the first thread: the number of the item after the next
  if (simt::warp() == 0) prepare<Traits>(product, smem, static_cast<int>(simt::block_index()));
  for (;;) {
    simt::block_sync();  // the next item is known, and all are done with all stages
    const ExpertsItem next = smem.next;
    if (next.expert >= 0) source.open(product, smem, stages);
    if (item.expert >= 0) {
      product.store(item, acc, stages[kStages - 1].weights.data);  // scratch: the stage that `open` leaves free
      simt::block_sync();
      if (simt::thread_index() == 0) simt::signal(product.ready(item));
    }
    if (next.expert < 0) return;
    item = next;

    acc.zero();
    const int used = product.used_fragments(item);
    const int looked_up_in = source.steps > 1;  // the second step, when its number is there; or the only one
    int stage = 0;
    for (int step = 0; step < source.steps; ++step) {
      simt::cp_async_wait<kStages - 2>();
      simt::block_sync();  // the step's data is there, and all are done with the step before, whose stage is refilled
      Stage& refilled = stages[stage == 0 ? kStages - 1 : stage - 1];
      const int ahead = step + kStages - 1;
      const bool in_slices = source.in_slices(product, ahead);
      if (!in_slices) source.start(product, refilled, ahead);
      if (step == 0 && simt::thread_index() == 0) taken = simt::atomic_add(product.taken(), 1u);
      if (step == looked_up_in && simt::warp() == 0) prepare_taken<Traits>(product, smem, taken);
      if (in_slices) {
        multiply_used<Traits>(acc, stages[stage], used, [&](int i) { source.start_slice(refilled, ahead, i); });
        simt::cp_async_commit();
      } else {
        multiply_used<Traits>(acc, stages[stage], used, [](int) {});
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
  }
}

template <class Traits>  // 256 threads an SM may take all registers
__global__ void __launch_bounds__(Traits::kThreads, 256 / Traits::kThreads)
    moe_experts_kernel(const ExpertsParams p, const ExpertsPass pass) {
  auto& smem = simt::dynamic_shared<ExpertsSmem<Traits>>();
  const UpProduct<Traits> up{{p, pass}};
  const DownProduct<Traits> down{{p, pass}};
  run<Traits>(up, smem, smem.up);
  simt::block_sync();  // all are done with the shared memory
  run<Traits>(down, smem, smem.down);
  if (simt::thread_index() == 0) down.wait_for_all();
  simt::block_sync();
  combine<typename Traits::T, Traits::kThreads>(p, pass);
}

}  // namespace twotower::kernels
