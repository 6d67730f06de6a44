"""Inputs of the measured calls: for every op, by case, how its rotating samples are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from twotower_ext._samples import Sample

from .dimensions import Dimensions

ROTATED_BYTES = 512 * 2**20
"""What the samples of a case touch together, as far as `MOST_SETS` of them reach: more than any common cache."""

FEWEST_SETS, MOST_SETS = 3, 32

MASK_TOKEN, STEPS, THRESHOLD = 3, 16, 0.8
CONTEXT = 4096  # cached keys that a block attends to
LONG_ATTENTION = 1024  # rows of attention without a context
SHARPNESS = 2.5  # spread of attention's scores: a few keys have most of the weight, and a forgotten one shows


class Numbers:
    """Random tensors on a device, the same at every run; on device "meta" only shapes, but expert ids always exist."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._generator = torch.Generator().manual_seed(2606_26493)
        self._offset = 0

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers of the given standard deviation, in the activation dtype unless another is given."""
        result = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        if self.device != "meta":
            self._offset = fill(result, scale, self._offset)
        return result

    def acc(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the accumulator dtype."""
        return self.normal(*shape, scale=scale, dtype=self.acc_dtype)

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=self.dtype, device=self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform numbers in the accumulator dtype."""
        values = low + (high - low) * torch.rand(shape, generator=self._generator)
        return values.to(self.device, self.acc_dtype)

    def integers(self, low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=self._generator).tolist()

    def distinct_ids(self, high: int, rows: int, count: int) -> Tensor:
        """(rows, count) int32, ascending and distinct in each row."""
        chosen = torch.rand(rows, high, generator=self._generator).argsort(-1)[:, :count]
        return chosen.sort(-1).values.to("cpu" if self.device == "meta" else self.device, torch.int32)

    def popular_ids(self, high: int, rows: int, count: int) -> Tensor:
        """The same, some far more often than others, so that of 128 experts 16 rows with 6 each meet 34, and the most
        popular is met by 12 of them, as traces of the model show."""
        popularity = -2.2 * torch.log(torch.arange(high) + 7.0)[torch.randperm(high, generator=self._generator)]
        noise = -torch.log(-torch.log(torch.rand(rows, high, generator=self._generator)))
        chosen = (popularity + noise).topk(count, dim=-1).indices
        return chosen.sort(-1).values.to("cpu" if self.device == "meta" else self.device, torch.int32)

    def heads(self, rows: int, count: int, width: int, scale: float = 1.0) -> Tensor:
        """(1, count, rows, width) as a projection leaves it: the heads of a row lie side by side."""
        return self.normal(1, rows, count, width, scale=scale).transpose(1, 2)


@cache
def _normal_block(device: str) -> Tensor:
    # A prime length: no row length divides it, so that no two rows of a matrix are equal.
    return torch.randn(16_777_213, generator=torch.Generator().manual_seed(1)).to(device)


def fill(tensor: Tensor, scale: float, offset: int = 0) -> int:
    """Fills a contiguous tensor with normal numbers of standard deviation `scale`; returns the next offset to use.

    All come from one block of numbers, repeated as often as it takes, which is many times faster than drawing them.
    """
    block = _normal_block(str(tensor.device))
    flat = tensor.view(-1)
    done = 0
    while done < flat.numel():
        count = min(flat.numel() - done, block.numel() - offset)
        torch.mul(block[offset : offset + count], scale, out=flat[done : done + count])
        done += count
        offset = (offset + count) % block.numel()
    return offset


def distinct_tensors(samples: Iterable[Sample]) -> list[Tensor]:
    """Every tensor among the arguments once."""
    values = [v for sample in samples for v in (*sample.args, *sample.kwargs.values())]
    return list({id(value): value for value in values if isinstance(value, Tensor)}.values())


Draw = Callable[[Numbers], list[Sample]]


def sets_for(touched: int) -> int:
    """How many samples a call that touches so many bytes gets."""
    return min(max(math.ceil(ROTATED_BYTES / max(touched, 1)), FEWEST_SETS), MOST_SETS)


def _copies(weight_bytes: int, sets: int) -> int:
    """How many copies of a weight rotate over the samples: enough to pass any cache, one where one does so alone."""
    return min(math.ceil(ROTATED_BYTES / weight_bytes), sets)


def _rotate(n: Numbers, elements: int, build: Callable[[int], Sample]) -> list[Sample]:
    """Samples 0, 1, … of a call that touches about so many elements of the activation dtype."""
    return [build(index) for index in range(sets_for(elements * n.dtype.itemsize))]


def _rows(d: Dimensions, shape_name: str, draw: Callable[[int], Draw]) -> dict[str, Draw]:
    """A short case, of a block, and a long one, of a prompt."""
    return {f"rows{rows}": draw(rows) for rows in (d.block, 2048 if shape_name == "real" else 256)}


def _rms_norm(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def draw(rows: int) -> Draw:
        def samples(n: Numbers) -> list[Sample]:
            weight = n.ones(d.hidden)

            def build(index: int) -> Sample:
                modulation = {name: n.normal(1, d.hidden, scale=0.5) for name in ("shift", "scale", "gate")}
                x, delta = n.normal(1, rows, d.hidden), n.normal(1, rows, d.hidden)
                return Sample(str(index), (x, weight), {"modulate": "after", "delta": delta, **modulation})

            return _rotate(n, 4 * rows * d.hidden, build)

        return samples

    return _rows(d, shape_name, draw)


def _gated_group_rms_norm(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def draw(rows: int) -> Draw:
        def samples(n: Numbers) -> list[Sample]:
            weight = n.ones(d.inner)

            def build(index: int) -> Sample:
                y, z = n.normal(1, rows, d.inner), n.normal(1, rows, d.inner)
                return Sample(str(index), (y, z, weight, d.inner // d.groups))

            return _rotate(n, 3 * rows * d.inner, build)

        return samples

    return _rows(d, shape_name, draw)


def _conv_weights(n: Numbers, d: Dimensions) -> tuple[Tensor, Tensor]:
    return n.normal(d.conv, d.taps, scale=d.taps**-0.5), n.normal(d.conv, scale=0.1)


def _causal_conv1d(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def draw(rows: int) -> Draw:
        def samples(n: Numbers) -> list[Sample]:
            weights = _conv_weights(n, d)

            def build(index: int) -> Sample:
                return Sample(str(index), (n.normal(1, rows, d.conv), *weights, n.normal(1, d.conv, d.taps)))

            return _rotate(n, 2 * rows * d.conv, build)

        return samples

    return _rows(d, shape_name, draw)


def decay(n: Numbers, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A_log, D and dt_bias as Mamba-2 starts training: A in [1, 16], steps of 0.001 to 0.1 at a raw dt of 0."""
    step = torch.exp(n.uniform(math.log(1e-3), math.log(1e-1), heads))
    return n.uniform(1, 16, heads).log(), torch.ones_like(step), step.expm1().log()


