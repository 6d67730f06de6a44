"""The scoreboard: what has been thrown at the package, and what came of it. `make harden` runs all of it.

Writes build/harden.json, and with --write the table of docs/reliability.md. Everything is drawn from --seed; a case
that fails is in the JSON with what repeats it. Malformed calls and checkpoints run in a process of their own, so that a
crash is counted and not suffered.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import torch
from evidence_file import commit
from shapes import SHAPES, Draw
from torch import Tensor
from tqdm import tqdm

from twotower_ext import array
from twotower_ext.registry import OPS

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- scoreboard:begin -->", "<!-- scoreboard:end -->"
Outcome = dict[str, Any]  # tried, failures (texts)

# --- calls that no op may take ---------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda t: t.tolist(),
    "an axis more": lambda t: t[None],
    "int8": lambda t: torch.zeros(t.shape, dtype=torch.int8),
    "complex": lambda t: torch.zeros(t.shape, dtype=torch.complex64),
    "on meta": lambda t: t.to("meta"),
    "a string": lambda t: "tensor",
    "a module": lambda t: torch,
}
NUMBERS = ("12", [1], 2**70, 1j, object())


def malformed(seed: int) -> tuple[str, str, Callable[[], Any]]:
    """(op, what is wrong, the call): one argument of a random call, damaged."""
    r = random.Random(seed)
    name = r.choice(list(SHAPES))
    sample = SHAPES[name](Draw(seed, torch.float32))
    parameters = [p for p in OPS[name].op.__annotations__ if p != "return"]
    arguments = dict(zip(parameters, sample.args, strict=False)) | sample.kwargs
    victim = r.choice([p for p, v in arguments.items() if v is not None])
    if isinstance(arguments[victim], Tensor):
        possible = set(DAMAGES) - ({"on meta"} if victim == parameters[0] else set())  # all on meta is no mistake
        damage = r.choice(sorted(possible))
        arguments[victim] = DAMAGES[damage](arguments[victim])
    else:
        wrong = r.choice([n for n in NUMBERS if not (n == 2**70 and isinstance(arguments[victim], float))])
        damage, arguments[victim] = repr(wrong), wrong
    face = r.choice((OPS[name].op, getattr(array, name)))
    return name, f"{victim} is {damage}", lambda: face(**arguments)


def try_malformed(seed: int) -> str | None:
    """What is wrong with how the call was refused; None: nothing."""
    name, what, call = malformed(seed)
    try:
        call()
    except (TypeError, ValueError) as error:
        return None if str(error).startswith(f"{name}: ") else f"{name}, {what}: does not name the op: {error}"
    except Exception as error:  # any other kind is a finding
        return f"{name}, {what}: {type(error).__name__}: {error}"
    return f"{name}, {what}: was taken"


# --- checkpoints that cannot be loaded -------------------------------------------------------------------------------


UNUSED = "intermediate_size"  # of a kind of layer that the model does not have


def damage_checkpoint(folder: Path, r: random.Random) -> str:
    """Damages the config, the header of the weights or the length of the file; says how."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole = weights.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    how = r.randrange(6)
    if how == 0:
        raw = json.loads(config.read_text())
        sizes = ("_size", "_heads", "_layers", "_experts", "_groups", "head_dim")
        field = r.choice([k for k, v in raw.items() if k.endswith(sizes) and type(v) is int and v > 1 and k != UNUSED])
        raw[field] = r.choice((-1, 0, 10**15, "8", None, 2.5, [raw[field]]))
        config.write_text(json.dumps(raw))
        return f"{field} is {raw[field]!r}"
    if how == 1:
        text = config.read_text()
        cut = r.randrange(len(text) - 2)
        config.write_text(text[:cut])
        return f"config.json ends at {cut}"
    if how == 2:
        cut = r.randrange(len(whole))
        weights.write_bytes(whole[:cut])
        return f"the weights end at byte {cut}"
    if how == 3:
        length = r.choice((0, 1, 2**63, len(whole), end - 9, r.randrange(2**40)))
        weights.write_bytes(length.to_bytes(8, "little") + whole[8:])
        return f"a header of {length} bytes"
    header = bytearray(whole[8:end])
    if how == 4:
        at = r.choice([i for i, c in enumerate(header) if c in b'{}[]":,'])
        header[at] = ord(r.choice("x0 "))
        weights.write_bytes(whole[:8] + bytes(header) + whole[end:])
        return f"byte {at} of the header is {chr(header[at])!r}"
    text = header.decode()
    name = r.choice(sorted(json.loads(text).keys() - {"__metadata__"}))
    fields = json.loads(text)
    fields[name]["data_offsets"][r.randrange(2)] += r.choice((-4, 4, 2**40, -(2**40)))
    changed = json.dumps(fields).encode()
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + whole[end:])
    return f"other offsets of {name}"


