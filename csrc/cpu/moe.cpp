// moe_experts: tokens sorted by expert, two matrix products over (expert, tile of rows) items, one combination a token.
//
// Each weight matrix that is needed at all is read once for up to kPairs routed tokens, by as many threads as it has
// tiles. The shared expert is one more expert that every token visits. Sums have a fixed order: within a product that
// of gemm.h, over a token's experts that of its slots. So a token's result depends on nothing but the token.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../dispatch.h"
#include "../params.h"
#include "gemm.h"
#include "math.h"
#include "parallel.h"

namespace twotower::cpu {
namespace {

constexpr int64_t kPairs = 4096;  // (token, slot) pairs in flight: bounds the scratch memory
constexpr int64_t kRows = 66;     // token rows that stay in the cache while a weight tile passes: whole register tiles
constexpr int64_t kTile = 64;     // weight rows of one work item
constexpr int kPieces = 64;       // a thread's, of the items: an expert may have a hundred times the tokens of another

// One expert and the rows that visit it.
template <class T>
struct Visit {
  const T *up, *down;  // [width or 2 width, D], [D, width]
  int64_t width;
  int64_t first, count;  // rows of x and of out: [first, first + count) in expert order
  operand_t<T>* h;       // [count, row_stride(width)]
};

// Work item: rows [begin, end) of a visited expert's matrix.
struct Item {
  int64_t visit, begin, end;
};

// relu(v)^2; a NaN stays one.
template <class A>
A relu2(A v) {
  return v < A(0) ? A(0) : v * v;
}

template <class T>
class Experts {
  using A = acc_t<T>;
  using O = operand_t<T>;

 public:
  explicit Experts(const ExpertsParams& p) : p_(p), shared_(p.shared_F > 0), chunk_(chunk_of(p)) {
    const int64_t rows = chunk_ * (p.k + shared_);
    rows_ = scratch<O>(chunk_ * row_stride<O>(p.D));
    row_.resize(chunk_);
    x_.resize(rows);
    place_.resize(chunk_ * p.k);
    h_ = scratch<O>(chunk_ * (p.k * row_stride<O>(p.F) + row_stride<O>(p.shared_F)));
    out_ = scratch<A>(rows * p.D);
  }

  void run() {
    for (int64_t first = 0; first < p_.T; first += chunk_) {
      first_token_ = first;
      tokens_ = std::min(chunk_, p_.T - first);
      sort_by_expert();
      over_tiles([](const Visit<T>& v) { return v.width; }, [&](const Item& item) { up(item); });
      over_tiles([&](const Visit<T>&) { return p_.D; }, [&](const Item& item) { down(item); });
      parallel_for(tokens_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) combine(t);
      });
    }
  }

 private:
  // Chunks of the same size: each reads all weights.
  static int64_t chunk_of(const ExpertsParams& p) {
    const int64_t most = std::max<int64_t>(1, kPairs / std::max<int64_t>(p.k, 1));
    const int64_t chunks = std::max<int64_t>(1, (p.T + most - 1) / most);
    return (p.T + chunks - 1) / chunks;
  }

  int64_t expert(int64_t token, int64_t slot) const {
    return p_.id_dtype == DType::i32 ? p_.expert_ids.at<const int32_t>(token)[slot]
                                     : p_.expert_ids.at<const int64_t>(token)[slot];
  }

