"""Running out of memory: one allocation of a call after the other fails, and what comes out is the same bound or that
error, never a bound or an error that rests on something half done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pycert
from pycert import _C


class Mixed(nn.Module):
    """One of each thing that a call keeps for later: lines of activations and pools, planes, charges, sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.gate, self.last = nn.Conv2d(2, 2, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.first(x), 0.1)
        x = torch.relu(self.second(x)) * torch.sigmoid(self.gate(x))
        return self.last(torch.relu(nn.functional.max_pool2d(x, 2) - 0.01).flatten(1)).abs()


CALLS = {
    "crown": dict(method="crown"),
    "linear": dict(method="crown", return_linear=True),
    "alpha-crown": dict(method="alpha-crown", iterations=1),
    "shared": dict(method="alpha-crown", iterations=2, alpha="shared"),
    "intermediate": dict(method="alpha-crown", iterations=1, intermediate="alpha-crown"),
    "gradient": dict(method="crown", memory="16KiB"),
}


def fail_each(net: nn.Module, x: Tensor, name: str, step: int) -> None:
    """With every ``step``-th allocation failing, each in a call of its own."""
    bm = pycert.BoundedModule(net.to(x.dtype), x[:1])
    region = pycert.LpBall(x, eps=0.1)

    def bound() -> list[Tensor]:
        with torch.set_grad_enabled(name == "gradient"):
            found = bm.bound(region, **CALLS[name])
        linear = vars(found.linear).values() if name == "linear" else ()
        return [t.detach() for t in (*found, *linear)]

    expected = bound()
    _C.testing_fail_allocation(-1)
    bound()
    count = _C.testing_fail_allocation(-1)
    went_on = 0
    for number in range(0, count, step):
        _C.testing_fail_allocation(number)
        try:
            found = bound()
        except RuntimeError as error:
            assert "can't allocate memory: a test's failure" in str(error), f"allocation {number} of {count}"
        else:
            went_on += 1
            for right, mine in zip(expected, found, strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-7, atol=1e-7)
        finally:
            assert _C.testing_fail_allocation(-1) > number, "the allocation was never asked for"
    assert went_on > count / step / 4


@pytest.mark.parametrize("name", ["crown", "alpha-crown"])
def test_a_failed_allocation_leaves_the_bound_or_its_error(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    fail_each(net, torch.rand(2, 3, dtype=torch.float64), name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_failed_allocation_in_any_operator(name):
    torch.manual_seed(0)
    fail_each(Mixed(), torch.rand(2, 1, 4, 4, dtype=torch.float64), name, 2)
