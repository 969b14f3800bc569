"""The three-state bound and bounds of Jacobians, against exact local Lipschitz constants of small networks."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional as F

import pycert
from lipschitz_nets import NETWORKS, balls, networks, operator_norm, trained
from pycert import lipschitz
from pycert.lipschitz import pullback, states
from pycert.lipschitz.slopes import _RANGES, hypotenuse_range, slope_range
from pycert.lipschitz.walk import Settings, Walk

PS = [1, 2, math.inf]


def small(seed: int, leak: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    activation = nn.ReLU if leak == 0 else lambda: nn.LeakyReLU(leak)
    return nn.Sequential(
        nn.Linear(2, 4), activation(), nn.Linear(4, 3), activation(), nn.Linear(3, 2)
    ).double()  # fmt: skip


def feasible(rows: np.ndarray, offsets: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> bool:
    """Whether ``rows x + offsets > 0`` has a point inside of the box, with something to spare."""
    count = rows.shape[1]
    found = linprog(
        np.r_[np.zeros(count), -1.0],
        A_ub=np.c_[-rows, np.linalg.norm(rows, axis=1)],
        b_ub=offsets,
        bounds=[*zip(lower, upper), (None, 1.0)],
    )
    return found.status == 0 and -found.fun > 1e-9


def pieces(net: nn.Sequential, lower: Tensor, upper: Tensor, leak: float = 0.0) -> list[Tensor]:
    """The Jacobians of all linear pieces that meet the box: layer by layer, one linear program for every sign."""
    (w1, b1), (w2, b2), (w3, _) = (
        (m.weight.detach(), m.bias.detach()) for m in net if isinstance(m, nn.Linear)
    )
    box = lower.numpy(), upper.numpy()

    def patterns(rows: Tensor, offsets: Tensor, before: tuple[Tensor, Tensor]) -> list[Tensor]:
        found = [torch.zeros(0, dtype=torch.float64)]
        for _ in range(len(rows)):
            longer = [
                torch.cat([one, torch.tensor([bit], dtype=torch.float64)]) for one in found for bit in (0, 1)
            ]
            found = []
            for one in longer:
                signs = 2 * one - 1
                a = torch.cat([before[0], rows[: len(one)] * signs[:, None]])
                b = torch.cat([before[1], offsets[: len(one)] * signs])
                if feasible(a.numpy(), b.numpy(), *box):
                    found.append(one)
        return found

    jacobians = []
    for first in patterns(w1, b1, (w1[:0], b1[:0])):
        signs, d1 = 2 * first - 1, leak + (1 - leak) * first
        hidden, offset = w2 @ (d1[:, None] * w1), w2 @ (d1 * b1) + b2
        for second in patterns(hidden, offset, (w1 * signs[:, None], b1 * signs)):
            d2 = leak + (1 - leak) * second
            jacobians.append(w3 @ (d2[:, None] * hidden))
    return jacobians


def largest(jacobians: list[Tensor], p: float) -> float:
    return max(torch.linalg.matrix_norm(one, ord=p).item() for one in jacobians)


@pytest.mark.parametrize("seed,leak", [(0, 0.0), (1, 0.0), (2, 0.2), (3, -0.5), (4, 2.0)])
def test_never_below_the_exact_local_constant(seed, leak):
    net = small(seed, leak)
    bm = pycert.BoundedModule(net, torch.empty(1, 2).double())
    gained = dict.fromkeys(PS, 0)
    for eps in (1e-7, 0.05, 0.3, 1.0):
        x = torch.randn(1, 2).double()
        region = pycert.Box(x - eps, x + eps)
        jacobians = pieces(net, region.lower[0], region.upper[0], leak)
        found = {kind: lipschitz.jacobian_bound(bm, region, kind) for kind in ("interval", "linear")}
        for kind, one in found.items():
            for jacobian in jacobians:
                assert (one.lower[0] <= jacobian).all() and (jacobian <= one.upper[0]).all(), kind
        assert (found["linear"].row_sums <= found["interval"].row_sums).all()
        for p in PS:
            exact = largest(jacobians, p)
            product = lipschitz.local_bound(bm, region, p, three_state=False)
            bound = lipschitz.local_bound(bm, region, p)
            assert exact <= bound <= product
            assert all(exact <= one.constant(p) for one in found.values())
            if eps == 1e-7:  # one linear piece: the bounds are its norm
                assert len(jacobians) == 1
                assert bound <= exact * 1.002 and found["interval"].constant(p) <= exact * 1.002
            gained[p] += bool(bound < product * 0.99)
    assert min(gained.values()) >= 2


def test_leaving_the_split_out_falls_below(monkeypatch):
    """What unstable neurons add is needed: without it the bound is below the exact constant."""
    monkeypatch.setattr(states.ThreeState, "_reach", lambda self, i: torch.zeros(self.walk.batch).double())
    below = 0
    for seed in range(4):
        net = small(seed)
        bm = pycert.BoundedModule(net, torch.empty(1, 2).double())
        region = pycert.Box(torch.full((1, 2), -1.0).double(), torch.ones(1, 2).double())
        exact = largest(pieces(net, region.lower[0], region.upper[0]), 2)
        below += bool(lipschitz.local_bound(bm, region, 2) < exact)
    assert below >= 1


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "pooled"])
def test_sampled_jacobians_lie_in_the_bounds(name):
    net, shape = networks()[name]
    double = networks()[name][0].double()
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    x = torch.rand(2, *shape)
    tighter = False
    for eps in (1e-3, 0.1):
        region = pycert.LpBall(x, eps, math.inf)
        interval, linear = (lipschitz.jacobian_bound(bm, region, kind) for kind in ("interval", "linear"))
        tighter |= bool((linear.row_sums < interval.row_sums * 0.999).any())
        for point in balls(x, eps, math.inf, 8):
            for b in range(2):
                jacobian = torch.func.jacrev(lambda z: double(z[None])[0])(point[b]).flatten(1)
                for found in (interval, linear):
                    assert (found.lower[b] <= jacobian).all() and (jacobian <= found.upper[b]).all()
                    assert (jacobian.abs().sum(1) <= found.row_sums[b]).all()
                    for p in PS:
                        assert operator_norm(jacobian, p) <= found.constant(p)[b].double()
    assert tighter or name == "clipped"


def test_a_kink_at_the_end_of_the_region_has_all_its_slopes():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    net[0].weight.data.fill_(1.0)
    bm = pycert.BoundedModule(net, torch.empty(1, 1))
    region = pycert.Box(torch.tensor([[-1.0]]), torch.tensor([[0.0]]))
    found = lipschitz.jacobian_bound(bm, region)
    assert found.lower.item() <= 0 and found.upper.item() >= 1
    with pytest.raises(ValueError, match="method must be one of 'interval', 'linear'"):
        lipschitz.jacobian_bound(bm, region, "crown")
    with pytest.raises(ValueError, match="p must be 1, 2 or inf"):
        found.constant(3)
    pooled, shape = networks()["pooled"]
    with pytest.raises(ValueError, match="jacobian_bound does not cover the operator"):
        lipschitz.jacobian_bound(
            pycert.BoundedModule(pooled, torch.empty(1, *shape)), pycert.LpBall(torch.rand(1, *shape), 0.1)
        )


def test_several_inputs_are_one_after_the_other():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(3, 4)

        def forward(self, x, y):
            return torch.relu(self.a(x) - 2 * self.b(y)).sum(1, keepdim=True)

    torch.manual_seed(0)
    net = Two()
    x, y = torch.randn(2, 2), torch.randn(2, 3)
    bm = pycert.BoundedModule(net, (x[:1], y[:1]))
    found = lipschitz.jacobian_bound(bm, (pycert.LpBall(x, 1e-6), pycert.LpBall(y, 1e-6)))
    exact = torch.autograd.functional.jacobian(lambda a, b: net(a, b).sum(), (x, y))
    torch.testing.assert_close(found.upper[:, 0].float(), torch.cat(exact, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.lower[:, 0].float(), torch.cat(exact, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
@pytest.mark.parametrize("p", PS)
def test_scales_and_dead_parts(scale, p):
    """Against sampled Jacobians, with dead neurons, zero rows and float32 weights far from 1."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[0].weight.mul_(scale)
        net[0].bias.mul_(scale)
        net[0].bias[:2] = -10 * scale
        net[2].weight[3] = 0
        net[2].bias[3] = 0
        net[2].bias[4:6] = 10 * scale
    bm = pycert.BoundedModule(net, torch.empty(1, 3))
    x = torch.rand(2, 3)
    for eps in (1e-5, 0.2):
        region = pycert.LpBall(x, eps, p)
        bound = lipschitz.local_bound(bm, region, p)
        found = lipschitz.jacobian_bound(bm, region)
        for point in balls(x, eps, p, 16).float():
            for b in range(2):
                jacobian = torch.func.jacrev(lambda z: net(z[None])[0])(point[b]).double()
                exact = operator_norm(jacobian, p) * (1 - 1e-5)  # float32
                assert exact <= bound[b].double() and exact <= found.constant(p)[b].double()
        assert torch.isfinite(bound).all() and (bound > 0).all()


