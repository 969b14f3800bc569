"""Activations that are convex and concave in turns: sound to 50 digits, of least area, exact images, differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pycert.ops import ActivationLines, activation_interval, activation_lines
from pycert.reference import curves
from test_relaxation import edge_boxes, heights, random_boxes, samples, violation

INF = math.inf


class Curve(NamedTuple):
    name: str
    arguments: dict[str, float]
    exact: Callable  # of an mpf
    run: Callable[[Tensor], Tensor]  # the network's own
    domain: str = "all"

    def f(self, x: Tensor) -> Tensor:
        return curves.FUNCTIONS[self.name](x, self.arguments)


def exact_gelu(x):
    return x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2


def exact_gelu_tanh(x):
    return x / (1 + mpmath.exp(-2 * mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3)))


def exact_mish(x):
    return x * mpmath.tanh(mpmath.log1p(mpmath.exp(x)))


def exact_elu(alpha: float):
    return lambda x: x if x >= 0 else alpha * mpmath.expm1(x)


def exact_softplus(threshold: float):
    return lambda x: x if x > threshold else mpmath.log1p(mpmath.exp(x))


CURVES = [
    Curve("elu", {"alpha": 1.0}, exact_elu(1.0), F.elu),
    Curve("elu", {"alpha": 1.7}, exact_elu(1.7), lambda x: F.elu(x, 1.7)),
    Curve("elu", {"alpha": 0.4}, exact_elu(0.4), lambda x: F.elu(x, 0.4)),
    Curve("softplus", {}, exact_softplus(20.0), F.softplus),
    Curve("softplus", {"threshold": 0.3}, exact_softplus(0.3), lambda x: F.softplus(x, 1.0, 0.3)),
    Curve("silu", {}, lambda x: x / (1 + mpmath.exp(-x)), F.silu),
    Curve("mish", {}, exact_mish, F.mish),
    Curve("gelu", {}, exact_gelu, F.gelu),
    Curve("gelu_tanh", {}, exact_gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    Curve("hardswish", {}, lambda x: x * min(max(x + 3, 0), 6) / 6, F.hardswish),
    Curve("softsign", {}, lambda x: x / (1 + abs(x)), F.softsign),
    Curve("exp", {}, mpmath.exp, torch.exp),
    Curve("log", {}, lambda x: mpmath.log(x) if x > 0 else -mpmath.inf, torch.log, "positive"),
    Curve("sqrt", {}, mpmath.sqrt, torch.sqrt, "positive"),
    Curve("reciprocal", {}, lambda x: 1 / x, torch.reciprocal, "either"),
    Curve("square", {}, lambda x: x * x, torch.square),
    Curve("sin", {}, mpmath.sin, torch.sin),
    Curve("cos", {}, mpmath.cos, torch.cos),
]
LOWEST = {
    "silu": -1.2784645427610738,
    "mish": -1.1924312145154952,
    "gelu": -0.7517915246935645,
    "gelu_tanh": -0.7524614220710163,
    "hardswish": -1.5,
}
EVERY = pytest.mark.parametrize(
    "curve", CURVES, ids=lambda c: c.name + "".join(map(str, c.arguments.values()))
)


def boxes_of(
    curve: Curve, seed: int, count: int, dtype: torch.dtype, exponent: float
) -> tuple[Tensor, Tensor]:
    """Boxes over many scales, moved into the domain."""
    lower, upper = random_boxes(seed, count, dtype, exponent)
    return into_domain(curve, lower, upper)


def into_domain(curve: Curve, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    if curve.domain == "all":
        return lower, upper
    ends = torch.stack([lower, upper]).abs()
    lower, upper = ends.amin(0), ends.amax(0)
    keep = lower > 0 if curve.name != "sqrt" else lower >= 0
    lower, upper = lower[keep], upper[keep]
    if curve.domain == "either":
        negative = torch.arange(len(lower)) % 2 == 0
        lower, upper = torch.where(negative, -upper, lower), torch.where(negative, -lower, upper)
    return lower, upper


def lines_of(curve: Curve, lower: Tensor, upper: Tensor, **options) -> ActivationLines:
    return activation_lines(lower, upper, curve.name, **options, **curve.arguments)


def image_of(curve: Curve, lower: Tensor, upper: Tensor, **options) -> tuple[Tensor, Tensor]:
    return activation_interval(lower, upper, curve.name, **options, **curve.arguments)


# ---- soundness --------------------------------------------------------------------------------------------------


def count_exact_violations(curve: Curve, lines, image, lower: Tensor, upper: Tensor) -> int:
    """At both ends, in between, and at and beside the points where curves turn or jump; in 50 digits."""
    bad, mpf = 0, mpmath.mpf
    with mpmath.workprec(2200):  # sums of numbers 2^1000 apart are exact
        rows = zip(*(t.tolist() for t in (lower, upper, *lines, *image)), strict=True)
        for low, high, *row in rows:
            k, t, m, s, least, most = map(mpf, row)
            low, high = mpf(low), mpf(high)
            inner = [low + (high - low) * mpf(i) / 7 for i in range(8)]
            special = [0, -3, 3, -1.27846454276, 0.3, mpf(0.3) + mpf(2) ** -60, 20, -1.5, 3.14159265358979]
            for x in {*inner, *(mpf(x) for x in special if low < x < high)}:
                with mpmath.workprec(170):
                    value = curve.exact(x)
                slack = abs(value) * mpf(2) ** -160
                below = k * x + t if mpmath.isfinite(t) else t
                above = m * x + s if mpmath.isfinite(s) else s
                bad += not (max(below, least) - slack <= value <= min(above, most) + slack)
    return bad


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lines_and_intervals_hold_to_fifty_digits(curve, dtype):
    for seed, count, exponent in ((1, 30, 1.0), (2, 15, 3.0)):
        lower, upper = boxes_of(curve, seed, count, dtype, exponent)
        for slope in ("adaptive", "parallel"):
            lines = lines_of(curve, lower, upper, slope=slope)
            assert count_exact_violations(curve, lines, image_of(curve, lower, upper), lower, upper) == 0


@EVERY
@pytest.mark.parametrize("slope", ["adaptive", "parallel"])
def test_float32_lines_and_intervals_contain_every_sample(curve, slope):
    for lower, upper in (random_boxes(3, 2048, torch.float32), edge_boxes(torch.float32)):
        lower, upper = into_domain(curve, lower, upper)
        x = samples(lower, upper)
        y = curve.f(x)
        known = y.isfinite()
        lines = lines_of(curve, lower, upper, slope=slope)
        assert violation(lines, x, torch.where(known, y, 0.0), 2.0**-52) <= 0 or not known.all()
        below, above = (t.double() for t in image_of(curve, lower, upper))
        assert (below <= y).all() and (y <= above).all()
        below, above = (
            lines.lower_slope * x + lines.lower_intercept,
            lines.upper_slope * x + lines.upper_intercept,
        )
        rounding = (
            2.0**-50 * (lines.lower_slope * x).abs().maximum((lines.upper_slope * x).abs())
            + 2.0**-50 * y.abs()
        )
        assert (below - rounding <= y)[known].all() and (y <= above + rounding)[known].all()


@EVERY
@pytest.mark.parametrize("slope", ["adaptive", "parallel"])
def test_deployed_lines_and_intervals_contain_float32_executions(curve, slope):
    generator = torch.Generator().manual_seed(11)
    for exponent in (0.7, 6.0):
        lower, upper = boxes_of(curve, 11, 2048, torch.float32, exponent)
        t = torch.rand(17, len(lower), generator=generator)
        x = torch.cat([(lower + (upper - lower) * t).maximum(lower).minimum(upper), lower[None], upper[None]])
        strided = torch.stack([x, x], -1)[
            ..., 0
        ]  # other kernels of the same function: gathers and scalar tails
        lines = lines_of(curve, lower, upper, slope=slope, deployed=True)
        low, high = image_of(curve, lower, upper, deployed=True)
        for y in (
            curve.run(x),
            curve.run(strided),
            torch.stack([curve.run(row[:7].clone()) for row in x.t()], 1),
        ):
            rows = len(y)
            assert (low <= y).all() and (y <= high).all()
            finite = y.isfinite()
            assert (finite | (lines.lower_intercept.isinf() | lines.upper_intercept.isinf())).all()
            assert (
                violation(
                    lines,
                    x[:rows].double(),
                    torch.where(finite, y, low.nan_to_num(0, 0, 0)).double(),
                    2.0**-52,
                )
                <= 0
                or not finite.all()
            )


@EVERY
def test_what_an_execution_errs_is_within_half_of_the_charge(curve):
    """On every 2^13th float32 and densely near 0, by torch's vectorised kernels, and by the scalar ones for some."""
    every = torch.arange(-(2**31), 2**31, 2**13).to(torch.int32).view(torch.float32)
    x = torch.cat(
        [every[every.isfinite()], torch.linspace(-12, 12, 100_001), torch.linspace(-100, 100, 50_001)]
    )
    x = (
        x[x.abs() > 2.0**-126]
        if curve.domain == "either"
        else x[x > 2.0**-126]
        if curve.domain == "positive"
        else x
    )
    exact = curve.f(x.double()).double()
    low, high = image_of(curve, x, x, deployed=True)
    narrow, wide = image_of(curve, x, x)
    charge = torch.maximum(high.double() - wide.double(), narrow.double() - low.double())
    ulp = 2.0**-24 * exact.abs() + 2.0**-140
    for y, where in (
        (curve.run(x), slice(None)),
        (curve.run(torch.stack([x, x], 1)[::16, 0]), slice(None, None, 16)),
    ):
        known = high[where].isfinite() & low[where].isfinite() & exact[where].isfinite()
        error = (y.double() - exact[where]).abs()
        assert (error <= 0.62 * charge[where] + 2 * ulp[where])[known].all()