  // Fills x_ (rows in expert order), place_ (the row of every pair) and visits_.
  void sort_by_expert() {
    parallel_for(tokens_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        row_[t] = lay_row<O>(p_.x.at<const T>(first_token_ + t), p_.D, rows_.get() + t * row_stride<O>(p_.D));
    });
    std::vector<int64_t> start(p_.E + 1);
    for (int64_t t = 0; t < tokens_; ++t)
      for (int64_t s = 0; s < p_.k; ++s) ++start[expert(first_token_ + t, s) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    visits_.clear();
    O* h = h_.get();
    const auto visit = [&](const Rows<2>& up, const Rows<2>& down, int64_t e, int64_t width, int64_t first,
                           int64_t count) {
      visits_.push_back({up.at<const T>(e, 0), down.at<const T>(e, 0), width, first, count, h});
      h += count * row_stride<O>(width);
    };
    for (int64_t e = 0; e < p_.E; ++e)
      if (start[e] < start[e + 1]) visit(p_.up, p_.down, e, p_.F, start[e], start[e + 1] - start[e]);
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t s = 0; s < p_.k; ++s) {
        const int64_t place = start[expert(first_token_ + t, s)]++;
        x_[place] = row_[t];
        place_[t * p_.k + s] = place;
      }
    }
    if (shared_) {
      std::copy_n(row_.begin(), tokens_, x_.begin() + tokens_ * p_.k);
      visits_.push_back(
          {p_.shared_up.at<const T>(0), p_.shared_down.at<const T>(0), p_.shared_F, tokens_ * p_.k, tokens_, h});
    }
    // Those with the most work first, so that no thread is left alone with them.
    std::stable_sort(visits_.begin(), visits_.end(),
                     [](const Visit<T>& a, const Visit<T>& b) { return a.count * a.width > b.count * b.width; });
  }

  // body(item) in parallel over tiles of rows_of(visit) rows of every visited expert.
  template <class R, class F>
  void over_tiles(R&& rows_of, F&& body) {
    items_.clear();
    for (size_t v = 0; v < visits_.size(); ++v) {
      const int64_t rows = rows_of(visits_[v]);
      for (int64_t begin = 0; begin < rows; begin += kTile)
        items_.push_back({static_cast<int64_t>(v), begin, std::min(begin + kTile, rows)});
    }
    parallel_for(
        items_.size(), 1,
        [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) body(items_[i]);
        },
        kPieces);
  }

  // h = activation(up x), kept as the next product takes it; never in float16, which a square overflows easily.
  void up(const Item& item) {
    const Visit<T>& v = visits_[item.visit];
    const bool gated = p_.activation == MoeActivation::silu_gate;
    const int64_t width = item.end - item.begin;
    A first[kRows * kTile], second[kRows * kTile];
    for (int64_t r = 0; r < v.count; r += kRows) {
      const int64_t rows = std::min(kRows, v.count - r);
      const O* const* x = x_.data() + v.first + r;
      product_nt(x, rows, v.up + item.begin * p_.D, p_.D, width, p_.D, first, kTile);
      if (gated) product_nt(x, rows, v.up + (v.width + item.begin) * p_.D, p_.D, width, p_.D, second, kTile);
      for (int64_t i = 0; i < rows; ++i) {
        const A *a = first + i * kTile, *b = second + i * kTile;
        O* h = v.h + (r + i) * row_stride<O>(v.width) + item.begin;
        if (gated)
          for (int64_t f = 0; f < width; ++f) h[f] = O(silu(a[f]) * b[f]);
        else
          for (int64_t f = 0; f < width; ++f) h[f] = O(relu2(a[f]));
      }
    }
  }

  void down(const Item& item) {
    const Visit<T>& v = visits_[item.visit];
    for (int64_t r = 0; r < v.count; r += kRows) {
      const int64_t rows = std::min(kRows, v.count - r);
      const O* h[kRows];
      for (int64_t i = 0; i < rows; ++i) h[i] = v.h + (r + i) * row_stride<O>(v.width);
      product_nt(h, rows, v.down + item.begin * v.width, v.width, item.end - item.begin, v.width,
                 out_.get() + (v.first + r) * p_.D + item.begin, p_.D);
    }
  }

  void combine(int64_t t) const {
    const Scratch<A> sum = zeros<A>(p_.D);
    const A* weights = p_.expert_weights.at<const A>(first_token_ + t);
    for (int64_t s = 0; s < p_.k; ++s) {
      const A* out = out_.get() + place_[t * p_.k + s] * p_.D;
      for (int64_t d = 0; d < p_.D; ++d) sum[d] += weights[s] * out[d];
    }
    if (shared_) {
      const A* out = out_.get() + (tokens_ * p_.k + t) * p_.D;
      for (int64_t d = 0; d < p_.D; ++d) sum[d] += out[d];
    }
    T* y = p_.y.at<T>(first_token_ + t);
    for (int64_t d = 0; d < p_.D; ++d) y[d] = T(sum[d]);
  }

  const ExpertsParams& p_;
  const bool shared_;
  const int64_t chunk_;  // tokens at a time
  int64_t first_token_ = 0, tokens_ = 0;
  Scratch<O> rows_;                // x of the chunk's tokens as products take it
  std::vector<const O*> row_, x_;  // rows of it: by token; in expert order, the shared expert last
  std::vector<int64_t> place_;     // [token, slot] -> row in expert order
  std::vector<Visit<T>> visits_;
  std::vector<Item> items_;
  Scratch<O> h_;    // [row in expert order, row_stride(width)]
  Scratch<A> out_;  // [row in expert order, D]
};

}  // namespace
}  // namespace twotower::cpu

namespace twotower::cpu::TWOTOWER_ISA {

void moe_experts(const ExpertsParams& p) {
  dispatch_floating(p.dtype, [&]<class T>(std::type_identity<T>) { Experts<T>(p).run(); });
}

}  // namespace twotower::cpu::TWOTOWER_ISA
