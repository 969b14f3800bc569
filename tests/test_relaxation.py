"""Lines and intervals around activations: sound with zero tolerance, of least area, differentiable."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import pycert
from pycert.ops import activation_interval, activation_lines, relu_relaxation
from pycert.reference import relaxation as reference

SLOPES = ("adaptive", "parallel", "zero", "one")
INF = math.inf
DTYPES = [torch.float32, torch.float64]

# name, arguments; kinks in the order of x
PIECEWISE = [
    ("relu", {}, [0.0]),
    ("abs", {}, [0.0]),
    ("leaky_relu", {"negative_slope": 0.01}, [0.0]),
    ("leaky_relu", {"negative_slope": -0.7}, [0.0]),
    ("leaky_relu", {"negative_slope": 1.9}, [0.0]),
    ("clamp", {"min": 0.0, "max": 6.0}, [0.0, 6.0]),
    ("clamp", {"min": -0.3, "max": 0.1}, [-0.3, 0.1]),
    ("clamp", {"max": 0.7}, [0.7]),
    ("clamp", {"min": 2.0, "max": 1.0}, []),
]
SMOOTH = [("sigmoid", {}, []), ("tanh", {}, [])]
EVERY = PIECEWISE + SMOOTH


def label(value) -> str:
    return "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def random_boxes(seed: int, count: int, dtype: torch.dtype, exponent: float = 6.0) -> tuple[Tensor, Tensor]:
    """Centres and widths over many scales; points, boxes that start or end at 0, symmetric ones among them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(count, generator=generator, dtype=torch.float64)  # noqa: E731
    centre = (2 * draw() - 1) * 10 ** (exponent * (2 * draw() - 1))
    width = draw() * 10 ** (exponent * (2 * draw() - 1))
    lower, upper = centre - width * draw(), centre + width * draw()
    form = torch.randint(0, 10, (count,), generator=generator)
    lower = torch.where(form == 0, upper, lower)
    lower = torch.where(form == 1, -upper.abs(), lower)
    upper = torch.where(form == 1, upper.abs(), upper)
    lower, upper = torch.where(form == 2, 0.0, lower), torch.where(form == 3, 0.0, upper)
    lower, upper = lower.to(dtype), upper.to(dtype)
    return torch.minimum(lower, upper), torch.maximum(lower, upper)


