"""Floors: the least time a forward of a model can take on a machine, kernel by kernel.

A kernel is reduced to the FLOPs it computes and the bytes it reads and writes. Its floor is the larger of FLOPs over
the matmul ceiling and bytes over the bandwidth ceiling. Counted once: every weight that is touched, every activation
that enters or leaves a kernel. Not counted: launches, cache hits, padding of tiles.

`python -m twotower_ext.benchmarks.roofline` prints the tables, for any model and any machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .dimensions import MID, REAL, SHAPES, Dimensions

__all__ = ["H200", "MID", "REAL", "SHAPES", "Dimensions", "Kernel", "Machine", "diffusion_over_ar", "forward", "total"]

FLOAT32 = 4  # bytes; router weights, Mamba states
CHUNK = 128  # rows that a long scan handles at a time; fixes its FLOPs
MODES = ("denoise", "extend", "ar", "prefill")
TOKENS_PER_NFE = (1.5, 2.0, 2.5, 3.33, 4.0, 6.0, 8.0)
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
MIXED = 0.1  # writes above this share of the reads make a kernel's traffic mixed


@dataclass(frozen=True)
class Machine:
    """Ceilings: a streaming read and a copy (reads and writes both counted) in bytes/s, a matmul in FLOP/s."""

    read: float
    copy: float
    matmul: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive finite number, got {value}")

    def memory_seconds(self, read: float, written: float) -> float:
        """The least time for this traffic, in bytes. Writes of up to a tenth of the reads count as hidden by them."""
        return (read + written) / self.copy if written > MIXED * read else read / self.read

    def floor(self, flops: float, read: float, written: float) -> float:
        """The least time in seconds for a kernel of these FLOPs and bytes."""
        return max(flops / self.matmul, self.memory_seconds(read, written))

    def bound(self, flops: float, read: float, written: float) -> str:
        """What sets the floor: "memory" or "compute"."""
        return "compute" if flops / self.matmul > self.memory_seconds(read, written) else "memory"

    @classmethod
    def from_results(cls, data: dict[str, Any], dtype: str, threads: int | None = None) -> Machine:
        """The ceilings in a results file; on a CPU those of `threads`, by default of the file's own setting."""
        ceilings = data["ceilings"]
        key = str(threads or data["settings"]["threads"])
        try:
            return cls(ceilings["read"][key], ceilings["copy"][key], ceilings[f"matmul_{dtype}"][key])
        except KeyError as error:
            raise ValueError(f"the results hold no ceiling {error} for {key} threads and {dtype}") from None


H200 = Machine(read=4.6e12, copy=4.3e12, matmul=790e12)  # bfloat16, measured through torch; read estimated


@dataclass(frozen=True)
class Kernel:
    """One launch of a kernel: FLOPs and bytes; `launches` of it make a forward."""

    name: str
    launches: int
    flops: float
    read: float
    written: float

    def floor(self, machine: Machine) -> float:
        """Seconds of one launch."""
        return machine.floor(self.flops, self.read, self.written)

    def bound(self, machine: Machine) -> str:
        return machine.bound(self.flops, self.read, self.written)


