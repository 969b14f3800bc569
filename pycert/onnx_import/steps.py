"""Modules for what ONNX writes as one operator and torch.nn has no module for.

All take and give ``[B, *sample]``. They hold Python numbers and buffers only, so a network of them is
copied, pickled and moved like any other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Functions of one value that have no module in torch.nn.
POINTWISE = frozenset("abs neg exp log sqrt sin cos atan sign reciprocal erf square".split())
#: Functions of two values.
PAIRWISE = frozenset("add sub mul div maximum minimum matmul".split())


class Reshape(nn.Module):
    """The elements of each sample in another shape."""

    def __init__(self, sample: tuple[int, ...]) -> None:
        super().__init__()
        self.sample = tuple(sample)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.sample)

    def extra_repr(self) -> str:
        return f"sample={list(self.sample)}"


class Permute(nn.Module):
    """Dimensions in another order; ``order`` counts the batch, which stays first."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = tuple(order)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)

    def extra_repr(self) -> str:
        return f"order={list(self.order)}"


class Narrow(nn.Module):
    """``length`` elements from ``start`` on along ``dim``."""

    def __init__(self, dim: int, start: int, length: int) -> None:
        super().__init__()
        self.dim, self.start, self.length = dim, start, length

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(self.dim, self.start, self.length)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, start={self.start}, length={self.length}"


class Select(nn.Module):
    """The elements ``index`` along ``dim``."""

    index: Tensor

    def __init__(self, dim: int, index: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, count={len(self.index)}"


class Pad(nn.Module):
    """A constant around each sample; ``pads`` as ``torch.nn.functional.pad`` takes them, negative ones crop."""

    def __init__(self, pads: tuple[int, ...], value: float = 0.0) -> None:
        super().__init__()
        self.pads, self.value = tuple(pads), value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, value=self.value)

    def extra_repr(self) -> str:
        return f"pads={list(self.pads)}, value={self.value}"


class EdgePad(nn.Module):
    """Copies of the outermost elements around the dimensions of space."""

    def __init__(self, pads: tuple[int, ...]) -> None:
        super().__init__()
        self.pads = tuple(pads)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pads, mode="replicate")

    def extra_repr(self) -> str:
        return f"pads={list(self.pads)}"


class Expand(nn.Module):
    """Broadcast to ``sample``."""

    def __init__(self, sample: tuple[int, ...]) -> None:
        super().__init__()
        self.sample = tuple(sample)

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(x.shape[0], *self.sample)

    def extra_repr(self) -> str:
        return f"sample={list(self.sample)}"


class Tile(nn.Module):
    """Each sample repeated along its dimensions."""

    def __init__(self, repeats: tuple[int, ...]) -> None:
        super().__init__()
        self.repeats = tuple(repeats)

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, *self.repeats)

    def extra_repr(self) -> str:
        return f"repeats={list(self.repeats)}"


class Concat(nn.Module):
    """Values and constants, in the order of the file, along ``dim``.

    ``constants``: at each position a tensor ``[*sample]``, or None where the next value goes.
    """

    def __init__(self, dim: int, constants: list[Tensor | None]) -> None:
        super().__init__()
        self.dim = dim
        for position, constant in enumerate(constants):
            self.register_buffer(f"constant{position}", constant)
        self.count = len(constants)

    def forward(self, *values: Tensor) -> Tensor:
        rest, parts = iter(values), []
        for position in range(self.count):
            constant = self._buffers[f"constant{position}"]
            if constant is None:
                parts.append(next(rest))
            else:
                parts.append(constant.expand(values[0].shape[0], *constant.shape))
        return torch.cat(parts, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, parts={self.count}"


class Pointwise(nn.Module):
    """One of the functions :data:`POINTWISE` of every element."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = _known(function, POINTWISE)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch, self.function)(x)

    def extra_repr(self) -> str:
        return self.function


class Power(nn.Module):
    """Every element to the power of a number."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        return torch.pow(x, self.exponent)

    def extra_repr(self) -> str:
        return f"exponent={self.exponent}"


class Clip(nn.Module):
    """Every element between ``minimum`` and ``maximum``; None where there is no limit."""

    def __init__(self, minimum: float | None, maximum: float | None) -> None:
        super().__init__()
        self.minimum, self.maximum = minimum, maximum

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.minimum, self.maximum)

    def extra_repr(self) -> str:
        return f"minimum={self.minimum}, maximum={self.maximum}"


class Pairwise(nn.Module):
    """One of the functions :data:`PAIRWISE` of two values of as many dimensions."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = _known(function, PAIRWISE)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return getattr(torch, self.function)(a, b)

    def extra_repr(self) -> str:
        return self.function


class WithConstant(nn.Module):
    """One of the functions :data:`PAIRWISE` of a value and ``constant``, a buffer without batch dimension."""

    constant: Tensor

    def __init__(self, function: str, constant: Tensor, first: bool = False) -> None:
        super().__init__()
        self.function, self.first = _known(function, PAIRWISE), first
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        operands = (self.constant, x) if self.first else (x, self.constant)
        return getattr(torch, self.function)(*operands)

    def extra_repr(self) -> str:
        text = f"constant {list(self.constant.shape)}"
        return f"{self.function}: {text}, x" if self.first else f"{self.function}: x, {text}"


class Choose(nn.Module):
    """Elements of the first value where ``mask`` holds and of the second elsewhere; a missing one is ``constant``."""

    mask: Tensor
    constant: Tensor | None

    def __init__(self, mask: Tensor, constant: Tensor | None, first: bool) -> None:
        super().__init__()
        self.first = first
        self.register_buffer("mask", mask)
        self.register_buffer("constant", constant)

    def forward(self, *values: Tensor) -> Tensor:
        constant = () if self.constant is None else (self.constant,)
        first, second = (*constant, *values) if self.first else (*values, *constant)
        return torch.where(self.mask, first, second)


class Reduce(nn.Module):
    """``sum``, ``mean``, ``amax`` or ``amin`` over dimensions of a sample; ``dims`` count the batch."""

    def __init__(self, function: str, dims: tuple[int, ...], keepdim: bool) -> None:
        super().__init__()
        self.function = _known(function, frozenset(("sum", "mean", "amax", "amin")))
        self.dims, self.keepdim = tuple(dims), keepdim

    def forward(self, x: Tensor) -> Tensor:
        return getattr(torch, self.function)(x, dim=self.dims, keepdim=self.keepdim)

    def extra_repr(self) -> str:
        return f"{self.function}, dims={list(self.dims)}, keepdim={self.keepdim}"


class MatrixFirst(nn.Module):
    """``weight @ x`` with a trainable matrix."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.weight, x)

    def extra_repr(self) -> str:
        return f"weight {list(self.weight.shape)}"


def _known(function: str, functions: frozenset[str]) -> Any:
    if function not in functions:
        raise ValueError(f"expected one of {', '.join(sorted(functions))}, got {function!r}")
    return function