def edge_boxes(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every pair of: zeros, subnormals, neighbours of kinks, ones, huge numbers, the largest."""
    info = torch.finfo(dtype)
    ends = [
        0.0,
        info.smallest_normal,
        info.smallest_normal / 8,
        1e-7,
        0.1,
        0.7,
        1.0,
        1.0 + info.eps,
        6.0,
        1e4,
    ]
    ends += [math.sqrt(info.max), info.max / 2, info.max]
    x = torch.tensor(sorted({sign * end for end in ends for sign in (-1, 1)}), dtype=dtype)
    lower, upper = torch.meshgrid(x, x, indexing="ij")
    keep = lower <= upper
    return lower[keep], upper[keep]


def samples(lower: Tensor, upper: Tensor, count: int = 65) -> Tensor:
    """[count, boxes] in float64, both ends, 0 and 0.7 clipped to the box included."""
    low, high = lower.double(), upper.double()
    t = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    inner = (low * (1 - t) + high * t).maximum(low).minimum(high)
    special = torch.tensor([0.0, 0.7, -0.3, 0.1, 6.0])[:, None].double().maximum(low).minimum(high)
    return torch.cat([inner, special])


def violation(lines: pycert.ops.ActivationLines, x: Tensor, y: Tensor, rounding: float) -> float:
    """The furthest that y lies outside; ``rounding``: of this check's own float64 arithmetic."""
    lower_slope, lower_intercept, upper_slope, upper_intercept = (t.double() for t in lines)
    below, above = lower_slope * x + lower_intercept, upper_slope * x + upper_intercept
    if rounding > 0:
        below -= rounding * ((lower_slope * x).abs() + lower_intercept.abs() + y.abs())
        above += rounding * ((upper_slope * x).abs() + upper_intercept.abs() + y.abs())
    assert not below.isnan().any() and not above.isnan().any()
    return max((below - y).max().item(), (y - above).max().item())


# ---- soundness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize(("name", "arguments", "kinks"), EVERY, ids=label)
@pytest.mark.parametrize("seed", range(2))
def test_float32_lines_and_intervals_contain_every_sample(name, arguments, kinks, slope, seed):
    for lower, upper in (random_boxes(seed, 2048, torch.float32), edge_boxes(torch.float32)):
        x = samples(lower, upper)
        y = reference.function(name, **arguments)(x)
        lines = activation_lines(lower, upper, name, slope=slope, **arguments)
        # a product of two float32 and a sum of numbers below 2^24 apart are exact in float64; beyond, one rounding
        rounding = 0.0 if name in ("relu", "abs") and lower.abs().max() < 1e7 else 2.0**-52
        assert violation(lines, x, y, rounding) <= 0
        low, high = activation_interval(lower, upper, name, **arguments)
        assert (low.double() <= y).all() and (y <= high.double()).all()


def rational(values: Tensor) -> list[Fraction | float]:
    return [Fraction(v) if math.isfinite(v) else v for v in values.double().flatten().tolist()]


def exact_function(name: str, arguments: dict[str, float]):
    low, high = arguments.get("min", -INF), arguments.get("max", INF)
    negative = Fraction(arguments.get("negative_slope", 0.0))

    def clamp(x):
        x = x if x >= low else Fraction(low)
        return x if x <= high else Fraction(high)

    return {
        "relu": lambda x: max(x, Fraction(0)),
        "abs": abs,
        "leaky_relu": lambda x: x if x >= 0 else negative * x,
        "clamp": clamp,
    }[name]


def holds(slope, intercept, x: Fraction, value: Fraction, sign: int) -> bool:
    if not isinstance(intercept, Fraction):
        return intercept == sign * INF
    return sign * (slope * x + intercept - value) >= 0


def count_exact_violations(lines, lower, upper, f, kinks) -> int:
    """A line and a piecewise linear function: what holds at both ends and at the kinks holds in between."""
    bad = 0
    for low, high, *line in zip(*(rational(t) for t in (lower, upper, *lines)), strict=True):
        for x in {low, high, *(Fraction(kink) for kink in kinks if low < Fraction(kink) < high)}:
            value = f(x)
            bad += not holds(line[0], line[1], x, value, -1) or not holds(line[2], line[3], x, value, 1)
    return bad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize(("name", "arguments", "kinks"), PIECEWISE, ids=label)
def test_piecewise_lines_hold_in_exact_arithmetic(name, arguments, kinks, slope, dtype):
    f = exact_function(name, arguments)
    for lower, upper in (random_boxes(3, 200, dtype), random_boxes(4, 200, dtype, 15.0), edge_boxes(dtype)):
        lines = activation_lines(lower, upper, name, slope=slope, **arguments)
        assert count_exact_violations(lines, lower, upper, f, kinks) == 0
        low, high = activation_interval(lower, upper, name, **arguments)
        zero = torch.zeros_like(low)
        constant = pycert.ops.ActivationLines(zero, low, zero, high)
        assert count_exact_violations(constant, lower, upper, f, kinks) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", SLOPES)
def test_relu_relaxation_holds_in_exact_arithmetic(slope, dtype):
    f = exact_function("relu", {})
    for lower, upper in (random_boxes(5, 500, dtype), random_boxes(6, 500, dtype, 15.0), edge_boxes(dtype)):
        found = relu_relaxation(lower, upper, slope)
        lines = (found.lower_slope, torch.zeros_like(lower), found.upper_slope, found.upper_intercept)
        assert count_exact_violations(lines, lower, upper, f, [0.0]) == 0


def nearest_lines(lower: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
    """What every other tool computes: the same triangle in plain arithmetic of the dtype."""
    slope = upper / (upper - lower)
    return (upper > -lower).to(lower.dtype), torch.zeros_like(lower), slope, -slope * lower


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_to_nearest_violates_what_outward_rounding_holds(dtype):
    """The check above can fail: without directed rounding it does, on the boxes where ours holds."""
    lower, upper = random_boxes(7, 1000, dtype)
    unstable = (lower < 0) & (upper > 0)
    lower, upper = lower[unstable], upper[unstable]
    f = exact_function("relu", {})
    assert count_exact_violations(nearest_lines(lower, upper), lower, upper, f, [0.0]) > len(lower) // 10
    found = relu_relaxation(lower, upper)
    ours = (found.lower_slope, torch.zeros_like(lower), found.upper_slope, found.upper_intercept)
    assert count_exact_violations(ours, lower, upper, f, [0.0]) == 0


def test_float64_smooth_lines_hold_against_wider_arithmetic():
    """Sigmoid in float64 against exp in rational arithmetic: the widening covers the error of libm."""
    lower, upper = random_boxes(8, 60, torch.float64, 1.5)
    lines = activation_lines(lower, upper, "sigmoid")
    rows = zip(*(rational(t) for t in (lower, upper, *lines)), strict=True)
    for low, high, lower_slope, lower_intercept, upper_slope, upper_intercept in rows:
        for x in {low, high, (low + high) / 2, (3 * low + high) / 4, (low + 3 * high) / 4}:
            value = 1 / (1 + exact_exp(-x))
            assert lower_slope * x + lower_intercept <= value <= upper_slope * x + upper_intercept


def exact_exp(x: Fraction) -> Fraction:
    """exp(x) within 1e-40 relative: Taylor's series of exp(x / 2^k), squared k times."""
    halvings = max(0, math.ceil(math.log2(max(float(abs(x)), 1.0)))) + 4
    y = Fraction(round(x * 2**300), 2**300) / 2**halvings
    term = total = Fraction(1)
    for n in range(1, 40):
        term = Fraction(round(term * y / n * 2**300), 2**300)
        total += term
    for _ in range(halvings):
        total = Fraction(round(total * total * 2**400), 2**400)
    return total


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize(("name", "arguments", "kinks"), EVERY, ids=label)
def test_deployed_lines_contain_float32_executions(name, arguments, kinks, slope):
    generator = torch.Generator().manual_seed(11)
    lower, upper = random_boxes(11, 4096, torch.float32)
    t = torch.rand(33, len(lower), generator=generator)
    x = torch.cat([(lower + (upper - lower) * t).maximum(lower).minimum(upper), lower[None], upper[None]])
    run = {
        "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, arguments["negative_slope"]),
        "clamp": lambda x: x.clamp(arguments.get("min"), arguments.get("max")),
    }
    executions = [run.get(name, reference.function(name))(x)]
    if name in ("sigmoid", "tanh"):  # other code of the same function: scalar tails, composed forms
        executions.append(torch.stack([reference.function(name)(row[::3].contiguous()) for row in x]))
    lines = activation_lines(lower, upper, name, slope=slope, deployed=True, **arguments)
    assert violation(lines, x.double(), executions[0].double(), 2.0**-52) <= 0
    low, high = activation_interval(lower, upper, name, deployed=True, **arguments)
    assert (low <= executions[0]).all() and (executions[0] <= high).all()
    for tail in executions[1:]:
        few = pycert.ops.ActivationLines(*(t[::3] for t in lines))
        assert violation(few, x[:, ::3].double(), tail.double(), 2.0**-52) <= 0


def test_leaky_relu_in_float32_leaves_the_real_lines_but_not_the_deployed_ones():
    """The charge is needed: the float32 network is not the real one."""
    lower = -torch.logspace(-3, 3, 4000)
    value = torch.nn.functional.leaky_relu(lower, 0.01).double()

    def worst(deployed: bool) -> float:
        lines = activation_lines(lower, lower, "leaky_relu", deployed=deployed)
        return violation(lines, lower.double(), value, 0.0)

    assert worst(deployed=False) > 0
    assert worst(deployed=True) <= 0


@pytest.mark.parametrize("slope", [-0.4, 0.25, 1.0, 3.0])
def test_prelu_per_channel_equals_leaky_relu(slope):
    lower, upper = (t.reshape(4, 3, 8) for t in random_boxes(12, 96, torch.float64))
    weight = torch.tensor([0.5, slope, -0.25], dtype=torch.float64)
    found = activation_lines(lower, upper, "prelu", weight=weight)
    image = activation_interval(lower, upper, "prelu", weight=weight)
    for channel in range(3):
        arguments = {"negative_slope": weight[channel].item()}
        low, high = lower[:, channel], upper[:, channel]
        for a, b in zip(found, activation_lines(low, high, "leaky_relu", **arguments), strict=True):
            assert torch.equal(a[:, channel], b)
        for a, b in zip(image, activation_interval(low, high, "leaky_relu", **arguments), strict=True):
            assert torch.equal(a[:, channel], b)
    one = activation_lines(lower, upper, "prelu", weight=weight[1:2])
    assert all(torch.equal(a[:, 1], b[:, 1]) for a, b in zip(one, found, strict=True))


# ---- infinities, NaN, flushed subnormals ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments", "kinks"), EVERY, ids=label)
@pytest.mark.parametrize("deployed", [False, True])
def test_infinite_and_undefined_ends(name, arguments, kinks, deployed):
    lower = torch.tensor([-INF, -INF, -1.0, 2.0, math.nan, 0.0])
    upper = torch.tensor([INF, 1.0, INF, INF, 1.0, math.nan])
    lines = activation_lines(lower, upper, name, deployed=deployed, **arguments)
    low, high = activation_interval(lower, upper, name, deployed=deployed, **arguments)
    assert not any(t.isnan().any() for t in (*lines, low, high))
    f = reference.function(name, **arguments)
    for i in range(4):
        x = torch.linspace(max(lower[i].item(), -1e6), min(upper[i].item(), 1e6), 999, dtype=torch.float64)
        here = pycert.ops.ActivationLines(*(t[i] for t in lines))
        assert violation(here, x, f(x), 0.0) <= 0
        assert (low[i] <= f(x)).all() and (f(x) <= high[i]).all()
    assert (low[4:] == -INF).all() and (high[4:] == INF).all()
    assert (lines.upper_slope[4:] == 0).all() and (lines.upper_intercept[4:] == INF).all()


def test_flushing_of_subnormals_on_the_calling_thread_changes_nothing():
    lower, upper = edge_boxes(torch.float32)
    expected = activation_lines(lower, upper, "leaky_relu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        found = activation_lines(lower, upper, "leaky_relu")
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- against the reference: values and area -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", SLOPES)
def test_relu_equals_the_reference(slope, dtype):
    lower, upper = random_boxes(20, 4096, dtype, 3.0)
    found, expected = relu_relaxation(lower, upper, slope), reference.relu_relaxation(lower, upper, slope)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4 * torch.finfo(dtype).eps, atol=1e-30)
    lines = activation_lines(lower, upper, "relu", slope=slope)
    assert torch.equal(lines.upper_intercept, found.upper_intercept)
    assert torch.equal(lines.lower_slope, found.lower_slope) and not lines.lower_intercept.any()


def heights(lines, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Both lines at the midpoint: half the area per width that they leave."""
    middle = (lower.double() + upper.double()) / 2
    lower_slope, lower_intercept, upper_slope, upper_intercept = (t.double() for t in lines)
    return lower_slope * middle + lower_intercept, upper_slope * middle + upper_intercept


@pytest.mark.parametrize("slope", ["adaptive", "parallel"])
@pytest.mark.parametrize(("name", "arguments", "kinks"), PIECEWISE, ids=label)
def test_piecewise_lines_have_least_area(name, arguments, kinks, slope):
    lower, upper = random_boxes(21, 4096, torch.float64, 2.0)
    f = reference.function(name, **arguments)
    expected = reference.piecewise_linear_lines(lower, upper, f, kinks, slope)
    found = activation_lines(lower, upper, name, slope=slope, **arguments)
    for a, b in zip(heights(found, lower, upper), heights(expected, lower, upper), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_smooth_lines_have_least_area(name, dtype):
    lower, upper = random_boxes(22, 500, dtype, 2.0)
    expected = reference.s_shaped_lines(lower, upper, reference.function(name))
    found = activation_lines(lower, upper, name)
    tolerance = 1e-7 if dtype == torch.float32 else 1e-10
    size = 1 + lower.double().abs().maximum(upper.double().abs()) * found.upper_slope.double()
    for a, b in zip(heights(found, lower, upper), heights(expected, lower, upper), strict=True):
        assert ((a - b).abs() / size).max() < 4 * tolerance


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_no_slope_gives_less_area_by_brute_force(name):
    """Independent of any theory: on a grid of slopes none leaves a lower line above f."""
    lower, upper = random_boxes(23, 100, torch.float64, 1.0)
    x = samples(lower, upper, 401)
    y = reference.function(name)(x)
    middle = (lower + upper) / 2
    steepest = {"sigmoid": 0.25, "tanh": 1.0}[name]
    slopes = torch.linspace(0, steepest, 301, dtype=torch.float64)
    best_upper = torch.stack([(y - k * x).amax(0) + k * middle for k in slopes]).amin(0)
    best_lower = torch.stack([(y - k * x).amin(0) + k * middle for k in slopes]).amax(0)
    low, high = heights(activation_lines(lower, upper, name), lower, upper)
    step = steepest / 300 * (upper - lower)  # the grids' own error
    assert (high <= best_upper + step + 1e-9).all() and (low >= best_lower - step - 1e-9).all()


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_parallel_smooth_lines_are_parallel_and_touch(name):
    lower, upper = random_boxes(24, 2000, torch.float64, 1.0)
    lines = activation_lines(lower, upper, name, slope="parallel")
    assert torch.equal(lines.lower_slope, lines.upper_slope)
    x = samples(lower, upper, 2001)
    rest = reference.function(name)(x) - lines.lower_slope * x
    assert (lines.upper_intercept - rest.amax(0) < 1e-5).all()
    assert (rest.amin(0) - lines.lower_intercept < 1e-5).all()


@pytest.mark.parametrize(("name", "arguments", "kinks"), EVERY, ids=label)
def test_intervals_equal_the_reference_and_shrink_with_the_box(name, arguments, kinks):
    lower, upper = random_boxes(25, 4096, torch.float64, 2.0)
    found = activation_interval(lower, upper, name, **arguments)
    expected = reference.activation_interval(lower, upper, reference.function(name, **arguments))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    inner = activation_interval(lower + (upper - lower) / 4, upper - (upper - lower) / 4, name, **arguments)
    assert (inner[0] >= found[0]).all() and (inner[1] <= found[1]).all()


def test_worked_by_hand():
    lower, upper = torch.tensor([[-1.0, -3.0, 1.0]]), torch.tensor([[3.0, 1.0, 2.0]])
    found = relu_relaxation(lower, upper)
    assert found.lower_slope.tolist() == [[1, 0, 1]]
    assert found.upper_slope.tolist() == [[0.75, 0.25, 1]]
    assert found.upper_intercept.tolist() == [[0.75, 0.75, 0]]
    clamp = activation_lines(torch.tensor([[-3.0]]), torch.tensor([[2.0]]), "clamp", min=0.0, max=1.0)
    # above: from (-3, 0) to (1, 1); below: constant 0, since the midpoint -0.5 lies left of the kink at 0
    assert [t.item() for t in clamp] == [0, 0, 0.25, 0.75]
    concave = activation_lines(
        torch.tensor([[-1.0]]), torch.tensor([[1.0]]), "leaky_relu", negative_slope=2.0
    )
    assert [t.item() for t in concave] == [1.5, -0.5, 2, 0]


# ---- gradients ------------------------------------------------------------------------------------------------------


def smooth_boxes() -> tuple[Tensor, Tensor]:
    """Away from every kink of f, of the slope rules and of the choice between tangents and chords."""
    lower = [[-1.3, -2.1, 0.4, -3.0, -0.9, -2.2], [-0.2, -4.0, -1.7, 0.21, -7.3, -0.45]]
    upper = [[0.6, 3.3, 1.9, -1.1, 0.35, 2.6], [6.5, 1.2, 0.33, 0.64, 8.9, -0.1]]
    return tuple(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (lower, upper))


@pytest.mark.parametrize("slope", SLOPES)
def test_gradcheck_relu(slope):
    lower, upper = smooth_boxes()
    differentiable = slice(None) if slope == "parallel" else slice(1, None)
    assert torch.autograd.gradcheck(lambda a, b: relu_relaxation(a, b, slope)[differentiable], (lower, upper))


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize(("name", "arguments", "kinks"), EVERY, ids=label)
def test_gradcheck_lines(name, arguments, kinks, slope):
    lower, upper = smooth_boxes()
    run = lambda a, b: tuple(activation_lines(a, b, name, slope=slope, **arguments))  # noqa: E731
    assert torch.autograd.gradcheck(run, (lower, upper), atol=2e-5)


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("weight", [[0.3], [-0.4, 0.2, 1.4, 0.1, -1.3, 2.0]], ids=len)
def test_gradcheck_prelu(weight, slope):
    lower, upper = smooth_boxes()
    parameter = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    lines = lambda a, b, w: tuple(activation_lines(a, b, "prelu", weight=w, slope=slope))  # noqa: E731
    assert torch.autograd.gradcheck(lines, (lower, upper, parameter), atol=2e-5)
    image = lambda a, b, w: activation_interval(a, b, "prelu", weight=w)  # noqa: E731
    assert torch.autograd.gradcheck(image, (lower, upper, parameter))


@pytest.mark.parametrize(("name", "arguments", "kinks"), EVERY, ids=label)
def test_gradcheck_intervals(name, arguments, kinks):
    run = lambda a, b: activation_interval(a, b, name, **arguments)  # noqa: E731
    assert torch.autograd.gradcheck(run, smooth_boxes(), atol=2e-5)


@pytest.mark.parametrize("name", ["relu", "sigmoid"])
def test_gradients_at_points_and_infinities_are_finite(name):
    lower = torch.tensor([0.0, 1.0, -INF, -1.0, -1e-9], requires_grad=True)
    upper = torch.tensor([0.0, 1.0, 1.0, INF, 1e-9], requires_grad=True)
    lines = activation_lines(lower, upper, name)
    torch.autograd.backward(tuple(lines), tuple(torch.ones_like(t) for t in lines))
    assert lower.grad.isfinite().all() and upper.grad.isfinite().all()


def test_second_derivatives_raise():
    lower, upper = smooth_boxes()
    (first,) = torch.autograd.grad(
        relu_relaxation(lower, upper).upper_intercept.sum(), lower, create_graph=True
    )
    with pytest.raises(RuntimeError, match="relu_relaxation_backward is not implemented"):
        first.sum().backward()


# ---- operators ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_opcheck():
    lower, upper = smooth_boxes()
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.pycert
    cases = [(ops.relu_relaxation.default, (lower, upper, 1))]
    for kind in (0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 14):
        parameter = weight if kind == 2 else None
        cases.append((ops.activation_lines.default, (lower, upper, kind, parameter, 0.1, 0.5, 0, True)))
        cases.append((ops.activation_interval.default, (lower, upper, kind, parameter, 0.1, 0.5, True)))
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments)
        plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(operator, plain)
    plain = lower.detach(), upper.detach()
    torch.library.opcheck(ops.relu_relaxation_backward.default, (*plain, None, plain[0], plain[1], 0))
    torch.library.opcheck(
        ops.activation_lines_backward.default,
        (*plain, weight.detach(), plain[0], None, plain[1], None, 2, 0.0, 0.0, 0),
    )
    torch.library.opcheck(
        ops.activation_interval_backward.default, (*plain, None, plain[0], None, 4, 0.0, 0.0)
    )


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    def function(lower, upper):
        lines = activation_lines(lower, upper, "tanh")
        return (relu_relaxation(lower, upper).upper_intercept * lines.upper_slope).sum()

    lower, upper = smooth_boxes()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(lower, upper), function(lower, upper))
    for a, b in zip(
        torch.autograd.grad(compiled(lower, upper), (lower, upper)),
        torch.autograd.grad(function(lower, upper), (lower, upper)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "arguments", "kinks"), EVERY[:4] + SMOOTH, ids=label)
def test_strided_empty_and_threaded_inputs(name, arguments, kinks):
    lower, upper = (t.reshape(64, 64) for t in random_boxes(30, 4096, torch.float32))
    expected = activation_lines(lower, upper, name, **arguments)
    found = activation_lines(lower.t(), upper.t().contiguous(), name, **arguments)
    assert all(torch.equal(a.t(), b) and a.is_contiguous() for a, b in zip(found, expected, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = activation_lines(lower, upper, name, **arguments)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, expected, strict=True))
    for shape in ((0,), (0, 3), (3, 0, 2)):
        empty = torch.empty(shape)
        assert all(t.shape == shape for t in activation_lines(empty, empty, name, **arguments))
        assert all(t.shape == shape for t in activation_interval(empty, empty, name, **arguments))


def test_empty_prelu_has_a_gradient():
    empty, weight = torch.empty(0, 3, 2, requires_grad=True), torch.ones(3, requires_grad=True)
    activation_lines(empty, empty, "prelu", weight=weight).upper_slope.sum().backward()
    assert weight.grad.tolist() == [0, 0, 0]


def test_autocast_is_cast_to_float32():
    lower, upper = torch.tensor([-1.0]).bfloat16(), torch.tensor([3.0]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert relu_relaxation(lower, upper).upper_slope.dtype == torch.float32
        assert activation_interval(lower, upper, "abs")[0].dtype == torch.float32


def test_errors_say_what_must_hold():
    x = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"relu_relaxation: lower and upper must have the same shape, got \[2, 3\]"
    ):
        relu_relaxation(x, x[0])
    with pytest.raises(TypeError, match="relu_relaxation: lower must be float32 or float64"):
        relu_relaxation(x.half(), x.half())
    with pytest.raises(TypeError, match="must have the same dtype"):
        relu_relaxation(x, x.double())
    with pytest.raises(ValueError, match="relu_relaxation: slope must be one of 'adaptive'"):
        relu_relaxation(x, x, slope="steep")
    with pytest.raises(ValueError, match="activation_lines: activation must be one of 'relu'"):
        activation_lines(x, x, "gelo")
    with pytest.raises(ValueError, match="weight must be given for prelu"):
        activation_interval(x, x, "prelu")
    with pytest.raises(ValueError, match="one per channel .* got 2 values"):
        activation_lines(x, x, "prelu", weight=torch.ones(2))
    with pytest.raises(ValueError, match="negative_slope must be finite"):
        activation_lines(x, x, "leaky_relu", negative_slope=INF)
    with pytest.raises(ValueError, match="alpha must be finite and not negative, got -1"):
        activation_lines(x, x, "elu", alpha=-1.0)
    with pytest.raises(ValueError, match="ELU's alpha must be finite and not negative, got -1"):
        torch.ops.pycert.activation_lines(x, x, 10, None, -1.0, 0.0, 0, False)
    with pytest.raises(ValueError, match="threshold must be a number"):
        activation_interval(x, x, "softplus", threshold=math.nan)
    with pytest.raises(ValueError, match="kind must be a number from 0 to 21"):
        torch.ops.pycert.activation_lines(x, x, 22, None, 0.0, 0.0, 0, False)
    with pytest.raises(ValueError, match="slope must be 0"):
        torch.ops.pycert.relu_relaxation(x, x, 7)
