"""No bound is ever violated: random networks of every layer, random regions, zero tolerance.

``real`` is judged by float64 evaluations widened by nothing but their own rounding error,
``deployed`` also by float32 executions in many orders of summation. Points are corners, edges,
interior points and the ends that signed ascent finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

import nets
import pycert
from judging import Executor, Judge, deployed_runs
from pycert.graph import trace

METHODS = ("ibp", "fastlin", "crown-ibp", "crown", "forward", "alpha-crown")
BATCH = 3


class Trial:
    """One random network over one random region, with points of the region and the values there."""

    def __init__(self, name: str, region: str, seed: int, points: int = 24) -> None:
        self.net, self.shape = nets.make(name, seed)
        self.bm = pycert.BoundedModule(self.net, torch.zeros(1, *self.shape))
        generator = torch.Generator().manual_seed(seed + 7 * len(region))
        center = nets.centre(name, seed, self.shape, BATCH, torch.float32)
        self.where = nets.REGIONS[region](generator, center)
        self.graph = trace(self.net, torch.zeros(1, *self.shape))
        self.judge = Judge(self.graph, self.where)
        inside = nets.points_in(self.where, seed, points, torch.float64)
        ends = list(nets.ends_by_ascent(self.judge.value, self.where, steps=3))
        self.points = torch.cat([inside, torch.stack(ends)])
        self.real = self.judge.values(self.points)

    def deployed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Float32 outputs ``[count, B, *out]`` in many orders, at float32 points, with a name."""
        points = nets.points_in(self.where, 1, 4, torch.float32)
        points = torch.cat([points, nets.inside(self.where, self.points[-2:], torch.float32)])
        executor = Executor(self.graph, self.judge.walk)
        for label, value in deployed_runs(self.net, executor, points.flatten(0, 1)):
            yield label, value.reshape(*points.shape[:2], *value.shape[1:])

    def check_real(self, bounds: pycert.Bounds, label: str) -> None:
        lower, upper = bounds.lower.double(), bounds.upper.double()
        above = self.real - self.judge.margin - upper
        below = lower - (self.real + self.judge.margin)
        worst = torch.maximum(above, below).nan_to_num(nan=-math.inf)
        assert (worst <= 0).all(), f"{label}: escapes by {worst.max():.3g}"
        assert not (bounds.lower.isnan() | bounds.upper.isnan()).any(), f"{label}: NaN in a bound"


