"""User-defined elementwise activations: :func:`register_activation` and their lines and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from pycert.activation_kinds import PREFIX, Activation, Elementwise, built_in, sign_interval, sign_lines
from pycert.ops.relaxation import SLOPES, ActivationLines

_UNIT = 2.0**-53  # unit roundoff of float64, in which everything here is computed
_SEARCH = 24  # bisection steps where a slope is chosen; an error there costs area, never validity
_NARROW = 1e-6  # below this width the slope of a chord is taken as the tangent's (differences cancel)
_LOCATE = 60  # bisection steps where an intercept is computed


class RegisteredActivation(nn.Module):
    """The layer of a registered activation: computes ``f(x)``; one operator for tracing."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = activation(name).name

    def forward(self, x: Tensor) -> Tensor:
        if has_torch_function_unary(x):  # a tracer takes it whole
            return handle_torch_function(self, (x,), x)
        return activation(self.name).f(x)

    def extra_repr(self) -> str:
        return repr(self.name)


_REGISTRY: dict[str, Activation] = {}


def register_activation(
    f: Elementwise,
    df: Elementwise,
    inflections: Sequence[float],
    name: str | None = None,
    *,
    error: float = 32.0,
) -> RegisteredActivation:
    """Makes an elementwise function an activation that every method can bound.

    What comes back is a layer: use it in a network, as ``nn.Sequential(..., act, ...)`` or
    ``act(x)``. A call of the bare ``f`` is traced as the torch functions it is made of.

    The caller grants, for every finite ``x``:

    * ``f`` is differentiable with a continuous derivative ``df``, and its curvature changes sign
      at ``inflections`` only (a straight piece counts as either);
    * ``f`` and ``df``, called on float64 tensors, are right within ``error * 2**-53 * max(1, |value|)``;
    * for ``soundness="deployed"``: the network's own ``f(x)`` in its dtype, of unit roundoff u, is
      right within ``error * u * max(1, |f(x)|)``.

    Two of these are tried on a grid over [-30, 30]; none is proved.

    Args:
        f: the function, of one tensor of any shape, elementwise, differentiable by autograd.
        df: its derivative, likewise (autograd through it is used where bounds are differentiated).
        inflections: points where the curvature changes sign, in the unit of ``x``; may be empty.
        name: under which networks that contain it are pickled; default: the name of ``f``.
        error: see above; unit: unit roundoffs.

    Returns:
        :class:`RegisteredActivation`, an ``nn.Module`` without parameters.

    Raises:
        ValueError: no usable name, or one that is taken or pycert's own; ``error`` not positive;
            ``inflections`` not finite; ``df`` is not the derivative of ``f``, or the curvature changes
            sign elsewhere, as far as the grid shows.
        TypeError: ``f`` or ``df`` is not callable or does not give float64 of the same shape for float64.

    Soundness: outward rounded, given the above.
    Gradient: of the bounds with respect to the ends of the interval, by autograd through ``f`` and
    ``df`` at the points where the lines touch.

    Example:
        >>> silu = lambda x: x * torch.sigmoid(x)
        >>> dsilu = lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))
        >>> act = pycert.register_activation(silu, dsilu, [-2.3993572805154, 2.3993572805154], name="silu")
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), act, torch.nn.Linear(8, 1))
    """
    if not callable(f) or not callable(df):
        raise TypeError("register_activation: f and df must be callable")
    name = name or str(getattr(f, "__name__", "<lambda>"))
    if name == "<lambda>":
        raise ValueError("register_activation: a lambda needs a name, as in name='silu'")
    if not error > 0:
        raise ValueError(f"register_activation: error must be positive, got {error}")
    if name.startswith(PREFIX):
        raise ValueError(
            f"register_activation: names that begin with {PREFIX!r} are pycert's own, got {name!r}"
        )
    points = tuple(sorted(float(point) for point in inflections))
    if not all(abs(point) < float("inf") for point in points):
        raise ValueError(f"register_activation: inflections must be finite, got {list(inflections)}")
    taken = _REGISTRY.get(name)
    if taken is not None and (taken.f is not f or taken.inflections != points):
        raise ValueError(f"register_activation: the name {name!r} is taken by another function")
    _REGISTRY[name] = Activation(name, f, df, points, _curvature(f, df, points), float(error))
    return RegisteredActivation(name)


