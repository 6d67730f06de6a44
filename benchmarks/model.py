"""End to end: forwards of a model of random weights against the publisher-style path, and how they divide by kernel."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import twotower
from torch import Tensor
from torch.overrides import TorchFunctionMode
from twotower import Config, LayerState, State, TwoTowerModel

from twotower_ext import ops

from . import timing
from .ceilings import name_of
from .dimensions import Dimensions
from .inputs import MASK_TOKEN, STEPS, THRESHOLD, Numbers, decay, fill
from .peers.commit import denoise_commit
from .peers.publisher_model import PublisherModel
from .peers.scan import chunked_scan
from .roofline import Machine, forward, total

CONTEXT = 512  # tokens behind which the forwards are measured
PROMPTS = (64, 2048)
NEW_TOKENS = 32
BATCHES = (1, 2, 4, 8)
SETS = 4  # rotating inputs
TRACED_ROUNDS = 3
HEAD_SCALE = 6.0  # spread of the logits: at this one a denoiser of random weights is sure of some positions
MODES = ("mask_diffusion", "mock_ar", "ar")
PEER = "publisher-style path"
CHUNKED_PEER = f"{PEER}, chunked scan"  # of prompts alone: a short block is a single chunk; of long ones the only peer

AGREEMENT: dict[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Relative L2 distance of logits up to which two implementations count as equal; different ones are about 1 apart.

Wide for the 16-bit dtypes, whose rounding sends a token to another expert wherever two scores are close."""

THOROUGH: dict[str, Any] = dict(min_seconds=1.0, max_seconds=8.0)
QUICK: dict[str, Any] = dict(min_seconds=0.3, max_seconds=2.0, min_runs=3)
"""How long a forward is timed."""

Thunks = Sequence[Callable[[], Tensor]]


