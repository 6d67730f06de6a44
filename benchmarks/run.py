"""The suite's command line: which cases, how long, where the results go, what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from twotower.command import Parser, guarded, integer, number, say

from twotower_ext.registry import OPS

from . import ceilings, plots, results
from .cases import Case, cases, memory_needed
from .peers import ALL, Peer
from .roofline import SHAPES, Dimensions
from .session import Plan, Session
from .suite import QUICK, Effort

DTYPES = ("bfloat16", "float32", "float16")
MINUTES = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite; returns 0, 1 (an op is wrong, or slower than in the file compared with), 2 (bad input), 130."""
    return guarded("benchmarks", lambda: run(argv, "python -m twotower_ext.benchmarks"))


def run(argv: Sequence[str] | None, program: str) -> int:
    """As `main`, but raises ValueError, TypeError, OSError, RuntimeError or ImportError for what it cannot do."""
    options = _parser(program).parse_args(argv)
    _check(options)
    plan = _plan(options)
    if options.list:
        for case in plan.cases:
            print(f"{case.key}  {memory_needed(case) / 2**30:.1f} GiB")
        return 0
    old = results.load(options.compare) if options.compare else None
    if options.plot:
        plots.require()
    with ceilings.using_threads(options.threads):
        session = Session(plan, options.json or results.default_path(plan.backend, plan.quick), options.fresh)
        try:
            session.measure()
            status = session.report(old)
        except KeyboardInterrupt:
            say(f"benchmarks: interrupted; {session.path} holds what is measured, the same command goes on from there")
            raise
    if options.plot:
        for path in plots.draw(session.data, options.plot, session.path.stem):
            print(path)
    return status


def _parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        description="Times every op against this machine's ceilings and against other code; see docs/benchmarking.md.",
    )
    parser.add_argument("--op", nargs="+", metavar="NAME", choices=OPS, help="only these ops (default: all)")
    parser.add_argument("--backend", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--shape", nargs="+", choices=(*SHAPES, "custom"),
        help="layer sizes: of the published model, of one that fits anywhere, of --config (default: real mid)",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", type=Path, help="config.json whose sizes --shape custom takes")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: bfloat16, and float32 for the whole model"
    )  # fmt: skip
    parser.add_argument("--threads", metavar="N", type=integer, help="on the CPU (default: torch's own number)")
    parser.add_argument("--peers", nargs="+", metavar="NAME", default=["all"], help="what to compare with, all or none")
    parser.add_argument(
        "--model", action=argparse.BooleanOptionalAction,
        help="forwards of a whole model of random weights (default: on the CPU, unless --op is given)",
    )  # fmt: skip
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="results (default: benchmarks/results/local-BACKEND.json)"
    )
    folder = plots.DOCS if plots.DOCS.is_dir() else Path()
    parser.add_argument(
        "--plot", nargs="?", metavar="DIR", type=Path, const=folder,
        help="draw pictures (in docs of a source checkout, else in the current folder)",
    )  # fmt: skip
    parser.add_argument("--compare", metavar="OLD.json", type=Path, help="exit with 1 where an op became slower")
    parser.add_argument("--fresh", action="store_true", help="measure again what the results file already holds")
    parser.add_argument("--minutes", metavar="X", type=number, default=MINUTES, help="to share (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a minute or two, for a look: the numbers are rough")
    parser.add_argument("--list", action="store_true", help="print the cases and the memory they need, measure nothing")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Fills defaults that depend on other options; ValueError for what does not go together."""
    if options.shape is None:
        options.shape = ["custom"] if options.config else ["real", "mid"]
    if ("custom" in options.shape) != bool(options.config):
        raise ValueError("--shape custom and --config FILE go together")
    if options.threads is None:
        options.threads = torch.get_num_threads()
    if options.backend == "cuda":
        options.threads = 1  # that launches
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    if not 0 < options.minutes <= 24 * 60:
        raise ValueError(f"--minutes must be above 0 and at most a day, got {options.minutes}")
    if options.backend == "cuda" and not torch.cuda.is_available():
        raise ValueError("--backend cuda: torch finds no usable NVIDIA GPU")
    if options.model and options.backend == "cuda" and not all(row.cuda for row in OPS.values()):
        raise ValueError("--model: not every op has a CUDA kernel yet, so the model runs on the CPU alone")
    if options.model is None:
        options.model = options.op is None and options.backend == "cpu"


def _plan(options: argparse.Namespace) -> Plan:
    dtypes = [getattr(torch, name) for name in dict.fromkeys(options.dtype or ["bfloat16"])]
    shapes = {name: _dimensions(options, name) for name in dict.fromkeys(options.shape)}
    ops = list(dict.fromkeys(options.op)) if options.op else None
    found: list[Case] = [c for name, d in shapes.items() for c in cases(d, name, dtypes, ops, options.backend)]
    return Plan(
        backend=options.backend,
        shapes=shapes,
        dtypes=dtypes,
        cases=found,
        peers=_peers(options.peers),
        model_dtypes=(dtypes if options.dtype else [torch.bfloat16, torch.float32]) if options.model else [],
        threads=options.threads,
        minutes=options.minutes,
        effort=QUICK if options.quick else Effort(),
    )


def _dimensions(options: argparse.Namespace, shape: str) -> Dimensions:
    return Dimensions.from_config(options.config) if shape == "custom" else SHAPES[shape]


def _peers(names: Sequence[str]) -> list[Peer]:
    """All, none, or those of the names given, one by one or with commas between them."""
    if list(names) == ["all"]:
        return list(ALL)
    if list(names) == ["none"]:
        return []
    wanted = [name.strip() for text in names for name in text.split(",") if name.strip()]
    known = {peer.name.lower(): peer for peer in ALL}
    for name in wanted:
        if name.lower() not in known:
            raise ValueError(f"--peers must be all, none or of {', '.join(p.name for p in ALL)}; got {name!r}")
    return [known[name] for name in dict.fromkeys(name.lower() for name in wanted)]
