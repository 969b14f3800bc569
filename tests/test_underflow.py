"""Numbers at both ends of the floating-point range: coefficients and values that underflow, or are flushed to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycert
from exact import ExactNetwork, rational
from nets import Apply

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown", "forward")


def tiny_linear() -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1e-20)
    return layer


def tiny_batch_norm() -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(1)
    layer.weight.data.fill_(1e-20)
    return layer


def bounded(function: Callable[..., Tensor], size: int = 1, **modules: nn.Module) -> pycert.BoundedModule:
    return pycert.BoundedModule(Apply(function, **modules).eval(), torch.zeros(1, size))


@pytest.fixture
def flushed() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


# Of inputs in [1e30, 2e30]: coefficients underflow, values do not.
UNDERFLOWING: dict[str, Callable[[], pycert.BoundedModule]] = {
    "product": lambda: bounded(lambda self, x: x * 1e-30 * 1e-20),
    "quotient": lambda: bounded(lambda self, x: x * 1e-30 / 1e20),
    "batch norm": lambda: bounded(lambda self, x: self.norm(x * 1e-30), norm=tiny_batch_norm()),
    "relu": lambda: bounded(lambda self, x: (x * 1e-30 - 1.5).relu() * 1e-14),
    "linear": lambda: bounded(lambda self, x: self.layer(x * 1e-30), layer=tiny_linear()),
    "two ways": lambda: bounded(lambda self, x: x * 1e-44 + (x * 1e-44).relu()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", UNDERFLOWING)
def test_coefficients_that_underflow(kind, method):
    bm = UNDERFLOWING[kind]()
    ends = torch.tensor([[1e30]]), torch.tensor([[2e30]])
    network = ExactNetwork(bm.graph)
    for rows in (None, torch.tensor([[1e-20]])):
        with torch.no_grad():
            found = bm.bound(
                pycert.Box(*ends), method, spec=rows, soundness="real", return_linear=method != "ibp"
            )
        for x in (rational(end).flatten() for end in ends):
            value = network.value(x)[-1][0] * (1 if rows is None else rational(rows)[0, 0])
            assert rational(found.lower).item() <= value <= rational(found.upper).item()
            if found.linear is not None:
                A_lower, c_lower, A_upper, c_upper = (rational(t).item() for t in vars(found.linear).values())
                assert A_lower * x[0] + c_lower <= value <= A_upper * x[0] + c_upper


# Of inputs near 1: values are subnormal on the way, and the network multiplies them up again.
SUBNORMAL: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x * 1e-20 * 1e-20,
    "quotient": lambda x: x / 3.3e38 / 30,
    "mean": lambda x: torch.cat([x, x, x], -1).mul(1e-37).mean(-1, keepdim=True) / 100,
    "average": lambda x: F.avg_pool1d(x.repeat(1, 3)[:, None] * 1e-37, 3)[:, 0] / 100,
    "leaky relu": lambda x: F.leaky_relu(-x * 1e-20, 1e-20),
    "relu": lambda x: F.relu(x * 1e-39),
    "clamp": lambda x: (x * 1e-39).clamp(0, 5e-40),
    "square": lambda x: (x * 1e-20).square(),
    "exp": lambda x: (x - 93).exp(),
    "sigmoid": lambda x: (x - 93).sigmoid(),
    "tanh": lambda x: (x * 1e-39).tanh(),
    "silu": lambda x: F.silu(x * 1e-39),
    "reciprocal": lambda x: 1 / (x * 1e38),
}


@pytest.mark.parametrize("kind", SUBNORMAL)
def test_flushing_neither_changes_bounds_nor_escapes_them(kind, flushed):
    bm = bounded(lambda self, x: SUBNORMAL[kind](x) * 1e20 * 1e20)
    x = torch.tensor([[1.2345678]])
    for method in (*METHODS, "lipschitz"):
        found = []
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            with torch.no_grad():
                value = bm(x)
                found.append((value, bm.bound(pycert.LpBall(x, 0.0), method)))
            still_on = torch.tensor(1e-39) * 1 == 0
            torch.set_flush_denormal(False)
            assert bool(still_on) == flush
        for _, bounds in found:
            assert all(torch.equal(a, b) for a, b in zip(bounds, found[0][1]))
            for value, _ in found:
                assert bounds.lower <= value <= bounds.upper, (method, value, bounds)


@pytest.mark.parametrize("method", ("ibp", "crown-ibp", "crown", "alpha-crown", "forward", "lipschitz"))
@pytest.mark.parametrize("convolution", (False, True))
def test_inputs_that_are_flushed(convolution, method, flushed):
    layer = nn.Conv1d(1, 1, 1, bias=False) if convolution else nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1e38)
    x = torch.full((1, 1, 1) if convolution else (1, 1), 3e-39)
    bounds = pycert.BoundedModule(layer, x).bound(
        pycert.Box(x, x) if method != "lipschitz" else pycert.LpBall(x, 0.0), method
    )
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        with torch.no_grad():
            value = layer(x).flatten()
        torch.set_flush_denormal(False)
        assert (bounds.lower.flatten() <= value).all() and (value <= bounds.upper.flatten()).all(), (
            flush,
            value,
            bounds,
        )


def subnormal_batch_norm() -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(1)
    layer.weight.data.fill_(1e-39)
    return layer


# Of inputs of 1e30: a factor below the smallest normal number, which an execution may take for 0.
FLUSHED_FACTORS: dict[str, Callable[[], pycert.BoundedModule]] = {
    "product": lambda: bounded(lambda self, x: x * torch.tensor(1e-39) * 1e9),
    "batch norm": lambda: bounded(lambda self, x: self.norm(x) * 1e9, norm=subnormal_batch_norm()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FLUSHED_FACTORS)
def test_factors_that_are_flushed(kind, method, flushed):
    bm, x = FLUSHED_FACTORS[kind](), torch.tensor([[1e30]])
    values = []
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        with torch.no_grad():
            values.append(bm(x))
        torch.set_flush_denormal(False)
    assert values[0] > 0.5 and values[1] == 0
    bounds = bm.bound(pycert.Box(x, x), method, intersect=False)
    assert all(bounds.lower <= value <= bounds.upper for value in values), (values, bounds)


def test_regions_of_subnormal_radius_while_flushing(flushed):
    torch.set_flush_denormal(True)
    ball = pycert.LpBall(torch.zeros(1, 2), 1e-40)
    torch.set_flush_denormal(False)
    assert (ball.upper >= 1e-40).all() and (ball.lower <= -1e-40).all()


@pytest.mark.parametrize("method", ("crown-ibp", "crown", "forward"))
def test_linear_functions_that_overflow_are_constants(method):
    def gate(self, x: Tensor) -> Tensor:
        y = (x * torch.tensor([1.0, -6e18])).relu()
        return (y * y.flip(-1)) @ torch.tensor([[1.4e23], [2.1e23]])

    x = torch.tensor([[0.4, -0.4]])
    bm = pycert.BoundedModule(Apply(gate), x)
    for where in (pycert.LpBall(x, 1e-3), pycert.Box(torch.full_like(x, -3e38), torch.full_like(x, 3e38))):
        linear = bm.bound(where, method, return_linear=True, intersect=False).linear
        assert torch.isfinite(linear.A_lower).all() and torch.isfinite(linear.A_upper).all()
        assert (linear.c_lower < 0).all() and (linear.c_upper > 0).all()


def test_a_large_sample_does_not_loosen_the_others_of_its_batch():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(2, 4)
    x[1] = 1e37
    bm = pycert.BoundedModule(net, x)
    alone, together = (bm.bound(pycert.LpBall(t, 1e-3), "forward") for t in (x[:1], x))
    torch.testing.assert_close(together.lower[:1], alone.lower, rtol=1e-5, atol=1e-5)