@EVERY
@pytest.mark.parametrize("deployed", [False, True])
def test_infinite_and_undefined_ends(curve, deployed):
    lower = torch.tensor([-INF, -INF, -1.0, 2.0, math.nan, 0.0, -INF, INF])
    upper = torch.tensor([INF, 1.0, INF, INF, 1.0, math.nan, -INF, INF])
    lines = lines_of(curve, lower, upper, deployed=deployed)
    low, high = image_of(curve, lower, upper, deployed=deployed)
    assert not any(t.isnan().any() for t in (*lines, low, high))
    for i in range(4):
        x = torch.linspace(max(lower[i].item(), -1e6), min(upper[i].item(), 1e6), 999, dtype=torch.float64)
        y = curve.f(x)
        x, y = x[y.isfinite()], y[y.isfinite()]
        assert violation(ActivationLines(*(t[i] for t in lines)), x, y, 0.0) <= 0
        assert (low[i] <= y).all() and (y <= high[i]).all()
    assert (low[4:6] == -INF).all() and (high[4:6] == INF).all()
    assert (lines.upper_slope[4:6] == 0).all() and (lines.upper_intercept[4:6] == INF).all()


@pytest.mark.parametrize("deployed", [False, True])
def test_boxes_that_leave_the_domain_have_infinite_bounds(deployed):
    lower, upper = torch.tensor([-1.0, -2.0, 0.0, -1.0, 0.0]), torch.tensor([1.0, -1.0, 0.0, 0.0, 4.0])
    expected = {
        "log": ([-INF] * 5, [INF, INF, -INF, INF, math.log(4)]),
        "sqrt": ([-INF, -INF, 0.0, -INF, 0.0], [INF, INF, 0.0, INF, 2.0]),
        "reciprocal": ([-INF, -1.0, -INF, -INF, -INF], [INF, -0.5, INF, INF, INF]),
    }
    for name, (least, most) in expected.items():
        low, high = activation_interval(lower, upper, name, deployed=deployed)
        torch.testing.assert_close(low, torch.tensor(least), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(high, torch.tensor(most), rtol=1e-5, atol=1e-8)
        lines = activation_lines(lower, upper, name, deployed=deployed)
        undefined = low == -INF
        assert (lines.lower_slope[undefined] == 0).all()
        assert torch.equal(lines.lower_intercept[undefined], low[undefined])
        assert (lines.upper_intercept[high == INF] == INF).all()


def test_the_jump_of_softplus_is_enclosed():
    for threshold in (20.0, 2.0, 0.0, -1.0):
        lower = torch.tensor([threshold - 1, threshold, threshold + 1e-4], dtype=torch.float64)
        upper = torch.tensor([threshold + 1, threshold + 1e-9, threshold + 1], dtype=torch.float64)
        x = torch.cat([samples(lower, upper, 999), torch.full((1, 3), threshold + 1e-12).clamp(lower, upper)])
        y = F.softplus(x, 1.0, threshold)
        for slope in ("adaptive", "parallel"):
            lines = activation_lines(lower, upper, "softplus", slope=slope, threshold=threshold)
            assert violation(lines, x, y, 2.0**-52) <= 0
        low, high = activation_interval(lower, upper, "softplus", threshold=threshold)
        assert (low <= y).all() and (y <= high).all()
        assert low[0] <= max(threshold, lower[0]) or low[0] <= y[0, 0]
        assert lines.lower_slope[2] == 1 and lines.lower_intercept[2] == 0  # the identity, exactly


def test_float32_overflow_inside_a_network_is_enclosed():
    """torch's gelu gives infinity at 2e38, hardswish at 6e37, softplus before a threshold of 100."""
    x = torch.tensor([2e38, 3e38])
    for name, f in (
        ("gelu", F.gelu),
        ("hardswish", F.hardswish),
        ("exp", torch.exp),
        ("square", torch.square),
    ):
        low, high = activation_interval(x, x, name, deployed=True)
        assert (f(x) <= high).all() and (low <= f(x)).all(), name
        assert (activation_lines(x, x, name, deployed=True).upper_intercept == INF).all(), name
        assert low.isfinite().all() or name == "exp"
    at = torch.tensor([95.0])
    assert F.softplus(at, 1.0, 100.0).isinf().all()
    assert activation_interval(at, at, "softplus", deployed=True, threshold=100.0)[1].isinf().all()


# ---- tightness --------------------------------------------------------------------------------------------------


def least_area_heights(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Heights of both envelopes of the points at the middle one: by every chord over it."""
    half = len(x) // 2
    left, right, middle = x[: half + 1, None], x[None, half:], x[half]
    width = right - left
    t = torch.where(width > 0, (middle - left) / torch.where(width > 0, width, 1.0), 0.0)
    value = y[: half + 1, None] + (y[None, half:] - y[: half + 1, None]) * t
    return value.amin((0, 1)), value.amax((0, 1))


@EVERY
def test_no_lines_leave_less_area_by_brute_force(curve):
    """Independent of any theory. Points on a grid miss kinks by up to a step, hence the tolerance."""
    if curve.arguments.get("threshold"):
        pytest.skip("beside a large jump the lines are those of the curve without it, lowered")
    for exponent in (0.5, 1.3):
        lower, upper = boxes_of(curve, 23, 150, torch.float64, exponent)
        x = samples(lower, upper, 201)[:201]
        y = curve.f(x)
        best_lower, best_upper = least_area_heights(x, y)
        low, high = heights(lines_of(curve, lower, upper), lower, upper)
        optimum = best_upper - best_lower
        assert (high - low <= 1.01 * optimum + 1e-9 * y.abs().amax(0)).all()
        assert (high >= best_upper - 1e-15 * y.abs().amax(0)).all()


@EVERY
@pytest.mark.parametrize("slope", ["adaptive", "parallel"])
def test_lines_equal_the_reference(curve, slope):
    lower, upper = boxes_of(curve, 24, 150, torch.float64, 0.7)
    found = heights(lines_of(curve, lower, upper, slope=slope), lower, upper)
    expected = curves.lines(curve.name, curve.arguments, lower, upper, slope)
    size = curve.f(torch.stack([lower, upper])).abs().amax(0).clamp(min=1.0)
    for a, b in zip(found, heights(expected, lower, upper), strict=True):
        assert ((a - b).abs() / size).max() < 1e-5


@EVERY
def test_intervals_are_images_and_shrink_with_the_box(curve):
    for exponent in (0.5, 2.0):
        lower, upper = boxes_of(curve, 25, 1000, torch.float64, exponent)
        low, high = image_of(curve, lower, upper)
        turns = [*(k * math.pi / 2 for k in range(-140, 140)), *LOWEST.values(), 0.3, math.nextafter(0.3, 1)]
        x = torch.tensor(turns, dtype=torch.float64)[:, None].maximum(lower).minimum(upper)
        y = curve.f(x)
        least, most = y.amin(0), y.amax(0)
        # the threshold of softplus is one of any arithmetic that a network may compare in
        size = (1e-6 if "threshold" in curve.arguments else 1e-11) * y.abs().amax(0) + 1e-300
        assert (low <= least + 1e-15 * least.abs()).all() and (high >= most - 1e-15 * most.abs()).all()
        assert (low >= least - size).all() and (high <= most + size).all()
        quarter = (upper - lower) / 4
        inner = image_of(curve, lower + quarter, upper - quarter)
        assert (inner[0] >= low).all() and (inner[1] <= high).all()


def test_extrema_inside_are_found_exactly():
    lower, upper = torch.tensor([-5.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    for curve in CURVES:
        least = {"square": 0.0, "sin": -1.0, "cos": -1.0}.get(curve.name)
        if curve.name in LOWEST:
            x = mpmath.mpf(LOWEST[curve.name])
            assert abs(mpmath.diff(curve.exact, x)) < 1e-12
            least = float(curve.exact(x))
        if least is not None:
            assert abs(image_of(curve, lower, upper)[0].item() - least) < 1e-11, curve.name
    for name in ("sin", "cos"):
        assert activation_interval(lower, upper, name)[1].item() == 1.0


@pytest.mark.parametrize("name", ["silu", "gelu", "exp", "sin", "square", "elu"])
def test_float64_lines_of_narrow_boxes_are_tight(name):
    lower = torch.linspace(-4, 4, 401, dtype=torch.float64)
    for width in (0.0, 1e-12, 1e-7, 2e-5):
        low, high = heights(activation_lines(lower, lower + width, name), lower, lower + width)
        size = 1 + curves.FUNCTIONS[name](lower, {}).abs()
        assert ((high - low) / size).max() <= 1e-11 + 6 * width * (width + 1e-7)


# ---- gradients --------------------------------------------------------------------------------------------------


def differentiable_boxes(curve: Curve) -> tuple[Tensor, Tensor]:
    """Away from kinks and from the choice between tangents and chords."""
    lower = [-1.3, -2.1, 0.4, -3.3, -0.9, -2.2, -0.2, -4.0, -1.7, 0.21, -7.3, -0.45]
    upper = [0.6, 3.4, 1.9, -1.1, 0.35, 2.6, 6.5, 1.2, 0.27, 0.64, 8.9, -0.1]
    ends = torch.tensor([lower, upper], dtype=torch.float64)
    return tuple(t.clone().requires_grad_() for t in into_domain(curve, ends[0], ends[1]))


@EVERY
@pytest.mark.parametrize("slope", ["adaptive", "parallel"])
def test_gradcheck_lines(curve, slope):
    if curve.arguments.get("threshold") == 0.3:
        pytest.skip("the lower line at a large jump is lowered without a gradient")
    run = lambda a, b: tuple(lines_of(curve, a, b, slope=slope))  # noqa: E731
    assert torch.autograd.gradcheck(run, differentiable_boxes(curve), atol=2e-5)


@EVERY
def test_gradcheck_intervals(curve):
    if curve.arguments.get("threshold") == 0.3:
        pytest.skip("the image jumps with the ends")
    run = lambda a, b: image_of(curve, a, b)  # noqa: E731
    assert torch.autograd.gradcheck(run, differentiable_boxes(curve), atol=2e-5)


@EVERY
def test_gradients_at_points_and_infinities_are_finite(curve):
    lower = torch.tensor([0.0, 1.0, -INF, -1.0, -1e-9, 2.0], requires_grad=True)
    upper = torch.tensor([0.0, 1.0, 1.0, INF, 1e-9, 2.0000002], requires_grad=True)
    results = (*lines_of(curve, lower, upper), *image_of(curve, lower, upper))
    torch.autograd.backward(results, tuple(torch.ones_like(t) for t in results))
    assert lower.grad.isfinite().all() and upper.grad.isfinite().all()
