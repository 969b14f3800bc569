"""Small networks against exact rational arithmetic: every interval, linear bound, slope and intercept."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import nets
import pycert
from exact import ExactNetwork, rational
from pycert.graph import trace

METHODS = ("ibp", "fastlin", "crown-ibp", "crown", "forward", "alpha-crown")
SMALL = [
    "mlp_relu", "mlp_leaky_relu", "mlp_prelu", "mlp_relu6", "mlp_hardtanh", "mlp_abs", "mlp_sigmoid", "mlp_tanh",
    "conv_plain", "conv_grouped_dilated", "conv_one_dimensional", "conv_transposed", "batch_norm_linear",
    "batch_norm_conv", "max_pool_dilated", "normalized", "residual", "shared_layer", "two_linears_added",
    "concatenated", "constants", "max_min", "pools_ceil", "affine_only", "activation_first", "prelu_channels",
    "products", "matrix_products", "conv_three_dimensional",
]  # fmt: skip
#: Exact arithmetic of a three-dimensional convolution takes seconds.
TRIED = [pytest.param(name, marks=pytest.mark.slow) if "three" in name else name for name in SMALL]


class ExactTrial:
    """One network over one box given by floats, with exact values at some of its points."""

    def __init__(self, name: str, seed: int, dtype: torch.dtype, width: float, batch: int = 1) -> None:
        self.net, shape = nets.make(name, seed, dtype=dtype)
        example = torch.zeros(1, *shape, dtype=dtype)
        self.graph = trace(self.net, example)
        self.exact = ExactNetwork(self.graph)
        self.bm = pycert.BoundedModule(self.net, example)
        x = nets.centre(name, seed, shape, batch, dtype)
        generator = torch.Generator().manual_seed(seed)
        self.where = pycert.Box(x, x + width * torch.rand(x.shape, generator=generator).to(dtype))
        self.lower, self.upper = (rational(end[0]).flatten() for end in (self.where.lower, self.where.upper))

    def points(self, count: int, seed: int) -> list[np.ndarray]:
        """Rational points of the box: corners and interior points."""
        random = np.random.default_rng(seed)
        found = []
        for i in range(count):
            t = (
                random.integers(0, 2, len(self.lower))
                if i % 2
                else random.integers(0, 17, len(self.lower)) / 16
            )
            t = np.vectorize(Fraction, otypes=[object])(t)
            found.append(self.lower + t * (self.upper - self.lower))
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("soundness", ["real", "deployed"])
@pytest.mark.parametrize("name", TRIED)
def test_interval_bounds_hold_the_exact_interval(name, soundness, dtype):
    """Exact interval propagation lies inside, and at 2^-10 of the width pycert's is not looser."""
    trial = ExactTrial(name, seed=1, dtype=dtype, width=0.5)
    with torch.no_grad():
        bounds = trial.bm.bound(trial.where, method="ibp", soundness=soundness)
    low, high = trial.exact.box(trial.lower, trial.upper)[trial.graph.output]
    found_low, found_high = rational(bounds.lower).flatten(), rational(bounds.upper).flatten()
    assert (found_low <= low).all()
    assert (found_high >= high).all()
    width = sum(high - low)
    assert sum(found_high - found_low) - width <= width / 1024 + Fraction(1, 10**4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("name", TRIED)
def test_bounds_and_lines_hold_exact_outputs(name, width, dtype):
    trial = ExactTrial(name, seed=2 if width == 1e-6 else 1, dtype=dtype, width=width)
    points = trial.points(3, seed=1)
    values = [trial.exact.value(x)[trial.graph.output] for x in points]
    for method in METHODS:
        with torch.no_grad():
            bounds = trial.bm.bound(
                trial.where, method=method, soundness="real", return_linear=method != "ibp"
            )
        low, high = rational_or_infinite(bounds.lower), rational_or_infinite(bounds.upper)
        for value in values:
            assert all(a <= v <= b for a, v, b in zip(low, value, high)), method
        if method != "ibp":
            check_lines(bounds.linear, points, values, method)


def rational_or_infinite(tensor: torch.Tensor) -> list:
    return [Fraction(v) if math.isfinite(v) else v for v in tensor.double().flatten().tolist()]


def check_lines(linear, points, values, method: str) -> None:
    """``A_lower x + c_lower <= value <= A_upper x + c_upper`` with no rounding at all."""
    parts = (linear.A_lower, linear.c_lower, linear.A_upper, linear.c_upper)
    if not all(part.isfinite().all() for part in parts):
        return
    A_lower, A_upper = (rational(A[0].flatten(1)) for A in (linear.A_lower, linear.A_upper))
    c_lower, c_upper = rational(linear.c_lower[0]), rational(linear.c_upper[0])
    for x, value in zip(points, values):
        assert (A_lower.dot(x) + c_lower <= value).all(), f"{method}: lower line"
        assert (A_upper.dot(x) + c_upper >= value).all(), f"{method}: upper line"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 12))