def test_nan_weights_give_no_number():
    net = small(0)
    bm = pycert.BoundedModule(net, torch.empty(1, 2).double())
    with torch.no_grad():
        net[2].weight[0, 0] = torch.nan
    region = pycert.LpBall(torch.zeros(1, 2).double(), 0.1, 2)
    for call in (lipschitz.local_bound, lipschitz.jacobian_bound):
        with pytest.raises(ValueError, match=r"'2\.weight' has NaN or infinite values"):
            call(bm, region)


FUNCTIONS = {
    "relu": F.relu, "abs": torch.abs, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-0.5, 0.7), "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "prelu": lambda x: F.leaky_relu(x, 0.1), "elu": lambda x: F.elu(x, 1.3), "softplus": F.softplus,
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "mish": F.mish,
    "hardswish": F.hardswish, "softsign": F.softsign, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal, "square": torch.square}  # fmt: skip
POSITIVE = ("log", "sqrt")


@pytest.mark.parametrize("op", sorted(_RANGES))
def test_ranges_of_slopes_are_exact(op):
    """Never crossed by a slope within, and reached on a fine grid, but for kinks."""
    torch.manual_seed(0)
    middle, half = torch.randn(400).double() * 3, torch.rand(400).double() ** 3 * 4
    if op in POSITIVE:
        middle = middle.abs() + half + 0.01
    if op == "reciprocal":
        middle = middle + torch.sign(middle) * (half + 0.01)
    attrs = {"slope": 0.1, "alpha": 1.3, "threshold": 20.0, "min": -0.5, "max": 0.7}
    lower, upper = middle - half, middle + half
    least, most = slope_range(op, lower, upper, attrs)
    points = (middle + half * torch.linspace(-1, 1, 1025).double()[:, None]).clamp(lower, upper)
    points.requires_grad_()
    (gradient,) = torch.autograd.grad(FUNCTIONS[op](points).sum(), points)
    assert (least <= gradient).all() and (gradient <= most).all()
    size = torch.maximum(least.abs(), most.abs())
    for end, reached in ((least, gradient.amin(0)), (most, gradient.amax(0))):
        assert ((end - reached).abs() <= 0.01 * (1 + size)).all()


