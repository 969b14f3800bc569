"""Products of two values in plain PyTorch: intervals, planes, and steps of back-substitution.

Both operators are sums ``z[p, i, j] = sum_k x[p, i, k] y[p, k, j]``; an elementwise product has one term each.
Source: McCormick, "Computability of global solutions to factorable nonconvex programs", Math. Programming 10 (1976).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pycert.graph.ir import Node


class Planes(NamedTuple):
    """``lower_x x + lower_y y + lower <= z <= upper_x x + upper_y y + upper``, summed over k.

    Slopes ``[B, P, I, K, J]``, constants ``[B, *shape]``.
    """

    lower_x: Tensor
    lower_y: Tensor
    upper_x: Tensor
    upper_y: Tensor
    lower: Tensor
    upper: Tensor


def _layout(node: Node, shape: torch.Size) -> tuple[int, int, int, int]:
    """P, I, K and J for a first factor of shape ``[B, *shape]``."""
    if node.op == "product":
        return math.prod(node.shape), 1, 1, 1
    *parts, rows, columns = node.shape
    return math.prod(parts), rows, shape[-1], columns


def _factors(node: Node, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The four ends, laid out so that they broadcast to ``[B, P, I, K, J]``."""
    parts, rows, terms, columns = _layout(node, x[0].shape)
    left = [end.reshape(-1, parts, rows, terms, 1) for end in x]
    right = [end.reshape(-1, parts, 1, terms, columns) for end in y]
    return [*left, *right]


def _least_corner(ends: list[Tensor], f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    x_low, x_high, y_low, y_high = ends
    first = torch.minimum(f(x_low, y_low), f(x_low, y_high))
    return torch.minimum(first, torch.minimum(f(x_high, y_low), f(x_high, y_high)))


def interval(node: Node, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The least box of a product of boxes, each end ``[B, *shape]``."""
    ends = _factors(node, x, y)
    low = _least_corner(ends, lambda a, b: a * b).sum(3)
    high = -_least_corner(ends, lambda a, b: -(a * b)).sum(3)
    return low.reshape(-1, *node.shape), high.reshape(-1, *node.shape)


def planes(node: Node, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Planes:
    """Planes of least volume around the products; of those, the ones whose ends over the box are the tightest."""
    ends = _factors(node, x, y)
    x_low, x_high, y_low, y_high = ends
    x_mid, y_mid, x_width, y_width = (
        (x_low + x_high) / 2,
        (y_low + y_high) / 2,
        x_high - x_low,
        y_high - y_low,
    )
    x_share, y_share = _share(x_mid, x_width), _share(y_mid, y_width)
    below = ((x_share + y_share) / -2).clamp(-0.5, 0.5)
    above = ((x_share - y_share) / -2).clamp(-0.5, 0.5)
    lower_x, lower_y = y_mid + below * y_width, x_mid + below * x_width
    upper_x, upper_y = y_mid - above * y_width, x_mid + above * x_width
    lower = _least_corner(ends, lambda a, b: a * b - (lower_x * a + lower_y * b)).sum(3)
    upper = -_least_corner(ends, lambda a, b: -(a * b - (upper_x * a + upper_y * b))).sum(3)
    return Planes(
        lower_x, lower_y, upper_x, upper_y, lower.reshape(-1, *node.shape), upper.reshape(-1, *node.shape)
    )


def _share(mid: Tensor, width: Tensor) -> Tensor:
    wide = width > 0
    return torch.where(wide, mid / torch.where(wide, width, 1.0), 0.0)


def step(node: Node, A: Tensor, planes: Planes) -> tuple[Tensor, Tensor]:
    """Rows ``A [B, S, *shape]`` at a product as rows at its two factors, from below."""
    batch, parts, rows, terms, columns = planes.lower_x.shape
    coefficients = A.reshape(batch, -1, parts, rows, 1, columns)
    positive, negative = coefficients.clamp(min=0), coefficients.clamp(max=0)

    def through(lower: Tensor, upper: Tensor, dim: int) -> Tensor:
        return (positive * lower[:, None] + negative * upper[:, None]).sum(dim)

    to_x, to_y = through(planes.lower_x, planes.upper_x, 5), through(planes.lower_y, planes.upper_y, 3)
    if node.op == "product":
        return to_x.reshape(A.shape), to_y.reshape(A.shape)
    lead = (*A.shape[:2], *node.shape[:-2])
    return to_x.reshape(*lead, rows, terms), to_y.reshape(*lead, terms, columns)
