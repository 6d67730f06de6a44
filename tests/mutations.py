"""Bugs to plant in the kernels and their vocabulary, one at a time; mutate.py applies them."""

from __future__ import annotations

from mutation import planted
from mutations_layers import LAYERS

NORM = planted(
    "kernels/norm.cuh", "rms_norm", "kernels", "rms_norm",
    ("the gate is forgotten", "float(gate.at[j]) * float(delta.at[j])", "float(delta.at[j])"),
    (
        "the sum of squares ends one access early",
        "for (int64_t i = first; i < p.D; i += step) {\n    const auto h = residual",
        "for (int64_t i = first; i + kVector < p.D; i += step) {\n    const auto h = residual",
    ),
    (
        "squares of what is not yet modulated",
        "modulate<Traits>(p, b, i, v);\n    for (int j = 0; j < kVector; ++j) squares",
        "squares += 0;\n    for (int j = 0; j < kVector; ++j) squares",
    ),
    ("the modulation of another row of the batch", "p.scale.at<const T>(b) + i", "p.scale.at<const T>(0) + i"),
    ("epsilon is divided, too", "rsqrt(mean + float(p.eps))", "rsqrt(mean + float(p.eps) / float(p.D))"),
    ("h goes to the next row", "p.h.at<T>(b, l) + i, h)", "p.h.at<T>(b, l + 1) + i, h)"),
)  # fmt: skip

TILE = (
    *planted(
        "simt/tile.h", "rms_norm", "kernels kernels_norm", "rms_norm",
        ("no barrier before the block's partial sums are read", "partial[warp()] = value;\n  block_sync();", "partial[warp()] = value;"),
        ("the last warp's partial sum is left out", "for (int w = 1; w < kThreads / kWarp; ++w)", "for (int w = 1; w + 1 < kThreads / kWarp; ++w)"),
        ("a warp's sum stops at two lanes", "mask > 0; mask /= 2", "mask > 1; mask /= 2"),
        ("every warp's first partial sum is the first warp's", "T total = partial[0];", "T total = partial[warp()];"),
    ),
    *planted(
        "simt/tile.h", "moe_experts", "kernels kernels_moe", "moe_experts and (reference or float64)",
        ("accumulators: the wrong row of a lane", "lane() / 4 + i / 2 * 8", "lane() / 4 + i % 2 * 8"),
        ("accumulators: the wrong column of a lane", "lane() % 4 * 2 + i % 2", "lane() % 4 + i % 2 * 4"),
        ("ldmatrix of the weights: halves exchanged", "a_row + lane() % 16, 2 * k + lane() / 16)", "a_row + lane() % 16, 2 * k + 1 - lane() / 16)"),
        ("the last 16 columns of a tile are left out", "for (int k = 0; k < A::kColumns / 16; ++k)", "for (int k = 0; k + 1 < A::kColumns / 16; ++k)"),
    ),
    *planted(
        "simt/tile.h", "moe_experts", "primitives_tiles", "",
        ("the permutation of a tile's chunks is none", "(chunk ^ (row % 8)) * kChunk", "chunk * kChunk"),
        ("the permutation repeats every 4 rows", "(chunk ^ (row % 8)) * kChunk", "(chunk ^ (row % 4)) * kChunk"),
        ("a softmax sum is not rescaled", "sum *= expf(max - largest);", ""),
        ("a row that is absent is copied", "present ? 16 : 0", "16"),
        ("of a pair of fragments nothing is called in between", "if (n == 0) between(k);", ""),
    ),
)  # fmt: skip

