"""Bounds of every element of the Clarke Jacobian over a region, and Lipschitz constants from them.

The Jacobian is a product of weights and of diagonals of slopes. Its rows are pulled back from the outputs to the inputs
as intervals; with ``method="linear"`` linear functions of them are also bounded as such: a slope in ``[a, b]`` times
an element ``m`` in ``[l, u]`` lies between the chords of ``min(a m, b m)`` (concave) and ``max(a m, b m)`` (convex), so
that a linear function of the rows at one layer becomes one at the layer above, up to the outputs, where rows are known.

Source: Shi, Wang, Zhang, Kolter and Hsieh, "Efficiently computing local Lipschitz constants of neural networks via
bound propagation", NeurIPS 2022, sections 3.2 to 3.4.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from pycert.bounded import BoundedModule
from pycert.lipschitz.bounds import LipschitzBound, walk_over
from pycert.lipschitz.pullback import (
    LINEAR,
    Rows,
    composite,
    interval_product,
    is_activation,
    pull,
    push,
    selection_range,
)
from pycert.lipschitz.walk import Settings, UnsupportedBound, Walk
from pycert.norms.arithmetic import UP, gamma, round_up
from pycert.norms.dense import norm_bound
from pycert.regions import Region

METHODS = ("interval", "linear")
#: Elements of the linear functions of one layer's rows that are bounded together; more stay intervals.
_MOST = 2**24


@dataclasses.dataclass
class JacobianBound:
    """``lower <= J <= upper`` elementwise for every Clarke Jacobian on the region.

    lower, upper: ``[B, n_out, n_in]`` float64 (inputs and outputs flattened, several inputs one after the other).
    row_sums: ``[B, n_out]``, bounds of the 1-norms of the rows. dtype: of constants.
    """

    lower: Tensor
    upper: Tensor
    row_sums: Tensor
    dtype: torch.dtype

    def constant(self, p: float = math.inf) -> LipschitzBound:
        """``[B]`` Lipschitz constants in the p-norm, p = 1, 2 or inf, on both sides; sound.

        For p = 2 by ``||C||_2 + ||R||_2`` of centres and radii, and by the norm of the largest magnitudes.
        """
        if p not in (1, 2, math.inf):
            raise ValueError(f"p must be 1, 2 or inf, got {p!r}")
        largest = torch.maximum(self.lower.abs(), self.upper.abs())
        if p == math.inf:
            value = self.row_sums.amax(1)
        elif p == 1:
            value = (largest.sum(1) * (1 + gamma(largest.shape[1] + 2))).amax(1)
        else:
            middle = self.lower / 2 + self.upper / 2
            radius = torch.maximum(self.upper - middle, middle - self.lower) * UP
            usable = torch.isfinite(largest).flatten(1).all(1)[:, None, None]
            centres, radii, whole = (
                norm_bound(torch.where(usable, part, torch.zeros_like(part)))
                for part in (middle, radius, largest)
            )
            value = torch.minimum((centres + radii) * UP, whole)
            value = torch.where(usable[:, 0, 0], value, torch.full_like(value, math.inf))
        value = torch.where(torch.isnan(value), torch.full_like(value, math.inf), value)
        return LipschitzBound.of(round_up(value, self.dtype), True, float(p), [])


def jacobian_bound(
    bm: BoundedModule, region: Region | tuple[Region, ...], method: str = "linear"
) -> JacobianBound:
    """Bounds of the Clarke Jacobian on every sample's region.

    Args:
        bm: the network; affine layers, elementwise functions, maxima and minima of pairs, sums and concatenations.
        region: as in :meth:`BoundedModule.bound`.
        method: ``"interval"``, or ``"linear"``, never wider, at a forward pass per output for the row sums and, where
            that is affordable, one per element for the bounds of elements.

    Returns:
        :class:`JacobianBound`; ``.constant(p)`` gives Lipschitz constants.

    Raises:
        ValueError: an unknown method; an operator that has no such bound; weights that are not finite.

    Soundness: outward rounded; of the network in real arithmetic with these weights. Gradient: none.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of 'interval', 'linear', got {method!r}")
    with torch.no_grad():
        walk = walk_over(bm, region, Settings(math.inf), bm.graph.output, "real")
        first = region[0] if isinstance(region, tuple) else region
        found = _Jacobian(walk, method == "linear").bound(first.lower.dtype)
        if not bool(torch.isfinite(found.row_sums).all()):
            bm._diagnose(walk.tensors)
        return found


