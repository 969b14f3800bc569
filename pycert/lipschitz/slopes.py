"""The largest ``|f'|`` of activations over intervals, not below it; float64.

By the mean value theorem ``|f(x) - f(y)|`` is at most this times ``|x - y|`` for every two points of the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Elementary functions are computed to a few units in the last place; this is far above.
_SLACK = 1 + 1e-9


def _nearest_to_zero(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.where(lower > 0, lower, torch.where(upper < 0, -upper, torch.zeros_like(lower)))


def _largest(lower: Tensor, upper: Tensor) -> Tensor:
    return torch.maximum(lower.abs(), upper.abs())


def _sigmoid(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    s = torch.sigmoid(_nearest_to_zero(lower, upper))
    return s * (1 - s) * _SLACK + 1e-16


def _tanh(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    t = torch.tanh(_nearest_to_zero(lower, upper))
    return ((1 - t) * (1 + t)) * _SLACK + 1e-15


def _clamp(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    low, high = attrs.get("min", -math.inf), attrs.get("max", math.inf)
    return ((upper > low) & (lower < high)).double()


def _leaky(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    slope = attrs["slope"]
    slope = slope.double() if isinstance(slope, Tensor) else torch.tensor(float(slope), dtype=torch.float64)
    left = torch.where(lower < 0, slope.abs().to(lower.device), torch.zeros_like(lower))
    return torch.maximum(left, (upper > 0).double())


def _elu(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    alpha = abs(float(attrs.get("alpha", 1.0)))
    left = alpha * torch.exp(upper.clamp(max=0)) * _SLACK
    return torch.where(lower < 0, torch.maximum(left, (upper > 0).double()), torch.ones_like(lower))


def _softplus(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    # Beyond the threshold torch returns x: there the function jumps, and across the jump has no Lipschitz constant.
    threshold = float(attrs.get("threshold", 20.0))
    jumps = (lower <= threshold) & (upper >= threshold) & (lower < upper)
    slope = torch.where(lower > threshold, torch.ones_like(upper), torch.sigmoid(upper) * _SLACK)
    return torch.where(jumps & torch.isfinite(lower), torch.full_like(slope, math.inf), slope)


def _curved(highest: float, second: float, derivative: Callable[[Tensor], Tensor]) -> Any:
    """From the slope at the middle and a bound of ``|f''|``; never above the largest slope anywhere."""

    def slope(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
        half = (upper - lower) / 2
        near = derivative(lower / 2 + upper / 2).abs() * _SLACK + second * half * _SLACK + 1e-12
        return torch.where(torch.isfinite(near), near.clamp(max=highest), torch.full_like(near, highest))

    return slope


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _hardswish(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    ends = torch.maximum((2 * lower.clamp(-3, 3) + 3).abs(), (2 * upper.clamp(-3, 3) + 3).abs()) / 6 * _SLACK
    return torch.where(
        upper <= -3, torch.zeros_like(ends), torch.where(lower >= 3, torch.ones_like(ends), ends)
    )


def _one(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    return torch.ones_like(lower)


_SLOPES: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "relu": lambda lower, upper, attrs: (upper > 0).double(),
    "abs": _one,
    "sin": _one,
    "cos": _one,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "clamp": _clamp,
    "leaky_relu": _leaky,
    "prelu": _leaky,
    "elu": _elu,
    "softplus": _softplus,
    # The largest slopes, and bounds of |f''|: silu'' is at most 1/2, at 0; gelu'' 2 phi(0) = 0.798, at 0.
    "silu": _curved(1.0999, 0.5001, _silu_slope),
    "gelu": _curved(1.1290, 0.7980, _gelu_slope),
    "gelu_tanh": _curved(1.1296, math.inf, _gelu_slope),
    "mish": _curved(1.0890, math.inf, _silu_slope),
    "hardswish": _hardswish,
    "softsign": lambda lower, upper, attrs: (1 + _nearest_to_zero(lower, upper)) ** -2 * _SLACK,
    "exp": lambda lower, upper, attrs: torch.exp(upper) * _SLACK,
    "log": lambda lower, upper, attrs: torch.where(lower > 0, _SLACK / lower, math.inf),
    "sqrt": lambda lower, upper, attrs: torch.where(lower > 0, _SLACK / (2 * lower.sqrt()), math.inf),
    "reciprocal": lambda lower, upper, attrs: torch.where(
        (lower > 0) | (upper < 0), _SLACK / _nearest_to_zero(lower, upper).square(), math.inf
    ),
    "square": lambda lower, upper, attrs: 2 * _largest(lower, upper) * _SLACK,
}

#: Whose values an execution rounds by more than a rounding or two of the result.
ELEMENTARY = frozenset(
    "sigmoid tanh elu softplus silu gelu gelu_tanh mish hardswish softsign exp log sqrt reciprocal sin cos".split()
)


def largest_slope(op: str, lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor | None:
    """Of one activation over ``[lower, upper]`` (infinite ends are taken), elementwise; None where it is not known."""
    rule = _SLOPES.get(op)
    return None if rule is None else rule(lower.double(), upper.double(), attrs)


def slope_range(op: str, lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Least and largest slope of one activation over ``[lower, upper]``, elementwise; None where they are not known.

    Points at an end of the interval count with all their Clarke slopes, those from outside as well: a ReLU at 0 has
    ``[0, 1]``. Where nothing better is known the range is ``[-s, s]`` with the largest magnitude ``s``.
    """
    lower, upper = lower.double(), upper.double()
    rule = _RANGES.get(op)
    if rule is not None:
        return rule(lower, upper, attrs)
    largest = largest_slope(op, lower, upper, attrs)
    return None if largest is None else (-largest, largest)


