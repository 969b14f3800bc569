"""Modules whose Lipschitz constant is known as a whole and lost when their operators are taken one by one."""

from __future__ import annotations

import torch
from torch import nn

from pycert.graph import Graph
from pycert.nn import Householder, SmoothMaxMin
from pycert.norms.arithmetic import UP


def _constant(module: nn.Module, p: float) -> float | None:
    """Of the module in real arithmetic with its present values; None where nothing better is known."""
    if isinstance(module, SmoothMaxMin):
        # The Jacobian of a pair is nonnegative with rows and columns that sum to 1: at most 1 in every p-norm. An
        # execution's divisions by 2 and its square root are roundings, and charged as such.
        return 1.0
    if isinstance(module, Householder) and p == 2:
        # I - 2 v v^T with computed v = (cos, sin): eigenvalues 1 and 1 - 2 |v|^2.
        with torch.no_grad():
            size = torch.cos(module.angle).double().square() + torch.sin(module.angle).double().square()
            return max(1.0, float((1 - 2 * size).abs().max())) * UP
    return None


def known_blocks(net: nn.Module, graph: Graph, p: float) -> dict[int, tuple[int, float]]:
    """Node that a block returns -> the node it reads, and its constant.

    Only for modules that are called once, read one value and end in one concatenation.
    """
    found: dict[int, tuple[int, float]] = {}
    for path, module in net.named_modules():
        constant = _constant(module, p)
        if constant is None:
            continue
        own = [i for i, node in enumerate(graph.nodes) if _belongs(node.path, path)]
        ends = [i for i in own if graph.nodes[i].op == "concat"]
        reads = {j for i in own for j in graph.nodes[i].inputs} - set(own)
        if len(ends) == 1 and len(reads) == 1:
            found[ends[0]] = (reads.pop(), constant)
    return found


def _belongs(node: str, module: str) -> bool:
    """Paths of nodes are those of their modules, with a suffix for the operator."""
    return node == module or node.startswith((module + ".", module + "#"))
