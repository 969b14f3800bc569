"""Modules whose Lipschitz constant is known as a whole and lost when their operators are taken one by one."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from pycert.graph import Graph
from pycert.nn import Householder, SmoothMaxMin
from pycert.norms.arithmetic import UP


@dataclasses.dataclass(frozen=True)
class Block:
    """A module on pairs of channels: the node it reads, its constant, and the width of its corner (0: sharp)."""

    source: int
    constant: float
    width: float

    def noise(self, size: Tensor, roundoff: float) -> Tensor:
        """What an execution may err, elementwise, for inputs ``[B, C, ...]`` of at most these magnitudes.

        Either module computes sums of at most four terms, each after at most eight roundings, of magnitude
        ``|a| + |b| + width`` or less; 64 roundings of that (of 1, where it is less) are more than all of them with
        a square root of 32. Squares that underflow move a root by at most ``2^-62``.
        """
        first, second = size.chunk(2, dim=1)
        total = (first + second + self.width).clamp(min=1) * (4 * 64 * roundoff) + 2.0**-60
        return torch.cat([total, total], dim=1)


def _constant(module: nn.Module, p: float) -> float | None:
    """Of the module in real arithmetic with its present values; None where nothing better is known."""
    if isinstance(module, SmoothMaxMin):
        # The Jacobian of a pair is nonnegative with rows and columns that sum to 1: at most 1 in every p-norm.
        return 1.0
    if isinstance(module, Householder) and p == 2:
        # I - 2 v v^T with computed v = (cos, sin): eigenvalues 1 and 1 - 2 |v|^2.
        with torch.no_grad():
            size = torch.cos(module.angle).double().square() + torch.sin(module.angle).double().square()
            return max(1.0, float((1 - 2 * size).abs().max())) * UP
    return None


def known_blocks(net: nn.Module, graph: Graph, p: float) -> dict[int, Block]:
    """By the node that a block returns; only of modules called once that read one value and end in a concatenation."""
    found: dict[int, Block] = {}
    for path, module in net.named_modules():
        constant = _constant(module, p)
        if constant is None:
            continue
        own = [i for i, node in enumerate(graph.nodes) if _belongs(node.path, path)]
        ends = [i for i in own if graph.nodes[i].op == "concat"]
        reads = {j for i in own for j in graph.nodes[i].inputs} - set(own)
        if len(ends) == 1 and len(reads) == 1:
            width = module.width if isinstance(module, SmoothMaxMin) else 0.0
            found[ends[0]] = Block(reads.pop(), constant, width)
    return found


def _belongs(node: str, module: str) -> bool:
    """Paths of nodes are those of their modules, with a suffix for the operator."""
    return node == module or node.startswith((module + ".", module + "#"))
