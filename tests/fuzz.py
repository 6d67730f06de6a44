"""Random calls of every op against float64: `python tests/fuzz.py --calls 200`, for each op and dtype.

An op may miss the float64 result by twice what the same computation in torch at that dtype misses it by, plus four
units in the last place of the largest value; where an unlucky call needs it, plus what rounding of the arguments moves
it by. Decisions (ids, tokens) have to be those of float64, but where a change of the inputs by one part in a million
changes them, too. Each call is also made with its first batch row alone, which has to have the same bits. A failure is
repeated by --op, --dtype and --seed; --json keeps the report.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, Draw
from torch import Tensor
from tqdm import tqdm
from twotower_ext.benchmarks.peers.moe import expert_loop

from twotower_ext._samples import Sample
from twotower_ext.registry import OPS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What rounds in the same places as the op; else the reference, in the call's dtype.
IN_TORCH = {"moe_experts": expert_loop}
FACTOR, UNITS = 2.0, 4


def converted(sample: Sample, change: Any) -> Sample:
    def of(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return Sample(sample.name, tuple(map(of, sample.args)), {k: of(v) for k, v in sample.kwargs.items()})


def results(function: Any, sample: Sample) -> list[Tensor | None]:
    found = function(*sample.args, **sample.kwargs)
    return list(found) if isinstance(found, tuple) else [found]


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest distance; infinite where one is not finite and the other is, or is it otherwise."""
    same = (actual.double() == exact) | (actual.isnan() & exact.isnan())
    return (actual.double() - exact).abs().masked_fill(same, 0).nan_to_num(torch.inf, torch.inf).max().item()


def mismatch(name: str, sample: Sample) -> str | None:
    """What is wrong with the op's results for these arguments; None: nothing."""
    row = OPS[name]
    exact = results(row.reference, converted(sample, Tensor.double))
    ours = results(row.op, sample)
    theirs = results(IN_TORCH.get(name, row.reference), sample)
    for i, (a, e, t) in enumerate(zip(ours, exact, theirs, strict=True)):
        if (a is None) != (e is None):
            return f"result {i} is {'absent' if a is None else 'there'}"
        if a is None:
            continue
        if a.shape != e.shape:
            return f"result {i}: {tuple(a.shape)}, expected {tuple(e.shape)}"
        if a.numel() == 0:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, e) and not is_a_tie(name, sample, exact):
                return f"result {i}: {int((a != e).sum())} of {a.numel()} decisions differ"
            continue
        if any(x is not None and not x.is_floating_point() and not torch.equal(x, y)
               for x, y in zip(ours, exact, strict=True)):  # fmt: skip
            continue  # of another decision, at a tie
        finite = e[e.isfinite()]
        units = UNITS * torch.finfo(a.dtype).eps * (finite.abs().max().item() if finite.numel() else 1.0)
        allowed = FACTOR * error(t, e) + max(units, torch.finfo(a.dtype).tiny)
        if (missed := error(a, e)) > allowed and missed > allowed + FACTOR * sensitivity(name, sample, e, i):
            return f"result {i}: error {missed:.3g}, allowed {allowed:.3g}"
    return alone(name, sample, ours)


def sensitivity(name: str, sample: Sample, exact: Tensor, index: int) -> float:
    """What half a unit in the last place of the arguments moves the float64 result by: how lucky torch may be."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:
        half = 0.5 * torch.finfo(t.dtype).eps
        return t.double() * (1 + half * (2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1))

    others = (results(OPS[name].reference, converted(sample, moved))[index] for _ in range(8))
    return max(error(o, exact) for o in others if o is not None)


def is_a_tie(name: str, sample: Sample, exact: list[Tensor | None]) -> bool:
    """Whether float64 decides otherwise a millionth away, where rounding may take the inputs."""
    for factor in (1 - 1e-6, 1 + 1e-6):
        first = sample.args[0].double() * factor
        moved = converted(sample, Tensor.double)
        other = results(OPS[name].reference, Sample("", (first, *moved.args[1:]), moved.kwargs))
        if any(o is not None and not o.is_floating_point() and not torch.equal(o, e)
               for o, e in zip(other, exact, strict=True)):  # fmt: skip
            return True
    logits = sample.args[0].double()
    if name == "lm_head_commit":
        logits = logits @ sample.args[1].double().T
    top = logits.topk(2, dim=-1).values if name.endswith("commit") and logits.shape[-1] > 1 else None
    return top is not None and top.numel() > 0 and (top[..., 0] - top[..., 1]).min().item() < 1e-5


def alone(name: str, sample: Sample, ours: list[Tensor | None]) -> str | None:
    """The first row of the batch alone against the same row among the others, bit for bit."""
    row = OPS[name]
    names = [a for a in row.op.__annotations__ if a != "return"]
    tensors = dict(zip(names, sample.args, strict=False)) | sample.kwargs
    anchor = tensors[names[0]]
    if not row.batched or anchor.shape[0] < 2:
        return None
    cut = {k: v[:1] if k in row.batched and isinstance(v, Tensor) else v for k, v in tensors.items()}
    for i, (one, many) in enumerate(zip(results(row.op, Sample("", (), cut)), ours, strict=True)):
        if one is not None and many is not None and not torch.equal(one.nan_to_num(), many[:1].nan_to_num()):
            return f"result {i}: the first row alone has other bits"
    return None


def run(ops: list[str], dtypes: list[str], first: int, calls: int) -> dict[str, Any]:
    """op -> dtype -> calls, mismatches with their seeds, and exceptions."""
    report: dict[str, Any] = {}
    with torch.no_grad(), tqdm(total=len(ops) * len(dtypes) * calls, disable=None) as progress:
        for op in ops:
            for dtype in dtypes:
                failures = []
                for seed in range(first, first + calls):
                    try:
                        wrong = mismatch(op, SHAPES[op](Draw(seed, DTYPES[dtype])))
                    except Exception as problem:  # of whatever kind: that is what is looked for
                        wrong = f"{type(problem).__name__}: {problem}"
                    if wrong:
                        failures.append({"seed": seed, "what": wrong})
                    progress.update()
                report.setdefault(op, {})[dtype] = {"calls": calls, "failures": failures}
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="for each op and dtype (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--op", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--json", type=Path, help="where to keep the report")
    options = parser.parse_args()
    started = time.monotonic()
    report = run(options.op, options.dtype, options.seed, options.calls)
    failures = [(op, d, f) for op, dtypes in report.items() for d, found in dtypes.items() for f in found["failures"]]
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "ops": report}, indent=1) + "\n")
    for op, dtype, failure in failures[:40]:
        print(f"{op}, {dtype}, seed {failure['seed']}: {failure['what']}")
    total = len(options.op) * len(options.dtype) * options.calls
    print(f"{total} calls, {len(failures)} mismatches, {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
