"""The command line: `twotower generate`, `train`, `evaluate`, `info`, `doctor` and `bench`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from twotower.command import Parser, guarded, integer, number, one_line, say

MODES = ("mask_diffusion", "mock_ar", "ar")
DTYPES = ("float32", "bfloat16", "float16")
DEMO = Path(__file__).parent / "demo"
"""The checkpoint that comes along."""
SETTINGS = (
    "mode", "max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "temperature", "top_k", "top_p",
    "eos_token_id", "seed",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 1 (something is wrong), 2 (bad input), 130 or 141."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded("twotower", lambda: _run(words))


def _run(words: list[str]) -> int:
    if words[:1] == ["bench"]:  # its options are the suite's own
        from twotower_ext.benchmarks.run import run

        return run(words[1:], "twotower bench")
    arguments = _parser().parse_args(words)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="twotower", description="Two-tower diffusion language models: generate, inspect, check.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = commands.add_parser("generate", help="continue a prompt, block by block or token by token")
    _add_model(generate)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; the checkpoint needs a tokenizer.json")
    prompt.add_argument("--prompt-ids", metavar="5,6,7", type=_token_ids, help="token ids to continue")
    generate.add_argument("--mode", choices=MODES, default="mask_diffusion", help="default: %(default)s")
    _add_number(generate, "--max-new-tokens", integer, 128, "where to stop without an end-of-sequence token")
    _add_number(generate, "--block-size", integer, 16, "tokens denoised together")
    _add_number(generate, "--steps-per-block", integer, 16, "most denoiser evaluations a block may take")
    _add_number(generate, "--confidence-threshold", number, 0.8, "predictions more probable than this are committed")
    _add_number(generate, "--temperature", number, 0.0, "0 takes the most probable token, more samples")
    _add_number(generate, "--top-k", integer, 0, "sample among the k most probable tokens; 0 among all")
    _add_number(generate, "--top-p", number, 1.0, "sample among the most probable tokens that reach this mass")
    _add_number(generate, "--seed", integer, 0, "of the sampling")
    generate.add_argument(
        "--eos-token-id", metavar="N", type=_eos, default=2, help="token that ends the text, or none (default: 2)"
    )
    _add_device(generate)
    generate.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default: as stored)")
    generate.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    generate.set_defaults(run=_generate)

    train = commands.add_parser("train", help="train a model: a backbone, then the denoiser that reads its states")
    train.add_argument(
        "out", metavar="OUT", type=Path, help="directory of the checkpoint; a run goes on where it stopped"
    )
    train.add_argument("--phase", choices=("both", "backbone", "denoiser"), default="both", help="default: %(default)s")
    train.add_argument("--config", type=Path, default=DEMO / "config.json", help="architecture (default: the demo's)")
    _add_number(train, "--steps", integer, None, "of each phase; this and the next four are the demo's unless given")
    _add_number(train, "--rows", integer, None, "sequences a step")
    _add_number(train, "--length", integer, None, "tokens a sequence")
    _add_number(train, "--learning-rate", number, None, "the highest")
    _add_number(train, "--text-share", number, None, "of the sequences are documentation, the others problems")
    _add_number(train, "--seed", integer, 0, "of weights, data and noise")
    _add_device(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="quality against speed on held-out tasks and text, in all modes")
    _add_model(evaluate)
    _add_number(evaluate, "--problems", integer, 200, "of each task")
    evaluate.add_argument("--quick", action="store_true", help="the three modes in their usual settings alone")
    evaluate.add_argument("--out", metavar="DIR", type=Path, help="also write evaluation.json and evaluation.svg there")
    _add_device(evaluate)
    evaluate.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default: as stored)")
    evaluate.set_defaults(run=_evaluate)

    info = commands.add_parser("info", help="architecture, parameters and memory, from config.json alone")
    info.add_argument("model", metavar="MODEL", type=Path, help="checkpoint directory or config.json")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    doctor = commands.add_parser("doctor", help="versions and devices; runs every op against its reference")
    doctor.add_argument("--json", action="store_true", help="the report as JSON alone, to go with a bug report")
    doctor.set_defaults(run=_doctor)

    commands.add_parser("bench", help="times every op against the machine's ceilings and other code", add_help=False)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", type=Path, nargs="?", default=DEMO,
        help="checkpoint directory: config.json and safetensors (default: the demo model)",
    )  # fmt: skip


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=_device, help="cpu, cuda or cuda:N (default: cuda if every op has a kernel for it)"
    )


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from twotower import __version__

        print(f"twotower {__version__}")
        parser.exit()


def _add_number(
    parser: argparse.ArgumentParser, name: str, kind: Callable[[str], float], default: float | None, meaning: str
) -> None:
    metavar = "N" if kind is integer else "X"
    ending = "" if default is None else f" (default: {default})"
    parser.add_argument(name, metavar=metavar, type=kind, default=default, help=meaning + ending)


def _token_ids(text: str) -> list[int]:
    try:
        return [integer(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas, got {text!r}") from None


def _eos(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else integer(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or none, got {text!r}") from None


def _device(text: str) -> str:
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return text


def _generate(arguments: argparse.Namespace) -> int:
    from twotower.continuation import generate

    settings = {name: getattr(arguments, name) for name in SETTINGS}
    return generate(arguments, settings, arguments.device or _default_device())


def _default_device() -> str:
    """CUDA where there is a device and this build has a kernel of every op for it, else the CPU."""
    import torch

    import twotower_ext
    from twotower_ext.registry import OPS

    kernels = twotower_ext.build_info()["cuda"] and all(row.cuda for row in OPS.values())
    return "cuda" if kernels and torch.cuda.is_available() else "cpu"


def _train(arguments: argparse.Namespace) -> int:
    from twotower import pictures
    from twotower.config import Config
    from twotower.train import LOG, PHASES, RECIPES, read_log, train

    phases = PHASES if arguments.phase == "both" else (arguments.phase,)
    names = ("steps", "rows", "length", "learning_rate", "text_share", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    recipes = {phase: replace(RECIPES[phase], **given) for phase in phases}
    config = Config.from_json(arguments.config)
    train(config, recipes, arguments.out, device=arguments.device or _default_device())
    _draw(lambda: pictures.training(read_log(arguments.out), arguments.out / "training.svg"))
    print(f"{arguments.out}: checkpoint, tokenizer.json, {LOG}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch

    import twotower
    from twotower import pictures
    from twotower.evaluate import evaluate, modes, settings, table
    from twotower.weights import replace_file

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    model = twotower.load(arguments.model, arguments.device or _default_device(), dtype=dtype)
    chosen = modes() if arguments.quick else settings()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    result = evaluate(model, problems=arguments.problems, chosen=chosen)
    print(table(result))
    if arguments.out:
        content = json.dumps(result, indent=1) + "\n"
        replace_file(arguments.out / "evaluation.json", lambda new: new.write_text(content))
        _draw(lambda: pictures.evaluation(result, arguments.out / "evaluation.svg"))
    return 0


def _draw(picture: Callable[[], object]) -> None:
    """Draws a picture, or says what is missing for it: the numbers are what matters."""
    try:
        picture()
    except ModuleNotFoundError as error:
        say(f"twotower: note: {one_line(error)}")


def _info(arguments: argparse.Namespace) -> int:
    from twotower import Config
    from twotower.info import describe, table

    path = arguments.model
    config = Config.from_json(path / "config.json" if path.is_dir() else path)
    print(json.dumps(describe(config)) if arguments.json else table(config))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from twotower.doctor import examine

    report = examine((lambda line: None) if arguments.json else partial(print, flush=True))
    if arguments.json:
        print(json.dumps(report, indent=1))
    problems = report["problems"]
    for problem in problems:
        say(f"twotower: error: {one_line(problem)}")
    return 1 if problems else 0
