"""Conversion of products with weights, convolutions and normalisations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

from pycert.onnx_import import steps
from pycert.onnx_import.converter import Converter
from pycert.onnx_import.nodes import Array, Live, Node, Raw, Value, axis_of, converts, has_batch

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
_CONV_TRANSPOSE: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
_BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


# ---- matrix products --------------------------------------------------------------------------


def linear_module(conv: Converter, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """``nn.Linear`` on given parameters; its own are made on the meta device and never filled."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=conv.dtype)
    module.weight = weight
    module.bias = bias  # type: ignore[assignment]
    return module


@converts("Gemm")
def gemm(conv: Converter, node: Node) -> Value:
    """``alpha A B + beta C`` with A from the input and B a weight."""
    value, weight = node.live(), node.given(1, "weight B")
    if node.attribute("transA", 0):
        node.refuse("with transA=1", "transpose the input before it, or write it as MatMul")
    if len(value.shape) != 2 or weight.ndim != 2:
        raise ValueError(f"A and B must be matrices, got {list(value.shape)} and {list(weight.shape)}")
    matrix = conv.parameter(weight, "" if node.attribute("transB", 0) else "transposed")
    term = node.constant(2, "bias C")
    alpha, beta = float(node.attribute("alpha", 1.0)), float(node.attribute("beta", 1.0))
    shape = (value.shape[0], matrix.shape[0])
    fused = alpha == 1 and beta == 1 and term is not None and term.size == shape[1] == term.shape[-1]
    module = linear_module(conv, matrix, conv.parameter(term, "flat") if fused and term is not None else None)
    raw, layer = conv.emit(node, module, [value.raw])
    if alpha != 1:
        raw, _ = conv.emit(
            node, steps.WithConstant("mul", conv.tensor(np.array(alpha, weight.dtype))), [raw], "alpha"
        )
    if term is not None and not fused:
        rows = np.broadcast_to(term * np.array(beta, term.dtype), shape)
        rows = rows[0] if has_batch(shape) else rows
        raw, _ = conv.emit(node, steps.WithConstant("add", conv.tensor(rows)), [raw], "bias")
    return Live(shape, raw, layer if alpha == 1 and term is None else "")


@converts("MatMul")
def matmul(conv: Converter, node: Node) -> Value:
    """Products with a weight on either side, and of two values."""
    first, second = node.input(0), node.input(1)
    if isinstance(first, Live) and isinstance(second, Live):
        return _product(conv, node, first, second)
    if isinstance(first, Live):
        return _weight_behind(conv, node, first, _matrix(node, node.given(1, "weight"), len(first.shape)))
    weight, value = _matrix(node, node.given(0, "weight"), len(node.live(1).shape)), node.live(1)
    if weight.ndim != 2 or len(value.shape) < 2:
        node.refuse("of a vector from the left", "write it as a product with a matrix")
    raw = value.raw if has_batch(value.shape) and len(value.shape) > 2 else conv.whole(node, value)
    shape = (*value.shape[:-2], weight.shape[0], value.shape[-1])
    return conv.apply(node, steps.MatrixFirst(conv.parameter(weight)), [raw], shape)


def _matrix(node: Node, weight: Array, dims: int) -> Array:
    """A constant factor as a matrix or vector."""
    if weight.ndim <= 2:
        return weight
    if math.prod(weight.shape[:-2]) != 1 or weight.ndim > dims:
        node.refuse(f"with a batch of constant matrices {list(weight.shape)}", "use one matrix")
    return weight.reshape(weight.shape[-2:])


def _weight_behind(conv: Converter, node: Node, value: Live, weight: Array) -> Value:
    column = weight.reshape(-1, 1) if weight.ndim == 1 else weight
    module = linear_module(conv, conv.parameter(column, "transposed"), None)
    raw = conv.whole(node, value) if len(value.shape) == 1 else value.raw
    shape = value.shape[:-1] if weight.ndim == 1 else (*value.shape[:-1], weight.shape[1])
    return conv.apply(node, module, [raw], shape)


def _product(conv: Converter, node: Node, first: Live, second: Live) -> Value:
    if min(len(first.shape), len(second.shape)) < 2:
        node.refuse("of a vector and another value", "give both two dimensions or more")
    batches = np.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    shape = (*batches, first.shape[-2], second.shape[-1])
    if len(first.shape) == len(second.shape) > 2 and has_batch(first.shape) and has_batch(second.shape):
        raws = [first.raw, second.raw]
    else:
        raws = [conv.whole(node, value, len(shape)) for value in (first, second)]
    return conv.apply(node, steps.Pairwise("matmul"), raws, shape)


