"""Node lists: emission with canonical forms, and removal of what the output does not need."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from pycert.graph.ir import Node


class Builder:
    """Collects nodes; movement of data is merged as it is emitted, so chains of it leave one node."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def emit(
        self,
        op: str,
        inputs: tuple[int, ...],
        shape: tuple[int, ...],
        params: tuple[int, ...] = (),
        path: str = "",
        **attrs: Any,
    ) -> int:
        """Appends a node and returns its number."""
        self.nodes.append(Node(op, inputs, tuple(shape), params, attrs, path))
        return len(self.nodes) - 1

    def reshape(self, node: int, shape: tuple[int, ...], path: str = "") -> int:
        """``node`` in another shape; nothing where the shape is the same."""
        node = self.behind_reshape(node) if self.nodes[node].shape != shape else node
        if self.nodes[node].shape == shape:
            return node
        return self.emit("reshape", (node,), shape, path=path)

    def gather(
        self, node: int, index: Tensor, shape: tuple[int, ...], path: str = "", fill: float = 0.0
    ) -> int:
        """Elements of ``node`` by flat ``index``; looks through movement, identities become reshapes."""
        index = index.reshape(-1)
        filled = bool((index < 0).any())
        source = self.behind_reshape(node)
        while self.nodes[source].op == "gather":
            inner = self.nodes[source]
            inner_filled = bool((inner.attrs["index"] < 0).any())
            if filled and inner_filled and inner.attrs["fill"] != fill:
                break
            index = torch.where(index < 0, index, inner.attrs["index"][index.clamp(min=0)])
            fill = inner.attrs["fill"] if inner_filled else fill
            filled = bool((index < 0).any())
            source = self.behind_reshape(inner.inputs[0])
        count = math.prod(self.nodes[source].shape)
        if not filled and len(index) == count and torch.equal(index, torch.arange(count, device="cpu")):
            return self.reshape(source, shape, path)
        return self.emit("gather", (source,), shape, path=path, index=index, fill=float(fill))

    def concat(self, nodes: list[int], shape: tuple[int, ...], path: str = "") -> int:
        """The elements of ``nodes`` one after the other."""
        return self.emit("concat", tuple(self.behind_reshape(node) for node in nodes), shape, path=path)

    def behind_reshape(self, node: int) -> int:
        """The first node before ``node`` that is no reshape."""
        while self.nodes[node].op == "reshape":
            (node,) = self.nodes[node].inputs
        return node


def prune(nodes: list[Node], output: int) -> tuple[list[Node], int, list[int]]:
    """The nodes that ``output`` needs and all inputs, the output's number, and the slots in use, renumbered.

    A gather read only by a reshape takes the shape of it.
    """
    nodes = [dataclasses.replace(node) for node in nodes]
    needed = _needed(nodes, output)
    readers = collections.Counter(source for number in needed for source in nodes[number].inputs)
    number_of: dict[int, int] = {}
    slot_of: dict[int, int] = {}
    kept: list[Node] = []
    for number in sorted(needed):
        node = nodes[number]
        source = node.inputs[0] if node.op == "reshape" else -1
        if source >= 0 and nodes[source].op == "gather" and readers[source] == 1 and source != output:
            moved = kept[number_of[source]]
            moved.shape = node.shape
            number_of[number] = number_of[source]
            continue
        node.inputs = tuple(number_of[i] for i in node.inputs)
        node.params = tuple(slot_of.setdefault(p, len(slot_of)) if p >= 0 else -1 for p in node.params)
        number_of[number] = len(kept)
        kept.append(node)
    return kept, number_of[output], list(slot_of)


def _needed(nodes: list[Node], output: int) -> set[int]:
    needed = {number for number, node in enumerate(nodes) if node.op == "input"}
    waiting = [output]
    while waiting:
        number = waiting.pop()
        if number in needed:
            continue
        needed.add(number)
        waiting.extend(nodes[number].inputs)
    return needed