COMMIT = (
    *planted(
        "kernels/commit.cuh", "denoise_commit", "kernels kernels_commit", "denoise_commit and not filter",
        ("of equal logits the highest id", "for (int i = kEach - 1; i >= 0; --i) lowest", "for (int i = 0; i < kEach; ++i) lowest"),
        ("the tail of the vocabulary wraps to id 0", "x[i] = id < p.V ? float(row[id]) : -simt::kInfinity;", "x[i] = float(row[id < p.V ? id : 0]);"),
        ("one id past the end is read", "x[i] = id < p.V ?", "x[i] = id <= p.V ?"),
        ("the mask token is a candidate", "if (place_of<Traits>(i) == hidden) x[i] = -simt::kInfinity;", "if (place_of<Traits>(i) == hidden) x[i] += 0.f;"),
        ("the mask token is sampled", "if (score > best && id != p.mask_token_id)", "if (score > best)"),
        ("parts are added without their scale", "parts[i].sum * exp(static_cast<double>(own - max))", "parts[i].sum"),
        ("what one part cannot use is forgotten", "all.bad = all.bad || parts[i].bad;", ""),
        ("the threshold is not strict", "candidate && confidence > threshold", "candidate && confidence >= threshold"),
        ("of equal confidences the lower position", "(other == own && j > l)", "(other == own && j < l)"),
        ("the quota is rounded down", "(masked - 1) / steps_left + 1", "masked / steps_left"),
        ("no barrier between prediction and choice", "predict_row<T, kThreads>(p, b, parts);\n  simt::block_sync();", "predict_row<T, kThreads>(p, b, parts);"),
        ("the step of the batch's first row", "p.step.at<const int64_t>()[b]", "p.step.at<const int64_t>()[0]"),
        ("noise of another position", "position(static_cast<uint32_t>(at.l))", "position(static_cast<uint32_t>(at.b))"),
        ("counts share their partial sums", "block_reduce<kThreads>(usable, counts + kThreads / simt::kWarp, add)", "block_reduce<kThreads>(usable, counts, add)"),
        ("a rejected position keeps its prediction", "if (!taken) p.new_block", "if (false) p.new_block"),
    ),
    *planted(
        "kernels/commit_filter.cuh", "denoise_commit", "kernels kernels_commit", "denoise_commit and filter",
        ("one token too many stays", "if (tokens.place(score, id) < cut) return;", "if (tokens.place(score, id) + 1 < cut) return;"),
        ("of equal logits the highest ids stay", "((uint64_t{1} << id_bits) - 1 - id)", "static_cast<uint64_t>(id)"),
        ("no barrier after the histogram is cleared", "shared.histogram[bin] = 0;\n    simt::block_sync();", "shared.histogram[bin] = 0;"),
        ("no barrier before the histogram is read", "tally.flush();\n    simt::block_sync();", "tally.flush();"),
        ("the last run of a thread is not counted", "    tally.flush();\n    simt::block_sync();", "    simt::block_sync();"),
        ("top-p is taken of all tokens, not of top-k's", "if (place >= cut && place >> unknown", "if (place >> unknown"),
        ("warps before are not counted", "if (w == simt::warp()) upto += total;", ""),
    ),
    *planted(
        "kernels/rank.cuh", "denoise_commit moe_route", "kernels kernels_commit kernels_moe", "denoise_commit or moe_route",
        ("negative numbers rank upside down", "bits & kSign ? ~bits : bits | kSign", "bits & kSign ? bits : bits | kSign"),
        ("of equal ranks the higher id", "<< 32 | ~id;", "<< 32 | id;"),
    ),
)  # fmt: skip

ROUTE = planted(
    "kernels/route.cuh", "moe_route", "kernels kernels_moe", "moe_route",
    ("no barrier before a stage is overwritten", "simt::block_sync();  // the stage before has been read\n", ""),
    ("no barrier before a stage is read", "weight.put(shared->weight);\n    simt::block_sync();", "weight.put(shared->weight);"),
    ("a stage's tail holds what follows in memory", "items[i] = left > 0 ? simt::load", "items[i] = inside ? simt::load"),
    ("experts beyond the last are stored", "if (t < p.T && e < p.E) logits", "if (t < p.T && e <= p.E) logits"),
    ("the bias weighs", "static_cast<float>(p.scaling) * score /", "static_cast<float>(p.scaling) * (score + p.correction_bias.at<const float>()[expert]) /"),
    ("the same expert is chosen again", "if (rank < last) best", "if (rank <= last) best"),
    ("a lane's slot counts itself", "simt::population_count(all & (own - 1));", "simt::population_count(all & (own - 1 + own));"),
    ("parts of logits beyond the last are added", "s + j < splits && first", "s + j <= splits && first"),
    ("experts beyond the last are scored", "ranks[i] = e < p.E ?", "ranks[i] = e <= p.E ?"),
    ("a lane's second expert is its first", "ranked(scores[i] + p.correction_bias", "ranked(scores[0] + p.correction_bias"),
    ("of many experts the last ones are left out", "e - simt::lane() < p.E; e += simt::kWarp", "e - simt::lane() < p.E - simt::kWarp; e += simt::kWarp"),
)  # fmt: skip

