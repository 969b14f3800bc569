"""Lines and intervals around activations: the ``relaxation`` family."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Slope rules, in the order of ``pycert::Slope`` (csrc/core/relaxation.h).
SLOPES = ("adaptive", "parallel", "zero", "one")
#: Activations, in the order of ``pycert::Activation``.
ACTIVATIONS = (
    *("relu", "leaky_relu", "prelu", "clamp", "sigmoid", "tanh", "abs", "softsign", "sin", "cos", "elu"),
    *("softplus", "silu", "mish", "gelu", "gelu_tanh", "hardswish", "exp", "log", "sqrt", "reciprocal"),
    "square",
)


class ReluRelaxation(NamedTuple):
    """``lower_slope * x <= relu(x) <= upper_slope * x + upper_intercept``."""

    lower_slope: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor


class ActivationLines(NamedTuple):
    """``lower_slope * x + lower_intercept <= f(x) <= upper_slope * x + upper_intercept``."""

    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor


def relu_relaxation(lower: Tensor, upper: Tensor, slope: str = "adaptive") -> ReluRelaxation:
    """Lines around ReLU on every interval ``[lower, upper]``.

    Gives ``lower_slope * x <= relu(x) <= upper_slope * x + upper_intercept`` for all ``x``
    in the interval.

    Args:
        lower: any shape, float32 or float64, in the units of the pre-activation.
        upper: like ``lower``, with ``lower <= upper`` (not checked).
        slope: of the lower line where ``lower < 0 < upper``. ``"adaptive"``: 1 where
            ``upper > -lower`` and 0 elsewhere (CROWN, least area); ``"parallel"``: the upper
            line's (Fast-Lin); ``"zero"``; ``"one"``.

    Returns:
        ``ReluRelaxation(lower_slope, upper_slope, upper_intercept)``, each like ``lower``;
        slopes without unit, the intercept in the unit of ``lower``. Where an end is infinite
        the upper line is constant (possibly infinite); where one is NaN its intercept is infinite.

    Raises:
        ValueError: the shapes or devices differ, or ``slope`` is none of the four.
        TypeError: the dtypes differ; half precision is refused, except under autocast, where it
            is cast to float32.

    Soundness: outward rounded; ReLU itself is exact in floating point.
    Gradient: with respect to both ends; zero for stable neurons; ``lower_slope`` has one for
    ``"parallel"`` only. Second derivatives raise.
    Source: Zhang et al., "Efficient Neural Network Robustness Certification with General
    Activation Functions", NeurIPS 2018 (CROWN), Table 2; Weng et al., "Towards Fast Computation
    of Certified Robustness for ReLU Networks", ICML 2018 (Fast-Lin), for parallel lines.

    Example:
        >>> pycert.ops.relu_relaxation(torch.tensor([[-1.0]]), torch.tensor([[3.0]])).upper_slope
        tensor([[0.7500]])
    """
    number = _number("relu_relaxation", "slope", slope, SLOPES)
    lower, upper = _out_of_autocast(lower), _out_of_autocast(upper)
    return ReluRelaxation(*torch.ops.pycert.relu_relaxation(lower, upper, number))


def activation_lines(
    lower: Tensor,
    upper: Tensor,
    activation: str,
    *,
    slope: str = "adaptive",
    deployed: bool = False,
    negative_slope: float = 0.01,
    weight: Tensor | None = None,
    min: float = -math.inf,
    max: float = math.inf,
    alpha: float = 1.0,
    threshold: float = 20.0,
) -> ActivationLines:
    """Lines around an activation ``f`` on every interval ``[lower, upper]``.

    Gives ``lower_slope * x + lower_intercept <= f(x) <= upper_slope * x + upper_intercept`` for
    all ``x`` in the interval.

    Args:
        lower: ``(B, *shape)``, float32 or float64, in the units of the pre-activation.
        upper: like ``lower``, with ``lower <= upper`` (not checked).
        activation: one of ``pycert.ops.relaxation.ACTIVATIONS``; ``"gelu"`` is the exact one,
            ``"gelu_tanh"`` its approximation.
        slope: ``"adaptive"``: lines of least area. ``"parallel"``: both have the slope of the
            chord. ``"zero"`` and ``"one"``: lines that hold for many slopes take 0 or 1, clipped
            to the slopes on both sides of the kink; all but relu, leaky_relu, prelu, abs and clamp
            stay adaptive.
        deployed: also enclose what the network's own arithmetic in the dtype of ``lower`` gives:
            ``32 u max(1, |f|)`` for each call of an elementary function (of exp: ``32 u |f|``),
            ``u |f|`` for prelu, ``2 u |f|`` for leaky_relu (whose slope is rounded as well) and square,
            ``4 u |f|`` for sqrt and reciprocal, ``4 u`` for softsign, ``8 u |f|`` for hardswish, the rounding
            of the limits for clamp, nothing for relu and abs; u is the unit roundoff, and ``|f|`` its
            largest value in the interval.
        negative_slope: leaky_relu's, any finite number.
        weight: prelu's slope: one value, or one per channel (dimension 1 of ``lower``).
        min, max: clamp's limits, infinite for none.
        alpha: elu's, not negative.
        threshold: of softplus, which is ``log(1 + exp(x))`` up to it and ``x`` beyond.

    Returns:
        ``ActivationLines(lower_slope, lower_intercept, upper_slope, upper_intercept)``, each like
        ``lower``; slopes in units of ``f`` per unit of ``lower``, intercepts in the unit of ``f``.
        Constant lines where an end is infinite, infinite intercepts where one is NaN, where the
        interval leaves the domain of log, sqrt or reciprocal, and where the network's own arithmetic
        may overflow (``deployed``). Constant lines for sin and cos beyond ``|x| = 2^20``.

    Raises:
        ValueError: shapes or devices differ; ``activation``, ``slope``, ``alpha``, ``threshold`` or
            the size of ``weight`` is not one of those above.
        TypeError: the dtypes differ; half precision is refused, except under autocast.

    Soundness: outward rounded. Elementary functions are evaluated in float64 and widened by
    2^-40 of their value.
    Gradient: with respect to both ends and ``weight``: the derivative of the formulas in real
    arithmetic (rounding counts as constant). Second derivatives raise.
    Source: Zhang et al., NeurIPS 2018 (CROWN), Tables 2 and 3; the least-area line is the one that
    supports the envelope of ``f`` at the midpoint of the interval.

    Example:
        >>> lines = pycert.ops.activation_lines(torch.tensor([[-1.0]]), torch.tensor([[3.0]]), "abs")
        >>> lines.upper_slope, lines.upper_intercept
        (tensor([[0.5000]]), tensor([[1.5000]]))
    """
    kind, parameter, a, b = _description(
        "activation_lines", lower, activation, negative_slope, weight, min, max, alpha, threshold
    )
    number = _number("activation_lines", "slope", slope, SLOPES)
    lower, upper = _out_of_autocast(lower), _out_of_autocast(upper)
    return ActivationLines(
        *torch.ops.pycert.activation_lines(lower, upper, kind, parameter, a, b, number, deployed)
    )


def activation_interval(
    lower: Tensor,
    upper: Tensor,
    activation: str,
    *,
    deployed: bool = False,
    negative_slope: float = 0.01,
    weight: Tensor | None = None,
    min: float = -math.inf,
    max: float = math.inf,
    alpha: float = 1.0,
    threshold: float = 20.0,
) -> tuple[Tensor, Tensor]:
    """The interval of an activation's values on every ``[lower, upper]``.

    Args:
        lower: ``(B, *shape)``, float32 or float64, in the units of the pre-activation.
        upper: like ``lower``, with ``lower <= upper`` (not checked).
        activation, deployed, negative_slope, weight, min, max, alpha, threshold: as in
            :func:`activation_lines`.

    Returns:
        The lower and the upper end, each like ``lower``; infinite where an end given is NaN. Both are
        infinite where the interval holds numbers for which the activation is undefined: negative
        ones for log and sqrt, 0 for reciprocal. log(0) is -inf.

    Raises:
        ValueError, TypeError: as in :func:`activation_lines`.

    Soundness: outward rounded.
    Gradient: with respect to both ends and ``weight``. Second derivatives raise.
    Source: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training
    Verifiably Robust Models", 2018, section 3.

    Example:
        >>> pycert.ops.activation_interval(torch.tensor([[-1.0]]), torch.tensor([[3.0]]), "abs")
        (tensor([[0.]]), tensor([[3.]]))
    """
    kind, parameter, a, b = _description(
        "activation_interval", lower, activation, negative_slope, weight, min, max, alpha, threshold
    )
    lower, upper = _out_of_autocast(lower), _out_of_autocast(upper)
    image = torch.ops.pycert.activation_interval(lower, upper, kind, parameter, a, b, deployed)
    return image[0], image[1]


def _number(operator: str, argument: str, value: str, known: tuple[str, ...]) -> int:
    if value not in known:
        accepted = ", ".join(repr(name) for name in known)
        raise ValueError(f"{operator}: {argument} must be one of {accepted}, got {value!r}")
    return known.index(value)


def _out_of_autocast(value: Tensor) -> Tensor:
    is_half = value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half and torch.is_autocast_enabled(value.device.type) else value


def _description(
    operator: str,
    lower: Tensor,
    activation: str,
    negative_slope: float,
    weight: Tensor | None,
    low: float,
    high: float,
    alpha: float,
    threshold: float,
) -> tuple[int, Tensor | None, float, float]:
    """The kind, parameter, a and b that the operators take."""
    kind = _number(operator, "activation", activation, ACTIVATIONS)
    if (weight is None) == (activation == "prelu"):
        raise ValueError(f"{operator}: weight must be given for prelu and for nothing else")
    if activation == "leaky_relu":
        if not math.isfinite(negative_slope):
            raise ValueError(f"{operator}: negative_slope must be finite, got {negative_slope}")
        return kind, None, float(negative_slope), 0.0
    if activation == "clamp":
        return kind, None, float(low), float(high)
    if activation == "elu":
        if not 0 <= alpha < math.inf:
            raise ValueError(f"{operator}: alpha must be finite and not negative, got {alpha}")
        return kind, None, float(alpha), 0.0
    if activation == "softplus":
        if math.isnan(threshold):
            raise ValueError(f"{operator}: threshold must be a number, got {threshold}")
        return kind, None, 0.0, float(threshold)
    return kind, None if weight is None else _out_of_autocast(weight), 0.0, 0.0


def _like(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.register_fake("pycert::relu_relaxation")
def _relu_relaxation_fake(lower: Tensor, upper: Tensor, slope: int) -> tuple[Tensor, ...]:
    return _like(lower), _like(lower), _like(lower)


@torch.library.register_fake("pycert::relu_relaxation_backward")
def _relu_relaxation_backward_fake(
    lower: Tensor,
    upper: Tensor,
    grad_lower_slope: Tensor | None,
    grad_upper_slope: Tensor | None,
    grad_upper_intercept: Tensor | None,
    slope: int,
) -> tuple[Tensor, ...]:
    return _like(lower), _like(lower)


@torch.library.register_fake("pycert::activation_lines")
def _activation_lines_fake(
    lower: Tensor,
    upper: Tensor,
    kind: int,
    parameter: Tensor | None,
    a: float,
    b: float,
    slope: int,
    deployed: bool,
) -> tuple[Tensor, ...]:
    return _like(lower), _like(lower), _like(lower), _like(lower)


def _parameter_gradient(lower: Tensor, parameter: Tensor | None) -> Tensor:
    return lower.new_empty(0) if parameter is None else _like(parameter)


@torch.library.register_fake("pycert::activation_lines_backward")
def _activation_lines_backward_fake(
    lower: Tensor,
    upper: Tensor,
    parameter: Tensor | None,
    grad_lower_slope: Tensor | None,
    grad_lower_intercept: Tensor | None,
    grad_upper_slope: Tensor | None,
    grad_upper_intercept: Tensor | None,
    kind: int,
    a: float,
    b: float,
    slope: int,
) -> tuple[Tensor, ...]:
    return _like(lower), _like(lower), _parameter_gradient(lower, parameter)


@torch.library.register_fake("pycert::activation_interval")
def _activation_interval_fake(
    lower: Tensor, upper: Tensor, kind: int, parameter: Tensor | None, a: float, b: float, deployed: bool
) -> tuple[Tensor, ...]:
    return _like(lower), _like(lower)


@torch.library.register_fake("pycert::activation_interval_backward")
def _activation_interval_backward_fake(
    lower: Tensor,
    upper: Tensor,
    parameter: Tensor | None,
    grad_out_lower: Tensor | None,
    grad_out_upper: Tensor | None,
    kind: int,
    a: float,
    b: float,
) -> tuple[Tensor, ...]:
    return _like(lower), _like(lower), _parameter_gradient(lower, parameter)