def activation(name: str) -> Activation:
    """The registered or built-in activation of this name; ValueError where there is none."""
    own = built_in(name)
    if own is not None:
        return own
    if name not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY)) or "none"
        raise ValueError(
            f"no activation named {name!r} is registered (registered: {known}); "
            "call pycert.register_activation before using or unpickling a network that contains it"
        )
    return _REGISTRY[name]


def lookup(target: Any) -> str | None:
    """The name under which a function or layer is registered, or None."""
    target = getattr(target, "__self__", target)  # a bound forward
    if isinstance(target, RegisteredActivation):
        return target.name
    return next((entry.name for entry in _REGISTRY.values() if entry.f is target), None)


def _curvature(f: Elementwise, df: Elementwise, inflections: tuple[float, ...]) -> tuple[bool, ...]:
    """Whether each piece is convex, from df on a grid; checks what the grid can show."""
    reach = max([30.0] + [2 * abs(point) for point in inflections])
    edges = torch.tensor([-reach, *inflections, reach], dtype=torch.float64)
    convex = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        x = low + (high - low) * torch.linspace(0, 1, 513, dtype=torch.float64)
        with torch.no_grad():
            value, slope = f(x), df(x)
        for what, result in (("f", value), ("df", slope)):
            if not isinstance(result, Tensor) or result.dtype != torch.float64 or result.shape != x.shape:
                raise TypeError(
                    f"register_activation: {what} must give float64 of the same shape for float64"
                )
            if not result.isfinite().all():
                raise ValueError(f"register_activation: {what} must be finite on [-{reach:g}, {reach:g}]")
        mean = (value[1:] - value[:-1]) / (x[1:] - x[:-1])  # lies between the slopes at both ends
        noise = 1e-9 * (1 + value.abs().max() / (x[1] - x[0]) + slope.abs().max())
        least, most = torch.minimum(slope[1:], slope[:-1]), torch.maximum(slope[1:], slope[:-1])
        steps = slope[1:] - slope[:-1]
        between = f"between {low.item():g} and {high.item():g}"
        if (steps > noise).any() and (steps < -noise).any():
            raise ValueError(
                f"register_activation: the curvature changes sign {between}: name the inflection"
            )
        if (mean < least - noise).any() or (mean > most + noise).any():
            raise ValueError(f"register_activation: df is not the derivative of f {between}")
        convex.append(bool(slope[-1] >= slope[0]))
    return tuple(convex)


# ---- lines and intervals ------------------------------------------------------------------------


def custom_lines(
    name: str, lower: Tensor, upper: Tensor, slope_rule: int | str = 0, deployed: bool = False
) -> ActivationLines:
    """Lines around a registered activation on every interval ``[lower, upper]``.

    Args:
        name: as registered.
        lower: any shape, float32 or float64.
        upper: like ``lower``, with ``lower <= upper`` (not checked).
        slope_rule: a name or number of ``pycert.ops.relaxation.SLOPES``; ``"parallel"`` gives both
            lines the slope of the chord, every other rule the lines of least area.
        deployed: also enclose the network's own arithmetic in the dtype of ``lower``.

    Returns:
        ``ActivationLines``, each like ``lower``; infinite intercepts where an end is not finite.

    Raises:
        ValueError: no such activation or rule.

    Soundness: outward rounded, under the conditions of :func:`register_activation`.
    Gradient: with respect to both ends.
    """
    return lines_of(activation(name), lower, upper, slope_rule, deployed)


def lines_of(
    entry: Activation, lower: Tensor, upper: Tensor, slope_rule: int | str = 0, deployed: bool = False
) -> ActivationLines:
    """:func:`custom_lines` for an activation that need not be registered."""
    if slope_rule not in (*SLOPES, *range(len(SLOPES))):
        raise ValueError(
            f"custom_lines: slope_rule must be one of {SLOPES} or its number, got {slope_rule!r}"
        )
    if entry.is_sign:
        return ActivationLines(*sign_lines(lower, upper, deployed))
    parallel = slope_rule in ("parallel", 1)
    low, high = _finite(lower, upper)
    sides = []
    for sign in (-1.0, 1.0):
        slope, point = _choose(entry, low, high, sign, parallel)
        rounded, intercept = _outward(entry, lower.detach(), upper.detach(), slope.detach(), sign, deployed)
        intercept = torch.where(rounded == 0, _limited(entry, intercept, lower, upper), intercept)
        exact = entry.f(point) - slope * point
        sides += [_with_gradient(rounded, slope), _with_gradient(intercept, exact)]
    return ActivationLines(*sides)


