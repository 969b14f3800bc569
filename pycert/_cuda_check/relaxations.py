"""Cases of the kernels of lines and intervals around activations."""

from __future__ import annotations

import torch

from .judging import OPS, Check, named_cases

CASES, case = named_cases()

#: LeakyReLU, clamp, sigmoid, sin, GELU: kind and its two numbers (csrc/core/relaxation_lines.h).
_KINDS = ((1, 0.1, 0.0), (3, -0.5, 0.5), (4, 0.0, 0.0), (8, 0.0, 0.0), (14, 0.0, 0.0))


@case("relu_lines")
def _relu_lines(check: Check) -> None:
    lower, upper = check.box(16, 64)
    for slope in range(4):
        found = check.same(OPS.relu_relaxation, lower, upper, slope, close=2)
        low, high, at = (t.double() for t in found if t is not None)
        for x in (lower.double(), upper.double(), torch.zeros_like(lower, dtype=torch.float64)):
            x = torch.minimum(torch.maximum(x, lower.double()), upper.double())
            check.holds(low * x, x.relu(), high * x + at)


@case("relu_backward")
def _relu_backward(check: Check) -> None:
    grads = [check.draw(16, 64, seed=seed) for seed in (3, 4, 5)]
    for slope in range(4):
        check.same(OPS.relu_relaxation_backward, *check.box(16, 64), *grads, slope)


@case("activation_interval")
def _activation_interval(check: Check) -> None:
    for kind, a, b in _KINDS:
        check.same(OPS.activation_interval, *check.box(6, 64), kind, None, a, b, True)


@case("activation_interval_backward")
def _activation_interval_backward(check: Check) -> None:
    grads = [check.draw(6, 64, seed=seed) for seed in (3, 4)]
    for kind, a, b in _KINDS:
        check.same(OPS.activation_interval_backward, *check.box(6, 64), None, *grads, kind, a, b, close=2**20)


@case("activation_lines")
def _activation_lines(check: Check) -> None:
    """Lines may be placed a little otherwise where an elementary function differs in its last bits: they must hold."""
    lower, upper = check.box(6, 64)
    for kind, a, b in _KINDS:
        found = check.there(OPS.activation_lines, lower, upper, kind, None, a, b, 0, True)
        check.agree(OPS.activation_lines(lower, upper, kind, None, a, b, 0, True), found, 2**20)
        ls, li, us, ui = (t.double() for t in found if t is not None)
        for share in (0.0, 0.3, 0.8, 1.0):
            x = lower.double() + share * (upper.double() - lower.double())
            values = OPS.activation_interval(x, x, kind, None, a, b, False)
            middle, width = (values[0] + values[1]) / 2, 1e-9
            check.holds(ls * x + li - width, middle, us * x + ui + width)


@case("activation_lines_backward")
def _activation_lines_backward(check: Check) -> None:
    grads = [check.draw(6, 64, seed=seed) for seed in (3, 4, 5, 6)]
    for kind, a, b in _KINDS:
        check.same(OPS.activation_lines_backward, *check.box(6, 64), None, *grads, kind, a, b, 0, close=2**20)
