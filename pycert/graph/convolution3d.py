"""Lowering of three-dimensional convolutions to grouped two-dimensional ones.

Every output depth is a group of its own: its input channels are the channels of all the depths that it reads, its
weight ``[O, C * kernel depth, kh, kw]``. Every output remains one sum of the same products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycert.graph.tracer import Traced, Tracer, lowers


@lowers("conv3d")
def conv3d(tracer: Tracer, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
           dilation: Any = 1, groups: int = 1) -> Traced:  # fmt: skip
    return convolve(tracer, input, weight, bias, stride, padding, dilation, groups)


@lowers("conv_transpose3d")
def conv_transpose3d(tracer: Tracer, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                     output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Traced:  # fmt: skip
    return convolve(tracer, input, weight, bias, stride, padding, dilation, groups, output_padding, True)


def convolve(
    tracer: Tracer,
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
    if not isinstance(input, Traced) or isinstance(weight, Traced) or isinstance(bias, Traced):
        tracer.refuse(
            "convolution with a weight or bias that depends on the input", "weights must be parameters"
        )
    channels = int(weight.shape[0] if transposed else weight.shape[1] * groups)
    _check(tracer, input, channels)
    kernel = tuple(int(size) for size in weight.shape[2:])
    stride, dilation, extra = _triple(stride), _triple(dilation), _triple(output_padding)
    node = tracer.node(input)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel)]
        node = _padded(tracer, node, [t % 2 for t in total])
        padding = [t // 2 for t in total]
    padding = _triple(padding)
    depth, *size = tracer.shape(node)[1:]
    geometry = list(zip((depth, *size), stride, padding, dilation, kernel, extra))
    if transposed:
        out = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, s, p, d, k, e in geometry]
    else:
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, s, p, d, k, _ in geometry]
    if min(out) <= 0:
        raise ValueError(
            f"{tracer.path or 'network'}: the kernel {kernel} is larger than the padded input {(depth, *size)}"
        )
    slices = _slices(tracer, node, _depths(transposed, out[0], *geometry[0][:5]), groups)
    matrix = _repeated(tracer, weight, out[0], transposed)
    params = (tracer.slot(matrix), -1)
    if bias is not None:
        params = (params[0], tracer.slot(tracer.compute(torch.Tensor.repeat, bias, out[0])))
    outputs = int(weight.shape[1] * groups if transposed else weight.shape[0])
    result = tracer.emit(
        "conv", (slices,), (out[0] * outputs, *out[1:]), params, stride=stride[1:], padding=padding[1:],
        dilation=dilation[1:], output_padding=extra[1:], groups=int(groups) * out[0], transposed=transposed,
    )  # fmt: skip
    moved = torch.arange(math.prod(out) * outputs, device="cpu").reshape(out[0], outputs, *out[1:])
    return tracer.wrap(tracer.gather(result, moved.transpose(0, 1), (outputs, *out)), input.dtype)


def _check(tracer: Tracer, input: Traced, channels: int) -> None:
    if input.dim() != 5:
        tracer.refuse(
            f"conv3d of a value of {input.dim()} dimensions, batch included",
            "give it 5: batch, channels and 3 of space",
        )
    if input.shape[1] != channels:
        where = tracer.path or "network"
        raise ValueError(f"{where}: conv3d needs {channels} input channels, got {input.shape[1]}")


def _triple(value: Any) -> tuple[int, int, int]:
    values = [int(value)] if isinstance(value, int) else [int(item) for item in value]
    values = values * 3 if len(values) == 1 else values
    return (values[0], values[1], values[2])


def _padded(tracer: Tracer, node: int, extra: list[int]) -> int:
    """Zeros at the far ends, where padding='same' is not symmetric."""
    if not any(extra):
        return node
    numbers = torch.arange(math.prod(tracer.shape(node)), device="cpu").reshape(tracer.shape(node))
    index = torch.nn.functional.pad(numbers, (0, extra[2], 0, extra[1], 0, extra[0]), value=-1)
    return tracer.gather(node, index, tuple(index.shape))


def _depths(
    transposed: bool, out: int, depth: int, stride: int, padding: int, dilation: int, kernel: int
) -> Tensor:
    """The input depth that each output depth meets at each tap, ``[out, kernel]``, -1 where there is none."""
    taps = torch.arange(kernel, device="cpu") * dilation
    places = torch.arange(out, device="cpu")[:, None]
    if not transposed:
        found = places * stride - padding + taps
        return torch.where((found >= 0) & (found < depth), found, -1)
    shifted = places + padding - taps
    found = shifted.div(stride, rounding_mode="floor")
    return torch.where((shifted % stride == 0) & (found >= 0) & (found < depth), found, -1)


def _slices(tracer: Tracer, node: int, depths: Tensor, groups: int) -> int:
    """``[C, D, H, W]`` as ``[out * C * kernel, H, W]``: for every output depth, group and channel all taps."""
    channels, depth, height, width = tracer.shape(node)
    numbers = torch.arange(channels * depth * height * width, device="cpu")
    numbers = numbers.reshape(channels, depth, height, width)
    picked = numbers[:, depths.clamp(min=0)]  # [C, out, kernel, H, W]
    picked = torch.where(depths[None, :, :, None, None] < 0, -1, picked).transpose(0, 1)
    return tracer.gather(node, picked, (picked.numel() // (height * width), height, width))


def _repeated(tracer: Tracer, weight: Tensor, out: int, transposed: bool) -> Tensor:
    """The weight with taps of depth beside the input channels, once for every output depth."""
    if transposed:  # [C, O, kd, kh, kw]
        weight = tracer.compute(torch.Tensor.transpose, weight, 1, 2)
        flat = tracer.compute(torch.Tensor.flatten, weight, 0, 1)
    else:
        flat = tracer.compute(torch.Tensor.flatten, weight, 1, 2)
    repeated: Tensor = tracer.compute(torch.Tensor.repeat, flat, out, 1, 1, 1)
    return repeated