def _relu_range(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return (lower > 0).double(), (upper >= 0).double()


def _abs_range(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return 2 * (lower > 0).double() - 1, 2 * (upper >= 0).double() - 1


def _clamp_range(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    low, high = attrs.get("min", -math.inf), attrs.get("max", math.inf)
    return ((lower > low) & (upper < high)).double(), ((upper >= low) & (lower <= high)).double()


def _leaky_range(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    slope = attrs["slope"]
    slope = slope.double() if isinstance(slope, Tensor) else torch.tensor(float(slope), dtype=torch.float64)
    left, right = slope.to(lower.device).expand_as(lower), torch.ones_like(lower)
    least, most = torch.minimum(left, right), torch.maximum(left, right)
    least = torch.where(lower > 0, right, torch.where(upper < 0, left, least))
    return least, torch.where(lower > 0, right, torch.where(upper < 0, left, most))


def _bell_range(largest: Callable[..., Tensor]) -> Any:
    """Of sigmoids, whose slope falls with the distance from 0."""

    def found(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        far = _largest(lower, upper)
        least = largest(far, far, attrs) * (1 - 4e-9) - 4e-15
        return least.clamp(min=0), largest(lower, upper, attrs)

    return found


def _softplus_range(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(lower) * (1 - 1e-9), _softplus(lower, upper, attrs)


def _elu_range(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    alpha = float(attrs.get("alpha", 1.0))
    largest = _elu(lower, torch.where(upper == 0, upper + 1e-300, upper), attrs)
    if alpha < 0:
        return -largest, largest
    left = alpha * torch.exp(lower.clamp(max=0)) * (1 - 1e-9)
    one = torch.ones_like(lower)
    return torch.where(lower > 0, one, torch.where(upper < 0, left, torch.minimum(left, one))), largest


def _curved_range(highest: float, second: float, derivative: Callable[[Tensor], Tensor]) -> Any:
    """As :func:`_curved`, on both sides of the slope at the middle."""

    def found(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        middle = derivative(lower / 2 + upper / 2)
        reach = second * (upper - lower) / 2 * _SLACK + middle.abs() * 1e-9 + 1e-12
        least, most = (torch.nan_to_num(middle + sign * reach, nan=sign * highest) for sign in (-1, 1))
        return least.clamp(-highest, highest), most.clamp(-highest, highest)

    return found


_RANGES: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], tuple[Tensor, Tensor]]] = {
    "relu": _relu_range,
    "abs": _abs_range,
    "clamp": _clamp_range,
    "leaky_relu": _leaky_range,
    "prelu": _leaky_range,
    "sigmoid": _bell_range(_sigmoid),
    "tanh": _bell_range(_tanh),
    "softplus": _softplus_range,
    "elu": _elu_range,
    "silu": _curved_range(1.0999, 0.5001, _silu_slope),
    "gelu": _curved_range(1.1290, 0.7980, _gelu_slope),
}
