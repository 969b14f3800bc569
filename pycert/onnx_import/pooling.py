"""Conversion of pools and of reductions over dimensions."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pycert.onnx_import import steps
from pycert.onnx_import.converter import Converter
from pycert.onnx_import.layers import image, paddings, pads_of, windows
from pycert.onnx_import.nodes import Live, Node, Value, axis_of, converts

_AVERAGE: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d}
_MAXIMUM: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d}
_REDUCTIONS = {"ReduceSum": "sum", "ReduceMean": "mean", "ReduceMax": "amax", "ReduceMin": "amin"}

Sizes = tuple[int, ...]


def _pooled(
    node: Node, space: Sizes, before: Sizes, behind: Sizes, kernel: Sizes, strides: Sizes, dilations: Sizes
) -> Sizes:
    """Sizes after a pool."""
    result = []
    for n, a, b, k, s, d in zip(space, before, behind, kernel, strides, dilations):
        left = n + a + b - d * (k - 1) - 1
        count = (-(-left // s) if node.attribute("ceil_mode", 0) else left // s) + 1
        if node.attribute("ceil_mode", 0) and (count - 1) * s >= n + a:
            node.refuse("with ceil_mode, whose last window lies in the padding alone",
                        "change pads or strides: runtimes disagree on what it gives")  # fmt: skip
        result.append(count)
    return tuple(result)


def _parts(node: Node, dims: Collection[int]) -> tuple[Live, Sizes, Sizes, Sizes, Sizes, Sizes, Sizes]:
    """What both pools begin with: value, kernel, strides, dilations, padding before and behind, result."""
    node.only_output()
    value = node.live()
    space = image(node, value)
    if len(space) not in dims:
        node.refuse(f"in {len(space)} dimensions", "use one or two")
    kernel = tuple(node.attribute("kernel_shape"))
    if len(kernel) != len(space):
        raise ValueError(f"kernel_shape {list(kernel)} for {len(space)} dimensions of space")
    strides, dilations = windows(node, kernel)
    before, behind = paddings(node, space, kernel, strides, dilations)
    result = _pooled(node, space, before, behind, kernel, strides, dilations)
    return value, kernel, strides, dilations, before, behind, result


def _plain(kernel: Sizes, before: Sizes, behind: Sizes) -> bool:
    """Whether torch's pools take this padding."""
    return before == behind and all(2 * pad <= size for pad, size in zip(before, kernel))


@converts("MaxPool")
def max_pool(conv: Converter, node: Node) -> Value:
    """Padding that is not symmetric repeats the outermost elements, which changes no maximum."""
    value, kernel, strides, dilations, before, behind, result = _parts(node, _MAXIMUM)
    if node.attribute("storage_order", 0):
        node.refuse("with storage_order=1", "leave the indices out")
    raw, padding, ceil = value.raw, before, bool(node.attribute("ceil_mode", 0))
    if not _plain(kernel, before, behind):
        inside = all(max(a, b) < k for a, b, k in zip(before, behind, kernel))
        if not inside or any(step != 1 for step in dilations) or ceil:
            node.refuse(f"with pads {[*before, *behind]} of windows {list(kernel)}",
                        "use symmetric pads of at most half a window")  # fmt: skip
        raw, _ = conv.emit(node, steps.EdgePad(pads_of(before, behind)), [raw], "pad")
        padding = (0,) * len(kernel)
    module = _MAXIMUM[len(kernel)](kernel, strides, padding, dilations, ceil_mode=ceil)
    return _checked(node, conv.apply(node, module, [raw], (1, value.shape[1], *result)), result)


@converts("AveragePool")
def average_pool(conv: Converter, node: Node) -> Value:
    """Padding that is not symmetric is put before it; where it does not count, sums are divided by counts."""
    value, kernel, strides, dilations, before, behind, result = _parts(node, _AVERAGE)
    ceil, counted = bool(node.attribute("ceil_mode", 0)), bool(node.attribute("count_include_pad", 0))
    if any(step != 1 for step in dilations):
        node.refuse("with dilations", "use dilations of 1")
    pool = _AVERAGE[len(kernel)]
    shape = (1, value.shape[1], *result)
    if _plain(kernel, before, behind):
        module = pool(kernel, strides, before, ceil_mode=ceil, count_include_pad=counted)
        return _checked(node, conv.apply(node, module, [value.raw], shape), result)
    if ceil:
        node.refuse(
            f"with ceil_mode and pads {[*before, *behind]}", "use symmetric pads of at most half a window"
        )
    raw, _ = conv.emit(node, steps.Pad(pads_of(before, behind)), [value.raw], "pad")
    if counted:
        return _checked(node, conv.apply(node, pool(kernel, strides), [raw], shape), result)
    raw, _ = conv.emit(node, pool(kernel, strides), [raw], "mean")
    size = torch.tensor(float(math.prod(kernel)), dtype=conv.dtype)
    raw, _ = conv.emit(node, steps.WithConstant("mul", size), [raw], "sum")
    ones = F.pad(torch.ones(1, *image(node, value), dtype=conv.dtype), pads_of(before, behind))
    counts = (pool(kernel, strides)(ones) * size).round()
    if not bool((counts >= 1).all()):
        raise ValueError("a window lies in the padding alone")
    return _checked(node, conv.apply(node, steps.WithConstant("div", counts), [raw], shape), result)


def _checked(node: Node, value: Live, result: Sizes) -> Live:
    if value.raw.sample[1:] != result:
        node.refuse(f"whose sizes are {list(result)} in ONNX and {list(value.raw.sample[1:])} in torch",
                    "choose pads that the windows fill")  # fmt: skip
    return value


@converts("GlobalAveragePool", "GlobalMaxPool")
def global_pool(conv: Converter, node: Node) -> Value:
    """Over all dimensions of space, which stay as 1."""
    value = node.live()
    space = image(node, value)
    if node.op == "GlobalAveragePool" and len(space) == 2:
        module: nn.Module = nn.AdaptiveAvgPool2d(1)
    else:
        function = "mean" if node.op == "GlobalAveragePool" else "amax"
        module = steps.Reduce(function, tuple(range(2, 2 + len(space))), True)
    return conv.apply(node, module, [value.raw], (1, value.shape[1], *[1] * len(space)))


@converts(*_REDUCTIONS)
def reduction(conv: Converter, node: Node) -> Value:
    """Over ``axes``, all of them where none are named."""
    value = node.live()
    dims = len(value.shape)
    axes = node.ints("axes", 1)
    if not axes and node.attribute("noop_with_empty_axes", 0):
        return value
    chosen = sorted({axis_of(axis, dims) for axis in axes or range(dims)})
    if conv.mixes(value, chosen):
        node.refuse("over the batch dimension", "samples must stay apart; name the axes from 1 on")
    raw, offset = conv.along(node, value, chosen)
    keep = bool(node.attribute("keepdims", 1))
    module = steps.Reduce(_REDUCTIONS[node.op], tuple(axis + offset for axis in chosen), keep)
    return conv.finish(node, conv.emit(node, module, [raw])[0], offset)
