"""Bad arguments of every op: a TypeError or ValueError that names op and argument, never a crash or a wrong number."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
import torch
from torch import Tensor

from twotower_ext import ops
from twotower_ext.registry import OPS

every_op = pytest.mark.parametrize("name", OPS)


def arguments_of(name: str) -> dict[str, Any]:
    """The arguments of the op's second sample (the first has axes of length 1, which say less)."""
    sample = OPS[name].samples()[1]
    bound = inspect.signature(OPS[name].op).bind(*sample.args, **sample.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def tensors_of(name: str) -> list[str]:
    return [k for k, v in arguments_of(name).items() if isinstance(v, Tensor)]


every_tensor = pytest.mark.parametrize(("name", "argument"), [(name, a) for name in OPS for a in tensors_of(name)])


@every_tensor
@pytest.mark.parametrize("value", [[1.0, 2.0], "text", 3.5])
def test_a_tensor_of_another_type(name: str, argument: str, value: Any):
    with pytest.raises(TypeError, match=rf"^{name}: {argument} must be .*got {type(value).__name__}$"):
        OPS[name].op(**arguments_of(name) | {argument: value})


@every_tensor
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_a_tensor_of_another_dtype(name: str, argument: str, dtype: torch.dtype):
    arguments = arguments_of(name)
    with pytest.raises(ValueError, match=rf"^{name}: {argument} must .*, got "):
        OPS[name].op(**arguments | {argument: arguments[argument].to(dtype)})


@every_tensor
def test_a_tensor_of_another_precision(name: str, argument: str):
    if (name, argument) == ("denoise_commit", "logits"):
        return  # the only floating tensor: any precision will do
    arguments = arguments_of(name)
    arguments[argument] = arguments[argument].double()
    with pytest.raises(ValueError, match=rf"^{name}: .* must .*, got "):
        OPS[name].op(**arguments)


@every_tensor
def test_a_tensor_of_another_rank(name: str, argument: str):
    arguments = arguments_of(name)
    value = arguments[argument]
    for wrong in (value[None], value.flatten()[0], value[0] if value.ndim > 1 else value[None, None]):
        with pytest.raises(ValueError, match=rf"^{name}: {argument} must have shape \(.*\).*, got \("):
            OPS[name].op(**arguments | {argument: wrong})


@every_tensor
def test_a_tensor_of_another_shape(name: str, argument: str):
    """One axis longer: either another argument no longer fits, or the axis is free and the result is right."""
    arguments = arguments_of(name)
    value = arguments[argument]
    refused = 0
    for axis in range(value.ndim):
        longer = torch.cat([value, value.narrow(axis, 0, 1)], axis)
        try:
            OPS[name].op(**arguments | {argument: longer})
        except ValueError as error:
            assert str(error).startswith(f"{name}: ")  # noqa: PT017
            assert ", got " in str(error)  # noqa: PT017
            refused += 1
    assert refused > 0


@every_tensor
def test_a_tensor_on_another_device(name: str, argument: str):
    arguments = arguments_of(name)
    with pytest.raises(ValueError, match=rf"^{name}: \w+ must be on (cpu|meta) with \w+, got (cpu|meta)$"):
        OPS[name].op(**arguments | {argument: arguments[argument].to("meta")})


def on_meta(name: str) -> dict[str, Any]:
    return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments_of(name).items()}


@every_tensor
def test_shapes_are_checked_without_data(name: str, argument: str):
    """Fake kernels refuse what the real ones would, so that a mistake shows while tracing."""
    arguments = on_meta(name)
    with pytest.raises(ValueError, match=rf"^{name}: {argument} must have shape \(.*\), got \("):
        OPS[name].op(**arguments | {argument: arguments[argument][None]})


@every_op
def test_shapes_without_data_are_those_with_data(name: str):
    results = OPS[name].op(**arguments_of(name))
    fakes = OPS[name].op(**on_meta(name))
    for real, fake in zip(*(r if isinstance(r, tuple) else (r,) for r in (results, fakes)), strict=True):
        assert (real is None) == (fake is None)
        if real is not None:
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def plain_arguments(name: str) -> list[tuple[str, Any]]:
    """(argument, a value of a wrong type) for each argument that is no tensor."""
    wrong = {int: 1.5, float: "1", bool: 1, str: 0}
    hints = typing.get_type_hints(OPS[name].op)
    return [
        (a, wrong[kind]) for a in arguments_of(name) for kind in wrong if hints[a] in (kind, kind | None, kind | Tensor)
    ]


@pytest.mark.parametrize(("name", "argument", "value"), [(name, *p) for name in OPS for p in plain_arguments(name)])
def test_a_plain_argument_of_another_type(name: str, argument: str, value: Any):
    with pytest.raises(TypeError, match=rf"^{name}: {argument} must be .*, got {type(value).__name__}$"):
        OPS[name].op(**arguments_of(name) | {argument: value})


NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = [
    ("rms_norm", {"eps": -1.0}),
    ("rms_norm", {"eps": NAN}),
    ("rms_norm", {"modulate": "sideways"}),
    ("rms_norm", {"modulate": "before"}),
    ("rms_norm", {"shift": torch.ones(2, 48)}),
    ("rms_norm", {"delta": None, "gate": torch.ones(2, 48)}),
    ("gated_group_rms_norm", {"group_size": 0}),
    ("gated_group_rms_norm", {"group_size": -4}),
    ("gated_group_rms_norm", {"group_size": 7}),
    ("gated_group_rms_norm", {"eps": NAN}),
    ("causal_conv1d", {"activation": "tanh"}),
    ("ssd_scan", {"chunk_size": 0}),
    ("ssd_scan", {"states_every": -1}),
    ("ssd_scan", {"B": torch.ones(2, 1, 3, 16), "C": torch.ones(2, 1, 3, 16)}),
    ("mamba_block", {"heads": 0}),
    ("mamba_block", {"heads": 3}),
    ("mamba_block", {"groups": 0}),
    ("mamba_block", {"groups": 3}),
    ("mamba_block", {"state_size": -1}),
    ("mamba_block", {"eps": -1e-5}),
    ("moe_route", {"top_k": 0}),
    ("moe_route", {"top_k": 17}),
    ("moe_route", {"scaling": NAN}),
    ("moe_experts", {"activation": "gelu"}),
    ("moe_experts", {"shared_up": torch.ones(24, 32)}),
    ("moe_experts", {"shared_down": torch.ones(32, 24)}),
    ("moe_experts", {"expert_ids": torch.full((12, 6), 16, dtype=torch.int32)}),
    ("moe_experts", {"expert_ids": torch.full((12, 6), -1, dtype=torch.int64)}),
    ("block_attention", {"context_k": None}),
    ("block_attention", {"context_v": None}),
    ("block_attention", {"context_lengths": torch.tensor([38, 1], dtype=torch.int32)}),
    ("block_attention", {"context_lengths": torch.tensor([-1, 1], dtype=torch.int32)}),
    ("block_attention", {"scale": NAN}),
    ("block_attention", {"q": torch.ones(2, 3, 16, 16)}),
    ("two_stream_attention", {"block_size": 0}),
    ("two_stream_attention", {"block_size": -2}),
    *(
        (name, change)
        for name in ("denoise_commit", "lm_head_commit")
        for change in (
            {"steps": 0},
            {"step": -1},
            {"step": 8, "steps": 8},
            {"threshold": NAN},
            {"temperature": -0.5},
            {"temperature": INF},
            {"temperature": NAN},
            {"top_k": -1},
            {"top_p": 0.0},
            {"top_p": 1.5},
            {"top_p": NAN},
            {"mask_token_id": -2},
            {"mask_token_id": 10**6},
            {"seed": 2**63},
            {"steps": 2**70},
            {"top_k": 2**70},
            {"temperature": 1e-38},
            {"temperature": 1e300},
        )
    ),
    ("lm_head_commit", {"top_k": 3}),
    ("lm_head_commit", {"top_p": 0.5}),
]


@pytest.mark.parametrize(("name", "change"), OUT_OF_RANGE, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_values_out_of_range(name: str, change: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"^{name}: .* must .*, got ") as caught:
        OPS[name].op(**arguments_of(name) | change)
    assert any(argument in str(caught.value) for argument in arguments_of(name))


@pytest.mark.parametrize("name", ["denoise_commit", "lm_head_commit"])
@pytest.mark.parametrize("token", [-1, 11, 2**40])
def test_a_token_id_outside_the_vocabulary(name: str, token: int):
    arguments = arguments_of(name)
    block = arguments["block"].clone()
    block[0, 2] = token
    with pytest.raises(ValueError, match=rf"^{name}: block .*got {token}"):
        OPS[name].op(**arguments | {"block": block})


def test_the_message_says_what_was_expected_and_what_came():
    arguments = arguments_of("moe_experts")
    with pytest.raises(ValueError) as caught:
        OPS["moe_experts"].op(**arguments | {"up": torch.zeros(16, 24, 31)})
    assert str(caught.value) == ("moe_experts: up must have shape (experts, width, 32) to match x, got (16, 24, 31)")


def test_more_axes_than_any_op_takes():
    with pytest.raises(ValueError, match="rms_norm: x must have at most 6 axes, got 7"):
        ops.rms_norm(torch.zeros(1, 1, 1, 1, 1, 1, 2), torch.ones(2))
