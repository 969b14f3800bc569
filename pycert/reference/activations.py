"""Interval images and lines of the elementwise activations of a graph, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycert import activations as registered
from pycert.graph.ir import Node
from pycert.ops.relaxation import ActivationLines
from pycert.reference import curves, relaxation
from pycert.reference import graph as execution

#: Activations that are linear on both sides of zero.
ONE_KINK = ("relu", "leaky_relu", "prelu", "abs")


def side_slopes(node: Node, slots: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes left and right of zero of an activation with one kink, broadcast to ``like``."""
    one, zero = torch.ones_like(like), torch.zeros_like(like)
    if node.op == "relu":
        return zero, one
    if node.op == "abs":
        return -one, one
    if node.op == "leaky_relu":
        return one * node.attrs["slope"], one
    slope = execution.parameter(node, slots, 0)
    assert slope is not None
    if slope.numel() > 1:
        slope = slope.reshape(-1, *[1] * (like.dim() - 2))
    return one * slope, one


def interval_image(node: Node, slots: list[Tensor], lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The least interval that holds the activation's values on ``[lower, upper]``."""
    if node.op == "custom":
        return registered.custom_interval(node.attrs["name"], lower, upper)
    if node.op in curves.DERIVATIVES:
        return curves.interval_image(node.op, node.attrs, lower, upper)
    at_lower, at_upper = (execution.apply(node, slots, end) for end in (lower, upper))
    low, high = at_lower.minimum(at_upper), at_lower.maximum(at_upper)
    if node.op not in ONE_KINK:
        return low, high
    crosses = (lower < 0) & (upper > 0)
    return torch.where(crosses, low.clamp(max=0), low), torch.where(crosses, high.clamp(min=0), high)


def unstable(node: Node, slots: list[Tensor], lower: Tensor, upper: Tensor) -> Tensor:
    """Where the activation is not linear on ``[lower, upper]``."""
    if node.op in ONE_KINK:
        return (lower < 0) & (upper > 0)
    if node.op == "clamp":
        low, high = node.attrs["min"], node.attrs["max"]
        return ((lower < low) & (upper > low)) | ((lower < high) & (upper > high))
    return lower < upper


def lines(node: Node, slots: list[Tensor], lower: Tensor, upper: Tensor, slope: str) -> ActivationLines:
    """Lines around the activation on ``[lower, upper]``; ``slope`` rules the side opposite the chord.

    Differentiable for activations with one kink, and for clamp as far as its chords are.
    """
    if node.op == "custom":
        return registered.custom_lines(node.attrs["name"], lower, upper, slope)
    if node.op == "clamp":
        kinks = [end for end in (node.attrs["min"], node.attrs["max"]) if math.isfinite(end)]
        clamp = relaxation.function("clamp", min=node.attrs["min"], max=node.attrs["max"])
        return relaxation.piecewise_linear_lines(lower, upper, clamp, kinks, slope)
    if node.op in curves.DERIVATIVES:
        return curves.lines(node.op, node.attrs, lower, upper, slope)
    if node.op in ("sigmoid", "tanh"):
        return relaxation.s_shaped_lines(lower, upper, relaxation.function(node.op))
    return one_kink_lines(node, slots, lower, upper, slope)


def one_kink_lines(
    node: Node, slots: list[Tensor], lower: Tensor, upper: Tensor, slope: str
) -> ActivationLines:
    """The chord on one side, on the other a line through the kink with the slope that ``slope`` names."""
    left, right = side_slopes(node, slots, lower)
    crosses = (lower < 0) & (upper > 0)
    width = torch.where(crosses, upper - lower, torch.ones_like(lower))
    chord = (right * upper - left * lower) / width
    intercept = (right - chord) * upper
    flat = torch.zeros_like(lower)
    tangent = {
        "adaptive": torch.where(upper > -lower, right, left),
        "parallel": chord,
        "zero": flat.clamp(torch.minimum(left, right), torch.maximum(left, right)),
        "one": torch.ones_like(flat).clamp(torch.minimum(left, right), torch.maximum(left, right)),
    }[slope]
    stable = torch.where(lower >= 0, right, left)
    chord, tangent = torch.where(crosses, chord, stable), torch.where(crosses, tangent, stable)
    intercept = torch.where(crosses, intercept, flat)
    convex = right >= left
    return ActivationLines(
        torch.where(convex, tangent, chord),
        torch.where(convex, flat, intercept),
        torch.where(convex, chord, tangent),
        torch.where(convex, intercept, flat),
    )
