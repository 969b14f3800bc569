"""The linear operators whose norms are bounded: a matrix, or a convolution of given input shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pycert._flags import plain_convolutions

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution ``[C, H, W] -> [O, H', W']``; see ``torch.nn.functional.conv2d`` and ``conv_transpose2d``."""

    input_shape: tuple[int, int, int]
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    transposed: bool = False
    output_padding: Pair = (0, 0)

    def reach(self, weight: Tensor) -> Pair:
        """Extent of the dilated kernel."""
        d, k = self.dilation, weight.shape[2:]
        return d[0] * (k[0] - 1) + 1, d[1] * (k[1] - 1) + 1

    def output_shape(self, weight: Tensor) -> tuple[int, int, int]:
        reach = self.reach(weight)
        sizes = []
        for axis in (0, 1):
            n, s, p = self.input_shape[1 + axis], self.stride[axis], self.padding[axis]
            if self.transposed:
                sizes.append((n - 1) * s - 2 * p + reach[axis] + self.output_padding[axis])
            else:
                sizes.append((n + 2 * p - reach[axis]) // s + 1)
        channels = weight.shape[1] * self.groups if self.transposed else weight.shape[0]
        return channels, sizes[0], sizes[1]

    def adjoint(self, weight: Tensor) -> Geometry:
        """The plain convolution with the same weight whose adjoint this transposed one is."""
        return dataclasses.replace(
            self, input_shape=self.output_shape(weight), transposed=False, output_padding=(0, 0)
        )


@dataclasses.dataclass(frozen=True)
class Operator:
    """``x -> W x`` for batches of samples, and its adjoint; ``geometry`` is None for a matrix."""

    weight: Tensor
    geometry: Geometry | None

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.weight.shape[1],) if self.geometry is None else self.geometry.input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.weight.shape[0],) if self.geometry is None else self.geometry.output_shape(self.weight)

    def with_weight(self, weight: Tensor) -> Operator:
        return Operator(weight, self.geometry)

    def plain(self) -> tuple[Operator, bool]:
        """This operator, or its adjoint where that is a plain convolution; whether it was exchanged."""
        if self.geometry is None or not self.geometry.transposed:
            return self, False
        return Operator(self.weight, self.geometry.adjoint(self.weight)), True

    def apply(self, x: Tensor) -> Tensor:
        g = self.geometry
        if g is None:
            return F.linear(x, self.weight)
        with plain_convolutions(x.device):
            if g.transposed:
                return F.conv_transpose2d(
                    x, self.weight, None, g.stride, g.padding, g.output_padding, g.groups, g.dilation
                )
            return F.conv2d(x, self.weight, None, g.stride, g.padding, g.dilation, g.groups)

    def apply_adjoint(self, y: Tensor) -> Tensor:
        g = self.geometry
        if g is None:
            return F.linear(y, self.weight.t())
        if g.transposed:
            with plain_convolutions(y.device):
                image = F.conv2d(y, self.weight, None, g.stride, g.padding, g.dilation, g.groups)
            return image[
                :, :, : g.input_shape[1], : g.input_shape[2]
            ]  # more with an output padding >= stride
        reach = g.reach(self.weight)
        extra = [
            g.input_shape[1 + a] - ((y.shape[2 + a] - 1) * g.stride[a] - 2 * g.padding[a] + reach[a])
            for a in (0, 1)
        ]
        with plain_convolutions(y.device):
            return F.conv_transpose2d(y, self.weight, None, g.stride, g.padding, extra, g.groups, g.dilation)

    def terms(self) -> int:
        """At least the number of products in a sum of ``apply`` or ``apply_adjoint``."""
        return max(self.weight[0].numel(), self.weight.numel() // self.weight.shape[1], self.weight.shape[0])

    def explicit(self) -> Tensor:
        """The matrix ``[numel out, numel in]``; each element is one weight or zero."""
        if self.geometry is None:
            return self.weight
        count = self.geometry.input_shape[0] * self.geometry.input_shape[1] * self.geometry.input_shape[2]
        basis = torch.eye(count, dtype=self.weight.dtype, device=self.weight.device)
        return self.apply(basis.view(count, *self.input_shape)).flatten(1).t()


_CONV_NAMES = ("input_shape", "stride", "padding", "dilation", "groups", "transposed", "output_padding")


def _pair(name: str, value: Any, least: int, dimensions: int) -> Pair:
    values = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(values) != dimensions or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"conv[{name!r}] must be {dimensions} integers of at least {least}, got {value!r}")
    neutral = 0 if least == 0 else 1
    return (values[0], values[1]) if dimensions == 2 else (neutral, values[0])


def operator_of(weight: Tensor, conv: Mapping[str, Any] | Geometry | None) -> Operator:
    """The operator of ``pycert.ops.masked_norm``'s arguments; a 3-d weight is a convolution over ``[C, L]``.

    Raises:
        ValueError: names what does not fit.
    """
    if conv is None:
        if weight.dim() != 2:
            raise ValueError(f"weight must be [out, in] without conv, got {list(weight.shape)}")
        return Operator(weight, None)
    if isinstance(conv, Geometry):
        return Operator(weight, conv)
    unknown = sorted(set(conv) - set(_CONV_NAMES))
    if unknown:
        raise ValueError(f"conv has no {unknown[0]!r}; known are {', '.join(_CONV_NAMES)}")
    if "input_shape" not in conv:
        raise ValueError("conv needs input_shape=(C, H, W), or (C, L) for a weight of three dimensions")
    dimensions = weight.dim() - 2
    shape = tuple(int(n) for n in conv["input_shape"])
    if dimensions not in (1, 2) or len(shape) != 1 + dimensions or min(shape) < 1:
        raise ValueError(
            f"weight {list(weight.shape)} and conv['input_shape'] {shape} must be [O, C, kh, kw] and (C, H, W), "
            "or [O, C, k] and (C, L)"
        )
    if dimensions == 1:
        weight, shape = weight.unsqueeze(2), (shape[0], 1, shape[1])
    groups, transposed = conv.get("groups", 1), bool(conv.get("transposed", False))
    geometry = Geometry(
        shape,  # type: ignore[arg-type]
        _pair("stride", conv.get("stride", 1), 1, dimensions),
        _pair("padding", conv.get("padding", 0), 0, dimensions),
        _pair("dilation", conv.get("dilation", 1), 1, dimensions),
        groups,
        transposed,
        _pair("output_padding", conv.get("output_padding", 0), 0, dimensions),
    )
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups or shape[0] != channels:
        raise ValueError(
            f"conv: weight {list(weight.shape)} with groups {groups} does not take {shape[0]} channels"
        )
    if min(geometry.output_shape(weight)) < 1:
        raise ValueError(
            f"conv: the kernel does not fit into the input, output {geometry.output_shape(weight)}"
        )
    return Operator(weight, geometry)