def entries(
    dimensions: Dimensions,
    shape_name: str,
    dtypes: Sequence[torch.dtype],
    *,
    device: str = "cpu",
    machines: Mapping[torch.dtype, Machine] | None = None,
    done: Container[str] = (),
    peers: bool = True,
    quick: bool = False,
    step: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures what `keys` names, and yields each key with its entry as it is finished; those in `done` are left out.

    machines: ceilings by dtype, for floors. peers: whether to time the publisher-style path as well. quick: shorter
    samples, and fewer batch sizes. `step` hears each key before it is measured.

    Entries of forwards ("denoise", "denoise-commit", "ar", "prefill64", "prefill2048") have the form of an op's,
    "denoise" and "denoise-commit" with a `split`: seconds by kernel; what is left passes between them. "batch" holds
    seconds of a denoise step (with commit), an extension by a block and an AR step by batch size, "generate" what
    `twotower.generate` reached by mode.
    """
    for dtype in dtypes:
        wanted = [key for key in keys(shape_name, [dtype]) if key not in done]
        if not wanted:
            continue
        step(f"building a {shape_name} model in {name_of(dtype)}")
        bench = _Bench(dimensions, dtype, device, (machines or {}).get(dtype), peers, quick)
        for key in wanted:
            step(key)
            with torch.inference_mode():
                entry = bench.measure(key.rpartition("/")[2])
            yield key, entry


def keys(shape_name: str, dtypes: Sequence[torch.dtype]) -> list[str]:
    """Keys of all entries, in the order in which they are measured."""
    names = ("denoise", "denoise-commit", "ar", *(f"prefill{n}" for n in PROMPTS), "batch", "generate")
    return [f"{shape_name}/{name_of(dtype)}/{name}" for dtype in dtypes for name in names]


def memory_needed(dimensions: Dimensions, dtype: torch.dtype) -> int:
    """Bytes that measuring the model takes: its parameters, and room for states and logits."""
    return dimensions.parameters() * dtype.itemsize + 2**30


def random_model(dimensions: Dimensions, dtype: torch.dtype, device: str = "cpu") -> TwoTowerModel:
    """A model of random weights whose activations stay near 1 and whose decays are those of a fresh Mamba-2."""
    d = dimensions
    config = Config(
        hybrid_override_pattern=d.pattern, num_hidden_layers=len(d.pattern), hidden_size=d.hidden, vocab_size=d.vocab,
        layer_norm_epsilon=1e-5, mamba_num_heads=d.mamba_heads, mamba_head_dim=d.mamba_head_dim, n_groups=d.groups,
        ssm_state_size=d.state, conv_kernel=d.taps, num_attention_heads=d.query_heads, num_key_value_heads=d.kv_heads,
        head_dim=d.head_dim, n_routed_experts=d.experts, num_experts_per_tok=d.top_k,
        moe_intermediate_size=d.expert_width, moe_shared_expert_intermediate_size=d.shared_width,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    model = TwoTowerModel(config, context_device=device, denoiser_device=device, dtype=dtype)
    numbers, offset = Numbers(device, dtype), 0
    for key, view in model.checkpoint_views().items():
        name = key.removesuffix(".weight").rpartition(".")[2]
        if key.endswith(("A_log", "mixer.D", "dt_bias")):
            A_log, D, dt_bias = decay(numbers, d.mamba_heads)
            view.copy_({"A_log": A_log, "D": D, "dt_bias": dt_bias}[name])
        elif name in ("norm", "norm_f"):
            view.fill_(1)
        elif key.endswith("bias"):
            offset = fill(view, 0.01, offset)
        elif name == "embeddings":
            offset = fill(view, 1.0, offset)
        else:
            scale = HEAD_SCALE if name.endswith("lm_head") else 1.0
            offset = fill(view, scale * view.shape[-1] ** -0.5, offset)
    return model.eval()


def random_state(model: TwoTowerModel, batch: int, length: int) -> State:
    """A context of `length` tokens a row that was never read: random numbers of the size that real ones have."""
    numbers = Numbers(str(model.context_device), model.dtype)

    def layer(empty: LayerState) -> LayerState:
        if empty.conv is not None and empty.ssm is not None:
            return LayerState(conv=numbers.normal(*empty.conv.shape), ssm=numbers.acc(*empty.ssm.shape, scale=0.3))
        if empty.k is not None:
            shape = (batch, empty.k.shape[1], length, empty.k.shape[3])
            return LayerState(k=numbers.normal(*shape), v=numbers.normal(*shape))
        return empty

    empty = model.empty_state(batch)
    return State(empty.lengths + length, tuple(map(layer, empty.layers)))


class _Bench:
    """One model in one dtype, and the publisher-style path on the same weights."""

    def __init__(
        self,
        dimensions: Dimensions,
        dtype: torch.dtype,
        device: str,
        machine: Machine | None,
        peers: bool,
        quick: bool,
    ):
        self.dimensions, self.dtype, self.device, self.machine = dimensions, dtype, device, machine
        self.model = random_model(dimensions, dtype, device)
        self.peers = {PEER: PublisherModel(self.model), CHUNKED_PEER: PublisherModel(self.model, chunked_scan)}
        if not peers:
            self.peers = {}
        self.quick = quick
        self.limits = QUICK if quick else THOROUGH
        self._generator = torch.Generator()

    def measure(self, name: str) -> dict[str, Any]:
        self._generator.manual_seed(7)  # the same inputs whatever was measured before
        if name == "batch":
            return self._batches()
        if name == "generate":
            prompt = self._ids(1, PROMPTS[0])
            return {mode: self._generate(mode, prompt) for mode in MODES}
        if name.startswith("prefill"):
            rows = int(name.removeprefix("prefill"))
            prompts = [self._ids(1, rows) for _ in range(SETS)]
            return self._compare(
                "prefill",
                [partial(self._prefill, prompt) for prompt in prompts],
                lambda peer: [partial(_first, peer.prefill, prompt) for prompt in prompts],
                rows=rows,
            )
        state = random_state(self.model, 1, CONTEXT)
        if name == "ar":
            tokens = [self._ids(1, 1) for _ in range(SETS)]
            return self._compare(
                "ar",
                [partial(_ar_step, self.model, state, token) for token in tokens],
                lambda peer: [partial(_ar_step, peer, state, token) for token in tokens],
                lambda model: model.extend(state, tokens[0])[0],
            )
        blocks = [self._block(1) for _ in range(SETS)]
        commits = name == "denoise-commit"
        ours = [partial(self._denoise_step if commits else self.model.denoise, state, *block) for block in blocks]

        def of_peer(peer: PublisherModel) -> Thunks:
            call = partial(_publisher_step, peer) if commits else peer.denoise
            return [partial(call, state, *block) for block in blocks]

        entry = self._compare("denoise", ours, of_peer, lambda model: model.denoise(state, *blocks[0]))
        return entry | {"split": self._split(ours, entry["seconds"])}

    def _compare(
        self,
        mode: str,
        ours: Thunks,
        of_peer: Callable[[PublisherModel], Thunks],
        logits_of: Callable[[Any], Tensor] | None = None,
        rows: int | None = None,
    ) -> dict[str, Any]:
        """Ours alone and beside each peer whose logits agree.

        logits_of: logits of a model on the first inputs, where the timed calls return something else.
        """
        logits = logits_of(self.model) if logits_of else ours[0]()
        if not bool(logits.isfinite().all()):
            raise ValueError(f"{mode}: the model's logits are not finite")
        distinct = self._trace(ours, rounds=1).distinct_experts()
        own = timing.measure(ours, device=self.device, **self.limits)
        entry: dict[str, Any] = {
            "op": "model",
            "dtype": name_of(self.dtype),
            **own.entry(),
            **self._floor(mode, rows, distinct, own.median),
            "notes": {"context": 0 if mode == "prefill" else CONTEXT, "sets": SETS, "distinct_experts": distinct},
            "peers": {},
            "missing": {},
        }
        for name, peer in self.peers.items():
            is_long = rows is not None and rows > PROMPTS[0]
            if (name == CHUNKED_PEER and rows is None) or (name == PEER and is_long):
                continue
            thunks = of_peer(peer)
            theirs = logits_of(peer) if logits_of else thunks[0]()
            distance = float((theirs - logits).norm() / logits.norm())
            if not distance <= AGREEMENT[self.dtype]:
                entry["missing"][name] = f"disagrees: relative distance of logits {distance:.3g}"
                continue
            own, other, ratio = timing.interleave(ours, thunks, device=self.device, **self.limits)
            entry["peers"][name] = {
                "version": f"torch {torch.__version__}", **other.entry(),
                "ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high, "distance": distance,
            }  # fmt: skip
        return entry

    def _floor(self, mode: str, rows: int | None, distinct: float, seconds: float) -> dict[str, Any]:
        kernels = forward(self.dimensions, mode, 1, rows, CONTEXT, distinct, self.dtype.itemsize)
        flops = sum(kernel.launches * kernel.flops for kernel in kernels)
        moved = sum(kernel.launches * (kernel.read + kernel.written) for kernel in kernels)
        result: dict[str, Any] = {"flops": round(flops), "bytes": round(moved)}
        if self.machine is not None:
            floor = total(kernels, self.machine)
            by_compute = sum(k.launches * k.floor(self.machine) for k in kernels if k.bound(self.machine) == "compute")
            result |= {
                "floor": floor, "of_floor": floor / seconds, "bound": "compute" if 2 * by_compute > floor else "memory",
                "read_fraction": moved / seconds / self.machine.read,
            }  # fmt: skip
        return result

    def _batches(self) -> dict[str, dict[str, float]]:
        found = {}
        limits = self.limits | {"max_seconds": self.limits["max_seconds"] / 4, "min_runs": 3}
        for batch in BATCHES[: 2 if self.quick else len(BATCHES)]:
            state = random_state(self.model, batch, CONTEXT)
            blocks, tokens = [self._block(batch) for _ in range(SETS)], [self._ids(batch, 1) for _ in range(SETS)]
            forwards: dict[str, Thunks] = {
                "denoise": [partial(self._denoise_step, state, *block) for block in blocks],
                "extend": [partial(_first, self.model.extend_hidden, state, ids) for ids, _ in blocks],
                "ar": [partial(_ar_step, self.model, state, token) for token in tokens],
            }
            found[str(batch)] = {
                name: timing.measure(thunks, device=self.device, **limits).median for name, thunks in forwards.items()
            }
        return found

    def _generate(self, mode: str, prompt: Tensor) -> dict[str, float]:
        outputs = [
            twotower.generate(self.model, prompt, mode=mode, max_new_tokens=NEW_TOKENS, eos_token_id=None)
            for _ in range(1 if self.quick else 3)
        ]
        middle = sorted(outputs, key=lambda out: out.seconds)[len(outputs) // 2]
        return {
            "tokens": len(middle.tokens[0]), "nfe": middle.nfe[0], "seconds": middle.seconds,
            "tokens_per_nfe": middle.tokens_per_nfe, "tokens_per_second": middle.tokens_per_second,
        }  # fmt: skip

    def _split(self, thunks: Thunks, seconds: float) -> dict[str, float]:
        """Seconds of a call by kernel.

        A clock at every kernel slows calls down a little, so it gives the shares of the time measured without.
        """
        trace = self._trace(thunks, TRACED_ROUNDS)
        return {kernel: seconds * share for kernel, share in trace.shares().items()}

    def _trace(self, thunks: Thunks, rounds: int) -> _Trace:
        with _Trace(self.device, self.dimensions.vocab) as trace:
            for thunk in rounds * list(thunks):
                thunk()
        return trace

    def _prefill(self, prompt: Tensor) -> Tensor:
        logits, _ = self.model.prefill(prompt, last_only=True)
        assert isinstance(logits, Tensor)
        return logits

    def _denoise_step(self, state: State, block: Tensor, t: Tensor) -> Tensor:
        """A denoise step as decoding runs it: forward, head and commit. Returns the block."""
        hidden = self.model.denoise_hidden(state, block, t)
        head = self.model.denoiser.head
        return ops.lm_head_commit(hidden, head, block, 0, STEPS, threshold=THRESHOLD, mask_token_id=MASK_TOKEN)[0]

    def _ids(self, batch: int, length: int) -> Tensor:
        vocab = self.dimensions.vocab
        return torch.randint(MASK_TOKEN + 1, vocab, (batch, length), generator=self._generator).to(self.device)

    def _block(self, batch: int) -> tuple[Tensor, Tensor]:
        """A block half of which is masked, and that fraction."""
        ids = self._ids(batch, self.dimensions.block)
        ids[:, ::2] = MASK_TOKEN
        masked = math.ceil(self.dimensions.block / 2) / self.dimensions.block
        return ids, torch.full((batch,), masked, device=self.device)


def _publisher_step(peer: PublisherModel, state: State, block: Tensor, t: Tensor) -> Tensor:
    logits = peer.denoise(state, block, t)
    return denoise_commit(logits, block, 0, STEPS, threshold=THRESHOLD, mask_token_id=MASK_TOKEN)[0]


def _ar_step(model: TwoTowerModel | PublisherModel, state: State, token: Tensor) -> Tensor:
    """One token more, logits of the last position, the next token."""
    return _first(model.extend, state, token)[:, -1].argmax(-1)


def _first(call: Callable[..., tuple[Tensor, Any]], *args: Any) -> Tensor:
    return call(*args)[0]


class _Trace(TorchFunctionMode):
    """Times every call of an op of ours and of F.linear, and notes which experts were chosen."""

    def __init__(self, device: str, vocab: int):
        super().__init__()
        self._gpu, self._vocab = device.startswith("cuda"), vocab
        self._marks: list[tuple[str, Any, Any]] = []
        self._chosen: list[Tensor] = []
        self._wall = 0.0

    def __enter__(self) -> _Trace:
        self._wall -= time.perf_counter()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._gpu:
            torch.cuda.synchronize()
        self._wall += time.perf_counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = self._kernel(func, args)
        if kernel is None:
            return func(*args, **(kwargs or {}))
        if kernel == "moe_experts":
            self._chosen.append(args[1])
        begin = self._now()
        result = func(*args, **(kwargs or {}))
        self._marks.append((kernel, begin, self._now()))
        return result

    def shares(self) -> dict[str, float]:
        """The part of the traced time that each kernel took."""
        found: dict[str, float] = {}
        for kernel, begin, end in self._marks:
            spent = begin.elapsed_time(end) / 1e3 if self._gpu else end - begin
            found[kernel] = found.get(kernel, 0.0) + spent / self._wall
        return found

    def distinct_experts(self) -> float:
        """Experts that a layer used in a forward, on average; 0 without such layers."""
        counts = [ids.unique().numel() for ids in self._chosen]
        return round(sum(counts) / max(len(counts), 1), 1)

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _kernel(self, func: Any, args: Any) -> str | None:
        """The op's name, "head" or "projections"; None for everything else."""
        namespace, _, rest = str(func).partition(".")
        name = rest.partition(".")[0] if namespace == "twotower" else getattr(func, "__name__", "")
        if name.strip("_") == "linear":
            return "head" if args[1].shape[0] == self._vocab else "projections"
        return name if namespace == "twotower" else None
