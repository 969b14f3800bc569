"""Lowering of sums, products by constants, activations and pairwise extrema."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from pycert.activation_kinds import PREFIX, power_name
from pycert.graph.live import scalar, survives
from pycert.graph.parts import broadcast, expand, sample_part
from pycert.graph.tracer import Traced, Tracer, lowers


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
        return _product(tracer, value, factor)
    return _by_constant(tracer, "mul_const", value, factor, neutral=1.0)


@lowers("div")
def div(tracer: Tracer, input: Any, other: Any, *, rounding_mode: str | None = None) -> Traced:
    if rounding_mode is not None:
        tracer.refuse(f"div with rounding_mode='{rounding_mode}'", "divide without rounding")
    if isinstance(other, Traced):
        return rdiv(tracer, other, input)
    return _by_constant(tracer, "div_const", input, other, neutral=1.0)


@lowers("rdiv")
def rdiv(tracer: Tracer, input: Traced, other: Any = 1) -> Traced:
    return mul(tracer, reciprocal(tracer, input), other)


@lowers("neg")
def neg(tracer: Tracer, input: Traced) -> Traced:
    return mul(tracer, input, -1)


@lowers("pow")
def power(tracer: Tracer, input: Any, exponent: Any) -> Traced:
    if isinstance(exponent, Tensor) and exponent.dim() == 0 and not isinstance(exponent, Traced):
        exponent = exponent if tracer.source(exponent) is not None else scalar(exponent)
    number = float(exponent) if isinstance(exponent, numbers.Real) else None
    if isinstance(input, Traced) and number in _POWERS:
        for op in _POWERS[number]:
            input = activation(tracer, op, input)
        return tracer.wrap(tracer.node(input), input.dtype)
    if not isinstance(input, Traced) or number is None or not (number.is_integer() and abs(number) >= 3):
        tracer.refuse("pow", "of powers only integers but 0, 0.5 and -0.5 of a value are bounded")
    result = activation(tracer, "custom", input, name=power_name(int(abs(number))))
    return reciprocal(tracer, result) if number < 0 else result


#: Exponents as activations, one after the other.
_POWERS: dict[float | None, tuple[str, ...]] = {
    1.0: (),
    2.0: ("square",),
    0.5: ("sqrt",),
    -0.5: ("sqrt", "reciprocal"),
    -1.0: ("reciprocal",),
    -2.0: ("square", "reciprocal"),
}


def _product(tracer: Tracer, left: Traced, right: Traced) -> Traced:
    """A product of two values; ``x * x`` and ``x * sigmoid(x)`` are the activations that they are."""
    a, b = same_shapes(tracer, left, right)
    if a == b:
        return activation(tracer, "square", left if tracer.shape(a) == tuple(left.shape[1:]) else right)
    for value, gate in ((a, b), (b, a)):
        node = tracer.builder.nodes[gate]
        if node.op == "sigmoid" and node.inputs == (value,):
            return tracer.wrap(tracer.emit("silu", (value,), tracer.shape(value)), left.dtype)
    return tracer.wrap(tracer.emit("product", (a, b), tracer.shape(a)), left.dtype)


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


def _plain(op: str) -> Any:
    """An activation without arguments."""

    def lowering(tracer: Tracer, input: Traced) -> Traced:
        return activation(tracer, op, input)

    return lowering


for _name in "exp log sqrt square sin cos silu mish softsign hardswish reciprocal".split():
    lowers(_name)(_plain(_name))


def _built_in(name: str) -> Any:
    """An activation without a kernel of its own."""

    def lowering(tracer: Tracer, input: Traced) -> Traced:
        return activation(tracer, "custom", input, name=PREFIX + name)

    return lowering


for _name, _own in {"atan": "arctan", "arctan": "arctan", "sign": "sign", "sgn": "sign"}.items():
    lowers(_name)(_built_in(_own))


def reciprocal(tracer: Tracer, input: Traced) -> Traced:
    return activation(tracer, "reciprocal", input)


@lowers("rsqrt")
def rsqrt(tracer: Tracer, input: Traced) -> Traced:
    return power(tracer, input, -0.5)


@lowers("gelu")
def gelu(tracer: Tracer, input: Traced, approximate: str = "none") -> Traced:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{tracer.path}: gelu's approximate must be 'none' or 'tanh', got {approximate!r}")
    return activation(tracer, "gelu" if approximate == "none" else "gelu_tanh", input)


@lowers("elu")
def elu(
    tracer: Tracer, input: Traced, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Traced:
    """``scale * x`` for x >= 0, ``scale * alpha * (exp(input_scale * x) - 1)`` below.

    With v = input_scale * x that is scale / input_scale times v and alpha * input_scale * (exp(v) - 1).
    """
    if not (0 <= alpha < math.inf and 0 < input_scale < math.inf and abs(scale) < math.inf):
        tracer.refuse(
            f"elu with alpha={alpha}, scale={scale}, input_scale={input_scale}",
            "alpha must not be negative, input_scale must be positive, and all of them finite",
        )
    inner = mul(tracer, input, input_scale)
    return mul(
        tracer, activation(tracer, "elu", inner, alpha=float(alpha) * input_scale), scale / input_scale
    )


@lowers("celu")
def celu(tracer: Tracer, input: Traced, alpha: float = 1.0) -> Traced:
    if not 0 < alpha < math.inf:
        tracer.refuse(f"celu with alpha={alpha}", "alpha must be positive and finite")
    return mul(tracer, activation(tracer, "elu", div(tracer, input, alpha), alpha=1.0), alpha)


@lowers("selu")
def selu(tracer: Tracer, input: Traced) -> Traced:
    """Klambauer et al., "Self-Normalizing Neural Networks", NeurIPS 2017, with the constants of its appendix."""
    return elu(tracer, input, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@lowers("softplus")
def softplus(tracer: Tracer, input: Traced, beta: float = 1.0, threshold: float = 20.0) -> Traced:
    """``log(1 + exp(beta * x)) / beta``, and x where ``beta * x > threshold``."""
    if not 0 < abs(beta) < math.inf or math.isnan(threshold):
        tracer.refuse(f"softplus with beta={beta}, threshold={threshold}", "both must be finite, beta not 0")
    inner = mul(tracer, input, beta)
    return div(tracer, activation(tracer, "softplus", inner, threshold=float(threshold)), beta)


@lowers("log_sigmoid", "logsigmoid")
def log_sigmoid(tracer: Tracer, input: Traced) -> Traced:
    """``-log(1 + exp(-x))``; beyond 80, where exp overflows in float32 soon, the sum is far below a rounding of x."""
    return neg(tracer, activation(tracer, "softplus", neg(tracer, input), threshold=80.0))


@lowers("tanhshrink")
def tanhshrink(tracer: Tracer, input: Traced) -> Traced:
    return sub(tracer, input, activation(tracer, "tanh", input))


@lowers("softshrink")
def softshrink(tracer: Tracer, input: Traced, lambd: float = 0.5) -> Traced:
    if not 0 <= lambd < math.inf:
        tracer.refuse(f"softshrink with lambd={lambd}", "lambd must not be negative")
    return sub(tracer, input, clamp(tracer, input, -float(lambd), float(lambd)))


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
    return scalar(value) if survives(value, tracer.dtype) else None


# ---- pairwise extrema -------------------------------------------------------------------------


@lowers("maximum")
def maximum(tracer: Tracer, input: Any, other: Any) -> Traced:
    return _extremum(tracer, "max2", input, other)


@lowers("minimum")
def minimum(tracer: Tracer, input: Any, other: Any) -> Traced:
    return _extremum(tracer, "min2", input, other)


def _pairwise(op: str) -> Any:
    """torch.max and torch.min: of two tensors, or over one dimension, where the indices must not be used."""

    def lowering(
        tracer: Tracer, input: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None
    ) -> Any:
        second = dim if other is None else other
        if isinstance(second, int):
            return _over_dimension(tracer, op, input, second, keepdim)
        if not isinstance(second, Tensor):
            tracer.refuse(
                "max or min over all dimensions", "use torch.amax or torch.amin, or the max of two tensors"
            )
        return _extremum(tracer, op, input, second)

    return lowering


def _over_dimension(tracer: Tracer, op: str, input: Traced, dim: int, keepdim: bool) -> Any:
    from pycert.graph.reduction import amax, amin  # it needs this module

    values = (amax if op == "max2" else amin)(tracer, input, dim, keepdim)
    indices = tracer.wrap(values.node, torch.int64)
    indices.node = -1
    return (torch.return_types.max if op == "max2" else torch.return_types.min)((values, indices))


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
