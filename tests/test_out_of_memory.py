"""Running out of memory: every allocation of a call fails once, and what comes out is the same bound or that error."""

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


#: How many allocations fail of each call; all of them with `slow`.
FEW = 24
CALLS = {
    "crown": dict(method="crown"),
    "linear": dict(method="crown", return_linear=True),
    "alpha-crown": dict(method="alpha-crown", iterations=2),
    "shared": dict(method="alpha-crown", iterations=2, alpha="shared"),
    "intermediate": dict(method="alpha-crown", iterations=1, intermediate="alpha-crown"),
    "gradient": dict(method="crown", memory="16KiB"),
}


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("name", CALLS)
def test_a_failed_allocation_leaves_the_bound_or_its_error(name, few):
    torch.manual_seed(0)
    bm = pycert.BoundedModule(Mixed().double(), torch.zeros(1, 1, 4, 4))
    region = pycert.LpBall(torch.rand(2, 1, 4, 4, dtype=torch.float64), eps=0.1)

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
    for number in range(0, count, count // FEW if few else 1):
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
    assert went_on > FEW // 4