def forward(
    dimensions: Dimensions,
    mode: str,
    batch: int = 1,
    rows: int | None = None,
    context: int = 2048,
    experts_hit: float | None = None,
    itemsize: int = 2,
) -> list[Kernel]:
    """The kernels of one forward of `batch` sequences of `rows` tokens each.

    mode: "denoise" (the denoiser on a block), "extend" (the context tower reads the block), "ar" (one token), "prefill"
    (a prompt; no context, no head). rows: by default the block size, 1 for "ar". context: cached tokens a sequence.
    experts_hit: distinct experts a layer, by default those of uniform routing. itemsize: bytes of a weight and of an
    activation.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    rows = rows if rows is not None else (1 if mode == "ar" else dimensions.block)
    for name, value, least in (("batch", batch, 1), ("rows", rows, 1), ("context", context, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if mode == "prefill":
        context = 0
    kernels = [
        *_moe(dimensions, batch * rows, experts_hit, itemsize),
        *_mamba(dimensions, mode, batch, rows, itemsize),
        *_attention(dimensions, mode, batch, rows, context, itemsize),
        _norms(dimensions, batch * rows, itemsize),
    ]
    if mode in ("denoise", "ar"):
        kernels.append(_head(dimensions, batch * rows, itemsize))
    return [kernel for kernel in kernels if kernel.launches]


def total(kernels: list[Kernel], machine: Machine) -> float:
    """The floor of a forward in seconds: its kernels, one after another."""
    return sum(kernel.launches * kernel.floor(machine) for kernel in kernels)


def diffusion_over_ar(
    dimensions: Dimensions, machine: Machine, tokens_per_nfe: float, batch: int = 1, **options: Any
) -> float:
    """How many times faster a block is made by diffusion than token by token, every kernel at its floor.

    The block takes block / tokens_per_nfe denoiser forwards and one extension, against a forward a token.
    `options` are those of `forward`; `experts_hit` is of the denoiser's routing alone.
    """
    others = {k: v for k, v in options.items() if k != "experts_hit"}
    denoise = total(forward(dimensions, "denoise", batch, **options), machine)
    extend = total(forward(dimensions, "extend", batch, **others), machine)
    token = total(forward(dimensions, "ar", batch, **others), machine)
    return dimensions.block * token / (dimensions.block / tokens_per_nfe * denoise + extend)


def _linear(name: str, launches: int, tokens: int, inner: int, outer: int, size: int) -> Kernel:
    return Kernel(
        name, launches, 2 * tokens * inner * outer, (inner * outer + tokens * inner) * size, tokens * outer * size
    )


def _moe(d: Dimensions, tokens: int, hit: float | None, size: int) -> list[Kernel]:
    """The router's own FLOPs, in float32 and under a hundredth of the experts', are left out."""
    layers = d.pattern.count("E")
    touched = d.experts_hit(tokens) if hit is None else hit
    inner, outer = tokens * d.top_k * d.expert_width * size, tokens * d.hidden * size
    weights = touched * 2 * d.hidden * d.expert_width * size + d.experts * d.hidden * FLOAT32
    flops = tokens * d.top_k * 4 * d.hidden * d.expert_width
    shared_inner = tokens * d.shared_width * size
    return [
        Kernel("routed experts", layers, flops, weights + outer + inner, inner + outer),
        Kernel(
            "shared expert", layers, tokens * 4 * d.hidden * d.shared_width,
            2 * d.hidden * d.shared_width * size + outer + shared_inner, shared_inner + outer,
        ),
    ]  # fmt: skip


def _mamba(d: Dimensions, mode: str, batch: int, rows: int, size: int) -> list[Kernel]:
    layers, tokens, chunk = d.pattern.count("M"), batch * rows, min(rows, CHUNK)
    state = batch * d.inner * d.state * FLOAT32
    # Within a chunk C·Bᵀ a group and its product with x; across chunks C·h, and Bᵀ·x where a new state is wanted.
    per_row = 2 * d.groups * chunk * d.state + 2 * d.inner * chunk + 2 * d.inner * d.state
    per_row += 2 * d.inner * d.state if mode != "denoise" else 0
    per_row += 2 * d.conv * d.taps
    return [
        _linear("in_proj", layers, tokens, d.hidden, d.projected, size),
        Kernel(
            "conv, scan, gated norm", layers, tokens * per_row,
            tokens * d.projected * size + (state if mode != "prefill" else 0),
            tokens * d.inner * size + (state if mode != "denoise" else 0),
        ),
        _linear("out_proj", layers, tokens, d.inner, d.hidden, size),
    ]  # fmt: skip


def _attention(d: Dimensions, mode: str, batch: int, rows: int, context: int, size: int) -> list[Kernel]:
    layers, tokens, queries = d.pattern.count("*"), batch * rows, d.query_heads * d.head_dim
    keys = d.kv_heads * d.head_dim
    pairs = batch * rows * (rows + 1) / 2 if mode == "prefill" else tokens * (context + rows)
    return [
        Kernel(
            "attention projections", layers, 2 * tokens * d.attention_weights,
            (d.attention_weights + tokens * (d.hidden + queries)) * size,
            tokens * (queries + 2 * keys + d.hidden) * size,
        ),
        Kernel(
            "attention", layers, 4 * queries * pairs,
            (batch * (context + rows) * 2 * keys + tokens * queries) * size, tokens * queries * size,
        ),
    ]  # fmt: skip


def _norms(d: Dimensions, tokens: int, size: int) -> Kernel:
    """Each reads the stream and the layer's output, and writes the new stream and its norm."""
    moved = 2 * tokens * d.hidden * size
    return Kernel("norm, residual, modulation", len(d.pattern), 10 * tokens * d.hidden, moved, moved)


def _head(d: Dimensions, tokens: int, size: int) -> Kernel:
    """Fused with the commit: 16 bytes a token leave it, no logits."""
    read = (d.vocab * d.hidden + tokens * d.hidden) * size
    return Kernel("head and commit", 1, 2 * tokens * d.vocab * d.hidden, read, 16 * tokens)


