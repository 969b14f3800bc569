"""Lipschitz certificates hold for executions only with every term that pays for their roundings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pycert
from judging import ordered_product
from pycert import _C
from pycert.lipschitz.walk import Walk

#: Just under half a unit in the last place of 1: a sum from the left loses every one of them.
DUST = 0.99 * 2.0**-24


@pytest.fixture(autouse=True)
def only_the_terms_of_executions() -> Iterator[None]:
    """The slack of our own products is of the same size, and would hide the terms looked at here."""
    for term in ("own_product", "backsub_own", "backsub_constant"):
        _C.testing_disable(term)
    yield
    _C.testing_enable_all()


def one_and_dust(count: int) -> Tensor:
    x = torch.full((1, count), DUST)
    x[0, 0] = 1
    return x


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


def escapes(net: nn.Sequential, x: Tensor, executed: float) -> bool:
    bm = pycert.BoundedModule(net, x)
    with torch.no_grad():
        bounds = bm.bound(pycert.LpBall(x, 1e-9, 2), method="lipschitz", soundness="deployed")
    return not bounds.lower.item() <= executed <= bounds.upper.item()


def in_the_last_layer() -> tuple[nn.Sequential, Tensor, float]:
    x = one_and_dust(512)
    return nn.Sequential(linear(torch.ones(1, 512))), x, 1.0


def in_a_hidden_layer() -> tuple[nn.Sequential, Tensor, float]:
    x = one_and_dust(512)
    return nn.Sequential(linear(torch.ones(1, 512)), nn.ReLU(), linear(torch.full((1, 1), 4.0))), x, 4.0


def without_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walk, "_with_noise", lambda self, lengths, noise: lengths)


def without_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Walk._affine_noise

    def noise(self: Walk, i: int) -> Tensor:
        return original(self, i) * (0.0 if i == self.graph.output else 1.0)

    monkeypatch.setattr(Walk, "_affine_noise", noise)


CASES = [(in_the_last_layer, without_the_last_layer), (in_a_hidden_layer, without_lengths)]


def test_the_adversary_does_what_it_says():
    x = one_and_dust(512)
    assert ordered_product(np.ones((1, 512), np.float32), x.numpy(), None, "forward") == 1


@pytest.mark.parametrize("case,removed", CASES, ids=lambda one: one.__name__)
def test_executions_escape_without_the_term(
    case: Callable[[], tuple[nn.Sequential, Tensor, float]],
    removed: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
):
    net, x, executed = case()
    assert not escapes(net, x, executed)
    removed(monkeypatch)
    assert escapes(net, x, executed)


@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=lambda one: one.__name__)
def test_real_bounds_do_not_cover_executions(case):
    net, x, executed = case()
    bm = pycert.BoundedModule(net, x)
    with torch.no_grad():
        bounds = bm.bound(pycert.LpBall(x, 1e-9, 2), method="lipschitz", soundness="real")
    assert bounds.lower.item() > executed
