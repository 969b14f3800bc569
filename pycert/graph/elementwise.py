"""Lowering of sums, products by constants, activations and pairwise extrema."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from pycert.graph.live import scalar
from pycert.graph.parts import broadcast, expand, sample_part
from pycert.graph.tracer import Traced, Tracer, lowers

_PRODUCT = "one factor must be a number, a constant, a parameter or a buffer"


@lowers("add")
def add(tracer: Tracer, input: Any, other: Any, *, alpha: float = 1) -> Traced:
    return _sum(tracer, input, other, float(alpha))


@lowers("sub")
def sub(tracer: Tracer, input: Any, other: Any, *, alpha: float = 1) -> Traced:
    return _sum(tracer, input, other, -float(alpha))


@lowers("rsub")
def rsub(tracer: Tracer, input: Any, other: Any, *, alpha: float = 1) -> Traced:
    return _sum(tracer, other, input, -float(alpha))


@lowers("mul")
def mul(tracer: Tracer, input: Any, other: Any) -> Traced:
    value, factor = (input, other) if isinstance(input, Traced) else (other, input)
    if isinstance(factor, Traced):
        tracer.refuse("a product of two values that depend on the input", _PRODUCT)
    return _by_constant(tracer, "mul_const", value, factor, neutral=1.0)


@lowers("div")
def div(tracer: Tracer, input: Any, other: Any, *, rounding_mode: str | None = None) -> Traced:
    if rounding_mode is not None:
        tracer.refuse(f"div with rounding_mode='{rounding_mode}'", "divide without rounding")
    if isinstance(other, Traced):
        tracer.refuse(
            "division by a value that depends on the input", "the divisor must be a constant or parameter"
        )
    return _by_constant(tracer, "div_const", input, other, neutral=1.0)


@lowers("rdiv", "reciprocal")
def rdiv(tracer: Tracer, input: Traced, other: Any = 1) -> Traced:
    tracer.refuse(
        "division by a value that depends on the input", "the divisor must be a constant or parameter"
    )


@lowers("neg")
def neg(tracer: Tracer, input: Traced) -> Traced:
    return mul(tracer, input, -1)


@lowers("pow")
def power(tracer: Tracer, input: Any, exponent: Any) -> Traced:
    if isinstance(exponent, numbers.Real) and float(exponent) == 1.0:
        return input
    tracer.refuse("pow", "powers of values are not bounded; use abs or a product by a constant")


def _sum(tracer: Tracer, left: Any, right: Any, factor: float) -> Traced:
    """``left + factor * right``."""
    if not isinstance(left, Traced):
        scaled = mul(tracer, right, factor)
        return _by_constant(tracer, "add_const", scaled, left, neutral=0.0, sign=1)
    sign = -1 if factor < 0 else 1
    if not isinstance(right, Traced):
        if abs(factor) != 1.0:
            right = (
                tracer.compute(torch.mul, right, abs(factor))
                if isinstance(right, Tensor)
                else right * abs(factor)
            )
        return _by_constant(tracer, "add_const", left, right, neutral=0.0, sign=sign)
    if abs(factor) != 1.0:
        right = mul(tracer, right, abs(factor))
    a, b = same_shapes(tracer, left, right)
    return tracer.wrap(tracer.emit("add", (a, b), tracer.shape(a), sign=sign), left.dtype)


def same_shapes(tracer: Tracer, left: Traced, right: Traced) -> tuple[int, int]:
    """Nodes of two values, both broadcast to their common shape."""
    if left.dim() != right.dim():
        tracer.refuse(
            f"broadcasting a value of shape {_batched(left)} against one of {_batched(right)}",
            "both must have as many dimensions, the batch first; use unsqueeze",
        )
    shape = broadcast(tracer, left.shape[1:], right.shape[1:])
    return expand(tracer, tracer.node(left), shape), expand(tracer, tracer.node(right), shape)


def _by_constant(
    tracer: Tracer, op: str, value: Traced, constant: Any, neutral: float, **attrs: Any
) -> Traced:
    """``mul_const``, ``div_const`` or ``add_const`` by a number or a tensor that is the same for all samples."""
    if not isinstance(constant, (numbers.Real, Tensor)):
        tracer.refuse(f"an operand of type {type(constant).__name__}", "use a real number or a tensor")
    node = tracer.node(value)
    if isinstance(constant, Tensor):
        constant = sample_part(tracer, constant, value.dim())
        shape = broadcast(tracer, constant.shape, tracer.shape(node))
        node = expand(tracer, node, shape)
    live = isinstance(constant, Tensor) and tracer.source(constant) is not None
    number = None if live else scalar(constant)
    if number == neutral:
        return tracer.wrap(node, value.dtype)
    if number is not None:
        return tracer.wrap(tracer.emit(op, (node,), tracer.shape(node), value=number, **attrs), value.dtype)
    params = (tracer.slot(constant),)
    return tracer.wrap(tracer.emit(op, (node,), tracer.shape(node), params, **attrs), value.dtype)


# ---- activations ------------------------------------------------------------------------------


def activation(tracer: Tracer, op: str, value: Traced, params: tuple[int, ...] = (), **attrs: Any) -> Traced:
    node = tracer.node(value)
    return tracer.wrap(tracer.emit(op, (node,), tracer.shape(node), params, **attrs), value.dtype)


@lowers("relu")
def relu(tracer: Tracer, input: Traced) -> Traced:
    return activation(tracer, "relu", input)


@lowers("sigmoid")
def sigmoid(tracer: Tracer, input: Traced) -> Traced:
    return activation(tracer, "sigmoid", input)


@lowers("tanh")
def tanh(tracer: Tracer, input: Traced) -> Traced:
    return activation(tracer, "tanh", input)


@lowers("abs")
def absolute(tracer: Tracer, input: Traced) -> Traced:
    return activation(tracer, "abs", input)


@lowers("leaky_relu")
def leaky_relu(tracer: Tracer, input: Traced, negative_slope: float = 0.01) -> Traced:
    slope = float(negative_slope)
    if slope in (0.0, 1.0):
        return relu(tracer, input) if slope == 0.0 else tracer.wrap(tracer.node(input), input.dtype)
    return activation(tracer, "leaky_relu", input, slope=slope)


@lowers("rrelu")
def rrelu(
    tracer: Tracer, input: Traced, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False
) -> Traced:
    if training:
        tracer.refuse("rrelu in training mode", "its slopes are random; call .eval()")
    tracer.needs_eval()
    return leaky_relu(tracer, input, (lower + upper) / 2)


@lowers("prelu")
def prelu(tracer: Tracer, input: Traced, weight: Tensor) -> Traced:
    channels = input.shape[1] if input.dim() > 1 else 1
    if weight.numel() not in (1, channels):
        raise ValueError(f"{tracer.path}: prelu has {weight.numel()} slopes for {channels} channels")
    return activation(tracer, "prelu", input, (tracer.slot(weight),))


@lowers("threshold")
def threshold(tracer: Tracer, input: Traced, threshold: float, value: float) -> Traced:
    if threshold != 0 or value != 0:
        tracer.refuse(f"threshold at {threshold} with value {value}", "use relu, or clamp")
    return relu(tracer, input)


@lowers("relu6")
def relu6(tracer: Tracer, input: Traced) -> Traced:
    return clamp(tracer, input, 0.0, 6.0)


@lowers("hardtanh")
def hardtanh(tracer: Tracer, input: Traced, min_val: float = -1.0, max_val: float = 1.0) -> Traced:
    return clamp(tracer, input, min_val, max_val)


@lowers("hardsigmoid")
def hardsigmoid(tracer: Tracer, input: Traced) -> Traced:
    return div(tracer, clamp(tracer, add(tracer, input, 3.0), 0.0, 6.0), 6.0)


@lowers("clamp_min")
def clamp_min(tracer: Tracer, input: Traced, min: Any) -> Traced:
    return clamp(tracer, input, min)


@lowers("clamp_max")
def clamp_max(tracer: Tracer, input: Traced, max: Any) -> Traced:
    return clamp(tracer, input, None, max)


@lowers("clamp")
def clamp(tracer: Tracer, input: Traced, min: Any = None, max: Any = None) -> Traced:
    """clamp with numbers or tensors; from 0 upwards it is a ReLU."""
    low = -math.inf if min is None else _number(tracer, min)
    high = math.inf if max is None else _number(tracer, max)
    if low is None or high is None:
        value = input if min is None else maximum(tracer, input, min)
        return value if max is None else minimum(tracer, value, max)
    if low > high:
        raise ValueError(f"{tracer.path or 'network'}: clamp needs min <= max, got {low} and {high}")
    if (low, high) == (0.0, math.inf):
        return relu(tracer, input)
    return activation(tracer, "clamp", input, min=low, max=high)


def _number(tracer: Tracer, value: Any) -> float | None:
    """The bound of a clamp where it is one number."""
    if isinstance(value, Tensor) and (isinstance(value, Traced) or tracer.source(value) is not None):
        return None
    return scalar(value)


# ---- pairwise extrema -------------------------------------------------------------------------


@lowers("maximum")
def maximum(tracer: Tracer, input: Any, other: Any) -> Traced:
    return _extremum(tracer, "max2", input, other)


@lowers("minimum")
def minimum(tracer: Tracer, input: Any, other: Any) -> Traced:
    return _extremum(tracer, "min2", input, other)


def _pairwise(op: str) -> Any:
    """torch.max and torch.min: of two tensors; the forms that also return indices are refused."""

    def lowering(
        tracer: Tracer, input: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None
    ) -> Traced:
        second = dim if other is None else other
        if not isinstance(second, Tensor):
            tracer.refuse(
                "max or min over a dimension", "use torch.amax or torch.amin, or the max of two tensors"
            )
        return _extremum(tracer, op, input, second)

    return lowering


lowers("max")(_pairwise("max2"))
lowers("min")(_pairwise("min2"))


def _extremum(tracer: Tracer, op: str, left: Any, right: Any) -> Traced:
    """``max2`` or ``min2``; against one number it is a clamp."""
    value, other = (left, right) if isinstance(left, Traced) else (right, left)
    if not isinstance(other, Traced):
        number = _number(tracer, other)
        if number is not None:
            return clamp(tracer, value, number) if op == "max2" else clamp(tracer, value, None, number)
        constant = sample_part(tracer, other, value.dim())
        node = tracer.emit("constant", (), tuple(constant.shape), (tracer.slot(constant),), helper=True)
        missing = value.dim() - 1 - constant.dim()
        other = tracer.wrap(tracer.reshape(node, (*[1] * missing, *constant.shape)))
    a, b = same_shapes(tracer, value, other)
    shape = tracer.shape(a)
    if a == b:
        return tracer.wrap(a, value.dtype)
    if (a, b) not in tracer.differences:
        tracer.differences[a, b] = tracer.emit("add", (a, b), shape, helper=True, sign=-1)
    return tracer.wrap(tracer.emit(op, (a, b, tracer.differences[a, b]), shape), value.dtype)


def _batched(value: Tensor) -> str:
    return str(["batch", *value.shape[1:]]).replace("'", "")
