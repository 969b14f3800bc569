"""What the device gave against what it should have given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OPS = torch.ops.pycert
Case = Callable[["Check"], None]


class WrongResult(Exception):
    """What a kernel gave that it should not."""


class Check:
    """Calls operators on the device, within ``within``, and on the processor, and compares."""

    def __init__(self, device: torch.device, dtype: torch.dtype, within: Callable[[], Any]) -> None:
        self.device, self.dtype, self.within = device, dtype, within
        self.eps = torch.finfo(dtype).eps

    def draw(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return values.to(dtype or self.dtype)

    def box(self, *shape: int) -> tuple[Tensor, Tensor]:
        lower = self.draw(*shape, seed=1)
        return lower, lower + self.draw(*shape, seed=2).abs()

    def there(self, op: Callable[..., Any], *arguments: Any) -> tuple[Tensor | None, ...]:
        """What the operator gives on the device, brought back."""
        moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in arguments]
        with self.within():
            found = op(*moved)
        results = found if isinstance(found, (tuple, list)) else (found,)
        return tuple(None if t is None else t.detach().cpu() for t in results)

    def same(self, op: Callable[..., Any], *arguments: Any, close: float = 64) -> tuple[Tensor | None, ...]:
        """The operator on both, equal within ``close`` roundings of sums of a few hundred; what the device gave."""
        expected = op(*arguments)
        found = self.there(op, *arguments)
        self.agree(expected if isinstance(expected, (tuple, list)) else (expected,), found, close)
        return found

    def agree(
        self, expected: Sequence[Tensor | None], found: Sequence[Tensor | None], close: float = 64
    ) -> None:
        """Same shapes, same infinities; elsewhere within ``close`` roundings, of the largest value or one."""
        for right, mine in zip(expected, found, strict=True):
            if right is None or mine is None or right.numel() == 0:
                continue
            if right.shape != mine.shape:
                raise WrongResult(f"shape {list(mine.shape)} instead of {list(right.shape)}")
            right, mine = right.double(), mine.double()
            finite = right.isfinite()
            if not torch.equal(right[~finite].nan_to_num(0.5), mine[~finite].nan_to_num(0.5)):
                raise WrongResult("other infinite values")
            error = (right - mine)[finite].abs()
            size = right[finite].abs().max().clamp_min(1) if finite.any() else torch.ones(())
            if not bool((error <= close * self.eps * size).all()):
                raise WrongResult(f"off by {float(error.nan_to_num(math.inf).max()):.3g}")

    def holds(self, lower: Tensor | None, value: Tensor, upper: Tensor | None) -> None:
        """``value``, exact to the rounding of float64, is enclosed."""
        slack = 1e-13 * (1 + value.abs())
        below, above = torch.zeros(()), torch.zeros(())
        if lower is not None:
            below = (lower.double() - value - slack).clamp_min(0)
        if upper is not None:
            above = (value - upper.double() - slack).clamp_min(0)
        worst = max(float(below.nan_to_num(math.inf).max()), float(above.nan_to_num(math.inf).max()))
        if worst > 0:
            raise WrongResult(f"an exact value lies {worst:.3g} outside its bounds")


def named_cases() -> tuple[dict[str, Case], Callable[[str], Callable[[Case], Case]]]:
    """A table of cases by the kernel that a failure accuses, and the decorator that adds one to it."""
    cases: dict[str, Case] = {}

    def case(name: str) -> Callable[[Case], Case]:
        def add(run: Case) -> Case:
            cases[name] = run
            return run

        return add

    return cases, case