Interval = tuple[Tensor, Tensor]


class _Jacobian:
    """Intervals ``[B, S, numel]`` of what the outputs' rows are as functions of every value."""

    def __init__(self, walk: Walk, linear: bool) -> None:
        self.walk, self.linear = walk, linear
        self.rows = walk.graph.numel(walk.graph.output)
        self.intervals: dict[int, Interval] = {}
        self.slopes: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

    def bound(self, dtype: torch.dtype) -> JacobianBound:
        walk = self.walk
        self._pull_back()
        inputs = [i for i, node in enumerate(walk.graph.nodes) if node.op == "input"]
        lower, upper = (torch.cat(ends, -1) for ends in zip(*(self._of_input(i) for i in inputs)))
        largest = torch.maximum(lower.abs(), upper.abs())
        sums = largest.sum(-1) * (1 + gamma(largest.shape[-1] + 2))
        if self.linear:
            sums = torch.minimum(sums, self._row_sums(inputs, lower, upper))
        return JacobianBound(lower, upper, sums, dtype)

    def _of_input(self, i: int) -> Interval:
        if i not in self.intervals:  # the outputs do not depend on it
            zero = torch.zeros(self.walk.batch, self.rows, self.walk.graph.numel(i), dtype=torch.float64)
            return zero, zero
        return self.intervals[i]

    # ---- from the outputs to the inputs -------------------------------------------------------------------

    def _pull_back(self) -> None:
        walk = self.walk
        output = walk.graph.output
        if not walk.varies(output):
            return
        start = torch.eye(self.rows, dtype=torch.float64).expand(walk.batch, -1, -1)
        pending = {output: (start, start)}
        while pending:
            i = max(pending)
            here = self.intervals[i] = self._tightened(i, pending.pop(i))
            for j, (lower, upper) in self._step(i, here):
                if j in pending:
                    lower, upper = _outward(pending[j][0] + lower, pending[j][1] + upper)
                pending[j] = lower, upper

    def _step(self, i: int, here: Interval) -> list[tuple[int, Interval]]:
        walk, node = self.walk, self.walk.graph.nodes[i]
        if node.op == "input":
            return []
        if node.op in LINEAR:
            return self._through(i, here)
        if not (is_activation(walk, i) or node.op in ("max2", "min2")):
            raise UnsupportedBound(f"jacobian_bound does not cover the operator '{node.op}' at '{node.path}'")
        if is_activation(walk, i):
            self.slopes[i] = [composite(walk, i)]
        else:
            self.slopes[i] = [(j, *selection_range(walk, i, j)) for j in node.inputs[:2]]
        return [
            (j, interval_product(least[:, None], most[:, None], *here)) for j, least, most in self.slopes[i]
        ]

    def _through(self, i: int, here: Interval) -> list[tuple[int, Interval]]:
        """Centres by the operator, radii by its magnitudes; what either lost in the 1-norm is in no element more."""
        lower, upper = here
        middle = lower / 2 + upper / 2
        radius = torch.maximum(upper - middle, middle - lower) * UP
        none = torch.zeros(middle.shape[:2], dtype=torch.float64)
        found = []
        wide = dict(pull(self.walk, i, Rows(radius, none), absolute=True))
        for j, rows in pull(self.walk, i, Rows(middle, none)):
            around = wide[j]
            reach = (around.matrix + (rows.error + around.error)[..., None]) * UP
            found.append((j, _outward(rows.matrix - reach, rows.matrix + reach)))
        return found

    # ---- linear functions of the rows ---------------------------------------------------------------------

    def _tightened(self, i: int, here: Interval) -> Interval:
        """Every element as a linear function of its own, where the method and the size allow that."""
        count = self.walk.graph.numel(i)
        node = self.walk.graph.nodes[i]
        if not self.linear or not (node.op == "input" or is_activation(self.walk, i)):
            return here
        lower, upper = here
        largest = max(self.walk.graph.numel(j) for j in range(i, self.walk.graph.output + 1))
        if self.walk.batch * self.rows * count * largest > _MOST or bool((lower == upper).all()):
            return here
        one = torch.eye(count, dtype=torch.float64).expand(self.walk.batch, self.rows, count, count)
        self.intervals[i] = here
        return (
            torch.maximum(lower, -self._upper({i: -one})),
            torch.minimum(upper, self._upper({i: one})),
        )

    def _row_sums(self, inputs: list[int], lower: Tensor, upper: Tensor) -> Tensor:
        """``sum_j |J_j|`` by the chords of the magnitude over ``[lower, upper]``."""
        width = upper - lower
        slope = torch.where(width > 0, (upper.abs() - lower.abs()) / width, torch.sign(upper)).clamp(-1, 1)
        rest = torch.maximum(upper.abs() - slope * upper, lower.abs() - slope * lower)
        rest = rest + (upper.abs() + lower.abs()) * gamma(4)
        sizes = [self.walk.graph.numel(i) for i in inputs]
        parts = slope[:, :, None, :].split(sizes, dim=-1)
        starts = {i: part for i, part in zip(inputs, parts) if i in self.intervals}
        if not starts:
            return rest.sum(-1)
        total = rest.sum(-1) + rest.abs().sum(-1) * gamma(rest.shape[-1] + 2)
        value = total + self._upper(starts)[..., 0]
        value = value + value.abs() * gamma(4)
        return torch.where(torch.isnan(value), torch.full_like(value, math.inf), value)

    def _upper(self, starts: dict[int, Tensor]) -> Tensor:
        """At least ``<A, M>`` for functions ``A [B, S, T, numel]`` of the rows at some values; ``[B, S, T]``."""
        walk = self.walk
        found = dict(starts)
        total = torch.zeros(next(iter(starts.values())).shape[:3], dtype=torch.float64)
        for i in range(min(starts) + 1, walk.graph.output + 1):
            if i not in self.intervals or i in starts:
                continue
            if i in self.slopes:
                given = [(part, found[part[0]]) for part in self.slopes[i] if part[0] in found]
                if given:
                    found[i], lost = self._chords(i, given)
                    total = _add(total, lost)
                continue
            some = {j: found[j] for j in walk.graph.nodes[i].inputs if j in found}
            if some:
                found[i], lost = push(walk, i, some)
                size = torch.maximum(self.intervals[i][0].abs(), self.intervals[i][1].abs()).amax(-1)
                total = _add(total, lost * size[:, :, None] * UP)
        last = found.get(walk.graph.output)
        if last is None:
            return total
        own = torch.diagonal(last, dim1=1, dim2=3).transpose(
            1, 2
        )  # row s of the outputs is the s-th unit vector
        value = _add(total, own)
        return torch.where(torch.isnan(value), torch.full_like(value, math.inf), value)

    def _chords(
        self, i: int, given: list[tuple[tuple[int, Tensor, Tensor], Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """``g d m`` summed over elements and parts, by a linear function of ``m`` and a constant."""
        lower, upper = (end[:, :, None, :] for end in self.intervals[i])
        line: Tensor | None = None
        total: Tensor | None = None
        for (_, least, most), g in given:
            a, b = least[:, None, None, :], most[:, None, None, :]
            rising = g >= 0
            # max(a m, b m) where g >= 0, min(a m, b m) where not; both are a line on either side of 0.
            left = torch.where((lower > 0) == rising, b, a) * lower
            right = torch.where((upper > 0) == rising, b, a) * upper
            width = upper - lower
            slope = torch.where(width > 0, (right - left) / width, torch.where(rising, b, a))
            slope = torch.minimum(torch.maximum(slope, a), b)
            ends = torch.stack([left - slope * lower, right - slope * upper])
            rest = torch.where(rising, ends.amax(0), ends.amin(0))
            size = g.abs() * torch.maximum(left.abs(), right.abs())
            size = size + g.abs() * torch.maximum(a.abs(), b.abs()) * torch.maximum(lower.abs(), upper.abs())
            lost = size.sum(-1) * (2 * gamma(lower.shape[-1] + 16)) + 1e-290
            part = (g * rest).sum(-1) + lost
            line = g * slope if line is None else line + g * slope
            total = part if total is None else _add(total, part)
        assert line is not None and total is not None
        return line, total


def _outward(lower: Tensor, upper: Tensor) -> Interval:
    slack = 2.0**-51
    return lower - lower.abs() * slack - 1e-300, upper + upper.abs() * slack + 1e-300


def _add(total: Tensor, term: Tensor) -> Tensor:
    value = total + term
    return value + (total.abs() + term.abs()) * 2.0**-51