@pytest.mark.parametrize("name", TRIED)
def test_bounds_and_lines_hold_exact_outputs_more_seeds(name, seed):
    for width in (0.0, 1e-6, 0.3, 30.0):
        trial = ExactTrial(name, seed=seed, dtype=torch.float32, width=width)
        points = trial.points(6, seed=seed)
        values = [trial.exact.value(x)[trial.graph.output] for x in points]
        for method in METHODS:
            with torch.no_grad():
                bounds = trial.bm.bound(
                    trial.where, method=method, soundness="real", return_linear=method != "ibp"
                )
            low, high = rational_or_infinite(bounds.lower), rational_or_infinite(bounds.upper)
            for value in values:
                assert all(a <= v <= b for a, v, b in zip(low, value, high)), (method, width)
            if method != "ibp":
                check_lines(bounds.linear, points, values, method)


@pytest.mark.parametrize("slope", ["adaptive", "parallel", "zero", "one"])
@pytest.mark.parametrize("seed", range(3))
def test_relu_lines_are_valid_exactly(seed, slope):
    """Piecewise linear: both lines need checking at the ends and at the kink alone."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (24 * torch.rand(200, generator=generator) - 12)
    a, b = scale * torch.randn(200, generator=generator), scale * torch.randn(200, generator=generator)
    lower, upper = torch.minimum(a, b)[None], torch.maximum(a, b)[None]
    lines = pycert.ops.relu_relaxation(lower, upper, slope=slope)
    rows = zip(*(rational(t).flatten() for t in (lower, upper, *lines)))
    for low, high, lower_slope, upper_slope, upper_intercept in rows:
        for x in {low, high, min(max(Fraction(0), low), high)}:
            assert lower_slope * x <= max(x, 0) <= upper_slope * x + upper_intercept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_region_itself_is_rounded_outward(p, method, dtype):
    """Through a network that does nothing: every end of the region asked for, and sums that no float holds."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 50, generator=generator).to(dtype)
    bm = pycert.BoundedModule(torch.nn.Flatten(), x)
    eye, pairs = torch.eye(50).to(dtype), (torch.eye(50) + torch.eye(50).roll(1, 0)).to(dtype)
    for eps in (0.1, 1e-9, 0.0):
        where = pycert.LpBall(x, eps=eps, p=p)
        reach = {1: Fraction(1), 2: Fraction(1414, 1000), math.inf: Fraction(2)}[p]  # of a pair, from below
        for rows, distance in ((None, Fraction(eps)), (eye, Fraction(eps)), (pairs, reach * Fraction(eps))):
            bounds = bm.bound(where, method=method, soundness="real", spec=rows)
            center = rational(x[0]) if rows is None else rational(rows).dot(rational(x[0]))
            assert (rational(bounds.lower[0]) <= center - distance).all()
            assert (rational(bounds.upper[0]) >= center + distance).all()


MEETINGS = {
    "branches": nets.Apply(lambda self, x: torch.cat([x, x, x], dim=1)),
    "copies": nets.Apply(lambda self, x: x.repeat(1, 3)),
    "windows": torch.nn.MaxPool1d(3, stride=1, padding=1),
}


@pytest.mark.parametrize("row", [[1e8, 1.0, -1e8], [1.0, 1e8, -1e8], [-1e8, 1e8, 1.0], [1e8, 5.0, -1e8]])
@pytest.mark.parametrize("kind", list(MEETINGS))
def test_coefficients_that_cancel_where_three_ways_meet(kind, row):
    """In float32 the sum of the coefficients is off by as much as the result."""
    x = torch.tensor([[[-5.0, 1.0, -5.0]]]) if kind == "windows" else torch.ones(1, 1)
    bm = pycert.BoundedModule(MEETINGS[kind], x)
    for method in METHODS:
        bounds = bm.bound(
            pycert.Box(x, x.clone()),
            method=method,
            spec=torch.tensor([row]),
            soundness="real",
            intersect=False,
        )
        assert bounds.lower <= sum(row) <= bounds.upper, method