def _ssm_state(n: Numbers, d: Dimensions) -> Tensor:
    return n.acc(1, d.mamba_heads, d.mamba_head_dim, d.state, scale=0.3)


def _ssd_scan(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def draw(rows: int) -> Draw:
        def samples(n: Numbers) -> list[Sample]:
            A_log, D, dt_bias = decay(n, d.mamba_heads)

            def build(index: int) -> Sample:
                x, dt = n.normal(1, rows, d.mamba_heads, d.mamba_head_dim), n.normal(1, rows, d.mamba_heads)
                B, C = (n.normal(1, rows, d.groups, d.state) for _ in range(2))
                return Sample(str(index), (x, dt, A_log, B, C, D, dt_bias, _ssm_state(n, d)))

            return _rotate(n, 2 * rows * d.inner, build)

        return samples

    return {f"rows{rows}": draw(rows) for rows in ((2048,) if shape_name == "real" else (256, 2048))}


def _mamba_block(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def draw(rows: int, update_state: bool) -> Draw:
        def samples(n: Numbers) -> list[Sample]:
            weights = (*_conv_weights(n, d), *decay(n, d.mamba_heads), n.ones(d.inner))
            sizes = dict(heads=d.mamba_heads, groups=d.groups, state_size=d.state, update_state=update_state)

            def build(index: int) -> Sample:
                states = (n.normal(1, d.conv, d.taps), _ssm_state(n, d))
                return Sample(str(index), (n.normal(1, rows, d.projected), *weights, *states), sizes)

            return _rotate(n, rows * d.projected + 2 * d.inner * d.state, build)

        return samples

    return {f"rows{d.block}": draw(d.block, False), "rows1-update": draw(1, True)}


def _moe_route(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def draw(tokens: int) -> Draw:
        def samples(n: Numbers) -> list[Sample]:
            def build(index: int) -> Sample:
                gate, bias = n.acc(d.experts, d.hidden, scale=d.hidden**-0.5), n.acc(d.experts, scale=0.01)
                return Sample(str(index), (n.normal(tokens, d.hidden), gate, bias, d.top_k, 2.5))

            return _rotate(n, (tokens + 2 * d.experts) * d.hidden, build)

        return samples

    return {f"T{tokens}": draw(tokens) for tokens in (d.block, 128, 2048, 8192)}


def _moe_experts(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    routed, shared = 2 * d.expert_width * d.hidden, 2 * d.shared_width * d.hidden  # elements of one expert

    def pair(n: Numbers, *leading: int, width: int) -> tuple[Tensor, Tensor]:
        up = n.normal(*leading, width, d.hidden, scale=d.hidden**-0.5)
        return up, n.normal(*leading, d.hidden, width, scale=width**-0.5)

    def draw(tokens: int, as_on_traces: bool = False) -> Draw:
        def samples(n: Numbers) -> list[Sample]:
            size = n.dtype.itemsize
            draw_ids = n.popular_ids if as_on_traces else n.distinct_ids
            count = sets_for(int(d.experts_hit(tokens) * routed + shared) * size)
            layers = [
                pair(n, d.experts, width=d.expert_width) for _ in range(_copies(d.experts * routed * size, count))
            ]
            always = [pair(n, width=d.shared_width) for _ in range(_copies(shared * size, count))]

            def build(index: int) -> Sample:
                ids = draw_ids(d.experts, tokens, d.top_k)  # new ones in every sample
                weights = n.uniform(0.5, 1.5, tokens, d.top_k)
                weights = 2.5 * weights / weights.sum(-1, keepdim=True)
                experts = (*layers[index % len(layers)], *always[index % len(always)])
                return Sample(str(index), (n.normal(tokens, d.hidden), ids, weights, *experts))

            return [build(index) for index in range(count)]

        return samples

    uniform = {f"T{tokens}": draw(tokens) for tokens in (1, d.block, 128, 512, 1024, 2048, 8192)}
    return uniform | {f"T{tokens}-traces": draw(tokens, True) for tokens in (d.block, 128, 512, 2048)}


def _block_attention(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def qkv(n: Numbers, rows: int) -> tuple[Tensor, ...]:
        keys = (n.heads(rows, d.kv_heads, d.head_dim) for _ in range(2))
        return n.heads(rows, d.query_heads, d.head_dim, SHARPNESS), *keys

    def over_context(n: Numbers) -> list[Sample]:
        lengths = torch.full((1,), CONTEXT, dtype=torch.int32, device=n.device)

        def build(index: int) -> Sample:
            keys = [n.normal(1, d.kv_heads, CONTEXT, d.head_dim) for _ in range(2)]
            return Sample(str(index), (*qkv(n, d.block), *keys, lengths))

        return _rotate(n, 2 * d.kv_heads * CONTEXT * d.head_dim, build)

    def causal(n: Numbers) -> list[Sample]:
        elements = 2 * (d.query_heads + d.kv_heads) * LONG_ATTENTION * d.head_dim
        return _rotate(n, elements, lambda index: Sample(str(index), qkv(n, LONG_ATTENTION), {"causal": True}))

    return {f"rows{d.block}-context{CONTEXT}": over_context, f"causal{LONG_ATTENTION}": causal}


def _two_stream_attention(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def draw(n: Numbers) -> list[Sample]:
        def build(index: int) -> Sample:
            q = n.heads(LONG_ATTENTION, d.query_heads, d.head_dim, SHARPNESS)
            keys = (n.heads(LONG_ATTENTION, d.kv_heads, d.head_dim) for _ in range(4))
            return Sample(str(index), (q, *keys, d.block))

        return _rotate(n, 2 * (d.query_heads + 2 * d.kv_heads) * LONG_ATTENTION * d.head_dim, build)

    return {f"rows{LONG_ATTENTION}-block{d.block}": draw}


def _peaks(d: Dimensions, coupling: float) -> list[float]:
    """For each row of a block the logit of one token that is the row's most probable, among others of N(0, 1).

    Their probabilities spread over (0, 1), the last quarter above the threshold, and lie so far from one another and
    from the threshold that no rounding to bfloat16 changes a decision. coupling: what the square of this logit adds to
    the variance of the others.
    """
    spacing, below = 0.375, int(0.7 * d.block)
    first = math.log(THRESHOLD / (1 - THRESHOLD)) - spacing * (below + 0.5)
    peaks = []
    for row in range(d.block):
        place = (row + d.block // 2) % d.block  # a permutation in which the last position is not the surest
        log_others = math.log(d.vocab) + 0.5
        for _ in range(10):
            peak = log_others + first + spacing * place
            log_others = math.log(d.vocab) + 0.5 * (1 + coupling * peak**2)
        peaks.append(peak)
    return peaks


def _commit(n: Numbers, d: Dimensions) -> tuple[Tensor, dict[str, float], list[int]]:
    """A block that is all masked, the arguments of its first step, and a token to predict for each position."""
    block = torch.full((1, d.block), MASK_TOKEN, device=n.device)
    settings = dict(step=0, steps=STEPS, threshold=THRESHOLD, mask_token_id=MASK_TOKEN)
    return block, settings, n.integers(MASK_TOKEN + 1, d.vocab, d.block)


def _denoise_commit(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def draw(n: Numbers) -> list[Sample]:
        def build(index: int) -> Sample:
            block, settings, tokens = _commit(n, d)
            logits = n.normal(1, d.block, d.vocab)
            for row, (peak, token) in enumerate(zip(_peaks(d, 0), tokens, strict=True)):
                logits[0, row, token] = peak
            return Sample(str(index), (logits, block), settings)

        return _rotate(n, d.block * d.vocab, build)

    return {f"rows{d.block}": draw}


def _lm_head_commit(d: Dimensions, shape_name: str) -> dict[str, Draw]:
    def draw(n: Numbers) -> list[Sample]:
        size = d.vocab * d.hidden * n.dtype.itemsize
        heads = [n.normal(d.vocab, d.hidden, scale=d.hidden**-0.5) for _ in range(_copies(size, sets_for(size)))]

        def build(index: int) -> Sample:
            block, settings, tokens = _commit(n, d)
            weight = heads[index % len(heads)]
            hidden = n.acc(1, d.block, d.hidden)
            for row, (peak, token) in enumerate(zip(_peaks(d, 1 / d.hidden), tokens, strict=True)):
                direction = weight[token].to(n.acc_dtype)
                hidden[0, row] += (peak - hidden[0, row] @ direction) / (direction @ direction) * direction
            return Sample(str(index), (hidden.to(n.dtype), weight, block), settings)

        return _rotate(n, d.vocab * d.hidden, build)

    return {f"rows{d.block}": draw}


# Of any op: too long for a run on a CPU, or one too many.
GPU_CASES = ("T1024", "T8192", "T2048-traces", "T1024-routed", "T8192-routed")
INPUTS: dict[str, Callable[[Dimensions, str], dict[str, Draw]]] = {
    "rms_norm": _rms_norm,
    "gated_group_rms_norm": _gated_group_rms_norm,
    "causal_conv1d": _causal_conv1d,
    "ssd_scan": _ssd_scan,
    "mamba_block": _mamba_block,
    "moe_route": _moe_route,
    "moe_experts": _moe_experts,
    "block_attention": _block_attention,
    "two_stream_attention": _two_stream_attention,
    "denoise_commit": _denoise_commit,
    "lm_head_commit": _lm_head_commit,
}
"""Op -> function of dimensions and shape name -> case -> how its samples are drawn."""
