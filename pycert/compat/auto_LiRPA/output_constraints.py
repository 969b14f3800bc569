"""Bounds under constraints on the output, by linear programs over the triangle relaxation.

auto_LiRPA optimises multipliers of these constraints (INVPROP: Kotha et al., "Provably Bounding Neural Network
Preimages", NeurIPS 2023); the optimum of that dual is the value of the program solved here. Every value is
recomputed from the solver's multipliers (weak duality), so that its tolerances cost tightness only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycert.compat.auto_LiRPA._triangle import Block, Triangle, block_of, triangles_before
from pycert.graph import Graph

_ERROR = (
    1e-12  # relative, of sums in float64: far above their roundings for any program that fits into memory
)


@dataclasses.dataclass
class Program:
    """``A v <= b``, ``lower <= v <= upper`` for the inputs and ReLUs ``v`` of one sample."""

    A: np.ndarray
    b: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    places: dict[int, slice]  # of every source among v

    def row(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """A block as rows over ``v`` and constants."""
        rows = np.zeros((len(block.constant), len(self.lower)))
        for source, matrix in block.matrices.items():
            rows[:, self.places[source]] = matrix.numpy()
        return rows, block.constant.numpy()

    def least(self, objective: np.ndarray) -> float | None:
        """A lower bound of ``objective @ v``; None where the solver finds no optimum."""
        from scipy.optimize import linprog

        found = linprog(
            objective, self.A, self.b, bounds=np.stack([self.lower, self.upper], 1), method="highs"
        )
        if found.status != 0:
            return None
        multipliers = np.maximum(0.0, -found.ineqlin.marginals)
        reduced = objective + multipliers @ self.A
        ends = np.minimum(reduced * self.lower, reduced * self.upper)
        value = ends.sum() - multipliers @ self.b
        magnitude = np.maximum(abs(self.lower), abs(self.upper))
        size = abs(ends).sum() + multipliers @ abs(self.b)
        size += (abs(objective) + multipliers @ abs(self.A)) @ magnitude
        return float(value - _ERROR * size)


@dataclasses.dataclass
class Sample:
    """One sample under output constraints: bounds of its input ``[n]`` and of its pre-activations."""

    graph: Graph
    lower: Tensor
    upper: Tensor
    triangles: list[Triangle]
    constraints: Tensor  # [N, n_out]
    thresholds: Tensor  # [N]

    def program(self) -> Program:
        """The relaxation with ``constraints @ f(x) <= thresholds``."""
        entry = next(number for number, node in enumerate(self.graph.nodes) if node.op == "input")
        lower, upper = [self.lower.double()], [self.upper.double()]
        places = {entry: slice(0, self.lower.numel())}
        for triangle in self.triangles:
            start = sum(len(part) for part in lower)
            places[triangle.node] = slice(start, start + len(triangle.lower))
            lower.append(triangle.lower.clamp(min=0))
            upper.append(triangle.upper.clamp(min=0))
        ends = torch.cat(lower).numpy(), torch.cat(upper).numpy()
        program = Program(np.zeros((0, 0)), np.zeros(0), *ends, places)
        A, b = [], []
        for triangle in self.triangles:
            rows, constant = program.row(triangle.block)
            own = np.zeros_like(rows)
            own[:, places[triangle.node]] = np.eye(len(rows))
            alive, active = ~triangle.dead.numpy(), triangle.active.numpy()
            A.append((rows - own)[alive])  # relu(z) >= z
            b.append(-constant[alive])
            slope = np.where(active, 1.0, triangle.slope.numpy())
            low = np.where(active, 0.0, triangle.lower.numpy())
            A.append((own - slope[:, None] * rows)[alive])  # relu(z) <= slope (z - low)
            b.append((slope * (constant - low))[alive])
        rows, constant = program.row(block_of(self.graph, self.graph.output))
        weights = self.constraints.detach().double().cpu().numpy()
        A.append(weights @ rows)
        b.append(self.thresholds.detach().double().cpu().numpy() - weights @ constant)
        return dataclasses.replace(program, A=np.concatenate(A), b=np.concatenate(b))

    def tighten(self) -> None:
        """One round: bounds of all pre-activations, then of the input, by what the constraints leave."""
        for triangle in self.triangles:
            objectives, constants = (program := self.program()).row(triangle.block)
            ends = _both(program, objectives, constants, triangle.lower, triangle.upper)
            triangle.lower, triangle.upper = ends
        program = self.program()
        objectives = np.zeros((self.lower.numel(), len(program.lower)))
        objectives[:, : self.lower.numel()] = np.eye(self.lower.numel())
        ends = _both(program, objectives, np.zeros(self.lower.numel()), self.lower, self.upper)
        self.lower, self.upper = ends

    def output(self, rows: Tensor | None, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the output (or of ``rows`` of it), never looser than those given, ``[S]``."""
        block = block_of(self.graph, self.graph.output)
        if rows is not None:
            rows = rows.detach().double()
            block = Block(rows @ block.constant, {s: rows @ matrix for s, matrix in block.matrices.items()})
        program = self.program()
        return _both(program, *program.row(block), lower, upper)


def sample_of(
    graph: Graph,
    boxes: dict[int, tuple[Tensor, Tensor]],
    region: Any,
    constraints: Tensor,
    thresholds: Tensor,
    number: int,
) -> Sample:
    """One sample of a batch.

    Args:
        boxes: bounds of pre-activations, by node number.
        region: a :class:`pycert.Box`, or a ball, whose box is taken.
        constraints: ``[N, n_out]``; thresholds: ``[N]``.

    Raises:
        UnsupportedOperator: another operator than ReLU and affine ones.
    """
    lower, upper = (end[number].detach().flatten() for end in (region.lower, region.upper))
    triangles = triangles_before(graph, graph.output, boxes, number)
    return Sample(graph, lower, upper, triangles, constraints, thresholds)


def _both(
    program: Program, objectives: np.ndarray, constants: np.ndarray, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Least and greatest values of ``objectives @ v + constants``, never looser than ``lower``, ``upper``."""
    found = []
    for sign, old in ((1.0, lower), (-1.0, upper)):
        values = old.detach().clone().flatten()
        for number, (objective, constant) in enumerate(zip(objectives, constants, strict=True)):
            least = program.least(sign * objective)
            if least is not None:
                value = torch.tensor(sign * least + constant, dtype=torch.float64)
                rounded = _outward(value, values.dtype, -sign)
                values[number] = max(values[number], rounded) if sign > 0 else min(values[number], rounded)
        found.append(values.view_as(old))
    return found[0], found[1]


def _outward(value: Tensor, dtype: torch.dtype, toward: float) -> Tensor:
    rounded = value.to(dtype)
    if dtype == torch.float64:
        return rounded
    inside = rounded.double() > value if toward < 0 else rounded.double() < value
    if not inside:
        return rounded
    return torch.nextafter(rounded, torch.tensor(toward * float("inf"), dtype=dtype))
