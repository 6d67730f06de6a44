"""The command line: `twotower generate`, `twotower info`, `twotower doctor`, `twotower bench`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.command import Parser, guarded, integer, number, one_line, say
from twotower.display import NO_BREAK, Decode, LiveDisplay, TokenText, printable, supports_live

if TYPE_CHECKING:
    from twotower.config import Config
    from twotower.decode import GenerateOutput, Step

MODES = ("mask_diffusion", "mock_ar", "ar")
DTYPES = ("float32", "bfloat16", "float16")
MASK_TOKEN_ID = 3
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
    generate.add_argument("model", metavar="MODEL", type=Path, help="checkpoint directory: config.json and safetensors")
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
    generate.add_argument(
        "--device", type=_device, help="cpu, cuda or cuda:N (default: cuda if every op has a kernel for it)"
    )
    generate.add_argument("--dtype", choices=DTYPES, help="of weights and activations (default: as stored)")
    generate.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    generate.set_defaults(run=_generate)

    info = commands.add_parser("info", help="architecture, parameters and memory, from config.json alone")
    info.add_argument("model", metavar="MODEL", type=Path, help="checkpoint directory or config.json")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    doctor = commands.add_parser("doctor", help="versions and devices; runs every op against its reference")
    doctor.set_defaults(run=_doctor)

    commands.add_parser("bench", help="times every op against the machine's ceilings and other code", add_help=False)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from twotower import __version__

        print(f"twotower {__version__}")
        parser.exit()


def _add_number(
    parser: argparse.ArgumentParser, name: str, kind: Callable[[str], float], default: float, meaning: str
) -> None:
    metavar = "N" if kind is integer else "X"
    parser.add_argument(name, metavar=metavar, type=kind, default=default, help=f"{meaning} (default: {default})")


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
    import torch

    import twotower
    from twotower.decode import check_options

    if not arguments.model.is_dir():
        raise FileNotFoundError(f"{arguments.model}: no such directory")
    config = twotower.Config.from_json(arguments.model / "config.json")
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    check_options(config, mask_token_id=MASK_TOKEN_ID, **settings)  # a large checkpoint takes minutes to load
    prompt, tokenizer = _prompt(arguments, config)
    device = arguments.device or _default_device()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    model = twotower.load(arguments.model, device, dtype=dtype)

    live = not arguments.json and supports_live(sys.stdout)
    follower = _follow(arguments, tokenizer, prompt, config.vocab_size) if live else None
    with follower.display if follower else nullcontext():
        out = twotower.generate(model, [prompt], mask_token_id=MASK_TOKEN_ID, on_step=follower, **settings)
        if follower:
            follower.finish(out.tokens[0])

    tokens = out.tokens[0]
    text = tokenizer.decode(tokens) if tokenizer else None
    if arguments.json:
        print(_as_json(out, text, settings | {"device": str(device), "dtype": str(model.dtype).split(".")[-1]}))
        return 0
    if not follower:
        plain = " ".join(map(str, tokens)) if text is None else text
        print(printable(plain) if sys.stdout.isatty() else plain, flush=True)
    say(
        f"{len(tokens)} tokens in {out.seconds:.2f} s: {out.tokens_per_second:.1f} tokens/s, "
        f"NFE {out.nfe[0]}, {out.tokens_per_nfe:.2f} tokens/NFE"
    )
    return 0


def _as_json(out: GenerateOutput, text: str | None, settings: dict[str, Any]) -> str:
    result: dict[str, Any] = {"mode": settings.pop("mode"), "tokens": out.tokens[0]}
    if text is not None:
        result["text"] = text
    result |= {
        "nfe": out.nfe[0],
        "seconds": out.seconds,
        "tokens_per_second": out.tokens_per_second,
        "tokens_per_nfe": out.tokens_per_nfe,
        "settings": settings,
    }
    return json.dumps(result)


class _Tokenizer:
    """The tokenizer stored at `path`; whatever goes wrong in it becomes a ValueError that names the file."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self._path = path
        with self._naming("not a tokenizer"):
            self._tokenizer = Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        with self._naming("cannot encode the prompt"):
            return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        with self._naming("cannot decode token ids"):
            return self._tokenizer.decode(ids)

    @contextmanager
    def _naming(self, complaint: str) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises plain Exception, and its panics not even that
            raise ValueError(f"{self._path}: {complaint}: {error}") from None