STEPS = {
    "multiply": nets.Apply(lambda self, x: x * 0.3),
    "divide": nets.Apply(lambda self, x: x / 7),
    "add a number": nets.Apply(lambda self, x: x + 0.1),
    "add": nets.Apply(lambda self, x: x + x.flip(-1)),
    "subtract from": nets.Apply(lambda self, x: 0.7 - x),
    "sum": nets.Apply(lambda self, x: x.reshape(-1, 1, 10, 7).sum(-1)),
    "mean": nets.Apply(lambda self, x: x.reshape(-1, 1, 10, 7).mean(-1)),
    "average pool": torch.nn.AvgPool1d(3, 2, padding=1),
    "normalise": pycert.nn.Normalize([0.1307], [0.3081]),
    "batch norm": torch.nn.BatchNorm1d(1),
    "batch norm that cancels": torch.nn.BatchNorm1d(1),
    "prelu": torch.nn.PReLU(init=0.3),
    "leaky relu": torch.nn.LeakyReLU(0.1),
    "sigmoid": torch.nn.Sigmoid(),
    "tanh": torch.nn.Tanh(),
    "smallest": nets.Apply(lambda self, x: torch.minimum(x, 0.3 * x.flip(-1))),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", list(STEPS))
def test_single_steps_hold_the_exact_value_at_points(kind, method):
    """Every elementwise step rounds; at a point nothing else hides an error that is not charged."""
    net, generator = STEPS[kind].eval(), torch.Generator().manual_seed(3)
    if "batch norm" in kind:
        nets.randomize_batch_norm(net, generator)
        net.running_mean.fill_(33.3)
    if kind == "batch norm that cancels":  # bias and shift leave nothing but their roundings
        net.bias.data = net.running_mean * net.weight.data / (net.running_var + net.eps).sqrt()
    x = torch.randn(1, 1, 70, generator=generator) + (33.3 if kind == "batch norm" else 0.0)
    x = x * 1e-6 if kind == "batch norm that cancels" else x
    graph = trace(net, x)
    exact = ExactNetwork(graph).value(rational(x).flatten())[graph.output]
    bm = pycert.BoundedModule(net, x)
    with torch.no_grad():
        executed = net(x)
        for soundness in ("real", "deployed"):
            bounds = bm.bound(pycert.Box(x, x.clone()), method=method, soundness=soundness, intersect=False)
            assert (rational(bounds.lower).flatten() <= exact).all()
            assert (exact <= rational(bounds.upper).flatten()).all()
    assert (bounds.lower <= executed).all()
    assert (executed <= bounds.upper).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["prelu", "leaky relu", "multiply", "average pool"])
def test_rows_times_slopes_are_charged_for_their_rounding(kind, method):
    net, generator = STEPS[kind], torch.Generator().manual_seed(4)
    x = -torch.rand(1, 1, 70, generator=generator)
    graph = trace(net, x)
    exact = ExactNetwork(graph).value(rational(x).flatten())[graph.output]
    factors = torch.rand(len(exact), generator=generator)
    with torch.no_grad():
        bounds = pycert.BoundedModule(net, x).bound(
            pycert.Box(x, x.clone()), method=method, spec=factors.diag(), soundness="real", intersect=False
        )
    assert (rational(bounds.lower[0]) <= rational(factors) * exact).all()
    assert (rational(factors) * exact <= rational(bounds.upper[0])).all()


@pytest.mark.parametrize("method", METHODS)
def test_products_below_the_least_float64(method):
    net = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    net.weight.data.fill_(1e-200)
    bm, x = pycert.BoundedModule(net, torch.zeros(1, 3).double()), torch.full((1, 3), 1e-200).double()
    with torch.no_grad():
        tiny = bm.bound(pycert.Box(x, x.clone()), method=method, soundness="real")
        ball = bm.bound(pycert.LpBall(0 * x, eps=1.0, p=2), method=method, soundness="real")
    assert tiny.upper > 0, "the exact output is 3e-400"
    assert ball.upper >= 1.7321e-200 and ball.lower <= -1.7321e-200


def test_the_exact_network_is_the_network():
    """The rational execution agrees with torch in float64, so that it judges the right function."""
    for name in SMALL:
        trial = ExactTrial(name, seed=1, dtype=torch.float64, width=0.5)
        x = trial.points(1, seed=0)[0]
        value = trial.exact.value(x)[trial.graph.output].astype(np.float64)
        with torch.no_grad():
            y = trial.net(torch.tensor(x.astype(np.float64)).reshape(1, *trial.graph.inputs[0]))
        torch.testing.assert_close(torch.from_numpy(value), y.flatten(), rtol=1e-9, atol=1e-9)