def custom_interval(name: str, lower: Tensor, upper: Tensor, deployed: bool = False) -> tuple[Tensor, Tensor]:
    """The interval of a registered activation's values on every ``[lower, upper]``.

    Arguments, errors and promises as in :func:`custom_lines`; returns the lower and the upper end.
    """
    return interval_of(activation(name), lower, upper, deployed)


def interval_of(
    entry: Activation, lower: Tensor, upper: Tensor, deployed: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`custom_interval` for an activation that need not be registered."""
    if entry.is_sign:
        return sign_interval(lower, upper, deployed)
    low, high = _finite(lower, upper)
    flat = torch.zeros_like(low)
    ends = []
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            point = _highest(entry, low, high, flat, sign, _LOCATE)[0]
        _, intercept = _outward(entry, lower.detach(), upper.detach(), flat, sign, deployed)
        intercept = _limited(entry, intercept, lower, upper)
        ends.append(_with_gradient(intercept, entry.f(_moving(point, low, high))))
    return ends[0], ends[1]


def _limited(entry: Activation, bound: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """A constant bound within the limits of the values, unless an end is NaN."""
    unknown = lower.isnan() | upper.isnan()
    return torch.where(unknown, bound, bound.clamp(*entry.limits))


def _finite(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends in float64, 0 where one is not finite: formulas and gradients stay finite there, results are masked."""
    known = lower.isfinite() & upper.isfinite()
    return torch.where(known, lower, 0.0).double(), torch.where(known, upper, 0.0).double()


def _with_gradient(value: Tensor, formula: Tensor) -> Tensor:
    """``value`` with the gradient of ``formula``."""
    if not formula.requires_grad:
        return value
    return value + (formula - formula.detach()).to(value.dtype)


def _moving(point: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """A point that follows the end it lies at; points inside stay, by the envelope theorem."""
    return torch.where(point == lower, lower, torch.where(point == upper, upper, point))


def _pieces(entry: Activation) -> list[tuple[float, float, bool]]:
    edges = [-float("inf"), *entry.inflections, float("inf")]
    return list(zip(edges[:-1], edges[1:], entry.convex, strict=True))


def _candidates(
    entry: Activation, lower: Tensor, upper: Tensor, slope: Tensor, sign: float, steps: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Points where ``sign * (f(x) - slope x)`` may be greatest, each with the piece ``[low, high]`` it speaks for.

    On a piece where ``sign * f`` is concave it is one point, found by bisection; elsewhere the ends
    of the piece, that is the ends of the interval and the inflections, which all pieces share.
    """
    found = [(lower, lower, lower), (upper, upper, upper)]
    for start, end, convex in _pieces(entry):
        low, high = (torch.full_like(lower, edge).maximum(lower).minimum(upper) for edge in (start, end))
        if convex == (sign > 0):
            found += [(low, low, low), (high, high, high)]
            continue
        if entry.point_of_slope is not None:  # any point of the piece is valid
            point = entry.point_of_slope(slope, high).nan_to_num().maximum(low).minimum(high)
            found.append((point, low, high))
            continue
        left, right = low, high
        for _ in range(steps):
            middle = left + (right - left) / 2
            rising = sign * entry.df(middle) > sign * slope
            left, right = torch.where(rising, middle, left), torch.where(rising, right, middle)
        # The side where the bisection ended is exact when the maximum lies at an end of the piece.
        point = torch.where(right < high, left + (right - left) / 2, high)
        found.append((torch.where(left > low, point, torch.where(right < high, left, point)), low, high))
    return found


def _highest(
    entry: Activation, lower: Tensor, upper: Tensor, slope: Tensor, sign: float, steps: int
) -> tuple[Tensor, Tensor]:
    """The point of ``[lower, upper]`` where ``sign * (f(x) - slope x)`` is greatest, and that value."""
    points = torch.stack([point for point, _, _ in _candidates(entry, lower, upper, slope, sign, steps)])
    values = sign * (entry.f(points) - slope * points)
    best, index = values.max(0, keepdim=True)
    return points.gather(0, index)[0], best[0]


def _choose(
    entry: Activation, lower: Tensor, upper: Tensor, sign: float, parallel: bool
) -> tuple[Tensor, Tensor]:
    """Slope and touching point, with gradients, of the line above (sign 1) or below (sign -1)."""
    low, high = lower.detach(), upper.detach()
    middle = lower + (upper - lower) / 2
    with torch.no_grad():
        if parallel:
            left, right = low, high
            tangent = torch.zeros_like(low, dtype=torch.bool)
        else:
            left, right, tangent = _bridge(entry, low, high, sign)
        tangent |= high - low < _NARROW
    left, right = _moving(left, lower, upper), _moving(right, lower, upper)
    # right + 1: no 0/0, nor its gradient, where the chord is not used
    slope = torch.where(
        tangent, entry.df(middle), _chord(entry, left, torch.where(tangent, right + 1, right))
    )
    if not parallel:
        return slope, torch.where(tangent, middle, left)
    with torch.no_grad():
        point = _highest(entry, low, high, slope, sign, _LOCATE)[0]
    return slope, _moving(point, lower, upper)


def _bridge(entry: Activation, low: Tensor, high: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    """The points on both sides of the midpoint that the line of least area goes through, and where it is the tangent.

    The line of least area supports the envelope at the midpoint: it is the tangent there, or a
    bridge between a point on the left and one on the right, each an end or a tangent point. The
    bridge is found by moving its ends to where f rises most above it.
    """
    left, right, middle = low, high, low + (high - low) / 2
    slope = entry.df(middle)
    own = sign * (entry.f(middle) - slope * middle)
    tangent = _highest(entry, low, high, slope, sign, _SEARCH)[1] <= own + 1e-12 * (1 + own.abs())
    for _ in range(_SEARCH):
        slope = _chord(entry, left, right)
        point, best = _highest(entry, low, high, slope, sign, _SEARCH)
        reached = sign * (entry.f(left) - slope * left)
        above = ~tangent & (best > reached + 1e-12 * (1 + reached.abs()))
        if not above.any():
            break
        left = torch.where(above & (point < middle), point, left)
        right = torch.where(above & (point > middle), point, right)
    return left, right, tangent


def _chord(entry: Activation, left: Tensor, right: Tensor) -> Tensor:
    width = right - left
    return (entry.f(right) - entry.f(left)) / torch.where(width > 0, width, torch.ones_like(width))


def _outward(
    entry: Activation, lower: Tensor, upper: Tensor, slope: Tensor, sign: float, deployed: bool
) -> tuple[Tensor, Tensor]:
    """The slope in the dtype of ``lower`` and an intercept that is valid for it, rounded outward.

    For every point t of a concave piece [a, b], f(x) <= f(t) + f'(t) (x - t) there, so f(x) - slope x is at most
    f(t) - slope t + max((f'(t) - slope) (b - t), (slope - f'(t)) (t - a), 0), whatever the error in t.
    """
    with torch.no_grad():
        rounded = slope.to(lower.dtype)
        k, low, high = rounded.double(), lower.double(), upper.double()
        error = entry.error * _UNIT
        highest = torch.full_like(low, -float("inf"))
        for point, start, end in _candidates(entry, low, high, k, sign, _LOCATE):
            value, derivative = entry.f(point), entry.df(point)
            excess, doubt = sign * (derivative - k), error * derivative.abs().clamp(min=1) + _UNIT * k.abs()
            slack = torch.maximum((excess + doubt) * (end - point), (doubt - excess) * (point - start)).clamp(
                min=0
            )
            # 8 roundings of these terms cover every operation between here and the result
            doubt = error * value.abs().clamp(min=1) + 8 * _UNIT * (value.abs() + (k * point).abs() + slack)
            highest = torch.maximum(highest, sign * (value - k * point) + (slack + doubt) * (1 + 1e-9))
        if deployed:
            flat = torch.zeros_like(slope)
            ends = [_outward(entry, lower, upper, flat, side, deployed=False)[1] for side in (-1.0, 1.0)]
            size = torch.maximum(ends[0].double().abs(), ends[1].double().abs())
            unit = torch.finfo(lower.dtype).eps / 2
            highest = highest + (entry.error * unit * size.clamp(min=1) + 4 * _UNIT * highest.abs()) * (
                1 + 1e-9
            )
        known = low.isfinite() & high.isfinite() & rounded.isfinite() & highest.isfinite()
        rounded = torch.where(known, rounded, torch.zeros_like(rounded))
        highest = torch.where(known, highest, torch.full_like(highest, float("inf")))
        return rounded, sign * _round_up(highest, lower.dtype)


def _round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    nearest = value.to(dtype)
    above = torch.nextafter(nearest, torch.full_like(nearest, float("inf")))
    return torch.where(nearest.double() < value, above, nearest)