SORT = planted(
    "kernels/moe_sort.cuh", "moe_experts", "kernels kernels_moe", "moe_experts",
    ("no barrier before pairs are counted", "s.pairs_of[e] = 0;\n  simt::block_sync();", "s.pairs_of[e] = 0;"),
    ("no barrier before the warps' hits are read", "s.hits[simt::warp()] = hits;\n  simt::block_sync();", "s.hits[simt::warp()] = hits;"),
    ("earlier warps' hits are not counted", "for (int w = 0; w < simt::warp(); ++w) row += s.hits[w];", ""),
    ("a lane counts itself", "bits & ((1u << simt::lane()) - 1)", "bits & ((2u << simt::lane()) - 1)"),
    ("counters are not zeroed", "pass.up_ready[expert] = 0;", ""),
    ("ids out of range are taken", "return id >= 0 && id < p.E ?", "return id >= 0 && id <= p.E ?"),
    ("the slot is taken for the token", "pass.token_of[at] = pair / static_cast<int>(p.k);", "pass.token_of[at] = pair % static_cast<int>(p.k);"),
    ("strided ids of the first pass are sorted again", "(pass.first + pair / k) * p.expert_ids.stride[0]", "(pair / k) * p.expert_ids.stride[0]"),
    ("ids are read as if they stood close together", "if (p.expert_ids.stride[0] != k) at", "if (p.expert_ids.stride[0] < k) at"),
)  # fmt: skip

