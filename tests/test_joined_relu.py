"""ReLUs that the affine step before them takes along: the same boxes and gradients as in two steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pycert

OPS = torch.ops.pycert
DTYPES = [torch.float32, torch.float64]
UNIT = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def box(*shape: int, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """So wide that behind a layer some intervals are on either side of zero, and some around it."""
    lower = draw(*shape, seed=seed, dtype=dtype)
    return [lower, lower + draw(*shape, seed=seed + 1, dtype=dtype).abs() * min(0.3, 6 / shape[-1])]


def steps(dtype: torch.dtype):
    """Operators with a ReLU at their end: name, call, tensors that have a gradient."""
    for soundness in (0, 1, 2):
        for batch, inputs in (
            (1, 40),
            (5, 33),
            (40, 33),
            (2, 2000),
        ):  # one for every way that the product is formed
            weight, bias = draw(7, inputs, seed=3, dtype=dtype), draw(7, seed=4, dtype=dtype)
            yield (
                f"linear {batch}x{inputs}, {soundness}",
                lambda *t, s=soundness, relu: OPS.interval_linear(*t, s, 0, relu),
                [*box(batch, inputs, seed=1, dtype=dtype), weight, bias],
            )
        for batch, channels in ((1, 3), (9, 16)):
            weight, bias = draw(8, channels, 3, 3, seed=3, dtype=dtype), draw(8, seed=4, dtype=dtype)
            yield (
                f"convolution {batch}x{channels}, {soundness}",
                lambda *t, s=soundness, relu: OPS.interval_conv2d(*t, *UNIT, s, 0, relu),
                [*box(batch, channels, 9, 9, seed=1, dtype=dtype), weight, bias],
            )
        channel = [draw(4, seed=seed, dtype=dtype) for seed in (5, 6)]
        yield (
            f"scale, {soundness}",
            lambda *t, s=soundness, relu: OPS.interval_scale(*t, None, 1e-5 * (s > 0), s > 0, relu),
            [*box(3, 4, 5, 6, seed=1, dtype=dtype), *channel],
        )
        for subtract in (False, True):
            yield (
                f"{'subtract' if subtract else 'add'}, {soundness}",
                lambda *t, s=soundness, m=subtract, relu: OPS.interval_add(
                    *t, m, 1e-5 * (s > 0), s > 0, relu
                ),
                [*box(3, 40, seed=1, dtype=dtype), *box(3, 40, seed=5, dtype=dtype)],
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operator_with_a_relu_is_the_operator_and_the_relu(dtype):
    for name, call, tensors in steps(dtype):
        given = [t.clone().requires_grad_() for t in tensors]
        lower, upper = (t.relu() for t in call(*given, relu=False))
        joined = call(*given, relu=True)
        assert torch.equal(joined[0], lower) and torch.equal(joined[1], upper), name
        assert lower.eq(0).any() and lower.gt(0).any(), name
        factors = [draw(*lower.shape, seed=seed, dtype=dtype) for seed in (8, 9)]
        expected = torch.autograd.grad(
            (lower * factors[0] + upper * factors[1]).sum(), given, retain_graph=True
        )
        found = torch.autograd.grad((joined[0] * factors[0] + joined[1] * factors[1]).sum(), given)
        for a, b in zip(expected, found):
            assert torch.equal(a, b), name
        alone = torch.autograd.grad(call(*given, relu=True)[1].sum(), given)  # nothing reads the lower end
        for a, b in zip(torch.autograd.grad(upper.sum(), given), alone):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_never_becomes_a_number(dtype):
    x = torch.tensor([[math.nan, 1.0]], dtype=dtype)
    weight = torch.ones(2, 2, dtype=dtype)
    assert all(t.isnan().all() for t in OPS.interval_linear(x, x, weight, None, 0, 0, True))
    lower, upper = OPS.interval_linear(x, x, weight, None, 1, 0, True)
    assert lower.eq(0).all() and upper.isinf().all()  # a ReLU of anything
    lower, upper = OPS.interval_add(x, x, x, x, False, 1e-5, True, True)
    assert lower[0, 0] == 0 and upper[0, 0].isinf()


class Residual(nn.Module):
    """A ReLU behind a sum, one behind a normalisation, and a layer that two nodes read."""

    def __init__(self, relu) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.shared, self.last = nn.BatchNorm2d(6), nn.Linear(6 * 25, 9), nn.Linear(9, 4)
        self.relus = nn.ModuleList(relu() for _ in range(4))

    def forward(self, x):
        a = self.relus[0](self.first(x))
        b = self.relus[1](self.norm(self.second(a)) + a)
        c = self.shared(b.flatten(1))
        return self.last(self.relus[2](c) + 0.5 * c)


def networks():
    def dense(relu):
        return nn.Sequential(nn.Linear(6, 20), relu(), nn.Linear(20, 20), relu(), nn.Linear(20, 3)), (6,)

    def ends_with_relu(relu):
        return nn.Sequential(nn.Linear(6, 20), relu(), nn.Linear(20, 3), relu()), (6,)

    def normalised(relu):
        layers = [nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), relu(), nn.Flatten(), nn.Linear(20, 4)]
        return nn.Sequential(*layers), (3, 5, 5)

    def residual(relu):
        return Residual(relu), (3, 5, 5)

    return [dense, ends_with_relu, normalised, residual]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("build", networks(), ids=lambda build: build.__name__)
def test_a_networks_intervals_and_gradients_are_those_of_two_steps(build, p, training):
    """A leaky ReLU of slope zero is a ReLU, and never taken along."""
    found = []
    for relu in (nn.ReLU, lambda: nn.LeakyReLU(0.0)):
        torch.manual_seed(3)
        net, shape = build(relu)
        net.train(training)
        x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
        bm = pycert.BoundedModule(net, x)
        eps = torch.full((5,), 0.05, requires_grad=True)
        bounds = bm.bound(pycert.LpBall(x, eps, p), "ibp")
        (bounds.lower.sum() - 2 * bounds.upper.sum()).backward()
        gradients = [parameter.grad.clone() for parameter in net.parameters()] + [eps.grad.clone()]
        margins = pycert.margins(bm, pycert.LpBall(x, eps, p), torch.zeros(5, dtype=torch.long), "ibp")
        found.append([bounds.lower, bounds.upper, margins, *gradients])
    for joined, apart in zip(*found):
        torch.testing.assert_close(joined, apart, rtol=2e-6, atol=1e-7)


def test_boxes_that_are_asked_for_are_those_before_the_relu():
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    bm = pycert.BoundedModule(net, torch.zeros(1, 6))
    region = pycert.LpBall(torch.zeros(2, 6), 0.1)
    bm.bound(region, "ibp")
    (lower, upper), *_ = bm.layer_bounds(region, "ibp").values()
    with torch.no_grad():
        centre = net[0](torch.zeros(2, 6))
    assert (lower <= centre).all() and (centre <= upper).all() and lower.lt(0).any()