# ---- convolutions -----------------------------------------------------------------------------


def image(node: Node, value: Live) -> tuple[int, ...]:
    """The dimensions of space of ``[1, C, *space]``."""
    if len(value.shape) < 3 or not has_batch(value.shape):
        node.refuse(
            f"of a value of shape {list(value.shape)}", "it needs one image [1, channels, ...] per sample"
        )
    return value.shape[2:]


def windows(node: Node, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and dilations, 1 where they are not given."""
    ones = (1,) * len(kernel)
    found = tuple(tuple(node.attribute(name) or ones) for name in ("strides", "dilations"))
    for name, values in zip(("strides", "dilations", "kernel_shape"), (*found, kernel)):
        if len(values) != len(kernel) or any(not 0 < value < 1 << 31 for value in values):
            raise ValueError(f"{name} must be {len(kernel)} positive numbers below 2^31, got {list(values)}")
    return found[0], found[1]


def paddings(
    node: Node,
    space: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is put before and behind each dimension of space, by ``pads`` or ``auto_pad``."""
    mode = node.attribute("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = tuple(int(pad) for pad in node.attribute("pads") or (0,) * (2 * len(space)))
        if len(pads) != 2 * len(space) or min(pads) < 0:
            raise ValueError(f"pads must be {2 * len(space)} numbers from 0 on, got {list(pads)}")
        return pads[: len(space)], pads[len(space) :]
    if mode == "VALID":
        return (0,) * len(space), (0,) * len(space)
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"auto_pad must be NOTSET, VALID, SAME_UPPER or SAME_LOWER, got {mode!r}")
    total = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(space, kernel, strides, dilations)
    ]
    half = tuple(pads // 2 for pads in total)
    rest = tuple(pads - before for pads, before in zip(total, half))
    return (half, rest) if mode == "SAME_UPPER" else (rest, half)


def pads_of(before: tuple[int, ...], behind: tuple[int, ...]) -> tuple[int, ...]:
    """In the order of torch.nn.functional.pad, the last dimension first."""
    return tuple(pad for pair in zip(reversed(before), reversed(behind)) for pad in pair)


@converts("Conv")
def convolution(conv: Converter, node: Node) -> Value:
    """Convolutions of one and two dimensions; padding that is not symmetric goes before them."""
    value, weight, bias = node.live(), node.given(1, "weight"), node.constant(2, "bias")
    space = image(node, value)
    kind = _CONV.get(len(space))
    if kind is None:
        node.refuse(f"in {len(space)} dimensions", "use one or two")
    kernel, groups = weight.shape[2:], int(node.attribute("group", 1))
    strides, dilations = windows(node, kernel)
    _check_channels(value, weight, bias, groups, weight.shape[1] * groups, weight.shape[0], len(space))
    before, behind = paddings(node, space, kernel, strides, dilations)
    raw, padding = value.raw, before
    if before != behind:
        raw, _ = conv.emit(node, steps.Pad(pads_of(before, behind)), [raw], "pad")
        padding = (0,) * len(space)
    module = kind(weight.shape[1] * groups, weight.shape[0], kernel, strides, padding, dilations, groups, bias=False,
                  device="meta", dtype=conv.dtype)  # fmt: skip
    return _on_image(conv, node, module, raw, weight, bias)


@converts("ConvTranspose")
def convolution_transposed(conv: Converter, node: Node) -> Value:
    """Transposed convolutions; padding that is not symmetric is cut off behind them."""
    value, weight, bias = node.live(), node.given(1, "weight"), node.constant(2, "bias")
    space = image(node, value)
    kind = _CONV_TRANSPOSE.get(len(space))
    if kind is None:
        node.refuse(f"in {len(space)} dimensions", "use one or two")
    kernel, groups = weight.shape[2:], int(node.attribute("group", 1))
    strides, dilations = windows(node, kernel)
    _check_channels(value, weight, bias, groups, weight.shape[0], weight.shape[1] * groups, len(space))
    extra = tuple(node.attribute("output_padding") or (0,) * len(space))
    before, behind = _cut(node, space, kernel, strides, dilations, extra)
    padding = before if before == behind else (0,) * len(space)
    module = kind(weight.shape[0], weight.shape[1] * groups, kernel, strides, padding, extra, groups, False, dilations,
                  device="meta", dtype=conv.dtype)  # fmt: skip
    if before == behind:
        return _on_image(conv, node, module, value.raw, weight, bias)
    whole = _on_image(conv, node, module, value.raw, weight, bias)
    negative = tuple(-pad for pad in pads_of(before, behind))
    raw, _ = conv.emit(node, steps.Pad(negative), [whole.raw], "crop")
    return Live((1, *raw.sample), raw)


def _cut(
    node: Node,
    space: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    extra: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a transposed convolution loses before and behind, by ``pads``, ``auto_pad`` or ``output_shape``."""
    mode, wanted = node.attribute("auto_pad", "NOTSET"), node.attribute("output_shape")
    if wanted is None and mode in ("NOTSET", "VALID"):
        return paddings(node, space, kernel, strides, dilations)
    sizes = list(wanted)[-len(space) :] if wanted else [n * s for n, s in zip(space, strides)]
    total = [
        s * (n - 1) + e + (k - 1) * d + 1 - size
        for n, s, e, k, d, size in zip(space, strides, extra, kernel, dilations, sizes)
    ]
    if min(total) < 0:
        node.refuse(f"whose output_shape {sizes} is larger than its windows reach", "use output_padding")
    half = tuple(cut // 2 for cut in total)
    rest = tuple(cut - before for cut, before in zip(total, half))
    return (half, rest) if mode == "SAME_UPPER" else (rest, half)


def _check_channels(
    value: Live, weight: Array, bias: Array | None, groups: int, channels: int, outputs: int, dims: int
) -> None:
    if weight.ndim != dims + 2 or channels != value.shape[1] or groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"a weight {list(weight.shape)} with group={groups} does not fit an image {list(value.shape)}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"the bias must have shape [{outputs}], got {list(bias.shape)}")


def _on_image(conv: Converter, node: Node, module: Any, raw: Raw, weight: Array, bias: Array | None) -> Live:
    module.weight = conv.parameter(weight)
    module.bias = None if bias is None else conv.parameter(bias)
    result, layer = conv.emit(node, module, [raw])
    return Live((1, *result.sample), result, layer if bias is None else "")


# ---- normalisation ----------------------------------------------------------------------------


@converts("BatchNormalization")
def batch_norm(conv: Converter, node: Node) -> Value:
    """With the statistics of the file."""
    node.only_output()
    if node.attribute("training_mode", 0) or not node.attribute("spatial", 1):
        node.refuse("in training mode or with spatial=0", "export the network in evaluation mode")
    value = node.live()
    if len(value.shape) < 2 or not has_batch(value.shape):
        node.refuse(f"of a value of shape {list(value.shape)}", "it needs [1, channels, ...] per sample")
    kind = _BATCH_NORM.get(len(value.shape) - 2)
    if kind is None:
        node.refuse(f"of a value of shape {list(value.shape)}", "it needs at most three dimensions of space")
    scale, bias, mean, variance = (
        node.given(position, what)
        for position, what in enumerate(("scale", "bias", "mean", "variance"), start=1)
    )
    channels = value.shape[1]
    if any(array.shape != (channels,) for array in (scale, bias, mean, variance)):
        raise ValueError(f"scale, bias, mean and variance must have shape [{channels}]")
    module = kind(channels, eps=float(node.attribute("epsilon", 1e-5)), dtype=conv.dtype)
    module.momentum = 1 - float(node.attribute("momentum", 0.9))
    module.weight, module.bias = conv.parameter(scale), conv.parameter(bias)
    module.running_mean, module.running_var = conv.tensor(mean), conv.tensor(variance)
    return conv.apply(node, module, [value.raw], value.shape)


@converts("LayerNormalization")
def layer_norm(conv: Converter, node: Node) -> Value:
    """Over the dimensions from ``axis`` on."""
    node.only_output()
    value, scale, bias = node.live(), node.given(1, "scale"), node.constant(2, "bias")
    axis = axis_of(int(node.attribute("axis", -1)), len(value.shape))
    if (axis == 0 and has_batch(value.shape)) or scale.shape != value.shape[axis:]:
        node.refuse(f"over axis {axis} of {list(value.shape)} with a scale {list(scale.shape)}",
                    "normalise dimensions of a sample, with a scale of their shape")  # fmt: skip
    module = nn.LayerNorm(scale.shape, float(node.attribute("epsilon", 1e-5)), dtype=conv.dtype)
    module.weight = conv.parameter(scale)
    module.bias = None if bias is None else conv.parameter(bias)  # type: ignore[assignment]
    return conv.apply(node, module, [value.raw], value.shape)
