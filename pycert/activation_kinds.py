"""What is known of an activation that has no kernel of its own, and those that pycert knows without registration."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]

#: Names that :func:`built_in` knows begin with this; none may be registered under one.
PREFIX = "pycert."
_HALF_PI = 1.570797  # above pi / 2 rounded to float32, the largest value of its arctangent


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation: what :func:`pycert.register_activation` was given, and the curvature of every piece."""

    name: str
    f: Elementwise
    df: Elementwise
    inflections: tuple[float, ...]
    convex: tuple[bool, ...]  # of the pieces between inflections, from left to right
    error: float
    #: Values lie between these, those of the network's own arithmetic too.
    limits: tuple[float, float] = (-math.inf, math.inf)
    #: The sign function: constant but for a step, so that the curvature says nothing.
    is_sign: bool = False
    #: ``(slope, high)``: where df is the slope, on the piece that ends at ``high``; None: found by bisection.
    point_of_slope: Callable[[Tensor, Tensor], Tensor] | None = None


def built_in(name: str) -> Activation | None:
    """The activation of a name that begins with :data:`PREFIX`: ``arctan``, ``sign`` or ``power_N``."""
    if name == PREFIX + "arctan":
        return _ARCTAN
    if name == PREFIX + "sign":
        return _SIGN
    found = re.fullmatch(re.escape(PREFIX) + r"power_([2-9]|[1-9]\d+)", name)
    return None if found is None else _power(int(found[1]))


def power_name(exponent: int) -> str:
    """The name of ``x ** exponent``, ``exponent`` at least 2."""
    return f"{PREFIX}power_{exponent}"


def _arctan_derivative(x: Tensor) -> Tensor:
    return 1 / (1 + x * x)


def _arctan_point(slope: Tensor, high: Tensor) -> Tensor:
    size = (1 / slope - 1).clamp(min=0).sqrt()
    return torch.where(high > 0, size, -size)


_ARCTAN = Activation(
    PREFIX + "arctan", torch.arctan, _arctan_derivative, (0.0,), (True, False), 32.0, (-_HALF_PI, _HALF_PI),
    point_of_slope=_arctan_point,
)  # fmt: skip
_SIGN = Activation(PREFIX + "sign", torch.sign, torch.zeros_like, (), (True,), 0.0, (-1.0, 1.0), True)


@functools.cache
def _power(exponent: int) -> Activation:
    """``x ** exponent``: convex right of 0, and left of it concave where the exponent is odd."""
    is_odd = exponent % 2 == 1

    def point_of_slope(slope: Tensor, high: Tensor) -> Tensor:
        size = ((slope.clamp(min=0) if is_odd else slope.abs()) / exponent) ** (1 / (exponent - 1))
        return torch.where((high > 0) if is_odd else (slope > 0), size, -size)

    return Activation(
        power_name(exponent),
        functools.partial(torch.pow, exponent=exponent),
        lambda x: exponent * torch.pow(x, exponent - 1),
        (0.0,) if is_odd else (),
        (False, True) if is_odd else (True,),
        32.0,
        (-math.inf if is_odd else 0.0, math.inf),
        point_of_slope=point_of_slope,
    )


def sign_interval(lower: Tensor, upper: Tensor, deployed: bool) -> tuple[Tensor, Tensor]:
    """The values of the sign function on ``[lower, upper]``; infinite where an end is NaN.

    ``deployed``: a subnormal number may count as 0.
    """
    known = ~(lower.isnan() | upper.isnan())
    least, most = lower.detach().sign(), upper.detach().sign()
    if deployed:
        tiny = torch.finfo(lower.dtype).tiny
        least = torch.where(lower.abs() < tiny, least.clamp(max=0), least)
        most = torch.where(upper.abs() < tiny, most.clamp(min=0), most)
    infinite = torch.full_like(least, math.inf)
    return torch.where(known, least, -infinite), torch.where(known, most, infinite)


def sign_lines(lower: Tensor, upper: Tensor, deployed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slope and intercept below the sign function, then above: constant, but for an interval that ends at 0.

    From 0 to u the line ``x / u`` lies below; its slope, rounded down, keeps it so. In deployed mode a
    positive subnormal number may count as 0, so that it does not.
    """
    least, most = sign_interval(lower, upper, deployed)
    zero = torch.zeros_like(least)
    if deployed:
        return zero, least, zero, most
    below = torch.where((lower == 0) & (upper > 0), _inverse_down(upper.detach()), zero)
    above = torch.where((upper == 0) & (lower < 0), _inverse_down(-lower.detach()), zero)
    return below, least, above, most


def _inverse_down(x: Tensor) -> Tensor:
    """``1 / x`` for ``x > 0`` rounded down, 0 where that is not finite."""
    inverse = torch.nextafter(1 / x, torch.zeros_like(x))
    return torch.where(inverse.isfinite() & (1 / x).isfinite(), inverse, torch.zeros_like(x))
