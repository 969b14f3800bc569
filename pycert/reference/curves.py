"""The activations that are convex and concave in turns: value, derivative and inflections, in plain PyTorch.

Lines and intervals are those of :mod:`pycert.activations`, which bounds any function given by these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pycert import activations as registered
from pycert.ops.relaxation import ActivationLines

Attributes = Mapping[str, float]


def _softplus(x: Tensor, attributes: Attributes) -> Tensor:
    return F.softplus(x, 1.0, attributes.get("threshold", 20.0))


def _elu(x: Tensor, attributes: Attributes) -> Tensor:
    return F.elu(x, attributes.get("alpha", 1.0))


FUNCTIONS: dict[str, Callable[[Tensor, Attributes], Tensor]] = {
    "elu": _elu,
    "softplus": _softplus,
    "silu": lambda x, _: x * x.sigmoid(),
    "mish": lambda x, _: x * F.softplus(x).tanh(),
    "gelu": lambda x, _: 0.5 * x * torch.special.erfc(-math.sqrt(0.5) * x),
    "gelu_tanh": lambda x, _: x * (2 * _cubic(x)).sigmoid(),
    "hardswish": lambda x, _: x * (x + 3).clamp(0, 6) / 6,
    "softsign": lambda x, _: x / (1 + x.abs()),
    "exp": lambda x, _: x.exp(),
    "log": lambda x, _: x.log(),
    "sqrt": lambda x, _: x.sqrt(),
    "reciprocal": lambda x, _: x.reciprocal(),
    "square": lambda x, _: x.square(),
    "sin": lambda x, _: x.sin(),
    "cos": lambda x, _: x.cos(),
}


_FAR = 100.0  # beyond this argument a sine's pieces are too many, and its bounds here are -1 and 1


def _cubic(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def _mish_derivative(x: Tensor, _: Attributes) -> Tensor:
    t = F.softplus(x).tanh()
    return t + x * (1 - t * t) * x.sigmoid()


def _gelu_derivative(x: Tensor, _: Attributes) -> Tensor:
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return 0.5 * torch.special.erfc(-math.sqrt(0.5) * x) + x * density


def _gelu_tanh_derivative(x: Tensor, _: Attributes) -> Tensor:
    s = (2 * _cubic(x)).sigmoid()
    return s + x * s * (1 - s) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


DERIVATIVES: dict[str, Callable[[Tensor, Attributes], Tensor]] = {
    "elu": lambda x, attributes: torch.where(x < 0, attributes.get("alpha", 1.0) * x.clamp(max=0).exp(), 1.0),
    "softplus": lambda x, _: x.sigmoid(),
    "silu": lambda x, _: x.sigmoid() * (1 + x * (-x).sigmoid()),
    "mish": _mish_derivative,
    "gelu": _gelu_derivative,
    "gelu_tanh": _gelu_tanh_derivative,
    "hardswish": lambda x, _: torch.where(x < -3, 0.0, torch.where(x < 3, (2 * x + 3) / 6, 1.0)),
    "softsign": lambda x, _: (1 + x.abs()) ** -2,
    "exp": lambda x, _: x.exp(),
    "log": lambda x, _: 1 / x,
    "sqrt": lambda x, _: torch.where(x > 0, 0.5 / x.sqrt(), 0.0),
    "reciprocal": lambda x, _: -(x**-2),
    "square": lambda x, _: 2 * x,
    "sin": lambda x, _: x.cos(),
    "cos": lambda x, _: -x.sin(),
}

#: Inflections and whether the pieces between them are convex, from left to right. A kink counts as two, the kink and
#: the number below it, so that the derivative is continuous on every other piece.
PIECES: dict[str, tuple[tuple[float, ...], tuple[bool, ...]]] = {
    "softplus": ((), (True,)),
    "silu": ((-2.399357280515467, 2.399357280515467), (False, True, False)),
    "mish": ((-2.256376396360793, 1.4905711794854284), (False, True, False)),
    "gelu": ((-math.sqrt(2), math.sqrt(2)), (False, True, False)),
    "gelu_tanh": ((-1.4185040087908284, 1.4185040087908284), (False, True, False)),
    "hardswish": (
        (math.nextafter(-3, -4), -3.0, math.nextafter(3, 2), 3.0),
        (False, False, True, False, False),
    ),
    "softsign": ((0.0,), (True, False)),
    "exp": ((), (True,)),
    "log": ((), (False,)),
    "sqrt": ((), (False,)),
    "reciprocal": ((0.0,), (False, True)),
    "square": ((), (True,)),
}


def _pieces(
    op: str, attributes: Attributes, lower: Tensor, upper: Tensor
) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    if op == "elu":
        return (math.nextafter(0.0, -1.0), 0.0), (True, attributes.get("alpha", 1.0) <= 1, True)
    if op not in ("sin", "cos"):
        return PIECES[op]
    shift = 0.0 if op == "sin" else 0.5
    ends = [math.floor(end / math.pi - shift) for end in (lower.min().item(), upper.max().item())]
    zeros = range(ends[0], ends[1] + 2)
    even = op == "sin"  # before its zero 0 sin is negative and convex, cos before pi / 2 positive and concave
    convex = tuple((k % 2 == 0) == even for k in (*zeros, ends[1] + 2))
    return tuple((k + shift) * math.pi for k in zeros), convex


def _entry(op: str, attributes: Attributes, lower: Tensor, upper: Tensor) -> registered.Activation:
    inflections, convex = _pieces(op, attributes, lower, upper)
    free = {**attributes, "threshold": math.inf}  # the jump of softplus is added apart
    return registered.Activation(
        op, lambda x: FUNCTIONS[op](x, free), lambda x: DERIVATIVES[op](x, free), inflections, convex, 32.0
    )


def _defined(op: str, lower: Tensor, upper: Tensor) -> Tensor:
    """Where the function is finite on the whole of a finite interval; for sine and cosine not too far out."""
    finite = lower.isfinite() & upper.isfinite()
    if op in ("sin", "cos"):
        return lower.abs().maximum(upper.abs()) < _FAR
    if op in ("log", "reciprocal"):
        return finite & ((lower > 0) | (upper < 0) if op == "reciprocal" else lower > 0)
    return finite & (lower >= 0) if op == "sqrt" else finite


def interval_image(op: str, attributes: Attributes, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The least interval that holds the values on ``[lower, upper]``, infinite where one does not exist."""
    known = _defined(op, lower, upper)
    low, high = (torch.where(known, end, 1.0) for end in (lower, upper))
    image = registered.interval_of(_entry(op, attributes, low, high), low, high)
    if op == "softplus":
        image = _jump(attributes, low, high, image[0]), image[1]
    infinite = torch.full_like(lower, 1.0 if op in ("sin", "cos") else math.inf)
    return torch.where(known, image[0], -infinite), torch.where(known, image[1], infinite)