@pytest.mark.parametrize("op", sorted(set(_RANGES) - {*POSITIVE, "reciprocal", "softplus"}))
def test_ranges_of_slopes_on_unbounded_and_undefined_intervals(op):
    attrs = {"slope": 0.1, "alpha": 1.3, "min": -0.5, "max": 0.7}
    infinity = torch.tensor([math.inf]).double()
    points = torch.linspace(-50, 50, 10_001).double().requires_grad_()
    (gradient,) = torch.autograd.grad(FUNCTIONS[op](points).sum(), points)
    for lower, upper, inside in (
        (-infinity, infinity, points < math.inf),
        (-infinity, 0 * infinity.clamp(max=1) + 1.0, points <= 1.0),
        (infinity.clamp(max=-1.0), infinity, points >= -1.0),
    ):
        least, most = slope_range(op, lower, upper, attrs)
        found = gradient[inside]
        assert least <= found.amin() and found.amax() <= most, op
    nothing = slope_range(op, infinity * torch.nan, infinity * torch.nan, attrs)
    assert nothing == slope_range(op, -infinity, infinity, attrs)  # an undefined box says nothing


def test_the_slope_of_a_hypotenuse_is_exact():
    torch.manual_seed(0)
    middle, half = torch.randn(300).double(), torch.rand(300).double() ** 3 * 2
    lower, upper = middle - half, middle + half
    least, most = hypotenuse_range(lower, upper, torch.tensor(0.01).double())
    exact = [end / (end.square() + 0.01).sqrt() for end in (lower, upper)]
    assert (least <= exact[0]).all() and (exact[1] <= most).all()
    assert ((exact[0] - least).abs() <= 2e-6).all() and ((most - exact[1]).abs() <= 2e-6).all()
    ends = torch.tensor([-math.inf, -1e200, 1e200, math.inf]).double()
    for found in hypotenuse_range(ends, ends, torch.tensor(0.01).double()):
        assert torch.allclose(found, ends.sign(), atol=1e-8)


