"""The private linear layer of the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from twotower import layers

from twotower_ext.ops._linear import linear
from twotower_ext.registry import CPU_DTYPES, TOLERANCE

SHAPES = [(1, 1, 1), (1, 5, 3), (2, 4, 64), (5, 7, 33), (6, 64, 96), (7, 66, 31), (13, 130, 65), (70, 129, 100)]


def inputs(rows: int, outputs: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * outputs + width)
    x, weight = (torch.randn(n, width, generator=generator) for n in (rows, outputs))
    return x.to(dtype), (weight / width**0.5).to(dtype)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype):
    x, weight = inputs(*shape, dtype)
    rtol, atol = TOLERANCE[dtype]
    expected = F.linear(x.double(), weight.double()).to(dtype)
    torch.testing.assert_close(linear(x, weight), expected, rtol=rtol, atol=atol)
    bias = torch.linspace(-3, 3, shape[1]).to(dtype)
    expected = F.linear(x.double(), weight.double(), bias.double()).to(dtype)
    torch.testing.assert_close(linear(x, weight, bias), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_a_row_is_the_row_alone(dtype):
    x, weight = inputs(23, 77, 130, dtype)
    whole = linear(x, weight)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 11), slice(22, 23)):
        assert torch.equal(linear(x[rows], weight), whole[rows])


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_threads_do_not_matter(dtype):
    x, weight = inputs(9, 600, 64, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = linear(x, weight)
        torch.set_num_threads(3)
        assert torch.equal(linear(x, weight), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_strides_axes_and_what_lies_beside(dtype):
    x, weight = inputs(6, 10, 20, dtype)
    wide_x, wide_weight = (torch.full((t.shape[0], 29), torch.nan, dtype=dtype) for t in (x, weight))
    wide_x[:, 4:24], wide_weight[:, 5:25] = x, weight
    expected = linear(x, weight)
    assert torch.equal(linear(wide_x[:, 4:24], wide_weight[:, 5:25]), expected)
    assert torch.equal(linear(x.view(2, 3, 20), weight), expected.view(2, 3, 10))
    assert torch.equal(linear(x.T.contiguous().T, weight), expected)
    assert torch.equal(linear(x[0], weight), expected[0])


def test_empty():
    weight = torch.ones(4, 3)
    assert linear(torch.ones(0, 3), weight).shape == (0, 4)
    assert linear(torch.ones(2, 0, 3), weight).shape == (2, 0, 4)
    assert linear(torch.ones(2, 3), torch.ones(0, 3)).shape == (2, 0)
    assert torch.equal(linear(torch.ones(2, 0), torch.ones(4, 0)), torch.zeros(2, 4))


def test_nan_and_infinity_pass_through():
    for dtype in CPU_DTYPES:
        x, weight = inputs(3, 5, 40, dtype)
        x[0, 7], x[1, 39] = torch.nan, torch.inf
        y = linear(x, weight)
        assert y[0].isnan().all()
        assert torch.equal(y[1], torch.inf * weight[:, 39].sign())
        assert y[2].isfinite().all()


def test_wrong_arguments():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"linear: weight must be a torch.Tensor, got list"):
        linear(x, [[1.0]])
    with pytest.raises(ValueError, match=r"linear: weight must have shape .*got \(4, 2\)"):
        linear(x, weight[:, :2])
    with pytest.raises(ValueError, match="linear: weight must be float32 to go with float32 x, got bfloat16"):
        linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"linear: bias must have shape .*got \(3,\)"):
        linear(x, weight, torch.ones(3))
    with pytest.raises(ValueError, match=r"linear: x must be float32, .* got int64"):
        linear(x.long(), weight.long())
    with pytest.raises(ValueError, match=r"linear: x must have shape \(..., inputs\)"):
        linear(torch.ones(()), weight)


@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
def test_the_model_has_a_gradient_for_whatever_is_trained(trained: str):
    tensors = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4)}
    tensors[trained].requires_grad_()
    layers.linear(**tensors).sum().backward()
    expected = {"x": 4.0, "weight": 2.0, "bias": 2.0}[trained]
    assert torch.equal(tensors[trained].grad, torch.full_like(tensors[trained], expected))


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_is_that_of_torch(bias: bool):
    generator, gradients = torch.Generator().manual_seed(0), []
    x, weight, b = (torch.randn(*shape, generator=generator) for shape in ((3, 5), (4, 5), (4,)))
    for function in (linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, b)[: 2 + bias]]
        function(*leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


def test_opcheck():
    for dtype in CPU_DTYPES:
        torch.library.opcheck(torch.ops.twotower._linear, (*inputs(3, 5, 8, dtype), torch.ones(5, dtype=dtype)))


def test_stream_read_reads_everything():
    for size in (0, 1, 31, 32, 1000, (1 << 17) + 5):
        values = torch.arange(size) * 7919 - 3
        assert torch.ops.twotower._stream_read(values).item() == values.sum().item()
    with pytest.raises(ValueError, match="stream_read: buffer must be int64, got float32"):
        torch.ops.twotower._stream_read(torch.ones(3))
