"""Networks that have no value somewhere in the region: NaN behind a logarithm, a pole or an overflow is in no bound."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from nets import Apply
from pycert import BoundedModule, LpBall, margins

INF = math.inf
METHODS = ("ibp", "fastlin", "crown-ibp", "crown", "forward", "alpha-crown")
UNDEFINED = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "overflow": lambda x: (x * 1e38) * 10 - (x * 1e38) * 10,
}
BOUNDED = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": nn.functional.hardsigmoid,
    "relu6": nn.functional.relu6,
    "clamp behind relu": lambda x: torch.relu(x).clamp(max=1),
    "softsign": nn.functional.softsign,
    "sin": torch.sin,
    "cos": torch.cos,
    "arctan": torch.arctan,
    "reciprocal of exp": lambda x: 1 / (1 + torch.exp(x)),
    "softmax": lambda x: torch.softmax(x, -1),
    "layer norm": lambda x: nn.functional.layer_norm(x, (2,)),
    "both extrema": lambda x: torch.maximum(torch.minimum(x, torch.ones_like(x)), -torch.ones_like(x)),
}


class Chain(nn.Module):
    """An undefined function, a linear layer where asked for, and a function of bounded range."""

    def __init__(self, first, second, mixed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = first, second
        self.inner = nn.Linear(2, 2) if mixed else nn.Identity()
        self.last = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.inner(self.first(x))))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("second", BOUNDED)
@pytest.mark.parametrize("first", UNDEFINED)
def test_no_finite_bound_hides_an_undefined_value(first, second, mixed):
    net = Chain(UNDEFINED[first], BOUNDED[second], mixed)
    bm = BoundedModule(net, torch.zeros(1, 2))
    region = LpBall(torch.tensor([[-0.5, 3.0], [4.0, 3.0]]), eps=1.0)
    for method, soundness in itertools.product(METHODS, ("real", "deployed")):
        options = {"iterations": 1} if method == "alpha-crown" else {}
        with torch.no_grad():
            bounds = bm.bound(region, method=method, soundness=soundness, **options)
        assert (bounds.lower[0] == -INF).all() and (bounds.upper[0] == INF).all(), (method, soundness)
        if first != "overflow":  # the other sample stays within the domain
            y = net(region.x[1])
            assert bounds.lower[1].isfinite().all() and bounds.upper[1].isfinite().all()
            assert (bounds.lower[1] <= y).all() and (y <= bounds.upper[1]).all()


@pytest.mark.parametrize("method", METHODS[:5])
def test_kinks_at_the_output_hide_nothing(method):
    """relu and abs of NaN are NaN, and not at least 0."""
    region = LpBall(torch.tensor([[-0.5, 3.0]]), eps=1.0)
    for kink in (torch.relu, torch.abs):
        bounds = BoundedModule(Apply(lambda self, x, f=kink: f(torch.log(x))), torch.ones(1, 2)).bound(
            region, method
        )
        assert (bounds.lower == -INF).all() and (bounds.upper == INF).all()


@pytest.mark.parametrize("name", ["sin", "cos", "softsign"])
def test_functions_that_have_no_value_at_infinity(name):
    """exp overflows to infinity, of which torch's sin, cos and softsign are NaN; the sigmoid is 1."""
    region = LpBall(torch.tensor([[2.0, 1.0]]), eps=0.5)
    for second, has_none in ((BOUNDED[name], True), (torch.sigmoid, False)):
        net = Chain(lambda x: torch.exp(100 * x), second, False)
        bounds = BoundedModule(net, torch.zeros(1, 2)).bound(region, method="ibp")
        assert net(region.x + 0.5).isnan().any() == has_none
        assert bounds.lower.isinf().all() == has_none and bounds.upper.isinf().all() == has_none


def test_branches_specifications_margins_and_layers():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.act, self.two = nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.two(self.act(self.one(torch.log(x)))), torch.tanh(x)], 1)

    bm = BoundedModule(Branches(), torch.ones(1, 2))
    region = LpBall(torch.tensor([[0.5, 3.0], [2.0, 3.0]]), eps=1.0)
    y = torch.tensor([0, 3])
    for method in ("ibp", "crown-ibp", "crown"):
        worst = margins(bm, region, y, method=method)
        assert (worst[0] == -INF).all() and worst[1].isfinite().all()
        bounds = bm.bound(region, method=method, spec=torch.eye(4)[:1], side="upper")
        assert bounds.lower is None and bounds.upper[0] == INF and bounds.upper[1].isfinite()
    linear = bm.bound(region, method="crown", return_linear=True).linear
    assert (linear.c_lower[0] == -INF).all() and (linear.c_upper[0] == INF).all()
    assert linear.c_lower[1].isfinite().all()
    layers = bm.layer_bounds(region, method="crown")
    assert layers["one"].lower[0].isinf().all() and layers["one"].lower[1].isfinite().all()
    assert any(b.lower.isfinite().all() for b in layers.values())  # what log and tanh read is known


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_plain_arithmetic_leaves_domains_alike(method):
    bm = BoundedModule(Chain(torch.log, torch.sigmoid, True), torch.zeros(1, 2))
    region = LpBall(torch.tensor([[-0.5, 3.0], [4.0, 3.0]]), eps=1.0)
    bounds = bm.bound(region, method=method, soundness="none")
    assert bounds.lower.requires_grad
    assert (
        bounds.lower[0].isinf().all() and bounds.upper[0].isinf().all() and bounds.lower[1].isfinite().all()
    )