def try_checkpoint(seed: int) -> str | None:
    import twotower

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in (ROOT / "tests" / "golden" / "checkpoint").iterdir():
            shutil.copy(path, folder)
        what = damage_checkpoint(folder, random.Random(seed))
        try:
            twotower.load(folder, progress=False)
        except (TypeError, ValueError, OSError) as error:
            return None if name in str(error) else f"{what}: does not name the file: {error}"
        except Exception as error:  # any other kind is a finding
            return f"{what}: {type(error).__name__}: {error}"
    return f"{what}: was loaded"


# --- the same again --------------------------------------------------------------------------------------------------


def repeated(name: str, runs: int) -> str | None:
    """Whether so many runs, with 1, 2 and 3 threads in turn, give the same bits."""
    drawn = (SHAPES[name](Draw(seed, torch.bfloat16)) for seed in range(1000))
    sample = next(s for s in drawn if s.args[0].numel() > 700)
    first, before = None, torch.get_num_threads()
    try:
        for i in range(runs):
            torch.set_num_threads(1 + i % 3)
            found = [None if r is None else r.nan_to_num() for r in fuzz.results(OPS[name].op, sample)]
            first = first or found
            if any(a is not b and not torch.equal(a, b) for a, b in zip(found, first, strict=True)):
                return f"{name}: run {i} differs"
    finally:
        torch.set_num_threads(before)
    return None


def soak(seconds: float) -> Outcome:
    """Generates from the demo model for so long; memory may grow by 16 MiB after the first tenth."""
    import twotower
    from twotower.cli import DEMO

    model = twotower.load(DEMO, progress=False)
    started, calls, base = time.monotonic(), 0, None
    with tqdm(total=round(seconds), unit="s", desc="soak", disable=None) as progress:
        while (spent := time.monotonic() - started) < seconds:
            for mode in ("mask_diffusion", "mock_ar", "ar"):
                prompt = [[5 + (calls * 7 + i) % 90 for i in range(1 + calls % 40)]]
                twotower.generate(model, prompt, mode=mode, max_new_tokens=16 + calls % 33, seed=calls, temperature=0.5)
                calls += 1
            if base is None and spent > seconds / 10:
                base = resident()
            progress.update(round(spent) - progress.n)
    grown = resident() - (resident() if base is None else base)
    failures = [f"grew by {grown >> 20} MiB"] if grown > 16 << 20 else []
    return {"tried": calls, "failures": failures, "seconds": round(seconds), "grown_kib": grown >> 10}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# --- what must not matter --------------------------------------------------------------------------------------------


def try_permutation(seed: int) -> str | None:
    """moe_experts of tokens in another order: the same rows, bit for bit."""
    sample = SHAPES["moe_experts"](Draw(seed, torch.bfloat16))
    order = torch.randperm(sample.args[0].shape[0], generator=torch.Generator().manual_seed(seed))
    y = OPS["moe_experts"].op(*sample.args, **sample.kwargs)
    moved = OPS["moe_experts"].op(*(a[order] for a in sample.args[:3]), *sample.args[3:], **sample.kwargs)
    return None if torch.equal(moved.nan_to_num(), y[order].nan_to_num()) else f"moe_experts, seed {seed}: other bits"


def try_pieces(seed: int) -> str | None:
    """ssd_scan and causal_conv1d in two pieces with the state handed on, and the scan in other chunks."""
    draw = Draw(seed, torch.float32)
    sample = SHAPES["ssd_scan"](draw)
    x, dt, a_log, b, c, d, dt_bias, state = sample.args
    scan, cut = OPS["ssd_scan"].op, draw.random.randint(0, x.shape[1])
    whole = scan(*sample.args, chunk_size=16)
    first = scan(x[:, :cut], dt[:, :cut], a_log, b[:, :cut], c[:, :cut], d, dt_bias, state, chunk_size=16)
    second = scan(x[:, cut:], dt[:, cut:], a_log, b[:, cut:], c[:, cut:], d, dt_bias, first[1], chunk_size=16)
    pieces = torch.cat([first[0], second[0]], 1), second[1]
    for what, found in (("pieces", pieces), ("chunks", scan(*sample.args, chunk_size=draw.size(40, 1)))):
        for got, wanted in zip(found, whole, strict=True):
            scale = wanted.abs().max().item() if wanted.numel() else 0.0
            if not torch.allclose(got, wanted, rtol=2e-5, atol=2e-5 * max(scale, 1)):
                return f"ssd_scan in {what}, seed {seed}"
    sample = SHAPES["causal_conv1d"](draw)
    x, weight, bias, state = sample.args
    cut = draw.random.randint(0, x.shape[1])
    conv = OPS["causal_conv1d"].op
    y, final = conv(*sample.args, **sample.kwargs)
    y1, between = conv(x[:, :cut], weight, bias, state, **sample.kwargs)
    y2, end = conv(x[:, cut:], weight, bias, between, **sample.kwargs)
    same = torch.equal(torch.cat([y1, y2], 1), y) and torch.equal(end, final)
    return None if same else f"causal_conv1d in pieces, seed {seed}"