MOE = (
    *planted(
        "kernels/moe.cuh", "moe_experts", "kernels kernels_moe", "moe_experts",
        ("the wait for a step's copies is too weak", "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
        ("no barrier after the wait for a step", "simt::block_sync();  // the step's data is there", "// the step's data is there"),
        ("the stage that is read is refilled", "stages[stage == 0 ? kStages - 1 : stage - 1]", "stages[stage]"),
        ("an item is signalled before all have stored it", "simt::block_sync();\n      if (simt::thread_index() == 0) simt::signal", "if (simt::thread_index() == 0) simt::signal"),
        ("no barrier before the next item's stages are filled", "simt::block_sync();  // the next item is known", "// the next item is known"),
        ("no barrier between the products", "simt::block_sync();  // all are done with the shared memory", ""),
        ("an item does not wait for its expert", "if (item.expert >= 0) product.wait(item);", ""),
        ("the sums do not wait for the products", "if (simt::thread_index() == 0) down.wait_for_all();", ""),
        ("accumulators are not cleared", "acc.zero();", "if (source.steps == 0) acc.zero();"),
        ("the scratch is a stage in use", "stages[kStages - 1].weights.data", "stages[0].weights.data"),
        ("the last stage but one is never filled", "for (int s = 0; s < Traits::kStages - 1; ++s)", "for (int s = 0; s < Traits::kStages - 2; ++s)"),
        ("item numbers repeat between blocks", "simt::block_count() + simt::shuffle(taken, 0)", "simt::shuffle(taken, 0)"),
    ),
    *planted(
        "kernels/moe.cuh", "moe_experts", "kernels_moe_mma", "each_tile or filling",
        ("a row of weights has no slice", "if (i % kSlices == slice)", "if (i > 0 && i % kSlices == slice)"),
        ("a step with fewer columns is copied in slices", "(step + 1) * Traits::kColumns <= columns", "step * Traits::kColumns < columns"),
        ("slices are no group of their own", "i); });\n        simt::cp_async_commit();", "i); });"),
    ),
    *planted(
        "kernels/moe_combine.cuh", "moe_experts", "kernels kernels_moe", "moe_experts",
        ("the last slot is left out", "first + s < k ? rows[s] : kNoRow", "first + s + 1 < k ? rows[s] : kNoRow"),
        ("the shared expert's row of another token", "load(pass.pairs + token, column)", "load(pass.pairs, column)"),
        ("weights of the pass's first token", "p.expert_weights.at<const float>(pass.first + token)", "p.expert_weights.at<const float>(pass.first)"),
    ),
    *planted(
        "kernels/moe_products.cuh", "moe_experts", "kernels kernels_moe kernels_large", "moe_experts",
        ("negative numbers are squared, too", "v < 0.f ? 0.f : v * v;", "v * v;"),
        ("gate and value are exchanged", "silu(gate) * value", "silu(value) * gate"),
        ("the wait for an expert misses one item", "this->up_weight_tiles(item.expert) * this->token_tiles(item.expert))", "this->up_weight_tiles(item.expert) * this->token_tiles(item.expert) - 1)"),
        ("the wait for all misses one item", "(pass.tiles[p.E] + this->token_tiles(this->shared_expert())));", "(pass.tiles[p.E] + this->token_tiles(this->shared_expert())) - 1);"),
        ("an expert's last tile of tokens is full", "left < Traits::kTokens ? left : Traits::kTokens;", "Traits::kTokens;"),
        ("an expert's up beyond 32 bits", "p.up.template at<const T>(item.expert, 0)", "(static_cast<const T*>(p.up.data) + int32_t(item.expert) * int32_t(p.up.stride[0]))"),
        ("an expert's weights beyond 32 bits", "p.down.template at<const T>(item.expert, 0)", "(static_cast<const T*>(p.down.data) + int32_t(item.expert) * int32_t(p.down.stride[0]))"),
    ),
)  # fmt: skip

LARGE = (
    *planted(
        "kernels/norm.cuh", "rms_norm", "kernels_large", "rms_norm",
        ("a row's offset in 32 bits", "p.x.at<const T>(b, l) + i);\n  if (!p.delta) return h;", "static_cast<const T*>(p.x.data) + int32_t(b * p.x.stride[0] + l * p.x.stride[1]) + i);\n  if (!p.delta) return h;"),
    ),
    *planted(
        "kernels/commit.cuh", "denoise_commit", "kernels_large", "denoise_commit",
        ("a position's offset in 32 bits", "const T* row = p.logits.at<const T>(at.b, at.l);", "const T* row = static_cast<const T*>(p.logits.data) + int32_t(at.b * p.logits.stride[0] + at.l * p.logits.stride[1]);"),
    ),
)  # fmt: skip

STREAMED = (
    *planted(
        "kernels/moe_stream.cuh", "moe_experts", "kernels_moe_sm90", "",
        ("streamed: the barriers are not published", "simt::publish_barriers();", ""),
        ("streamed: one warp gives a stage back", "smem.empty[i].init(Traits::kConsumers / simt::kWarp);", "smem.empty[i].init(1);"),
        ("streamed: a stage wants an arrival more", "smem.full[i].init(1 + simt::kWarp);", "smem.full[i].init(2 + simt::kWarp);"),
        ("streamed: a stage is full when its weights are there", "smem.full[i].init(1 + simt::kWarp);", "smem.full[i].init(1);"),
        ("streamed: a stage is read before it is filled", "smem.full[ring.stage].wait(ring.parity);\n    simt::fence_products();", "simt::fence_products();"),
        ("streamed: products of rows without a fence", "simt::fence_products();", ""),
        ("streamed: a stage is given back unread", "if (step > 0) give_back(smem, last);\n    last = ring.stage;", "give_back(smem, ring.stage);"),
        ("streamed: no wait for the step before", "simt::wgmma_wait<1>(d[0]);", ""),
        ("streamed: no wait for the last step", "for (int b = 0; b < Traits::kBlocks; ++b) simt::wgmma_wait<0>(d[b]);", "for (int b = 0; b < 0; ++b) simt::wgmma_wait<0>(d[b]);"),
        ("streamed: the last stage is never given back", "if (steps > 0) give_back(smem, last);", ""),
        ("streamed: an item is signalled when one warp has stored it", "smem.stored[i].init(Traits::kConsumers / simt::kWarp);", "smem.stored[i].init(1);"),
        ("streamed: a warp's first lane has stored for all", "simt::warp_sync();  // all of the warp's part is stored", "// all of the warp's part is stored"),
        ("streamed: an item is signalled before it is stored", "smem.stored[finished.stage].wait(finished.parity);\n    const", "const"),
        ("streamed: finished items are overwritten", "smem.signalled[finished.stage].wait(finished.parity ^ 1);", ""),
        ("streamed: finished items are never taken", "smem.signalled[finished.stage].arrive();", ""),
        ("streamed: no barrier before the sums", "queue.wait_for_all();\n    simt::warpgroup_sync();", "queue.wait_for_all();"),
        ("streamed: one warpgroup waits before the sums", "if (simt::thread_index() % simt::kWarpgroup == 0) queue.wait_for_all();", "if (simt::thread_index() == 0) queue.wait_for_all();"),
        ("streamed: every product takes the first 16 columns", "tokens + 32 * k)", "tokens)"),
        ("streamed: sums go on from the item before", "d[b][i] = 0.f;", "d[b][i] += 0.f;"),
        ("streamed: both warpgroups take the first rows", "warpgroup() * Traits::kBlocks * kBlockBytes;", "0 * kBlockBytes;"),
        ("streamed: a warpgroup's second 64 rows are its first", "weights + b * kBlockBytes + 32 * k", "weights + 32 * k"),
        ("streamed: a warpgroup's second 64 rows are stored as its first", "(warpgroup() * Traits::kBlocks + b) * 64", "warpgroup() * Traits::kBlocks * 64"),
        ("streamed: a warpgroup without rows keeps its stages", "give_back(smem, ring.stage);\n  }", "}"),
        ("streamed: a warpgroup with a few rows has none", "queue.rows_left(item) <= warpgroup() * Traits::kBlocks * 64)", "queue.rows_left(item) < (warpgroup() + 1) * Traits::kBlocks * 64)"),
        ("streamed: a product of fewer columns", "if (item.at.count <= kNarrower)", "if (item.at.count <= kNarrower + 1)"),
        ("streamed: a token beyond the item is stored", "if (token + t >= item.count) continue;", "if (token + t > item.count) continue;"),
        ("streamed: h of a token beyond the item is stored", "product_column(j) + odd < item.count", "product_column(j) + odd <= item.count"),
        ("streamed: lanes exchange what they keep", "simt::shuffle_xor(odd ? v[0] : v[1], 4)", "simt::shuffle_xor(odd ? v[1] : v[0], 4)"),
        ("streamed: rows beyond the expert are stored", "if (stored && output + 8 * group < width)", "if (stored && output < width)"),
    ),
    *planted(
        "kernels/moe_stream_copy.cuh", "moe_experts", "kernels_moe_sm90", "",
        ("streamed: a stage is filled while it is read", "smem.empty[ring.stage].wait(ring.parity ^ 1);\n    if (simt::lane() == 0) {\n      if (column", "if (simt::lane() == 0) {\n      if (column"),
        ("streamed: the first stages are waited for", "smem.empty[ring.stage].wait(ring.parity ^ 1);\n    if (simt::lane() == 0) {\n      if (column", "smem.empty[ring.stage].wait(ring.parity);\n    if (simt::lane() == 0) {\n      if (column"),
        ("streamed: half of the weights' bytes are expected", "full.arrive_expecting(sizeof tile);", "full.arrive_expecting(sizeof tile / 2);"),
        ("streamed: the ring's second lap is its first", "parity ^= 1;\n", ""),
        ("streamed: an item is written down one stage late", "if (column == 0) smem.items", "if (column == Traits::kColumns) smem.items"),
        ("streamed: item numbers repeat between blocks", "simt::block_count() + simt::shuffle(taken, 0)", "simt::shuffle(taken, 0)"),
        ("streamed: the shared expert reads the others' rows", "(in_order ? row : queue.pass.token_of[at.row + row])", "queue.pass.token_of[in_order ? row : at.row + row]"),
        ("streamed: the shared expert's second tile is its first", "from += (at.row - queue.pass.pairs) * stride * 16;", "from += 0;"),
        ("streamed: every step copies the first columns of tokens", "from += Traits::kColumns * sizeof(T);", ""),
        ("streamed: columns behind the last are copied", "* Tile::kChunk < left ? 16 : 0", "* Tile::kChunk <= left ? 16 : 0"),
        ("streamed: chunks of every second four rows are not permuted", "tile.chunk(row + kAtOnce, chunk)", "tile.chunk(row, chunk) + kAtOnce * Traits::kColumns"),
        ("streamed: the last 8 rows are not copied", "% 32 == 0) && i * kAtOnce >= count) break;", "% 32 == 0) && i * kAtOnce + 8 >= count) break;"),
        ("streamed: lanes do not know of the h that the first has waited for", "simt::warp_sync();  // what the first lane has waited for", "// what the first lane has waited for"),
        ("streamed: rows behind the item's are those before it", "mine = (present - first + kAtOnce - 1) / kAtOnce;", "mine = (present - first) / kAtOnce;"),
        ("streamed: every lane copies the first chunk", "from += simt::lane() % Tile::kChunks * 16;", ""),
        ("streamed: gate rows of other groups", "grouped ? output / 8 : 0", "grouped ? output / 16 : 0"),
        ("streamed: weights that run ahead pass the ring's end", "column < Traits::kStages * kStep", "column <= Traits::kStages * kStep"),
        ("streamed: weights that ran ahead have no tokens", "for (int from = 0; from < column; from += kStep) tokens(from);", ""),
        ("streamed: tokens do not wait for h", "if (simt::lane() == 0) queue.wait(item);", ""),
        ("streamed: a stage is full before its rows have landed", "smem.full[behind.stage].arrive_when_copied();", "smem.full[behind.stage].arrive();"),
    ),
    *planted(
        "kernels/moe_stream_queue.cuh", "moe_experts", "kernels_moe_sm90", "",
        ("streamed: no wait for h", "simt::wait_for(pass.up_ready + item.at.expert, ups_of(item.at.expert));", ""),
        ("streamed: the wait for h misses one item", "return up_tiles(expert) * this->token_tiles(expert);", "return up_tiles(expert) * this->token_tiles(expert) - 1;"),
        ("streamed: the wait for all misses one item", "down_tiles() * tiles());", "down_tiles() * tiles() - 1);"),
        ("streamed: 16 columns are taken for 17 tokens", "count <= 16 ? 16 : ceil_div(count, 32) * 32", "count <= 17 ? 16 : ceil_div(count, 32) * 32"),
        ("streamed: rows of another product are left", "if (item.down) return static_cast<int>(p.D) - item.at.output;", ""),
        ("streamed: half of a gated expert's rows are left", "* (this->gated() ? 2 : 1);", "* 1;"),
        ("streamed: h is always there", "return !item.down || all ||", "return true ||"),
        ("streamed: all h is there when one item is missing", "has_reached(ups_ready(), ups());", "has_reached(ups_ready(), ups() - 1);"),
        ("streamed: the expert after the right one", "pass.tiles[middle] <= tile ?", "pass.tiles[middle] < tile ?"),
    ),
    *planted(
        "kernels/moe_stream.cuh", "moe_experts", "kernels_moe_sm90", "float16 and not bfloat16",
        ("streamed: float16's second numbers are left out", "kFirst * d[i] + kSecond * d[i + 1];", "kFirst * d[i];"),
        ("streamed: float16's first number overflows", "scaled * scaled > kLargest * kLargest ? largest : scaled", "scaled"),
    ),
    *planted(
        "kernels/moe_stream_copy.cuh", "moe_experts", "kernels_moe_sm90", "float16 and not bfloat16",
        ("streamed: float16's numbers of another token", "hidden_row(at.expert, at.row));", "hidden_row(at.expert, at.row)) + stride;"),
        ("streamed: half of float16's numbers are copied", "count = product_width(at.count) * numbers;", "count = product_width(at.count);"),
    ),
    *planted(
        "kernels/moe_stream.cu", "moe_experts", "kernels_moe_sm90", "",
        ("streamed: rows of x that are not aligned are read in place", "if (aligned<T>(p.x) && stride", "if (stride"),
        ("streamed: the call's first tokens are read again", "return {p.x.at<T>(pass.first),", "return {p.x.at<T>(0),"),
        ("streamed: the call's first tokens are aligned again", "p, pass.first,\n", "p, int64_t{0},\n"),
    ),
    *planted(
        "kernels/moe_maps.h", "moe_experts", "kernels_moe_sm90", "",
        ("streamed: half of the rows of weights are copied", "{64, Traits::kRows, 1, 1, 1}", "{64, Traits::kRows / 2, 1, 1, 1}"),
        ("streamed: gate rows stand in pairs of groups", "{64, 8, 2, Traits::kRows / 16, 1}", "{64, 8, 1, Traits::kRows / 8, 1}"),
    ),
)  # fmt: skip

MUTATIONS = (*NORM, *TILE, *COMMIT, *ROUTE, *SORT, *MOE, *STREAMED, *LARGE, *LAYERS)
