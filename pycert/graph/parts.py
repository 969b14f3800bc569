"""What lowerings share: indices of elements, broadcasting, constants beside values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from pycert.graph.live import scalar, survives
from pycert.graph.tracer import Traced, Tracer


class Parts:
    """Values and constants one after the other, and where the elements of each of them stand.

    ``indices[i]``: int64 in the shape of one sample of ``shapes[i]`` (which counts the batch), -1 for
    the elements of constants that are one number, the fill of the gather.
    """

    def __init__(self, tracer: Tracer, parts: Any, shapes: list[tuple[int, ...]]) -> None:
        self.tracer = tracer
        self.nodes: list[int] = []
        self.fill: float | None = None
        self.indices: list[Tensor] = []
        self._size = 0
        for part, shape in zip(parts, shapes):
            self.indices.append(self._index(part, tuple(shape)))

    def gather(self, index: Tensor, dtype: torch.dtype) -> Traced:
        """The value that holds the elements ``index`` of all parts."""
        tracer = self.tracer
        shape = tuple(index.shape)
        if len(self.nodes) > 1 and torch.equal(index.reshape(-1), torch.arange(self._size, device="cpu")):
            return tracer.wrap(tracer.concat(self.nodes, shape, helper=False), dtype)
        node = self.nodes[0] if len(self.nodes) == 1 else tracer.concat(self.nodes, (self._size,))
        return tracer.wrap(tracer.gather(node, index, shape, self.fill or 0.0, helper=False), dtype)

    def _index(self, part: Any, shape: tuple[int, ...]) -> Tensor:
        tracer = self.tracer
        if isinstance(part, Traced):
            if part.dim() != len(shape):
                tracer.refuse(
                    f"values of {part.dim()} and {len(shape)} dimensions together",
                    "both need the batch as the first",
                )
            return self._place(tracer.node(part)).expand(shape[1:])
        live = isinstance(part, Tensor) and tracer.source(part) is not None
        number = None if live else scalar(part)
        exact = survives(part, tracer.dtype)
        if number is not None and exact and self.fill in (None, number):
            self.fill = number
            return torch.tensor(-1, device="cpu").expand(shape[1:])
        if not isinstance(part, Tensor):
            part = torch.tensor(number, dtype=torch.float64, device="cpu")
        constant = sample_part(tracer, part, len(shape))
        node = tracer.emit("constant", (), tuple(constant.shape), (tracer.slot(constant),), helper=True)
        return self._place(node).expand(shape[1:])

    def _place(self, node: int) -> Tensor:
        shape = self.tracer.shape(node)
        start, self._size = self._size, self._size + math.prod(shape)
        self.nodes.append(node)
        return torch.arange(start, self._size, device="cpu").reshape(shape)


def indices(value: Traced) -> Tensor:
    """Numbers of the elements of a value, ``[batch, *shape]``, int64, on the CPU."""
    return torch.arange(math.prod(value.shape), device="cpu").reshape(value.shape)


def constant_index(tracer: Tracer, key: Any) -> Any:
    """A part of an index, or another argument, with index tensors on the CPU; they are watched from now on."""
    if isinstance(key, (tuple, list)) and not isinstance(key, torch.Size):
        return type(key)(constant_index(tracer, part) for part in key)
    if isinstance(key, Tensor) and not isinstance(key, Traced):
        return tracer.pin(key, "an index").detach().cpu()
    return key


def sample_part(tracer: Tracer, value: Tensor, dims: int) -> Tensor:
    """A tensor that does not depend on the input without its batch dimension, where ``dims`` counts it."""
    if value.dim() > dims:
        tracer.refuse(
            f"a constant or parameter of {value.dim()} dimensions against a value of {dims} (batch included)",
            "give the value more dimensions, or the constant fewer",
        )
    if value.dim() < dims:
        return value
    if value.shape[0] == 1:
        return tracer.compute(torch.Tensor.reshape, value, tuple(value.shape[1:]))
    if value.shape[0] == tracer.batch and (value.stride(0) == 0 or bool((value == value[:1]).all())):
        return tracer.compute(torch.Tensor.select, value, 0, 0)
    tracer.refuse(
        f"a constant or parameter of shape {list(value.shape)} that differs along the batch",
        "it must be the same for all samples",
    )


def broadcast(tracer: Tracer, *shapes: Any) -> tuple[int, ...]:
    """The common shape (torch.broadcast_shapes imports sympy at its first call, which takes half a second)."""
    result: list[int] = []
    for sizes in itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        others = {int(size) for size in sizes} - {1}
        if len(others) > 1:
            found = " and ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{tracer.path or 'network'}: shapes {found} do not broadcast")
        result.append(others.pop() if others else 1)
    return tuple(reversed(result))


def expand(tracer: Tracer, node: int, shape: tuple[int, ...]) -> int:
    """``node`` broadcast to ``shape``."""
    own = tracer.shape(node)
    if own == shape:
        return node
    index = torch.arange(math.prod(own), device="cpu").reshape(own).expand(shape)
    return tracer.gather(node, index, shape)


def check_batch(tracer: Tracer, name: str, shape: Any) -> None:
    if len(shape) == 0 or shape[0] != tracer.batch:
        found = "has no dimension" if len(shape) == 0 else f"is {shape[0]}"
        tracer.refuse(
            f"{name} that moves the batch dimension (the first dimension of its result {found}, the batch "
            f"in the trace {tracer.batch})",
            "keep the batch first and of any size, as in x.flatten(1) or x.view(x.size(0), -1)",
        )
