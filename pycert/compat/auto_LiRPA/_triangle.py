"""A ReLU network as linear constraints: affine blocks between ReLUs, the triangle around every unstable one.

Source: Ehlers, "Formal Verification of Piece-Wise Linear Feed-Forward Neural Networks", ATVA 2017; the
relaxation that Salman et al., "A Convex Relaxation Barrier to Tight Robustness Verification", NeurIPS 2019, study.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pycert.errors import UnsupportedOperator
from pycert.graph import Graph
from pycert.graph.ir import AFFINE
from pycert.reference import graph as reference


@dataclasses.dataclass
class Block:
    """``value = constant + sum_s matrices[s] @ value_s`` in float64; ``s`` are inputs and ReLUs."""

    constant: Tensor  # [n]
    matrices: dict[int, Tensor]  # [n, n_s]


def block_of(graph: Graph, target: int) -> Block:
    """The value of a node as an affine function of the nearest inputs and ReLUs before it.

    Raises:
        UnsupportedOperator: there is something else on the way.
    """
    inner, sources = _between(graph, target)
    sizes = [graph.numel(source) for source in sources]
    rows = 1 + sum(sizes)
    slots = [slot.detach().double() for slot in graph.tensors()]
    values: dict[int, Tensor] = {}
    offset = 1
    for source, size in zip(sources, sizes, strict=True):
        unit = torch.zeros(rows, size, dtype=torch.float64)
        unit[offset : offset + size] = torch.eye(size, dtype=torch.float64)
        values[source] = unit.view(rows, *graph.nodes[source].shape)
        offset += size
    for number in inner:
        node = graph.nodes[number]
        if node.op == "constant":
            values[number] = slots[node.params[0]].reshape(node.shape).expand(rows, *node.shape)
        elif node.op == "batch_norm":
            values[number] = reference.batch_norm(graph, node, slots, values[node.inputs[0]], None)
        else:
            values[number] = reference.apply(node, slots, *(values[i] for i in node.inputs))
    found = values[target].reshape(rows, -1)
    constant = found[0]
    parts = (found[1:] - constant).split(sizes) if sizes else ()
    return Block(constant, {source: part.t() for source, part in zip(sources, parts, strict=True)})


def _between(graph: Graph, target: int) -> tuple[list[int], list[int]]:
    """Affine nodes up to ``target`` and the sources they start from, both in order."""
    inner, sources, waiting = set(), set(), [target]
    while waiting:
        number = waiting.pop()
        node = graph.nodes[number]
        if number in inner or number in sources:
            continue
        if node.op == "input" or (node.op == "relu" and number != target):
            sources.add(number)
        elif node.op in AFFINE or node.op == "constant":
            inner.add(number)
            waiting.extend(node.inputs)
        else:
            raise UnsupportedOperator(node.path, node.op, "linear programs are built for ReLU networks")
    return sorted(inner), sorted(sources)


@dataclasses.dataclass
class Triangle:
    """A ReLU node: its own number, the block of its pre-activation, and bounds ``[n]`` of that."""

    node: int
    block: Block
    lower: Tensor
    upper: Tensor

    @property
    def active(self) -> Tensor:
        return self.lower >= 0

    @property
    def dead(self) -> Tensor:
        return (self.upper <= 0) & ~self.active

    @property
    def slope(self) -> Tensor:
        """Of the upper line over unstable neurons, 0 elsewhere."""
        unstable = ~self.active & ~self.dead
        width = torch.where(unstable, self.upper - self.lower, torch.ones_like(self.upper))
        return torch.where(unstable, self.upper / width, torch.zeros_like(width))


def triangles_before(
    graph: Graph, target: int, boxes: dict[int, tuple[Tensor, Tensor]], sample: int
) -> list[Triangle]:
    """The ReLUs that a node depends on, with the boxes of their pre-activations for one sample."""
    needed: set[int] = set()
    waiting = [target]
    while waiting:
        _, sources = _between(graph, waiting.pop())
        for source in sources:
            if graph.nodes[source].op == "relu" and source not in needed:
                needed.add(source)
                waiting.append(graph.nodes[source].inputs[0])
    found = []
    for number in sorted(needed):
        read = graph.nodes[number].inputs[0]
        lower, upper = (end[sample].detach().double().flatten() for end in boxes[read])
        found.append(Triangle(number, block_of(graph, read), lower, upper))
    return found