class Smooth(nn.Module):
    """Also a chain that goes on behind the hypotenuse."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.smooth, self.chained = pycert.nn.SmoothMaxMin(0.3), chained

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.smooth(self.first(x)))
        return self.last(torch.tanh(torch.sqrt(x.square() + 0.04)) if self.chained else self.smooth(x))


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("p", PS)
def test_smooth_maxmin_is_no_looser_than_its_slopes(p, chained):
    torch.manual_seed(0)
    net = Smooth(chained).double()
    with torch.no_grad():
        net.second.weight.mul_(0.3)
        net.second.bias.mul_(0.1)
    bm = pycert.BoundedModule(net, torch.empty(1, 2).double())
    x = torch.randn(4, 2).double()
    for eps in (1e-6, 0.05, 1.0):
        region = pycert.LpBall(x, eps, math.inf)
        local, found = lipschitz.local_bound(bm, region, p), lipschitz.jacobian_bound(bm, region)
        points = (
            x + eps * (1 - 1e-9) * torch.cat([torch.zeros(1, 4, 2), 2 * torch.rand(24, 4, 2) - 1]).double()
        )
        jacobians = torch.func.vmap(torch.func.vmap(torch.func.jacrev(lambda z: net(z[None])[0])))(points)
        assert (found.lower <= jacobians).all() and (jacobians <= found.upper).all()
        exact = (
            torch.stack([operator_norm(jacobian, p) for jacobian in jacobians.flatten(0, 1)])
            .view(25, 4)
            .amax(0)
        )
        for bound in (local, found.constant(p)):
            assert (exact <= bound).all()
            assert (bound <= exact * {1e-6: 1.003, 0.05: 3.0, 1.0: 30.0}[eps]).all(), (eps, bound / exact)


@pytest.mark.parametrize("after", [lambda x: x, torch.tanh], ids=["alone", "chained"])
def test_the_hypotenuse_of_one_number(after):
    """Near 0 the walk's slopes of square and root have a product below the slope of 1 that the split counts with."""

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return after(torch.sqrt(x.square() + 0.04))

    net = One()
    region = pycert.Box(torch.full((1, 1), -0.05).double(), torch.full((1, 1), 0.05).double())
    bm = pycert.BoundedModule(net, torch.empty(1, 1).double())
    exact = torch.func.jacrev(lambda z: net(z))(torch.tensor(0.05).double())
    assert exact * (1 - 1e-12) <= lipschitz.local_bound(bm, region).item() <= exact * 1.1
    assert exact * (1 - 1e-12) <= lipschitz.jacobian_bound(bm, region).constant().item() <= exact * 1.1