def _jump(attributes: Attributes, lower: Tensor, upper: Tensor, least: Tensor) -> Tensor:
    """``least`` of log(1 + exp(x)), or the threshold where softplus jumps down to it."""
    threshold = torch.full_like(lower, attributes.get("threshold", 20.0))
    return torch.where(upper > threshold, least.minimum(threshold.maximum(lower)), least)


def lines(op: str, attributes: Attributes, lower: Tensor, upper: Tensor, slope: str) -> ActivationLines:
    """Lines of least area (``"parallel"``: of the chord's slope); infinite where one does not exist."""
    known = _defined(op, lower, upper)
    low, high = (torch.where(known, end, 1.0) for end in (lower, upper))
    found = registered.lines_of(_entry(op, attributes, low, high), low, high, slope)
    if op == "softplus":  # x - slope x beyond the threshold is least at an end
        threshold = attributes.get("threshold", 20.0)
        beyond = [(1 - found.lower_slope) * x for x in (low.clamp(min=threshold), high)]
        intercept = found.lower_intercept.minimum(beyond[0]).minimum(beyond[1])
        same, one = low > threshold, torch.ones_like(low)
        found = ActivationLines(
            torch.where(same, one, found.lower_slope),
            torch.where(same, 0.0, torch.where(high > threshold, intercept, found.lower_intercept)),
            torch.where(same, one, found.upper_slope),
            torch.where(same, 0.0, found.upper_intercept),
        )
    infinite = torch.full_like(lower, 1.0 if op in ("sin", "cos") else math.inf)
    return ActivationLines(
        torch.where(known, found.lower_slope, 0.0),
        torch.where(known, found.lower_intercept, -infinite),
        torch.where(known, found.upper_slope, 0.0),
        torch.where(known, found.upper_intercept, infinite),
    )