def _prompt(arguments: argparse.Namespace, config: Config) -> tuple[list[int], _Tokenizer | None]:
    """The prompt's token ids, and what makes text of ids: None without a tokenizer.json, which ids can do without."""
    path = arguments.model / "tokenizer.json"
    if arguments.prompt is None:
        ids = _checked(arguments.prompt_ids, config)
        return ids, _tokenizer_for(ids, path) if path.is_file() else None
    if not arguments.prompt:
        raise ValueError("--prompt must not be empty")
    if not path.is_file():
        raise ValueError(f"--prompt needs {path}, which is missing; use --prompt-ids")
    tokenizer = _Tokenizer(path)
    ids = _checked(tokenizer.encode(arguments.prompt), config)
    tokenizer.decode(ids)  # what fails here would fail after the generation
    return ids, tokenizer


def _checked(ids: list[int], config: Config) -> list[int]:
    if not ids:
        raise ValueError("--prompt gives no tokens")
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"the prompt's token ids must be in [0, {config.vocab_size}), got {token}")
    return ids


def _tokenizer_for(ids: list[int], path: Path) -> _Tokenizer | None:
    """The tokenizer at `path`, None (and a note) where it cannot even decode the prompt."""
    try:
        tokenizer = _Tokenizer(path)
        tokenizer.decode(ids)
        return tokenizer
    except (ValueError, ImportError) as error:
        say(f"twotower: note: {one_line(error)}; printing token ids")
        return None


def _default_device() -> str:
    """CUDA where there is a device and this build has a kernel of every op for it, else the CPU."""
    import torch

    import twotower_ext
    from twotower_ext.registry import OPS

    kernels = twotower_ext.build_info()["cuda"] and all(row.cuda for row in OPS.values())
    return "cuda" if kernels and torch.cuda.is_available() else "cpu"


def _follow(
    arguments: argparse.Namespace, tokenizer: _Tokenizer | None, prompt: list[int], vocab_size: int
) -> _Follower:
    from twotower.decode import NOTHING_YET

    undecided = MASK_TOKEN_ID if arguments.mode == "mask_diffusion" else NOTHING_YET
    digits = len(str(vocab_size - 1))
    glyph = "░" if _can_encode("░") else "."
    decode: Decode
    if tokenizer:
        decode, mask = tokenizer.decode, f" {glyph * 3}"  # words bring the space before them
    else:
        decode, mask = lambda ids: "".join(f"{token:{NO_BREAK}>{digits}} " for token in ids), f"{glyph * digits} "
    return _Follower(LiveDisplay(sys.stdout, TokenText(decode, prompt), mask), undecided, arguments)


def _can_encode(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class _Follower:
    """Shows the steps of a generation of one row on a live display."""

    def __init__(self, display: LiveDisplay, undecided: int, arguments: argparse.Namespace):
        self.display = display
        self._undecided = undecided  # the id that marks a masked position
        self._arguments = arguments
        self._begin = time.perf_counter()
        self._settled = 0  # tokens that the display has printed for good
        self._block: list[int] = []  # the block in work

    def __call__(self, step: Step) -> None:
        if step.start > self._settled:
            self.display.settle(self._block)
            self._settled = step.start
        self._block = step.block_after
        shown = [None if token == self._undecided else token for token in self._block]
        self.display.show(shown, step.committed, self._status(step, shown), self._arguments.eos_token_id)

    def finish(self, tokens: Sequence[int]) -> None:
        """Replace the block in work by what `generate` returned of it."""
        self.display.settle(tokens[self._settled :], final=True)

    def _status(self, step: Step, shown: Sequence[int | None]) -> str:
        options = self._arguments
        committed = len(shown) - shown.count(None)
        speed = (step.start + committed) / (time.perf_counter() - self._begin)
        if options.mode != "mask_diffusion":
            return f"token {step.start + 1}/{options.max_new_tokens}, {speed:.1f} tokens/s"
        blocks = math.ceil(options.max_new_tokens / options.block_size)
        return (
            f"block {step.block_index + 1}/{blocks}, step {step.step + 1}/{options.steps_per_block}, "
            f"{committed}/{len(shown)} committed, {speed:.1f} tokens/s"
        )


def _info(arguments: argparse.Namespace) -> int:
    from twotower import Config
    from twotower.info import describe, table

    path = arguments.model
    config = Config.from_json(path / "config.json" if path.is_dir() else path)
    print(json.dumps(describe(config)) if arguments.json else table(config))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from twotower.doctor import examine

    problems = examine()
    for problem in problems:
        say(f"twotower: error: {one_line(problem)}")
    return 1 if problems else 0
