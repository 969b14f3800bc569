"""Lines and intervals around activations in float64, written to be read: no rounding, no gradients of tangent points.

The line of least area above ``f`` on ``[lower, upper]`` is the one that supports the concave
envelope of ``f`` at the midpoint, because the area under a line is its height there times the
width. The line below is the same for ``-f``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pycert.ops.relaxation import ActivationLines, ReluRelaxation

Function = Callable[[Tensor], Tensor]


def relu_relaxation(lower: Tensor, upper: Tensor, slope: str = "adaptive") -> ReluRelaxation:
    """CROWN's lines around ReLU; see :func:`pycert.ops.relu_relaxation`."""
    lower, upper = lower.double(), upper.double()
    unstable = (lower < 0) & (upper > 0)
    width = torch.where(unstable, upper - lower, torch.ones_like(lower))
    stable = (lower >= 0).double()
    chord = torch.where(unstable, upper / width, stable)
    below = {
        "adaptive": (upper > -lower).double(),
        "parallel": chord,
        "zero": torch.zeros_like(lower),
        "one": torch.ones_like(lower),
    }[slope]
    intercept = torch.where(unstable, -lower * upper / width, torch.zeros_like(lower))
    return ReluRelaxation(torch.where(unstable, below, stable), chord, intercept)


def function(
    activation: str, negative_slope: float | Tensor = 0.01, min: float = -math.inf, max: float = math.inf
) -> Function:
    """The activation itself; ``negative_slope`` serves leaky_relu and prelu."""
    functions: dict[str, Function] = {
        "relu": torch.relu,
        "leaky_relu": lambda x: torch.where(x >= 0, x, negative_slope * x),
        "prelu": lambda x: torch.where(x >= 0, x, negative_slope * x),
        "clamp": lambda x: x.clamp(min, max),
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "abs": torch.abs,
    }
    return functions[activation]


def activation_interval(lower: Tensor, upper: Tensor, f: Function) -> tuple[Tensor, Tensor]:
    """The values of ``f`` at both ends and, where it is inside, at 0: there the minimum of abs, or of a leaky
    ReLU with a negative slope, may lie."""
    lower, upper = lower.double(), upper.double()
    inside = torch.zeros_like(lower).maximum(lower).minimum(upper)
    values = torch.stack([f(lower), f(upper), f(inside)])
    return values.amin(0), values.amax(0)


def piecewise_linear_lines(
    lower: Tensor, upper: Tensor, f: Function, kinks: list[float], slope: str = "adaptive"
) -> ActivationLines:
    """Lines around a piecewise linear ``f``: its envelope has corners at the ends and at kinks alone."""
    lower, upper = lower.double(), upper.double()
    corners = [lower, upper] + [torch.full_like(lower, kink).maximum(lower).minimum(upper) for kink in kinks]
    x = torch.stack(corners)
    upper_slope, upper_intercept = _support(x, f(x), slope)
    lower_slope, lower_intercept = _support(x, -f(x), slope)
    return ActivationLines(-lower_slope, -lower_intercept, upper_slope, upper_intercept)


def _support(x: Tensor, y: Tensor, slope: str) -> tuple[Tensor, Tensor]:
    """The least line at the midpoint above the points ``(x, y)``, of all through two of them; or the one above
    them with the slope of the chord."""
    lower, upper = x[0], x[1]
    candidates = []
    for i in range(len(x)):
        for j in range(i):
            width = x[i] - x[j]
            candidates.append(
                torch.where(width != 0, (y[i] - y[j]) / torch.where(width != 0, width, 1.0), 0.0)
            )
    if slope == "parallel":
        candidates = candidates[:1]
    slopes = torch.stack(candidates)
    intercepts = (y - slopes[:, None] * x).amax(1)
    best = (slopes * (lower + upper) / 2 + intercepts).argmin(0, keepdim=True)
    return slopes.gather(0, best)[0], intercepts.gather(0, best)[0]


def s_shaped_lines(lower: Tensor, upper: Tensor, f: Function) -> ActivationLines:
    """Lines of least area around sigmoid or tanh: convex left of 0, concave right of it."""
    lower, upper = lower.double(), upper.double()
    upper_slope, upper_intercept = _above(lower, upper, f)
    lower_slope, lower_intercept = _above(-upper, -lower, lambda x: -f(-x))
    return ActivationLines(lower_slope, -lower_intercept, upper_slope, upper_intercept)


def _above(lower: Tensor, upper: Tensor, f: Function) -> tuple[Tensor, Tensor]:
    middle = (lower + upper) / 2
    # The tangent point t >= 0 of the line through (lower, f(lower)): by bisection, as far as upper.
    low, high = lower.clamp(min=0), upper.clamp(min=0)
    for _ in range(100):
        t = (low + high) / 2
        beyond = _derivative(f, t) * (t - lower) <= f(t) - f(lower)
        low, high = torch.where(beyond, low, t), torch.where(beyond, t, high)
    reach = torch.where(lower >= 0, lower, torch.where(upper <= 0, upper, high))
    chord = (f(reach) - f(lower)) / torch.where(reach > lower, reach - lower, 1.0)
    is_tangent = (middle >= reach) | (upper == lower)
    slope = torch.where(is_tangent, _derivative(f, middle), chord)
    point = torch.where(is_tangent, middle, lower)
    return slope, f(point) - slope * point


def _derivative(f: Function, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x).sum(), x)[0]
