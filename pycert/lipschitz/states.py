"""The three-state bound: neurons that are certainly on are linear, those certainly off are gone, the rest are split.

On an interval on which an activation's slopes lie in ``[a, b]`` it is ``c z + psi(z)`` with ``c = (a + b) / 2`` and
``psi`` moving at most ``r = (b - a) / 2`` as far as ``z``. Pulling an output back through the linear parts alone, every
activation ``j`` passed adds ``||M_j S_j|| t_j``: ``M_j`` what the output is as a linear function of that activation,
``S_j`` the neurons with ``r > 0``, ``t_j`` a Lipschitz constant of ``r z_j``. What is left at any one value is
multiplied by the constant of the walk there, so that the product bound is the case of stopping at once.

Source: the loop transformation of Fazlyab et al., "Certified robustness via dynamic margin maximization and improved
Lipschitz regularization", NeurIPS 2023, with the slopes of the region in place of [0, 1]; docs/lipschitz.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pycert.lipschitz.pullback import LINEAR, Rows, composite, hypotenuse, is_activation, pull
from pycert.lipschitz.walk import Walk
from pycert.norms.arithmetic import UP, dual_norm, gamma, with_gradient
from pycert.norms.dense import norm_bound

#: Floating-point operations that the constant of one layer of one sample may cost.
BUDGETS = {"normal": 3e8, "high": 4e10}
#: Elements of the rows held at a time.
_CHUNK = 2**24

Measure = Callable[[Rows], Tensor]


class ThreeState:
    """Over a finished walk with a region."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.p = walk, walk.settings.p
        self._split: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._reaches: dict[int, Tensor] = {}

    def of_rows(self, table: Tensor) -> Tensor:
        """``[B, S]``: constants of the single functions ``C f``, from the p-norm to the absolute value."""
        return self._in_parts(self.walk.graph.output, table, self._row_measure)

    def of_outputs(self) -> Tensor:
        """``[B]``: the constant of the whole network, infinite where it costs more than the budget."""
        output = self.walk.graph.output
        if self._cost(output) > BUDGETS[self.walk.settings.effort]:
            return torch.full((self.walk.batch,), math.inf, dtype=torch.float64)
        return self._of_all_elements(output, torch.ones(1, dtype=torch.float64))

    def _of_all_elements(self, i: int, scale: Tensor) -> Tensor:
        """``[B]``: the constant of node ``i`` times a diagonal ``[B or 1, numel or 1]``."""
        count = self.walk.graph.numel(i)
        table = torch.eye(count, dtype=torch.float64) * scale.expand(self.walk.batch, count)[:, None, :]
        return self._in_parts(i, table, self._matrix_measure)

    # ---- sizes of rows ------------------------------------------------------------------------------------

    def _row_measure(self, rows: Rows) -> Tensor:
        return (dual_norm(rows.matrix, self.p) + rows.error) * UP

    def _matrix_measure(self, rows: Rows) -> Tensor:
        """``[B, 1]``; the 1-norms of the rows' errors sum up to at least every p-norm of their matrix."""
        matrix = rows.matrix
        usable = torch.isfinite(matrix).flatten(1).all(1)
        if self.p == 2:
            matrix = torch.where(usable[:, None, None], matrix, torch.zeros_like(matrix))
            with torch.no_grad():
                norms = norm_bound(matrix)
            if torch.is_grad_enabled() and matrix.requires_grad:
                norms = with_gradient(norms, torch.linalg.matrix_norm(matrix, ord=2))
        else:
            sums = matrix.abs().sum(1 if self.p == 1 else 2)
            norms = sums.amax(1) * ((1 + gamma(max(matrix.shape[1:]) + 2)) * UP)
        norms = torch.where(usable, norms, torch.full_like(norms, math.inf))
        return ((norms + rows.error.sum(1) * (1 + gamma(rows.error.shape[1] + 2))) * UP)[:, None]

    # ---- pulling back -------------------------------------------------------------------------------------

    def _in_parts(self, start: int, table: Tensor, measure: Measure) -> Tensor:
        """:meth:`_bound` for a few samples at a time; ``[B, S]``, or ``[B]`` for a measure of matrices."""
        largest = max(self.walk.graph.numel(i) for i in range(start + 1))
        step = max(1, _CHUNK // max(1, table.shape[1] * largest))
        found = []
        for first in range(0, self.walk.batch, step):
            part = slice(first, min(first + step, self.walk.batch))
            rows = Rows(table[part], table.new_zeros(table[part].shape[:2]))
            found.append(self._bound(start, rows, part, measure))
        result = torch.cat(found)
        return result[:, 0] if measure == self._matrix_measure else result

    def _bound(self, start: int, rows: Rows, samples: slice, measure: Measure) -> Tensor:
        """The least, over where to stop, of what the activations passed add and what is left there."""
        walk = self.walk
        pending = {start: rows}
        total: Tensor | None = None
        best: Tensor | None = None
        while pending:
            i = max(pending)
            rows = pending.pop(i)
            activation = is_activation(walk, i)
            passes = activation or walk.graph.nodes[i].op in LINEAR
            if not passes or (not pending and walk.is_resolved(i)):
                stopped = _sum(total, self._left(i, rows, samples, measure))
                if not pending:
                    best = stopped if best is None else torch.minimum(best, stopped)
                if not passes:
                    total = stopped
                    continue
            if activation:
                root, middle, spread = self._parts(i)
                middle, spread = middle[samples], spread[samples]
                split = (spread > 0).double()
                if bool(split.any()):
                    reach = self._reach(i)[samples, None]
                    total = _sum(total, measure(rows.scaled(split, True)) * reach)
                found = [(root, rows.scaled(middle, True))]
            else:
                found = pull(walk, i, rows)
            for j, part in found:
                pending[j] = pending[j].plus(part) if j in pending else part
        # Where nothing varies nothing was stopped at.
        return torch.zeros_like(measure(rows)) if best is None else best

    def _left(self, i: int, rows: Rows, samples: slice, measure: Measure) -> Tensor:
        """The size of the rows on what varies, times the constant there."""
        value = self.walk.lengths(i)
        if value.support is not None:
            live = value.support.flatten(1).double().expand(self.walk.batch, -1)
            rows = rows.scaled(live[samples], True)
        return measure(rows) * value.lengths[samples, :1] * UP

    # ---- activations --------------------------------------------------------------------------------------

    def _parts(self, i: int) -> tuple[int, Tensor, Tensor]:
        """What an activation reads, ``c`` and ``r``, ``[B, numel]``; both 0 where it is constant on the region."""
        if i not in self._split:
            root, least, most = composite(self.walk, i)
            varies = (self._largest(i) > 0).double()
            middle = (least + most) / 2
            spread = torch.maximum(most - middle, middle - least) * UP
            self._split[i] = root, middle * varies, spread * varies
        return self._split[i]

    def _largest(self, i: int) -> Tensor:
        """The slopes ``[B, numel]`` that the walk's constant of activation ``i`` counts with (1 for a hypotenuse)."""
        walk = self.walk
        if hypotenuse(walk, i) is not None:
            return torch.ones(walk.batch, walk.graph.numel(i), dtype=torch.float64)
        source = self._source(i)
        slope = walk._slope(i, source)[0].flatten(1).expand(walk.batch, -1)
        return slope * self._largest(source) if is_activation(walk, source) else slope

    def _source(self, i: int) -> int:
        """What activation ``i`` reads that varies."""
        first, *others = self.walk.graph.nodes[i].inputs
        return first if self.walk.varies(first) else others[0]

    def _has_hypotenuse(self, i: int) -> bool:
        """Whether the chain of activations that ends in ``i`` has one: the walk counts with other slopes then."""
        while is_activation(self.walk, i):
            if hypotenuse(self.walk, i) is not None:
                return True
            i = self._source(i)
        return False

    def _reach(self, i: int) -> Tensor:
        """``[B]``: a constant of ``r z``, by the walk's own of the activation, or by this bound where affordable."""
        if i not in self._reaches:
            root, _, spread = self._parts(i)
            if self._has_hypotenuse(i):
                best = self.walk.lengths(root).lengths[:, 0] * spread.amax(1) * UP
            else:
                # ||r z|| <= max(r / D) ||D z|| with D the slopes of the walk.
                share = torch.where(spread > 0, spread / self._largest(i), torch.zeros_like(spread)).amax(1)
                best = self.walk.lengths(i).lengths[:, 0] * share * UP
            if self._cost(root) <= BUDGETS[self.walk.settings.effort]:
                best = torch.minimum(best, self._of_all_elements(root, spread))
            self._reaches[i] = best
        return self._reaches[i]

    def _cost(self, start: int) -> float:
        """Floating-point operations of :meth:`_of_all_elements` for one sample."""
        walk = self.walk
        count = float(walk.graph.numel(start))
        seen, total = {start}, 0.0
        for i in range(start, -1, -1):
            if i not in seen:
                continue
            node = walk.graph.nodes[i]
            if is_activation(walk, i):
                seen.add(self._parts(i)[0])
                total += 2 * count**2 * walk.graph.numel(i)
            elif node.op in LINEAR:
                seen.update(node.inputs)
                total += 2 * count * max(walk._terms(i), 1.0) * walk.graph.numel(i)
        return total + 4 * count**3


def _sum(total: Tensor | None, term: Tensor) -> Tensor:
    """Rounded up; infinity for NaN, which says nothing."""
    value = term * UP if total is None else (total + term * UP) * UP
    return torch.where(torch.isnan(value), torch.full_like(value, math.inf), value)
