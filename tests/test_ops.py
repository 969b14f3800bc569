"""Boxes and concretisation as single operators: gradients, registration, compilation, shapes, errors.

The ``relaxation`` family has its own file."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pycert
from pycert.ops import concretize, interval_conv2d, interval_linear

F64 = torch.float64
CONVOLUTIONS = {
    "plain": dict(),
    "strided": dict(stride=(2, 1), padding=1),
    "dilated": dict(dilation=2, padding=(2, 1)),
    "grouped": dict(groups=2, padding=1),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def boxes(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    lower = draw(*shape, seed=1, dtype=dtype)
    return lower, lower + draw(*shape, seed=2, dtype=dtype).abs() + 0.1


def weights(groups: int = 1) -> tuple[Tensor, Tensor]:
    return draw(4, 4 // groups, 3, 2, seed=3), draw(4, seed=4)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


# ---- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("soundness", ["none", "real", "deployed"])
@pytest.mark.parametrize("batch", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_boxes_through_linear_layers(batch, dtype, soundness):
    lower, upper = boxes(batch, 3, 6, dtype=dtype)
    weight, bias = draw(5, 6, dtype=dtype), draw(5, dtype=dtype)
    found = interval_linear(lower, upper, weight, bias, soundness=soundness)
    wide = [t.double() for t in (lower, upper, weight, bias)]
    exact = (
        F.linear(wide[0], wide[2].clamp(min=0), wide[3]) + F.linear(wide[1], wide[2].clamp(max=0)),
        F.linear(wide[1], wide[2].clamp(min=0), wide[3]) + F.linear(wide[0], wide[2].clamp(max=0)),
    )
    tolerance = 1e-10 if dtype == F64 else 1e-4
    for mine, true in zip(found, exact):
        assert mine.shape == (batch, 3, 5) and mine.dtype == dtype
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=tolerance)
    if soundness != "none" and dtype == torch.float32:
        assert (found[0].double() <= exact[0]).all() and (exact[1] <= found[1].double()).all()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_boxes_through_convolutions(name):
    arguments = CONVOLUTIONS[name]
    (lower, upper), (weight, bias) = boxes(2, 4, 7, 6), weights(arguments.get("groups", 1))
    found = interval_conv2d(lower, upper, weight, bias, **arguments, soundness="none")
    centre = F.conv2d((lower + upper) / 2, weight, bias, **arguments)
    radius = F.conv2d((upper - lower) / 2, weight.abs(), **arguments)
    torch.testing.assert_close(found[0], centre - radius)
    torch.testing.assert_close(found[1], centre + radius)
    real = interval_conv2d(lower, upper, weight, bias, **arguments, soundness="real")
    assert (real[0] <= found[0] + 1e-14).all() and (real[1] >= found[1] - 1e-14).all()
    assert torch.equal(
        interval_conv2d(lower, upper, weight, **arguments)[0],
        interval_conv2d(lower, upper, weight, None, **arguments)[0],
    )


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("soundness", ["none", "deployed"])
def test_gradients_of_linear_layers(batch, soundness):
    arguments = leaves(*boxes(batch, 4), draw(3, 4), draw(3))
    run = lambda *given: interval_linear(*given, soundness=soundness)  # noqa: E731
    assert torch.autograd.gradcheck(run, arguments)
    assert torch.autograd.gradcheck(lambda *given: run(*given, None), arguments[:3])


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_of_convolutions(name):
    arguments = leaves(*boxes(2, 4, 5, 4), *weights(CONVOLUTIONS[name].get("groups", 1)))
    run = lambda *given: interval_conv2d(*given, **CONVOLUTIONS[name], soundness="none")  # noqa: E731
    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)


def ball(kind: str, x: Tensor, eps: Tensor):
    if kind == "box":
        return pycert.Box(x - eps.view(-1, 1), x + eps.view(-1, 1) * 2)
    p, clip = {"linf": (math.inf, None), "l2": (2, None), "l1": (1, None), "l2 clipped": (2, (-5.0, 5.0))}[
        kind
    ]
    return pycert.LpBall(x, eps, p=p, clip=clip)


@pytest.mark.parametrize("side", ["lower", "upper"])
@pytest.mark.parametrize("kind", ["linf", "l2", "l1", "l2 clipped", "box"])
def test_concretisation(kind, side):
    A, c, x, eps = leaves(draw(3, 2, 5), draw(3, 2, seed=1), draw(3, 5, seed=2), draw(3, seed=3).abs() + 0.1)
    assert torch.autograd.gradcheck(
        lambda A, c, x, eps: concretize(A, c, ball(kind, x, eps), side), (A, c, x, eps)
    )
    with torch.no_grad():
        region = ball(kind, x, eps)
        found = concretize(A, c, region, side)
        sign = 1 if side == "upper" else -1
        if kind == "box" or kind == "linf":
            end = torch.where(A * sign > 0, region.upper.unsqueeze(1), region.lower.unsqueeze(1))
            expected = (A * end).sum(2) + c
        else:
            dual = A.norm(math.inf if kind == "l1" else 2, dim=2)
            expected = (A * x.unsqueeze(1)).sum(2) + c + sign * eps.view(-1, 1) * dual
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        assert (sign * (found - expected) >= -1e-15).all(), "rounded outward"
        single = concretize(A.float(), c.float(), ball(kind, x.float(), eps.float()), side)
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_coefficients_that_are_not_finite_concretise_to_infinities(bad):
    A, c, region = torch.ones(1, 3, 2), torch.zeros(1, 3), pycert.LpBall(torch.rand(1, 2), 0.1)
    A[0, 0, 1] = bad
    c[0, 1] = bad
    for side, expected in (("lower", -math.inf), ("upper", math.inf)):
        found = concretize(A, c, region, side)[0]
        assert found[0] == expected and found[1] == expected and found[2].isfinite()


# ---- shapes, dtypes, errors -----------------------------------------------------------------------


def test_strided_and_empty_inputs():
    lower, upper = boxes(6, 8)
    weight, bias = draw(5, 8), draw(5)
    dense = interval_linear(lower, upper, weight, bias)
    found = interval_linear(
        lower.t().contiguous().t(), torch.stack([upper, upper], -1)[..., 0], weight.t().contiguous().t(),
        torch.stack([bias, bias], -1)[..., 0],
    )  # fmt: skip
    for mine, other in zip(found, dense):
        torch.testing.assert_close(mine, other)
    (lower, upper), (weight, bias) = boxes(2, 4, 7, 6), weights()
    dense = interval_conv2d(lower, upper, weight, bias)
    found = interval_conv2d(
        lower.to(memory_format=torch.channels_last), upper.transpose(2, 3).contiguous().transpose(2, 3),
        weight.to(memory_format=torch.channels_last), bias,
    )  # fmt: skip
    for mine, other in zip(found, dense):
        torch.testing.assert_close(mine, other)
    assert [t.shape for t in interval_conv2d(lower[:0], upper[:0], weight)] == [(0, 4, 5, 5)] * 2
    A, c, region = draw(2, 3, 4, 5), draw(2, 3), pycert.Box(*boxes(2, 4, 5))
    strided = A.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(concretize(strided, c.t().contiguous().t(), region), concretize(A, c, region))
    assert concretize(A[:, :0], c[:, :0], region).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "rows, terms, columns", [(1, 1, 1), (5, 31, 33), (24, 64, 32), (29, 300, 71), (13, 700, 5)]
)
def test_products_of_rows(rows, terms, columns, dtype):
    """Within the error bound of its blocks, and with the columns of A that are left out taken for zero."""
    a, b = draw(rows, terms, seed=1, dtype=dtype), draw(terms, columns, seed=2, dtype=dtype)
    live = draw(2, terms, seed=3) > 0.3
    cut = rows // 3
    segments, starts = torch.tensor([0, cut, rows]), torch.tensor([0, int(live[0].sum()), int(live.sum())])
    mask = torch.cat([live[:1].expand(cut, terms), live[1:].expand(rows - cut, terms)])
    own = pycert._C.isa() != "portable"  # which leaves the product to ATen
    chain = min(terms, 32) + math.ceil(terms / 32) if own else terms
    product = torch.ops.pycert.rows_product
    for found, left in (
        (product(a, b, None, None, None), a),
        (product(a * mask, b, segments, live.nonzero()[:, 1].contiguous(), starts), a * mask),
    ):
        exact, size = left.double() @ b.double(), left.double().abs() @ b.double().abs()
        slack = chain * torch.finfo(dtype).eps / 2 * size * 1.001 + 1e-15 * size
        assert ((found.double() - exact).abs() <= slack).all()


def test_half_precision_is_for_autocast_only():
    x, weight, kernel = torch.rand(2, 4), torch.rand(3, 4), torch.rand(2, 1, 2, 2)
    image, region = torch.rand(1, 1, 4, 4), pycert.LpBall(torch.rand(2, 4), 0.1)
    A, c = torch.rand(2, 3, 4), torch.rand(2, 3)
    for dtype in (torch.float16, torch.bfloat16):
        calls = (
            lambda dtype=dtype: interval_linear(x.to(dtype), x.to(dtype), weight.to(dtype)),
            lambda dtype=dtype: interval_conv2d(image.to(dtype), image.to(dtype), kernel.to(dtype)),
            lambda dtype=dtype: concretize(A.to(dtype), c.to(dtype), region),
        )
        for call in calls:
            with pytest.raises(TypeError, match="float"):
                call()
            with torch.autocast("cpu", torch.bfloat16):
                result = call()
            assert (result if isinstance(result, Tensor) else result[0]).dtype == torch.float32


def test_errors_say_what_must_hold():
    x, weight, image = torch.rand(2, 4), torch.rand(3, 4), torch.rand(1, 4, 6, 5)
    kernel, region, A, c = (
        torch.rand(2, 4, 3, 2),
        pycert.LpBall(torch.rand(2, 4), 0.1),
        torch.rand(2, 3, 4),
        torch.rand(2, 3),
    )
    for error, message, call in (
        (TypeError, "lower must be a tensor, got list", lambda: interval_linear([1.0], x, weight)),
        (TypeError, "same dtype, got Float and Double", lambda: interval_linear(x, x.double(), weight)),
        (TypeError, "lower and weight must have the same dtype", lambda: interval_linear(x, x, weight.double())),
        (ValueError, r"same shape, got \[2, 4\] and \[1, 4\]", lambda: interval_linear(x, x[:1], weight)),
        (ValueError, r"weight \[out, in\], got \[2, 4\] and \[3, 3\]", lambda: interval_linear(x, x, weight[:, :3])),
        (ValueError, r"\[batch, \.\.\., in\]", lambda: interval_linear(x[0], x[0], weight)),
        (ValueError, "bias must have shape", lambda: interval_linear(x, x, weight, torch.rand(1, 3))),
        (ValueError, "none, real, deployed, got 'yes'", lambda: interval_linear(x, x, weight, soundness="yes")),
        (ValueError, "stride must be an integer or two", lambda: interval_conv2d(image, image, kernel, stride=(1, 2, 3))),
        (ValueError, "padding must be .* got 'same'", lambda: interval_conv2d(image, image, kernel, padding="same")),
        (ValueError, "weight 4-dimensional", lambda: interval_conv2d(image[0], image[0], kernel)),
        (ValueError, "side must be 'lower' or 'upper', got 'both'", lambda: concretize(A, c, region, "both")),
        (ValueError, r"A must have shape \[2, S, 4\], got \[2, 3, 3\]", lambda: concretize(A[..., :3], c, region)),
        (ValueError, r"c must have shape \[2, 3\], got \[2, 2\]", lambda: concretize(A, c[:, :2], region)),
        (TypeError, "A, c and region must have the same dtype", lambda: concretize(A.double(), c.double(), region)),
        (TypeError, "region must be a pycert.LpBall or pycert.Box, got Tensor", lambda: concretize(A, c, x)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


# ---- torch.library and torch.compile -----------------------------------------------------------------


@pytest.mark.slow
def test_opcheck():
    """Schemas, fake kernels and autograd registration, with gradients and without."""
    ops = torch.ops.pycert
    (lower, upper), weight, bias = boxes(3, 2, 5), draw(4, 5), draw(4)
    cases = [
        (ops.interval_linear.default, (lower, upper, weight, bias, 2, 0)),
        (ops.interval_linear.default, (*leaves(lower, upper, weight, bias), 0, 0)),
        (ops.interval_linear.default, (*leaves(lower, upper), weight, None, 1, 8)),
        (
            ops.interval_linear_backward.default,
            (draw(3, 2, 4), draw(3, 2, 4), lower, upper, weight, [True] * 3),
        ),
    ]
    lower, upper = boxes(2, 4, 6, 5)
    for transposed in (False, True):
        weight, bias = weights(2)
        bias = draw(4) if transposed else bias
        geometry = ([2, 1], [1, 0], [1, 2], transposed, [1, 0] if transposed else [0, 0], 2)
        out, _ = ops.interval_conv2d(lower, upper, weight, None, *geometry, 0, 0)
        cases += [
            (ops.interval_conv2d.default, (lower, upper, weight, None, *geometry, 2, 0)),
            (ops.interval_conv2d.default, (*leaves(lower, upper, weight), None, *geometry, 0, 0)),
            (
                ops.interval_conv2d_backward.default,
                (out, out * 2, lower, upper, weight, *geometry, [True] * 3),
            ),
        ]
    rows, sample, dense = draw(6, 5), torch.tensor([0, 0, 1, 1, 2, 2]), [1, 0, 0, 0, 0, 0, 0]
    for norm, first, second in (
        (0, *boxes(3, 5)),
        (1, draw(3, 5), draw(3).abs()),
        (2, draw(3, 5), draw(3).abs()),
    ):
        place = (sample, None, dense, [1, 1, 5])
        cases += [
            (ops.concretize_rows.default, (rows, None, 2**62, *place, first, second, norm)),
            (ops.concretize_rows.default, (*leaves(rows), None, 2**62, *place, *leaves(first, second), norm)),
            (ops.concretize_rows_backward.default, (draw(2, 6), rows, *place, first, second, norm, True)),
        ]
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments)


def test_second_derivatives_raise():
    lower, upper, weight = leaves(*boxes(2, 3), draw(4, 3))
    with pytest.raises(NotImplementedError, match="interval_linear: second derivatives"):
        torch.autograd.grad(
            interval_linear(lower, upper, weight)[0].square().sum(), weight, create_graph=True
        )


def test_second_derivatives_behind_a_convolution_raise():
    net, x = torch.nn.Conv2d(2, 3, 3).double(), draw(1, 2, 5, 5)
    bounds = pycert.BoundedModule(net, x).bound(pycert.LpBall(x, 0.1), method="crown", soundness="none")
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(bounds.lower.square().sum(), net.weight, create_graph=True)


def compiled_equals_eager(function, *arguments: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    wanted = [value for value in arguments if value.requires_grad]
    expected, found = function(*arguments), compiled(*arguments)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(mine, other)


@pytest.mark.slow
def test_linear_layers_compile_without_graph_breaks():
    def function(lower, upper, weight, bias):
        lower, upper = interval_linear(lower, upper, weight, bias)
        return (lower.relu().sin() + upper.relu().cos()).sum()

    compiled_equals_eager(function, *leaves(*boxes(3, 5), draw(4, 5), draw(4)))
    (lower, upper), (weight,) = boxes(3, 5), leaves(draw(4, 5))
    compiled_equals_eager(function, lower, upper, weight, draw(4))  # some gradients only
    compiled_equals_eager(lambda *given: function(*given, None), *leaves(lower, upper, weight))


@pytest.mark.slow
def test_convolutions_and_concretisation_compile_without_graph_breaks():
    region = pycert.LpBall(draw(3, 5), 0.1, p=2)

    def function(lower, upper, weight, bias, A, c):
        lower, upper = interval_conv2d(lower, upper, weight, bias, stride=2, padding=1)
        return (lower.sin() + upper.cos()).sum() + concretize(A, c, region).sum()

    compiled_equals_eager(function, *leaves(*boxes(2, 4, 6, 5), *weights(), draw(3, 2, 5), draw(3, 2)))
