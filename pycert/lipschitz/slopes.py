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
#: Thresholds of softplus from here on are counted by :func:`softplus_jump`.
_FAR = 64.0


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


def softplus_jump(attrs: dict[str, Any]) -> float:
    """How far softplus with its threshold is from softplus at most, where that is far below any rounding, else 0.

    From :data:`_FAR` on the jump at the threshold counts as an error of this size, not as a slope.
    """
    threshold = float(attrs.get("threshold", 20.0))
    return math.exp(-threshold) * _SLACK + 1e-300 if threshold >= _FAR else 0.0


def _softplus(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    # Beyond the threshold torch returns x: there the function jumps, and across the jump has no Lipschitz constant.
    threshold = float(attrs.get("threshold", 20.0))
    if threshold >= _FAR:
        return torch.sigmoid(upper) * _SLACK
    jumps = (lower <= threshold) & (upper >= threshold) & (lower < upper)
    slope = torch.where(lower > threshold, torch.ones_like(upper), torch.sigmoid(upper) * _SLACK)
    return torch.where(jumps & torch.isfinite(lower), torch.full_like(slope, math.inf), slope)


def _between_turns(name: str) -> Any:
    """The range of a slope that is monotone between its turning points: over the ends and those in the interval."""
    derivative, turns, highest = _TURNING[name]

    def found(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        # Beyond 40 the slopes differ from their limits by less than the slack.
        values = [derivative(end.clamp(-40, 40)) for end in (lower, upper)]
        least, most = torch.minimum(*values), torch.maximum(*values)
        for turn in turns:
            inside = (lower <= turn) & (upper >= turn)
            value = derivative(torch.tensor(turn, dtype=torch.float64, device=lower.device))
            least = torch.where(inside, torch.minimum(least, value), least)
            most = torch.where(inside, torch.maximum(most, value), most)
        least, most = (
            torch.nan_to_num(end + sign * (end.abs() * 1e-9 + 1e-12), nan=sign * highest)
            for sign, end in ((-1, least), (1, most))
        )
        return least.clamp(min=-highest), most.clamp(max=highest)

    return found


def _magnitude(name: str) -> Any:
    def found(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
        return _largest(*_between_turns(name)(lower, upper, attrs))

    return found


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    factor = math.sqrt(2 / math.pi)
    t = torch.tanh(factor * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t) * (1 + t) * factor * (1 + 3 * 0.044715 * x * x)


def _mish_slope(x: Tensor) -> Tensor:
    t = torch.tanh(torch.nn.functional.softplus(x, threshold=50.0))
    return t + x * (1 - t) * (1 + t) * torch.sigmoid(x)


#: Slopes, the zeros of the second derivative, and a bound of the slope's magnitude.
_TURNING: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, ...], float]] = {
    "silu": (_silu_slope, (-2.3993572805154677, 2.3993572805154677), 1.0999),
    "gelu": (_gelu_slope, (-math.sqrt(2), math.sqrt(2)), 1.1290),
    "gelu_tanh": (_gelu_tanh_slope, (-1.4185040087908284, 1.4185040087908284), 1.1290),
    "mish": (_mish_slope, (-2.2563763963607931, 1.4905711794854285), 1.0890),
}


def _hardswish(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    ends = torch.maximum((2 * lower.clamp(-3, 3) + 3).abs(), (2 * upper.clamp(-3, 3) + 3).abs()) / 6 * _SLACK
    return torch.where(
        upper <= -3, torch.zeros_like(ends), torch.where(lower >= 3, torch.ones_like(ends), ends)
    )


def _softsign(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> Tensor:
    return (1 + _nearest_to_zero(lower, upper)) ** -2 * _SLACK


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
    "silu": _magnitude("silu"),
    "gelu": _magnitude("gelu"),
    "gelu_tanh": _magnitude("gelu_tanh"),
    "mish": _magnitude("mish"),
    "hardswish": _hardswish,
    "softsign": _softsign,
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
    return None if rule is None else rule(*_ends(lower, upper), attrs)


def _ends(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """In float64; NaN, which compares as nothing would, as infinite."""
    lower, upper = lower.double(), upper.double()
    infinite = torch.full((), math.inf, dtype=torch.float64, device=lower.device)
    return torch.where(torch.isnan(lower), -infinite, lower), torch.where(torch.isnan(upper), infinite, upper)


def slope_range(op: str, lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Least and largest slope of one activation over ``[lower, upper]``, elementwise; None where they are not known.

    Points at an end of the interval count with all their Clarke slopes, those from outside as well: a ReLU at 0 has
    ``[0, 1]``. Where nothing better is known the range is ``[-s, s]`` with the largest magnitude ``s``.
    """
    lower, upper = _ends(lower, upper)
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


def _hardswish_range(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ends = [(2 * end.clamp(-3, 3) + 3) / 6 for end in (lower, upper)]
    curved = (upper >= -3) & (lower <= 3)
    least = torch.where(curved, ends[0] - 1e-9, torch.where(upper < -3, 0.0, 1.0))
    most = torch.where(curved, ends[1] + 1e-9, torch.where(upper < -3, 0.0, 1.0))
    flat, straight = lower <= -3, upper >= 3
    least = torch.where(flat, least.clamp(max=0), torch.where(straight, least.clamp(max=1), least))
    most = torch.where(straight, most.clamp(min=1), torch.where(flat, most.clamp(min=0), most))
    return least, most


def _falling(slope: Callable[[Tensor], Tensor], sign: float) -> Any:
    """Of functions on the positive numbers whose slope has this sign and a magnitude that falls."""

    def found(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        far = torch.where(upper > 0, slope(upper.clamp(min=1e-300)) * (1 - 1e-9), 0.0)
        near = torch.where(lower > 0, slope(lower.clamp(min=1e-300)) * _SLACK, math.inf)
        return (far, near) if sign > 0 else (-near, -far)

    return found


def _reciprocal_range(lower: Tensor, upper: Tensor, attrs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    near, far = _nearest_to_zero(lower, upper), _largest(lower, upper)
    least = torch.where(near > 0, -_SLACK / near.square(), -math.inf)
    most = torch.where(near > 0, -(1 - 1e-9) / far.square(), 0.0)
    return least, torch.where(torch.isfinite(most), most, 0.0)


def hypotenuse_range(lower: Tensor, upper: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``sqrt(x^2 + square)``: ``x / sqrt(x^2 + square)``, which rises; ``square`` is known to a few roundings."""

    def slope(x: Tensor, sign: float) -> Tensor:
        # A larger square brings the slope nearer to 0.
        width = (square * torch.where((x > 0) == (sign < 0), 1 + 1e-6, 1 - 1e-6)).sqrt()
        value = x / torch.hypot(x, width)
        value = torch.where(torch.isinf(x), torch.sign(x), value)
        return torch.nan_to_num(value + sign * (value.abs() * 1e-9 + 1e-300), nan=sign).clamp(-1, 1)

    return slope(lower.double(), -1.0), slope(upper.double(), 1.0)


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
    **{name: _between_turns(name) for name in _TURNING},
    "hardswish": _hardswish_range,
    "softsign": _bell_range(_softsign),
    "exp": lambda lower, upper, attrs: (torch.exp(lower) * (1 - 1e-9), torch.exp(upper) * _SLACK),
    "square": lambda lower, upper, attrs: (2 * lower, 2 * upper),
    "log": _falling(torch.reciprocal, 1.0),
    "sqrt": _falling(lambda x: 0.5 / x.sqrt(), 1.0),
    "reciprocal": _reciprocal_range,
}
