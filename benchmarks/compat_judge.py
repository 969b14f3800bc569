"""A pytest plugin for auto_LiRPA's own tests run through :mod:`pycert.compat.auto_LiRPA`.

Its tests compare bounds with stored tensors. A bound that lies inside the stored one counts as passed if it
is sound; so where ``torch.allclose`` finds a difference, this plugin asks on which side a bound returned by
``compute_bounds`` stands. All bounds returned are tried against executions in float64 at corners and random
points of their region; a test that got an unsound bound fails, whatever it asserts.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

POINTS = 16
_allclose = torch.allclose


class Judge:
    """Bounds returned during one test: which storages are lower and which are upper bounds."""

    def __init__(self) -> None:
        self.sides: dict[int, int] = {}
        self.kept: list[Any] = []
        self.wrong: list[str] = []
        self.inside = 0

    def note(self, tensor: Any, side: int) -> None:
        if isinstance(tensor, Tensor):
            self.sides[tensor.untyped_storage().data_ptr()] = side
            self.kept.append(tensor)  # so that no other tensor gets its memory

    def side(self, tensor: Any) -> int:
        return self.sides.get(tensor.untyped_storage().data_ptr(), 0) if isinstance(tensor, Tensor) else 0

    def allclose(self, a: Any, b: Any, *args: Any, **kwargs: Any) -> bool:
        """``torch.allclose``, or a bound of ours inside the other one."""
        if _allclose(a, b, *args, **kwargs):
            return True
        sides = self.side(a), self.side(b)
        if sides == (0, 0) or 0 not in sides or a.shape != b.shape:
            return False
        ours, theirs = (a, b) if sides[0] else (b, a)
        rtol = kwargs.get("rtol", args[0] if args else 1e-5)
        atol = kwargs.get("atol", args[1] if len(args) > 1 else 1e-8)
        beyond = (theirs - ours) * (sides[0] or sides[1])
        inside = bool((beyond.detach() <= atol + rtol * theirs.detach().abs()).all())
        self.inside += inside
        return inside

    def check(self, module: Any, lower: Any, upper: Any, rows: Any) -> None:
        """Executes the network at points of the region of the last call, in float64."""
        inputs = module._inputs
        if (
            inputs is None
            or module._network.fused
            or any(p is not None and p.concretizes for p in inputs.perturbations)
        ):
            return
        from pycert.reference import graph as reference

        graph = module._network.engine.graph
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), module._mode(module.training):
            clean = [value.double() for value in inputs.values]
            statistics = reference.clean_statistics(graph, *clean)
            for number in range(POINTS):
                points = [_point(region, number, generator) for region in inputs.regions]
                out = reference.evaluate(graph, *points, statistics=statistics)
                if isinstance(rows, Tensor):
                    out = (rows.double().flatten(2) @ out.flatten(1).unsqueeze(-1)).squeeze(-1)
                slack = 1e-4 * out.abs() + 1e-5
                low = lower is not None and bool((out < lower.double().view_as(out) - slack).any())
                high = upper is not None and bool((out > upper.double().view_as(out) + slack).any())
                if low or high:
                    self.wrong.append("an execution lies outside of the bounds")
                    return


def _point(region: Any, number: int, generator: torch.Generator) -> Tensor:
    """A corner or random point of a box; of a ball, a point on its surface or within."""
    lower, upper = region.lower.detach().double(), region.upper.detach().double()
    share = torch.rand(lower.shape, generator=generator, dtype=torch.float64)
    if getattr(region, "p", math.inf) == math.inf:
        return lower + (upper - lower) * (share.round() if number % 2 == 0 else share)
    x = region.x.detach().double()
    step = (share - 0.5).flatten(1)
    if region.p == 1 and number % 2 == 0:  # a vertex
        step = torch.zeros_like(step).scatter_(1, share.flatten(1).argmax(1, keepdim=True), 1.0)
    step = step / step.norm(region.p, dim=1, keepdim=True)
    return x + (step * region.eps.detach().double().view(-1, 1)).view_as(x)


@pytest.fixture(autouse=True)
def _judged(monkeypatch: pytest.MonkeyPatch) -> Any:
    from pycert.compat.auto_LiRPA import BoundedModule

    judge, compute = Judge(), BoundedModule.compute_bounds

    def compute_bounds(module: Any, *args: Any, **kwargs: Any) -> Any:
        found = compute(module, *args, **kwargs)
        for tensor, side in zip(found[:2], (1, -1)):
            judge.note(tensor, side)
        judge.check(module, found[0], found[1], kwargs.get("C"))
        return found

    save = BoundedModule.save_intermediate

    def save_intermediate(module: Any, *args: Any, **kwargs: Any) -> Any:
        saved = save(module, *args, **kwargs)
        for lower, upper in saved.values():
            judge.note(lower, 1)
            judge.note(upper, -1)
        return saved

    monkeypatch.setattr(BoundedModule, "compute_bounds", compute_bounds)
    monkeypatch.setattr(BoundedModule, "save_intermediate", save_intermediate)
    monkeypatch.setattr(torch, "allclose", judge.allclose)
    yield judge
    assert not judge.wrong, judge.wrong[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bounds that are compared by a sum of squares: inside the stored ones is enough."""
    for item in items:
        cls = getattr(item, "cls", None)
        verify = getattr(cls, "verify_bounds", None)
        if verify is not None and not hasattr(verify, "judged"):
            cls.verify_bounds = _inside(verify)


def _inside(verify: Any) -> Any:
    def verify_bounds(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            verify(self, *args, **kwargs)
        except AssertionError:
            low, high = kwargs["lb_name"], kwargs["ub_name"]
            if low not in self.result:
                raise
            gain = self.result[low] - self.reference[low], self.reference[high] - self.result[high]
            rounding = 5e-6 if kwargs.get("method") == "CROWN-Optimized" else 1e-6  # of float32
            if min(part.min() for part in gain) < -rounding:
                raise
            # Gradients add up in x: equal while its bounds have been equal, others after a tighter one.
            name, x = low.removesuffix("lb") + "grad", args[1]
            if max(part.max() for part in gain) >= rounding:
                x.has_tighter = True
            elif name in self.reference and not hasattr(x, "has_tighter"):
                if not _allclose(self.result[name], self.reference[name], 1e-4, 1e-6):
                    raise

    verify_bounds.judged = True  # type: ignore[attr-defined]
    return verify_bounds