def try_order(seed: int) -> str | None:
    return try_permutation(seed) or try_pieces(seed)


# --- the board -------------------------------------------------------------------------------------------------------


def in_child(attempt: Callable[[int], str | None], seeds: range, name: str) -> Outcome:
    """Each attempt in a worker that is replaced where it dies."""
    context, failures, left = multiprocessing.get_context("spawn"), [], list(seeds)
    with tqdm(total=len(left), desc=name, disable=None) as progress:
        while left:
            ours, theirs = context.Pipe()
            child = context.Process(target=_attempts, args=(attempt, left, theirs))
            child.start()
            theirs.close()
            try:
                while left:
                    if not ours.poll(120):
                        raise EOFError
                    if wrong := ours.recv():
                        failures.append(f"seed {left[0]}: {wrong}")
                    left.pop(0)
                    progress.update()
            except EOFError:
                child.kill()
                failures.append(f"seed {left.pop(0)}: the process died or hung")
                progress.update()
            child.join()
    return {"tried": len(seeds), "failures": failures}


def _attempts(attempt: Callable[[int], str | None], seeds: list[int], to: Any) -> None:
    for seed in seeds:
        to.send(attempt(seed))


def board(options: argparse.Namespace) -> dict[str, Outcome]:
    first = options.seed
    shapes = fuzz.run(list(SHAPES), list(fuzz.DTYPES), first, options.calls)
    wrong = [
        f"{op}, {dtype}, seed {f['seed']}: {f['what']}"
        for op, dtypes in shapes.items() for dtype, found in dtypes.items() for f in found["failures"]
    ]  # fmt: skip
    names = list(SHAPES)
    return {
        "random shapes": {"tried": options.calls * len(names) * len(fuzz.DTYPES), "failures": wrong},
        "malformed calls": in_child(try_malformed, range(first, first + options.malformed), "malformed calls"),
        "damaged checkpoints": in_child(try_checkpoint, range(first, first + options.checkpoints), "checkpoints"),
        "repeated runs": {
            "tried": options.repeats * len(names),
            "failures": [w for n in tqdm(names, desc="repeats", disable=None) if (w := repeated(n, options.repeats))],
        },
        "order, pieces, chunks": in_child(try_order, range(first, first + options.properties), "properties"),
        "soak": soak(options.soak),
    }


WHAT = {
    "random shapes": "calls of random shapes, strides and settings, each op in float32, bfloat16 and float16, against "
    "float64; the first batch row also alone, bit for bit",
    "malformed calls": "calls with an argument of a wrong type, dtype, rank, device or range, through both faces: each "
    "a TypeError or ValueError that names the op",
    "damaged checkpoints": "checkpoints with a damaged config, header, offset or length: each an error that names the "
    "file",
    "repeated runs": "runs with 1, 2 and 3 threads in turn: the same bits",
    "order, pieces, chunks": "draws of tokens in another order, sequences in two pieces, scans in other chunks: the "
    "same results, bit for bit but for the scan",
    "soak": "generations from the demo model, all modes, one after the other: memory stays flat",
}


def table(found: dict[str, Any]) -> str:
    lines = ["| what | tried | failed |", "|---|---:|---:|"]
    for name, outcome in found["board"].items():
        more = f" ({outcome['seconds']} s, {outcome['grown_kib']} KiB more)" if name == "soak" else ""
        lines.append(f"| {WHAT[name]}{more} | {outcome['tried']:,} | {len(outcome['failures'])} |")
    return "\n".join([*lines, "", f"Commit {found['commit']}, seed {found['seed']}, {found['machine']}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000, help="random shapes an op and dtype")
    parser.add_argument("--malformed", type=int, default=500)
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1000, help="runs an op")
    parser.add_argument("--properties", type=int, default=2000)
    parser.add_argument("--soak", type=float, default=3600, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "harden.json")
    parser.add_argument("--write", action="store_true", help=f"also the table of {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args()
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    found = {"commit": commit(), "seed": options.seed, "machine": machine, "board": board(options)}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    failures = [f"{name}: {text}" for name, o in found["board"].items() for text in o["failures"]]
    print("\n".join(failures[:50]))
    if options.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