def trial_ids():
    """Every network with every region, a third of them fast; the seed walks through the weight scales."""
    for i, name in enumerate(nets.BUILDERS):
        for j, region in enumerate(nets.REGIONS):
            fast = (i + j) % 3 == 0 and not (name == "mlp_custom" and j > 1)  # seconds each
            yield pytest.param(name, region, (i // 3 + j) % 3, marks=[] if fast else [pytest.mark.slow])


def check(name: str, region: str, seed: int) -> None:
    trial = Trial(name, region, seed)
    runs = [(label, value.double()) for label, value in trial.deployed()]
    for method in METHODS:
        for soundness in ("real", "deployed"):
            with torch.no_grad():
                bounds = trial.bm.bound(trial.where, method=method, soundness=soundness, intersect=seed == 1)
            trial.check_real(bounds, f"{method}, {soundness}")
        for label, value in runs:
            outside = (value < bounds.lower) | (value > bounds.upper)
            assert not outside.any(), f"{method}, execution '{label}' escapes"


@pytest.mark.parametrize(("name", "region", "seed"), list(trial_ids()))
def test_no_execution_escapes(name, region, seed):
    check(name, region, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 18))
@pytest.mark.parametrize("region", list(nets.REGIONS))
@pytest.mark.parametrize("name", list(nets.BUILDERS))
def test_no_execution_escapes_more_seeds(name, region, seed):
    check(name, region, seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(nets.BUILDERS))
def test_linear_bounds_and_spec_hold_at_every_point(name, method):
    trial = Trial(name, "linf", seed=1)
    outputs = math.prod(trial.real.shape[2:])
    generator = torch.Generator().manual_seed(5)
    spec = torch.randn(BATCH, 4, outputs, generator=generator)
    rows = (spec.double() @ trial.real.flatten(2)[..., None]).squeeze(-1)  # [count, B, 4]
    margin = trial.judge.spec_margin(spec)
    for soundness in ("real", "deployed"):
        with torch.no_grad():
            options = dict(method=method, spec=spec, soundness=soundness)
            if method == "ibp":
                found = trial.bm.bound(trial.where, **options)
            else:
                found = trial.bm.bound(trial.where, return_linear=True, **options)
        assert (found.lower.double() <= rows + margin).all()
        assert (found.upper.double() >= rows - margin).all()
        if method == "ibp":
            continue
        for sign, A, c in (
            (1, found.linear.A_lower, found.linear.c_lower),
            (-1, found.linear.A_upper, found.linear.c_upper),
        ):
            x, A, c = trial.points.flatten(2)[..., None], A.double().flatten(2), c.double()
            line = (A @ x).squeeze(-1) + c
            rounding = 2.0**-50 * (A.shape[-1] + 4) * ((A.abs() @ x.abs()).squeeze(-1) + c.abs())
            assert (sign * line <= sign * rows + margin + rounding).all(), f"{soundness}, sign {sign}"


@pytest.mark.parametrize("method", [method for method in METHODS if method != "forward"])
@pytest.mark.parametrize(
    "name", ["conv_plain", "residual", "max_min", "pools", "mlp_sigmoid", "batch_norm_conv"]
)
def test_layer_bounds_hold_at_every_point(name, method):
    trial = Trial(name, "linf", seed=0)
    modules = dict(trial.net.named_modules())
    with torch.no_grad():
        layers = trial.bm.layer_bounds(trial.where, method=method)
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(path: str):
        return lambda module, inputs, output: seen.setdefault(path, []).append(output)

    for path in layers.keys() & modules.keys():
        modules[path].register_forward_hook(keep(path))
    double = trial.net.double()
    with torch.no_grad():
        for x in trial.points:
            double(x)
    for path, outputs in seen.items():
        values = torch.stack(outputs)
        slack = 1e-12 * values.abs().amax()
        assert (layers[path].lower.double() - slack <= values).all(), path
        assert (layers[path].upper.double() + slack >= values).all(), path
    assert seen or name == "max_min"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_relu", "conv_plain", "residual", "batch_norm_conv", "mlp_sigmoid"])
def test_compiled_network_stays_inside(name):
    trial = Trial(name, "linf", seed=0)
    with torch.no_grad():
        compiled = torch.compile(trial.net)
        bounds = trial.bm.bound(trial.where, method="crown", soundness="deployed")
        for x in nets.points_in(trial.where, 3, 16, torch.float32):
            y = compiled(x)
            assert (bounds.lower <= y).all() and (y <= bounds.upper).all()


@pytest.mark.parametrize("method", METHODS)
def test_permuted_units_stay_inside(method):
    """The same function with hidden units and input features in another order sums differently."""
    torch.manual_seed(3)
    first, second = torch.nn.Linear(300, 200), torch.nn.Linear(200, 4)
    net = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    x = torch.rand(2, 300)
    where = pycert.LpBall(x, eps=0.0, p=math.inf)
    with torch.no_grad():
        bounds = pycert.BoundedModule(net, x).bound(where, method=method, soundness="deployed")
        for seed in range(20):
            torch.manual_seed(seed)
            features, units = torch.randperm(300), torch.randperm(200)
            hidden = torch.relu(
                torch.nn.functional.linear(x[:, features], first.weight[:, features], first.bias)
            )
            y = torch.nn.functional.linear(hidden[:, units], second.weight[:, units], second.bias)
            assert (bounds.lower <= y).all() and (y <= bounds.upper).all()


def dense_net(features: int, hidden: int, seed: int) -> torch.nn.Module:
    """Two layers whose sums nearly cancel, so that rounding errors are large beside the result."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(features, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 16))
    net[0].weight.data = torch.randn(hidden, features)
    net[2].weight.data = torch.randn(16, hidden)
    net[2].weight.data -= net[2].weight.data.mean(1, keepdim=True)
    return net


@pytest.mark.parametrize("batch", [1, 4, 5, 40])
@pytest.mark.parametrize(("features", "hidden"), [(33, 2500), (1024, 7), (1025, 1030), (3000, 20)])
def test_long_sums(features, hidden, batch):
    """Every way to form a product: row by row or by blocks, in the forward and in the backward walk."""
    net = dense_net(features, hidden, seed=features + batch)
    x = torch.rand(batch, features) + 0.5
    bm = pycert.BoundedModule(net, x)
    for where in (pycert.Box(x, x.clone()), pycert.LpBall(x, eps=1e-4, p=math.inf)):
        points = nets.points_in(where, batch, 4, torch.float32)
        with torch.no_grad():
            exact = torch.stack([net.double()(point.double()) for point in points])
            runs = torch.stack([net.float()(point) for point in points])
            runs_alone = torch.stack([torch.cat([net(row[None]) for row in point]) for point in points])
            for method in ("ibp", "crown-ibp"):
                real = bm.bound(where, method=method, soundness="real")
                margin = 1e-9 * (real.upper - real.lower).double() + 1e-9  # float64 against float32
                assert (real.lower.double() <= exact + margin).all(), method
                assert (real.upper.double() >= exact - margin).all(), method
                deployed = bm.bound(where, method=method, soundness="deployed")
                for value in (runs, runs_alone):
                    assert (deployed.lower <= value).all() and (value <= deployed.upper).all(), method


def test_long_sums_of_convolutions():
    torch.manual_seed(9)
    net = torch.nn.Sequential(torch.nn.Conv2d(128, 96, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(96, 8, 3),
                              torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 4, 3, stride=2))  # fmt: skip
    for layer in net[::2]:
        layer.weight.data = torch.randn(layer.weight.shape)
    x = torch.rand(2, 128, 6, 6)
    where = pycert.Box(x, x.clone())
    bm = pycert.BoundedModule(net, x)
    with torch.no_grad():
        exact, run = net.double()(x.double()), net.float()(x)
        for method in ("ibp", "crown-ibp"):
            real = bm.bound(where, method=method, soundness="real")
            assert (real.lower.double() <= exact).all() and (exact <= real.upper.double()).all()
            deployed = bm.bound(where, method=method, soundness="deployed")
            assert (deployed.lower <= run).all() and (run <= deployed.upper).all()


def test_overflow_gives_infinite_bounds():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    for layer in (net[0], net[2]):
        layer.weight.data.fill_(1e30)
    x = torch.ones(1, 2)
    bm = pycert.BoundedModule(net, x)
    for method in METHODS:
        bounds = bm.bound(pycert.LpBall(x, eps=0.1, p=math.inf), method=method)
        assert not bounds.upper.isnan().any() and not bounds.lower.isnan().any()
        assert (bounds.upper == math.inf).all(), method


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_weights_never_give_a_finite_wrong_bound(bad):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    net[2].weight.data[0, 1] = bad
    x = torch.rand(2, 3)
    bm = pycert.BoundedModule(net, x)
    for method in METHODS:
        try:
            bounds = bm.bound(pycert.LpBall(x, eps=0.1, p=math.inf), method=method)
        except ValueError as error:
            assert "2" in str(error), "the error names the layer"
            continue
        assert not bounds.lower[:, 0].isfinite().any() or not bounds.upper[:, 0].isfinite().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_centres_are_refused(bad):
    x = torch.rand(2, 3)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="x"):
        pycert.LpBall(x, eps=0.1, p=math.inf)