def tables(
    dimensions: Dimensions,
    machine: Machine,
    batches: Sequence[int] = (1, 8, 32),
    prompts: Sequence[int] = (2048, 8192),
    context: int = 2048,
    experts_hit: float | None = None,
    itemsize: int = 2,
) -> str:
    """Every kernel of every kind of forward as text, and how diffusion compares with token by token."""
    text = [
        f"{dimensions.parameters() / 1e9:.2f} G parameters, {dimensions.parameters() * itemsize / 2**30:.1f} GiB; "
        f"read {machine.read / 1e9:.4g} GB/s, copy {machine.copy / 1e9:.4g} GB/s, "
        f"matmul {machine.matmul / 1e12:.4g} TFLOP/s; context {context}"
    ]
    options = dict(context=context, itemsize=itemsize)
    for batch in batches:
        for mode in ("denoise", "extend", "ar"):
            hit = experts_hit if mode == "denoise" else None
            kernels = forward(dimensions, mode, batch, experts_hit=hit, **options)
            text.append(_table(f"{mode}, batch {batch}", kernels, machine))
    text += [_table(f"prefill of {n}", forward(dimensions, "prefill", 1, n, **options), machine) for n in prompts]
    lines = ["tokens made by diffusion over token by token, at tokens per denoiser forward of"]
    lines.append(f"{'batch':>7}" + "".join(f"{r:>8}" for r in TOKENS_PER_NFE))
    for batch in batches:
        ratios = [
            diffusion_over_ar(dimensions, machine, r, batch, experts_hit=experts_hit, **options) for r in TOKENS_PER_NFE
        ]
        lines.append(f"{batch:>7}" + "".join(f"{ratio:>8.2f}" for ratio in ratios))
    return "\n\n".join([*text, "\n".join(lines)])


def _table(title: str, kernels: list[Kernel], machine: Machine) -> str:
    lines = [f"{title:<28}{'x':>4}{'GFLOP':>11}{'MB':>11}{'floor, µs':>12}{'all, ms':>11}  bound"]
    for k in kernels:
        floor = k.floor(machine)
        lines.append(
            f"  {k.name:<26}{k.launches:>4}{k.flops / 1e9:>11.3f}{(k.read + k.written) / 1e6:>11.2f}"
            f"{floor * 1e6:>12.2f}{k.launches * floor * 1e3:>11.3f}  {k.bound(machine)}"
        )
    flops = sum(k.launches * k.flops for k in kernels)
    moved = sum(k.launches * (k.read + k.written) for k in kernels)
    lines.append(f"  {'sum':<30}{flops / 1e9:>11.1f}{moved / 1e6:>11.1f}{'':>12}{total(kernels, machine) * 1e3:>11.3f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The tables' command line; returns 0, or 2 for bad input."""
    from twotower.command import guarded

    return guarded("roofline", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    from twotower.command import Parser, integer, number

    from . import results

    parser = Parser(
        prog="python -m twotower_ext.benchmarks.roofline",
        description="The least time that forwards of a model can take on a machine, kernel by kernel.",
    )
    parser.add_argument("--shape", choices=SHAPES, default="real", help="default: %(default)s")
    parser.add_argument("--config", metavar="FILE", type=Path, help="a config.json instead")
    parser.add_argument("--batch", metavar="N", type=integer, nargs="+", default=[1, 8, 32], help="default: 1 8 32")
    parser.add_argument(
        "--prompt", metavar="N", type=integer, nargs="+", default=[2048, 8192], help="tokens to prefill"
    )
    parser.add_argument("--context", metavar="N", type=integer, default=2048, help="cached tokens (default: 2048)")
    parser.add_argument("--experts", metavar="X", type=number, help="distinct experts a layer that a denoise step hits")
    parser.add_argument("--dtype", choices=ITEMSIZES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--results", metavar="FILE", type=Path, help="take the ceilings that the suite measured")
    parser.add_argument(
        "--threads", metavar="N", type=integer, help="those of N threads (default: the run's own number)"
    )
    for name, unit, default in (("read", "GB/s", H200.read / 1e9), ("copy", "GB/s", H200.copy / 1e9)):
        parser.add_argument(f"--{name}", metavar="X", type=number, help=f"{unit} (default: {default:g}, one H200)")
    parser.add_argument("--matmul", metavar="X", type=number, help=f"TFLOP/s (default: {H200.matmul / 1e12:g})")
    options = parser.parse_args(argv)

    machine = H200
    if options.results:
        machine = Machine.from_results(results.load(options.results), options.dtype, options.threads)
    given = {"read": (options.read, 1e9), "copy": (options.copy, 1e9), "matmul": (options.matmul, 1e12)}
    machine = replace(machine, **{name: x * unit for name, (x, unit) in given.items() if x is not None})
    dimensions = Dimensions.from_config(options.config) if options.config else SHAPES[options.shape]
    if options.experts is not None and not 0 < options.experts <= dimensions.experts:
        raise ValueError(f"--experts must be above 0 and at most {dimensions.experts}, got {options.experts:g}")
    print(
        tables(
            dimensions, machine, options.batch, options.prompt, options.context, options.experts,
            ITEMSIZES[options.dtype],
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
