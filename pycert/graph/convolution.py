"""Lowering of convolutions, all as two-dimensional ones on ``[C, H, W]``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycert.graph.tracer import Traced, Tracer, lowers


@lowers("conv1d")
def conv1d(tracer: Tracer, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
           dilation: Any = 1, groups: int = 1) -> Traced:  # fmt: skip
    return _conv(tracer, 1, input, weight, bias, stride, padding, dilation, groups)


@lowers("conv2d")
def conv2d(tracer: Tracer, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
           dilation: Any = 1, groups: int = 1) -> Traced:  # fmt: skip
    return _conv(tracer, 2, input, weight, bias, stride, padding, dilation, groups)


@lowers("conv_transpose1d")
def conv_transpose1d(tracer: Tracer, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                     output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Traced:  # fmt: skip
    return _conv(tracer, 1, input, weight, bias, stride, padding, dilation, groups, output_padding, True)


@lowers("conv_transpose2d")
def conv_transpose2d(tracer: Tracer, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                     output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Traced:  # fmt: skip
    return _conv(tracer, 2, input, weight, bias, stride, padding, dilation, groups, output_padding, True)


@lowers("convolution")
def convolution(tracer: Tracer, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
                transposed: bool, output_padding: Any, groups: int) -> Traced:  # fmt: skip
    dims = weight.dim() - 2
    extra = output_padding if transposed else 0
    if dims == 3:
        from pycert.graph.convolution3d import convolve

        return convolve(tracer, input, weight, bias, stride, padding, dilation, groups, extra, transposed)
    if dims not in (1, 2):
        tracer.refuse(f"convolution of {dims} dimensions", "use Conv1d, Conv2d or Conv3d")
    return _conv(tracer, dims, input, weight, bias, stride, padding, dilation, groups, extra, transposed)


def _conv(
    tracer: Tracer,
    dims: int,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any = 0,
    transposed: bool = False,
) -> Traced:
    """Convolutions of one and two dimensions, as two-dimensional nodes on ``[C, H, W]``."""
    if not isinstance(input, Traced) or isinstance(weight, Traced) or isinstance(bias, Traced):
        tracer.refuse(
            "convolution with a weight or bias that depends on the input", "weights must be parameters"
        )
    _check_conv(tracer, dims, input, weight, groups, transposed)
    node = image(tracer, input, dims)
    kernel = pair(weight.shape[2:], dims, 1)
    stride, dilation = pair(stride, dims, 1), pair(dilation, dims, 1)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel)]
        node = _pad_after(tracer, node, [t % 2 for t in total])
        padding = (total[0] // 2, total[1] // 2)
    else:
        padding = pair(padding, dims, 0)
    extra = pair(output_padding, dims, 0)
    size = tracer.shape(node)[1:]
    if transposed:
        out = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, s, p, d, k, e
               in zip(size, stride, padding, dilation, kernel, extra)]  # fmt: skip
        channels = weight.shape[1] * groups
    else:
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, s, p, d, k
               in zip(size, stride, padding, dilation, kernel)]  # fmt: skip
        channels = weight.shape[0]
    if min(out) <= 0:
        raise ValueError(
            f"{tracer.path or 'network'}: the kernel {kernel} is larger than the padded input {size}"
        )
    params = (tracer.slot(weight), -1 if bias is None else tracer.slot(bias))
    result = tracer.emit(
        "conv", (node,), (channels, *out), params, stride=stride, padding=padding, dilation=dilation,
        output_padding=extra, groups=int(groups), transposed=transposed,
    )  # fmt: skip
    return from_image(tracer, result, input, dims)


def _check_conv(
    tracer: Tracer, dims: int, input: Traced, weight: Tensor, groups: int, transposed: bool
) -> None:
    if input.dim() != dims + 2:
        tracer.refuse(
            f"conv{dims}d of a value of {input.dim()} dimensions, batch included",
            f"give it {dims + 2}: batch, channels and {dims} of space",
        )
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if input.shape[1] != channels:
        where = tracer.path or "network"
        raise ValueError(f"{where}: conv{dims}d needs {channels} input channels, got {input.shape[1]}")


def _pad_after(tracer: Tracer, node: int, extra: list[int]) -> int:
    """Zeros below and to the right, where padding='same' is not symmetric."""
    if not any(extra):
        return node
    numbers = torch.arange(math.prod(tracer.shape(node)), device="cpu").reshape(tracer.shape(node))
    index = torch.nn.functional.pad(numbers, (0, extra[1], 0, extra[0]), value=-1)
    return tracer.gather(node, index, tuple(index.shape))


def pair(value: Any, dims: int, missing: int) -> tuple[int, int]:
    """Two ints for what torch takes as an int or a sequence; ``missing`` for the first of one dimension."""
    values = [int(value)] * dims if isinstance(value, int) else [int(item) for item in value]
    values = values * dims if len(values) == 1 else values
    return (missing, values[0]) if dims == 1 else (values[0], values[1])


def image(tracer: Tracer, input: Traced, dims: int) -> int:
    """A value of ``dims`` dimensions of space as ``[C, H, W]``; without channels they become one."""
    node = tracer.node(input)
    shape = tracer.shape(node)
    channels, space = shape[: len(shape) - dims], shape[len(shape) - dims :]
    return tracer.reshape(node, (*(channels or (1,)), *([1] if dims == 1 else []), *space))


def from_image(tracer: Tracer, node: int, input: Traced, dims: int) -> Traced:
    """``[C, H, W]`` in the dimensions that the input has."""
    channels, height, width = tracer.shape(node)
    shape = (channels, height, width)[3 - (input.dim() - 1) :] if dims == 2 else (channels, width)
    shape = shape[1:] if dims == 1 and input.dim() == 2 else shape
    return tracer.wrap(tracer.reshape(node, shape), input.dtype)