def test_the_far_threshold_of_a_ramp_is_no_infinite_slope():
    """SmoothRamp's softplus jumps by exp(-80) at 80 of its widths: an error, also in real arithmetic, and no slope."""
    net = nn.Sequential(nn.Linear(1, 2), pycert.nn.SmoothRamp("softplus", 0.1), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[0].bias.copy_(torch.tensor([8.0, -8.0]))
        net[2].weight.copy_(torch.tensor([[1e30, 0.0], [0.0, 1.0]]))  # enlarges the jump to what is seen
        net[2].bias.zero_()
    bm = pycert.BoundedModule(net, torch.empty(1, 1).double())
    x = torch.zeros(1, 1).double()
    region = pycert.LpBall(x, 0.5, 2)
    assert lipschitz.local_bound(bm, region) <= lipschitz.global_bound(bm).value * 1.01 < math.inf
    assert lipschitz.jacobian_bound(bm, region).constant(2).isfinite().all()
    finder = Walk(bm.net, bm.graph, bm._tensors(), Settings(), 1)
    # exp(-80), twice, of one width, for both neurons
    expected = 2 * math.exp(-80) * 0.1 * math.sqrt(2)
    assert finder.lengths(finder.graph.output - 1).lengths[0, 1].item() == pytest.approx(expected, rel=1e-6)
    found = bm.bound(region, "lipschitz", soundness="real")
    for point in torch.linspace(-0.49, 0.49, 41).double():
        value = net(point.view(1, 1))
        assert (found.lower <= value).all() and (value <= found.upper).all()


def test_certificates_use_the_three_states(monkeypatch):
    net, x, y = trained()
    bm = pycert.BoundedModule(net, torch.empty(1, 2))
    region = pycert.LpBall(x, 0.1, 2)
    with_states = pycert.margins(bm, region, y, method="lipschitz")
    monkeypatch.setattr(
        states.ThreeState, "of_rows", lambda self, table: table.new_full(table.shape[:2], math.inf)
    )
    without = pycert.margins(bm, region, y, method="lipschitz")
    assert (with_states >= without).all() and (with_states > without + 0.01).any()
    for point in balls(x, 0.1, 2, 20).float():
        scores = net(point)
        others = torch.arange(3).expand(len(y), 3)[torch.arange(3) != y[:, None]].view(-1, 2)
        gaps = scores.gather(1, y[:, None]) - scores.gather(1, others)
        assert (with_states <= gaps).all()


def test_lost_roundings_are_charged(monkeypatch):
    """Rows pulled back through long sums that cancel: the charge is above what they lost, and not 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 512), nn.LeakyReLU(1.0), nn.Linear(512, 1)).double()
    with torch.no_grad():
        net[2].weight[:, 256:] = -net[2].weight[:, :256]
        net[0].weight[256:] = net[0].weight[:256] * (1 + 1e-13)
    bm = pycert.BoundedModule(net, torch.empty(1, 2).double())
    exact = np.array([[0.0, 0.0]], dtype=object)
    for j in range(2):
        exact[0, j] = sum(
            Fraction(a) * Fraction(b) for a, b in zip(net[2].weight[0].tolist(), net[0].weight[:, j].tolist())
        )
    region = pycert.LpBall(torch.zeros(1, 2).double(), 1.0, math.inf)
    for kind in ("interval", "linear"):
        found = lipschitz.jacobian_bound(bm, region, kind)
        for j in range(2):
            assert (
                Fraction(found.lower[0, 0, j].item()) <= exact[0, j] <= Fraction(found.upper[0, 0, j].item())
            )
    bound = lipschitz.local_bound(bm, region, math.inf)
    assert Fraction(bound.item()) >= sum(abs(e) for e in exact[0])
    monkeypatch.setattr(pullback, "gamma", lambda terms: 0.0)
    plain = lipschitz.jacobian_bound(bm, region, "interval")
    assert (plain.upper - plain.lower < found.upper - found.lower).any()


@pytest.mark.parametrize(
    "name,p", [(name, 2) for name in NETWORKS if name != "pooled"] + [("dense", 1), ("clipped", math.inf)]
)
def test_gradients_of_bounds_are_those_of_differences(name, p):
    """With respect to all parameters, the centre and eps, along random directions."""
    net, shape = networks()[name]
    net = net.double()
    bm = pycert.BoundedModule(net, torch.empty(1, *shape).double())
    torch.manual_seed(2)
    x, weight = torch.rand(2, *shape).double(), torch.randn(2, 3, 2).double()
    values = [*net.parameters(), x, torch.tensor([0.05, 0.2]).double()]
    directions = [torch.randn_like(value) * 0.1 for value in values]

    def total(step: float) -> Tensor:
        for value, direction in zip(values, directions):
            value.data.add_(step * direction)
        found = bm.bound(pycert.LpBall(values[-2], values[-1], p), method="lipschitz")
        result = (torch.stack([found.lower, found.upper], 2) * weight).sum()
        for value, direction in zip(values, directions):
            value.data.sub_(step * direction)
        return result

    with torch.no_grad():
        difference = (total(1e-6) - total(-1e-6)) / 2e-6
    for value in values:
        value.requires_grad_()
    gradients = torch.autograd.grad(total(0.0), values, allow_unused=True)
    for value, gradient in zip(values, gradients):
        assert gradient is not None and torch.isfinite(gradient).all(), value.shape
    along = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions))
    assert abs(along - difference) <= 5e-3 * abs(difference) + 1e-3
