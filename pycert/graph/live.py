"""Live tensors during a trace: what the values that the forward sees are read from afterwards."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pycert.graph.ir import Constant, Expression, Pin, Slot, Source


class LiveTensors:
    """Knows by ``id`` every tensor that is a slot, or that the forward has computed from slots."""

    def __init__(self) -> None:
        self.owned: dict[int, list[Slot]] = {}
        self.sources: list[Source] = []  # those in use, in the order of their slot numbers
        self.pins: list[Pin] = []
        self.met: dict[int, Tensor] = {}  # constants, by id
        self._computed: dict[int, Source] = {}
        self._keep: list[Tensor] = []  # tensors known by id must not die
        self._number: dict[Any, int] = {}

    def source(self, value: Tensor, module: nn.Module | None, path: str) -> Source | None:
        """What a live tensor is read from, None for constants.

        Of the owners of a tied parameter, ``module``, the one that runs now, is asked first.
        """
        computed = self._computed.get(id(value))
        if computed is not None:
            return computed
        owners = self.owned.get(id(value))
        if owners is not None:
            return next((slot for slot in owners if slot.owner is module), owners[0])
        if isinstance(value, nn.Parameter) or value.requires_grad:
            return self.outside(value, path)
        self.met[id(value)] = value
        return None

    def outside(self, value: Tensor, path: str) -> Source:
        """Notes a tensor of nobody in the network, which somebody else may change."""
        return self.remember(value, Constant(value, f"{path}: tensor outside of the module"))

    def remember(self, value: Tensor, source: Source) -> Source:
        """Notes that ``value`` is what ``source`` gives now."""
        self._computed[id(value)] = source
        self._keep.append(value)
        return source

    def number(self, source: Source) -> int:
        """The slot number of a source, the same whenever it is used."""
        key = (id(source.owner), source.name) if isinstance(source, Slot) else id(source)
        if key not in self._number:
            self._number[key] = len(self.sources)
            self.sources.append(source)
        return self._number[key]

    def express(self, function: Callable[..., Any], arguments: Any, result: Any, path: str) -> bool:
        """Remembers the tensors of ``result`` as expressions; False if it is something else."""
        if getattr(function, "__name__", "") == "__get__":  # a property as .T, whose getter does not pickle
            name = function.__self__.__name__  # type: ignore[attr-defined]
            function, arguments = getattr, ((*arguments[0], name), arguments[1])
        args, kwargs = arguments
        expression = Expression(function, args, kwargs, path, detached=not torch.is_grad_enabled())
        if isinstance(result, Tensor):
            self.remember(result, expression)
        elif isinstance(result, (tuple, list)) and all(isinstance(item, Tensor) for item in result):
            for position, item in enumerate(result):
                self.remember(item, Expression(_item, (expression, position), {}, path))
        else:
            return False
        return True


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments, slices included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))


def scalar(value: Any) -> float | None:
    """The number that a Python number or a constant tensor of equal elements is; None otherwise."""
    if isinstance(value, numbers.Real):
        return float(value)
    if value.numel() == 0 or value.is_meta or value.is_complex():
        return None
    first = value.reshape(-1)[0]
    return float(first) if value.numel() == 1 or bool((value == first).all()) else None


def survives(value: Any, dtype: torch.dtype) -> bool:
    """Whether torch takes a number or constant tensor for one of ``dtype``, or it is exact in it.

    A tensor of more dimensions than none makes float64 of what it meets in float32.
    """
    if not isinstance(value, Tensor) or value.dim() == 0 or value.dtype != torch.float64 or value.is_meta:
        return True
    return dtype == torch.float64 or torch.equal(value, value.to(dtype).double())


def leaves(source: Source) -> Iterator[Slot | Constant]:
    """The slots and constants that a source is computed from, shared expressions visited once."""
    waiting: list[Any] = [source]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, (Slot, Constant)):
            yield item
        elif isinstance(item, Expression) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend((item.args, item.kwargs))
        elif isinstance(item, (tuple, list)):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())


def reads_parameter(source: Source) -> bool:
    """Whether a source depends on a parameter."""
    return any(
        leaf.tensor.requires_grad
        if isinstance(leaf, Constant)
        else isinstance(leaf.owner._parameters.get(leaf.name), Tensor)
        for leaf in leaves(source)
    )


def widens(value: Tensor, cast: Any) -> bool:
    """Whether a cast keeps every value, so that who reads the slot may do it as well."""
    real = (torch.float32, torch.float64)
    return value.dtype in real and cast.dtype in real and value.dtype.itemsize <= cast.dtype.itemsize


def _item(values: Any, position: int) -> Any:
    return values[position]
