"""Conversion of sums, products and activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from pycert.onnx_import import patterns, steps
from pycert.onnx_import.converter import Converter
from pycert.onnx_import.nodes import Array, Live, Node, Value, axis_of, converts, has_batch
from pycert.onnx_import.signature import DTYPES

#: Activations that are a module of torch.nn, by operator.
_MODULES: dict[str, Callable[[Node], nn.Module]] = {
    "Relu": lambda node: nn.ReLU(),
    "Sigmoid": lambda node: nn.Sigmoid(),
    "Tanh": lambda node: nn.Tanh(),
    "LeakyRelu": lambda node: nn.LeakyReLU(float(node.attribute("alpha", 0.01))),
    "Elu": lambda node: nn.ELU(float(node.attribute("alpha", 1.0))),
    "Celu": lambda node: nn.CELU(float(node.attribute("alpha", 1.0))),
    "Softplus": lambda node: nn.Softplus(),
    "Softsign": lambda node: nn.Softsign(),
    "Mish": lambda node: nn.Mish(),
    "HardSwish": lambda node: nn.Hardswish(),
    "Gelu": lambda node: nn.GELU(node.attribute("approximate", "none")),
    **{
        name.capitalize(): lambda node, name=name: steps.Pointwise(name)  # type: ignore[misc]
        for name in sorted(steps.POINTWISE - {"square"})
    },
}
_SELU = (1.67326319217681884765625, 1.05070102214813232421875)
_FUNCTIONS = {
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Max": "maximum",
    "Min": "minimum",
    "Sum": "add",
}


def same_shape(conv: Converter, node: Node, module: nn.Module, value: Live) -> Live:
    return conv.apply(node, module, [value.raw], value.shape)


@converts(*_MODULES)
def activation(conv: Converter, node: Node) -> Value:
    return same_shape(conv, node, _MODULES[node.op](node), node.live())


@converts("Selu")
def selu(conv: Converter, node: Node) -> Value:
    given = (node.attribute("alpha", _SELU[0]), node.attribute("gamma", _SELU[1]))
    if any(np.float32(a) != np.float32(b) for a, b in zip(given, _SELU)):
        node.refuse(f"with alpha={given[0]}, gamma={given[1]}", "use the standard constants, or Elu and Mul")
    return same_shape(conv, node, nn.SELU(), node.live())


@converts("HardSigmoid")
def hard_sigmoid(conv: Converter, node: Node) -> Value:
    """``alpha x + beta``, clipped to [0, 1]."""
    value = node.live()
    raw = value.raw
    for name, function, default in (("alpha", "mul", 0.2), ("beta", "add", 0.5)):
        constant = torch.tensor(node.attribute(name, default), dtype=conv.dtype)
        raw, _ = conv.emit(node, steps.WithConstant(function, constant), [raw], name)
    return conv.apply(node, steps.Clip(0.0, 1.0), [raw], value.shape)


@converts("Clip")
def clip(conv: Converter, node: Node) -> Value:
    limits: list[float | None] = []
    for position, name in ((1, "min"), (2, "max")):
        found = node.constant(position, name)
        limit = node.attribute(name) if found is None else found.reshape(-1)[0]
        limits.append(None if limit is None or math.isinf(limit) else float(limit))
    low, high = limits
    if any(limit is not None and math.isnan(limit) for limit in limits):
        node.refuse(f"with min={low} and max={high}", "limits must be numbers")
    if low is None and high is None:
        return node.live()
    if low is not None and high is not None and low >= high:
        node.refuse(f"with min={low} and max={high}", "min must be below max")
    if low == 0 and high is None:
        return same_shape(conv, node, nn.ReLU(), node.live())
    return same_shape(conv, node, steps.Clip(low, high), node.live())


@converts("PRelu")
def prelu(conv: Converter, node: Node) -> Value:
    """One slope, or one per channel; with one per element, ``relu(x) - slope relu(-x)``."""
    value, slope = node.live(), node.given(1, "slope")
    if np.broadcast_shapes(value.shape, slope.shape) != value.shape:
        raise ValueError(f"a slope {list(slope.shape)} does not broadcast to {list(value.shape)}")
    inner = (1,) * (len(value.shape) - slope.ndim) + slope.shape
    per_channel = has_batch(value.shape) and slope.size == value.shape[1] == inner[1]
    if slope.size == 1 or per_channel:
        module = nn.PReLU(slope.size, device="meta", dtype=conv.dtype)
        module.weight = conv.parameter(slope, "flat")
        return same_shape(conv, node, module, value)
    positive, _ = conv.emit(node, nn.ReLU(), [value.raw], "positive")
    negated, _ = conv.emit(node, steps.Pointwise("neg"), [value.raw], "negated")
    negative, _ = conv.emit(node, nn.ReLU(), [negated], "negative")
    scaled = with_constant(conv, node, "mul", Live(value.shape, negative), slope, False)
    return conv.apply(node, steps.Pairwise("sub"), [positive, scaled.raw], value.shape)


@converts("Identity", "Dropout")
def identity(conv: Converter, node: Node) -> Value:
    """The value itself; Dropout is nothing outside of training."""
    if node.op == "Dropout":
        training = node.constant(2, "training_mode")
        if training is not None and bool(training.reshape(-1)[0]):
            node.refuse("in training mode", "export the network in evaluation mode")
        if len(node.outputs) > 1 and conv.readers[node.outputs[1]]:
            node.refuse("whose mask is used", "export the network in evaluation mode")
    return node.live()


@converts("Cast")
def cast(conv: Converter, node: Node) -> Value:
    if DTYPES.get(node.attribute("to")) != conv.dtype:
        node.refuse(f"of {conv.dtype} values to another type", "it rounds every value; leave it out")
    return node.live()


@converts("Softmax", "LogSoftmax")
def softmax(conv: Converter, node: Node) -> Value:
    """Along one axis; before opset 13 over all dimensions from ``axis`` on."""
    value = node.live()
    dims = len(value.shape)
    axis = axis_of(int(node.attribute("axis", -1 if node.opset >= 13 else 1)), dims)
    if node.opset < 13 and math.prod(value.shape[axis + 1 :]) != 1:
        node.refuse(
            f"over the dimensions from {axis} on of {list(value.shape)}", "flatten the value before it"
        )
    if conv.mixes(value, [axis]):
        node.refuse("over the batch dimension", "samples must stay apart; use an axis from 1 on")
    raw, offset = conv.along(node, value, [axis])
    module = (nn.Softmax if node.op == "Softmax" else nn.LogSoftmax)(dim=axis + offset)
    return conv.finish(node, conv.emit(node, module, [raw])[0], offset)


@converts("Pow")
def power(conv: Converter, node: Node) -> Value:
    exponent = node.given(1, "exponent")
    if exponent.size != 1 or exponent.ndim > len(node.live().shape):
        node.refuse(
            f"with exponents of shape {list(exponent.shape)}",
            "use one exponent, of no more dimensions than x",
        )
    number = float(exponent.reshape(-1)[0])
    if number == 1:
        return node.live()
    module = steps.Pointwise("square") if number == 2 else steps.Power(number)
    return same_shape(conv, node, module, node.live())


# ---- two operands -----------------------------------------------------------------------------


@converts("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")
def arithmetic(conv: Converter, node: Node) -> Value:
    """Operands from left to right; a mean is a sum divided by their number."""
    found = patterns.activation_of_product(conv, node) if node.op == "Mul" else None
    if found is not None:
        return same_shape(conv, node, *found)
    function = _FUNCTIONS.get(node.op, "add")
    result = node.inputs[0]
    for operand in node.inputs[1:]:
        assert result is not None and operand is not None
        if not isinstance(result, Live) and not isinstance(operand, Live):
            result = getattr(np, function if function.endswith("imum") else "add")(result, operand)
        else:
            result = _two(conv, node, function, result, operand)
    assert isinstance(result, Live)
    if node.op != "Mean" or len(node.inputs) == 1:
        return result
    count = torch.tensor(float(len(node.inputs)), dtype=conv.dtype)
    return same_shape(conv, node, steps.WithConstant("div", count), result)


@converts("Where")
def where(conv: Converter, node: Node) -> Value:
    """With a constant condition."""
    mask = node.given(0, "condition")
    first, second = node.inputs[1], node.inputs[2]
    assert first is not None and second is not None
    shape = np.broadcast_shapes(mask.shape, first.shape, second.shape)
    raws = [conv.whole(node, part, len(shape)) for part in (first, second) if isinstance(part, Live)]
    constant = next((conv.tensor(part) for part in (first, second) if not isinstance(part, Live)), None)
    module = steps.Choose(torch.from_numpy(mask.copy()), constant, not isinstance(first, Live))
    raw, _ = conv.emit(node, module, raws)
    return conv.finish(node, raw, 1)


def _two(conv: Converter, node: Node, function: str, first: Value, second: Value) -> Live:
    if isinstance(first, Live) and isinstance(second, Live):
        return _values(conv, node, function, first, second)
    if isinstance(first, Live):
        assert not isinstance(second, Live)
        if function == "add":
            fused = _as_bias(conv, node, first, second, node.inputs[0] is first)
            if fused is not None:
                return fused
        return with_constant(conv, node, function, first, second, False)
    assert isinstance(second, Live)
    fused = _as_bias(conv, node, second, first, True) if function == "add" else None
    return fused or with_constant(conv, node, function, second, first, True)


def _values(conv: Converter, node: Node, function: str, first: Live, second: Live) -> Live:
    """Two values, broadcast as the file has them at batch size one."""
    shape = tuple(np.broadcast_shapes(first.shape, second.shape))
    if len(first.shape) == len(second.shape) and has_batch(first.shape) and has_batch(second.shape):
        return conv.apply(node, steps.Pairwise(function), [first.raw, second.raw], shape)
    raws = [conv.whole(node, value, len(shape)) for value in (first, second)]
    return conv.apply(node, steps.Pairwise(function), raws, shape)


def with_constant(
    conv: Converter, node: Node, function: str, value: Live, constant: Array, first: bool
) -> Live:
    """A value and a constant, broadcast likewise; the constant is a buffer."""
    shape = tuple(np.broadcast_shapes(value.shape, constant.shape))
    if has_batch(value.shape) and has_batch(shape) and len(shape) == len(value.shape):
        inner = constant[0] if constant.ndim == len(shape) else constant
        return conv.apply(node, steps.WithConstant(function, conv.tensor(inner), first), [value.raw], shape)
    raw = conv.whole(node, value, len(shape))
    return conv.apply(node, steps.WithConstant(function, conv.tensor(constant), first), [raw], shape)


def _as_bias(conv: Converter, node: Node, value: Live, constant: Array, direct: bool) -> Live | None:
    """The value again where the constant can be the bias of the layer that makes it, which only this node reads."""
    if not value.layer or not direct or len(node.inputs) != 2:
        return None
    if any(item is value and not conv.once(name) for item, name in zip(node.inputs, node.input_names)):
        return None
    module: Any = conv.layer(value.layer)
    outputs = module.weight.shape[0] if isinstance(module, nn.Linear) else value.shape[1]
    inner = (1,) * (len(value.shape) - constant.ndim) + constant.shape
    axis = len(value.shape) - 1 if isinstance(module, nn.Linear) else 1
    wanted = tuple(outputs if dim == axis else 1 for dim in range(len(value.shape)))
    if inner != wanted or module.bias is not None:
        return None
    module.bias = conv.parameter(constant, "flat")
    return Live(value.shape, value.raw)
