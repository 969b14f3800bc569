"""alpha-CROWN: slopes optimised on the bounds themselves, against plain PyTorch and against the network."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import pycert
from pycert import BoundedModule, Box, LpBall, certify, margins
from tests import nets

F64 = torch.float64
PLAIN = dict(soundness="none", intersect=False)


def mlp(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32, activation=nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(sizes):
        layers += [nn.Linear(wide, narrow), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.inner, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.last(torch.relu(hidden + self.inner(hidden)).abs())


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


CASES = {
    "mlp": (lambda: mlp(6, 16, 16, 4), (6,), 0.3),
    "leaky": (lambda: mlp(6, 16, 16, 4, activation=lambda: nn.LeakyReLU(0.2)), (6,), 0.3),
    "convolutional": (convolutional, (1, 8, 8), 0.2),
    "residual": (Residual, (6,), 0.3),
    "mixed": (
        lambda: nn.Sequential(mlp(6, 12, 12), nn.Sigmoid(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
        (6,),
        0.5,
    ),
}


def case(name: str, batch: int = 3) -> tuple[BoundedModule, Tensor, float]:
    make, shape, eps = CASES[name]
    return BoundedModule(make(), torch.empty(1, *shape)), draw(batch, *shape, seed=5), eps


# ---- the ascent, against plain PyTorch ------------------------------------------------------------


def reference_lower(net: nn.Sequential, boxes, x: Tensor, eps: float, spec: Tensor, slopes) -> Tensor:
    """Lower bounds of ``spec @ f`` by CROWN with the given lower slopes, each ``[B, S, n]``."""
    A, c = spec.expand(len(x), -1, -1), torch.zeros((), dtype=x.dtype)
    position = len(slopes)
    for layer in reversed(net):
        if isinstance(layer, nn.Linear):
            c, A = c + A @ layer.bias, A @ layer.weight
            continue
        position -= 1
        lower, upper = (t.unsqueeze(1) for t in boxes[position])
        unstable = (lower < 0) & (upper > 0)
        steep = torch.where(unstable, upper / (upper - lower), (lower >= 0).to(x))
        c = c + (A.clamp(max=0) * torch.where(unstable, -steep * lower, 0.0)).sum(-1)
        A = A.clamp(min=0) * torch.where(unstable, slopes[position], steep) + A.clamp(max=0) * steep
    return c + (A * x.unsqueeze(1)).sum(-1) - eps * A.abs().sum(-1)


def reference_ascent(net, boxes, x: Tensor, eps: float, spec: Tensor, steps: int, rate: float, shared: bool):
    """Projected Adam with torch's own optimiser; the best bound of every row (or of a sample's sum)."""
    rows = 1 if shared else len(spec)
    slopes = [
        (upper > -lower).to(x).unsqueeze(1).repeat(1, rows, 1).requires_grad_() for lower, upper in boxes
    ]
    optimizer = torch.optim.Adam(slopes, lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    best, first = None, None
    for step in range(steps + 1):
        found = reference_lower(net, boxes, x, eps, spec, slopes)
        first = found.detach() if first is None else first
        if best is None:
            best = found.detach()
        elif shared:
            best = torch.where((found.sum(1) > best.sum(1)).unsqueeze(1), found.detach(), best)
        else:
            best = torch.maximum(best, found.detach())
        if step < steps:
            optimizer.zero_grad()
            (-found.sum()).backward()
            optimizer.step()
            schedule.step()
            for slope in slopes:
                slope.data.clamp_(0, 1)
    return torch.maximum(best, first)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
@pytest.mark.parametrize("shared", [False, True])
def test_ascent_takes_the_steps_of_plain_pytorch(shared, steps):
    """Every step, so also every gradient with respect to a slope, to float64's rounding."""
    net = mlp(6, 14, 12, 10, 3, dtype=F64)
    bm, x, eps, spec = (
        BoundedModule(net, torch.empty(1, 6, dtype=F64)),
        draw(4, 6, dtype=F64),
        0.4,
        draw(5, 3, dtype=F64),
    )
    region = LpBall(x, eps)
    options = dict(PLAIN, iterations=steps, learning_rate=0.1, alpha="shared" if shared else "per spec")
    with torch.no_grad():
        boxes = [tuple(b) for b in bm.layer_bounds(region, "crown", **PLAIN).values()]
        lower, upper = bm.bound(region, "alpha-crown", spec=spec, **options)
    for found, sign in ((lower, 1), (upper, -1)):
        expected = reference_ascent(net, boxes, x, eps, sign * spec, steps, 0.1, shared)
        torch.testing.assert_close(sign * found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("from_table", [False, True])
def test_relax_rows_has_the_gradient_of_its_formula(from_table):
    """With rows of the lower line's tables, a bias, and rows that read a table with a sign."""
    groups, samples, n, count = 3, 2, 7, 5
    rows = draw(4 if from_table else count, n, dtype=F64)
    slope, intercept = draw(groups, n, seed=1, dtype=F64), draw(groups, n, seed=2, dtype=F64)
    upper, constant, bias = (draw(*shape, seed=3, dtype=F64) for shape in ((samples, n), (samples, n), (n,)))
    group, sample = torch.tensor([0, 2, 1, 2, 0]), torch.tensor([0, 1, 0, 1, 0])
    source, negative = (torch.tensor([3, 0, 0, 1, 2]), 3) if from_table else (None, 2**62)

    def mine(rows, slope, intercept):
        out, sums = torch.ops.pycert.relax_rows(
            rows, source, negative, sample, None, [1, 0, 0, 0, 0, 0, 0], [1, 1, n], slope, intercept, upper,
            constant, bias, None, group,
        )  # fmt: skip
        return out.view(count, n), sums[0]

    def plain(rows, slope, intercept):
        if from_table:
            rows = rows[source] * torch.tensor([1, 1, 1, -1, -1]).unsqueeze(1)
        high, low = rows.clamp(min=0), rows.clamp(max=0)
        out = high * slope[group] + low * upper[sample]
        return out, (high * intercept[group] + low * constant[sample] + out * bias).sum(1)

    leaves = [t.requires_grad_() for t in ((slope, intercept) if from_table else (rows, slope, intercept))]
    weights = draw(count, n, seed=9, dtype=F64), draw(count, seed=10, dtype=F64)
    found = [
        torch.autograd.grad([(v * w).sum() for v, w in zip(f(rows, slope, intercept), weights)], leaves)
        for f in (mine, plain)
    ]
    for a, b in zip(mine(rows, slope, intercept) + found[0], plain(rows, slope, intercept) + found[1]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64, the same sums in another order


# ---- never looser, and sound ------------------------------------------------------------------------


@pytest.mark.parametrize("soundness", ["none", "deployed"])
@pytest.mark.parametrize("alpha", ["per spec", "shared"])
@pytest.mark.parametrize("intermediate", ["crown-ibp", "crown", "alpha-crown"])
@pytest.mark.parametrize("name", CASES)
def test_never_looser_than_crown_and_strictly_tighter(name, intermediate, alpha, soundness):
    bm, x, eps = case(name)
    before = "crown-ibp" if intermediate == "crown-ibp" else "crown"
    with torch.no_grad():
        region = LpBall(x, eps)
        plain = bm.bound(region, before, soundness=soundness)
        found = bm.bound(
            region, "alpha-crown", iterations=8, alpha=alpha, intermediate=intermediate, soundness=soundness
        )
        assert (found.lower >= plain.lower).all() and (found.upper <= plain.upper).all()
        assert (found.upper - found.lower).sum() < 0.99 * (plain.upper - plain.lower).sum()
        for point in sampled(region, 50):
            value = bm.net(point)
            assert (found.lower <= value).all() and (value <= found.upper).all()
    assert found.soundness == soundness


def sampled(region, count: int):
    generator = torch.Generator().manual_seed(11)
    lower, upper = region.lower, region.upper
    for number in range(count):
        share = torch.rand(lower.shape, generator=generator)
        share = share.round() if number % 2 else share
        point = lower + share * (upper - lower)
        yield torch.minimum(torch.maximum(point, lower), upper)


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
def test_every_norm(p, clip):
    bm, x, _ = case("mlp")
    region = LpBall(x.clamp(-1, 1), torch.tensor([0.3, 0.5, 1.0]), p=p, clip=clip)
    with torch.no_grad():
        plain, found = bm.bound(region, "crown"), bm.bound(region, "alpha-crown")
        assert (found.lower >= plain.lower).all() and (found.upper <= plain.upper).all()
        assert (found.upper - found.lower).sum() < 0.99 * (plain.upper - plain.lower).sum()
        for point in nets.points_in(region, 3, 30, torch.float32):
            values = bm.net(point)
            assert (found.lower <= values).all() and (values <= found.upper).all()


def test_boxes_points_and_nets_without_unstable_neurons():
    bm, x, _ = case("mlp")
    with torch.no_grad():
        lower, upper = bm.bound(Box(x - 0.2, x + torch.rand(x.shape)), "alpha-crown")
        assert (lower <= bm.net(x)).all() and (bm.net(x) <= upper).all()
        for method_options in (dict(), dict(intermediate="alpha-crown"), dict(alpha="shared")):
            for region in (Box(x, x), LpBall(x, 1e-6)):
                plain, found = bm.bound(region, "crown"), bm.bound(region, "alpha-crown", **method_options)
                assert (found.lower >= plain.lower).all() and (found.upper <= plain.upper).all()
                assert (found.lower <= bm.net(x)).all() and (bm.net(x) <= found.upper).all()
        affine = BoundedModule(nn.Linear(6, 2), torch.empty(1, 6))
        torch.testing.assert_close(
            affine.bound(LpBall(x, 0.1), "alpha-crown").lower, affine.bound(LpBall(x, 0.1), "crown").lower
        )


def test_exact_on_one_hidden_layer_by_brute_force():
    """One input: the lower bound must lie below the exact minimum, and come closer to it than CROWN's."""
    gained = []
    for seed in range(6):
        net = mlp(1, 8, 1, seed=seed, dtype=F64)
        bm, x = BoundedModule(net, torch.empty(1, 1, dtype=F64)), draw(1, 1, seed=seed, dtype=F64)
        region = LpBall(x, 1.0)
        with torch.no_grad():
            kinks = (-net[0].bias / net[0].weight.flatten()).clamp(float(x) - 1, float(x) + 1)
            ends = torch.cat([kinks, x.flatten() - 1, x.flatten() + 1]).unsqueeze(1)
            values = net(ends)  # piecewise linear: extreme at a kink or an end
            found, plain = bm.bound(region, "alpha-crown", iterations=50), bm.bound(region, "crown")
        assert found.lower <= values.min() and values.max() <= found.upper
        gained.append(float((values.min() - found.lower) / (values.min() - plain.lower)))
    assert sum(gained) / len(gained) < 0.9, gained


def test_extreme_regions_keep_bounds_valid():
    bm, x, _ = case("leaky")
    with torch.no_grad():
        for eps in (1e-30, 1e8, 1e30):
            for alpha in ("per spec", "shared"):
                region = LpBall(x, eps)
                plain, found = bm.bound(region, "crown"), bm.bound(region, "alpha-crown", alpha=alpha)
                assert (found.lower >= plain.lower).all() and (found.upper <= plain.upper).all()
                assert (found.lower <= bm.net(x)).all() and (bm.net(x) <= found.upper).all()
        huge = BoundedModule(copy.deepcopy(bm.net), torch.empty(1, 6))
        for parameter in huge.net.parameters():
            parameter.mul_(1e15)
        lower, upper = huge.bound(LpBall(x, 0.3), "alpha-crown")
        assert not lower.isnan().any() and not upper.isnan().any()


# ---- options --------------------------------------------------------------------------------------------


def test_sides_and_specs_give_the_same_bounds():
    bm, x, eps = case("convolutional")
    region, spec = LpBall(x, eps), draw(3, 4, 5)
    with torch.no_grad():
        for rows in (spec, spec[0], None):
            both = bm.bound(region, "alpha-crown", spec=rows)
            low = bm.bound(region, "alpha-crown", spec=rows, side="lower")
            high = bm.bound(region, "alpha-crown", spec=rows, side="upper")
            assert low.upper is None and high.lower is None
            torch.testing.assert_close(low.lower, both.lower, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(high.upper, both.upper, rtol=1e-3, atol=1e-3)
        table = bm.bound(region, "alpha-crown", spec=spec[0])
        own = bm.bound(region, "alpha-crown", spec=spec[:1].expand(3, -1, -1))
        torch.testing.assert_close(table.lower, own.lower, rtol=1e-3, atol=1e-3)


def test_own_slopes_are_tighter_than_shared_ones():
    bm, x, eps = case("mlp")
    spec = draw(12, 4, seed=2)
    with torch.no_grad():
        width = {
            alpha: sum_of_widths(bm.bound(LpBall(x, eps), "alpha-crown", spec=spec, alpha=alpha, **PLAIN))
            for alpha in ("per spec", "shared")
        }
    assert width["per spec"] < 0.995 * width["shared"]


def sum_of_widths(bounds) -> float:
    return float((bounds.upper - bounds.lower).sum())


def test_optimised_intermediate_bounds_are_tighter():
    bm, x, eps = case("mlp")
    region = LpBall(x, eps)
    with torch.no_grad():
        widths = [
            sum_of_widths(bm.bound(region, "alpha-crown", intermediate=name))
            for name in ("crown-ibp", "crown", "alpha-crown")
        ]
        assert widths[0] > 1.01 * widths[1] > 1.01 * 1.005 * widths[2]
        plain, found = bm.layer_bounds(region, "crown"), bm.layer_bounds(region, "alpha-crown")
        for name, layer in found.items():
            assert (layer.lower >= plain[name].lower).all() and (layer.upper <= plain[name].upper).all()
        assert sum_of_widths(found["2"]) < sum_of_widths(plain["2"])


def test_a_tight_budget_changes_nothing_but_roundings():
    bm, x, eps = case("convolutional")
    region = LpBall(x, eps)
    with torch.no_grad():
        for alpha in ("per spec", "shared"):
            plain = bm.bound(region, "alpha-crown", alpha=alpha)
            tight = bm.bound(region, "alpha-crown", alpha=alpha, memory="200KB")
            crown = bm.bound(region, "crown")
            assert (tight.lower >= crown.lower - 1e-5).all()
            if alpha == "per spec":
                torch.testing.assert_close(plain.lower, tight.lower, rtol=1e-3, atol=1e-3)


def test_the_same_call_gives_the_same_bits():
    bm, x, eps = case("convolutional")
    with torch.no_grad():
        first, second = (
            bm.bound(LpBall(x, eps), "alpha-crown", intermediate="alpha-crown", iterations=4)
            for _ in range(2)
        )
    assert torch.equal(first.lower, second.lower) and torch.equal(first.upper, second.upper)


def test_linear_bounds_hold():
    bm, x, eps = case("residual")
    region = LpBall(x, eps)
    with torch.no_grad():
        found = bm.bound(region, "alpha-crown", return_linear=True, intersect=False)
        least = pycert.ops.concretize(found.linear.A_lower, found.linear.c_lower, region)
        torch.testing.assert_close(least, found.lower, rtol=1e-4, atol=1e-4)
        for point in sampled(region, 40):
            below = (found.linear.A_lower @ point.unsqueeze(-1)).squeeze(-1) + found.linear.c_lower
            above = (found.linear.A_upper @ point.unsqueeze(-1)).squeeze(-1) + found.linear.c_upper
            assert (below <= bm.net(point) + 1e-5).all() and (bm.net(point) <= above + 1e-5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(iterations=-1), "iterations must be an integer of at least 0, got -1"),
        (dict(iterations=2.5), "iterations must be an integer of at least 0, got 2.5"),
        (dict(learning_rate=0), "learning_rate must be a positive finite number, got 0"),
        (dict(learning_rate="fast"), "learning_rate must be a positive finite number, got 'fast'"),
        (dict(alpha="own"), "alpha must be one of 'per spec', 'shared', got 'own'"),
        (dict(intermediate="ibp"), "intermediate must be one of 'crown-ibp', 'crown', 'alpha-crown', got 'ibp'"),
        (dict(threshold=math.nan), "threshold must be a number or None, got nan"),
        (dict(iteration=3), "unknown option 'iteration'.*Did you mean 'iterations'"),
        (dict(method="crown", iterations=3), "option 'iterations' is one of 'alpha-crown', 'krelu', 'lp', not of 'crown'"),
        (dict(method="alfa-crown"), "did you mean 'alpha-crown'"),
    ],
)  # fmt: skip
def test_options_are_checked(options, message):
    bm, x, eps = case("mlp")
    with pytest.raises(ValueError, match=message):
        bm.bound(LpBall(x, eps), **{"method": "alpha-crown", **options})


# ---- margins, certificates, gradients ---------------------------------------------------------------------


def test_threshold_stops_where_the_bounds_are_good_enough():
    bm, x, eps = case("mlp", batch=60)
    y, region = bm.net(x).argmax(1), LpBall(x, 0.3)
    with torch.no_grad():
        plain = margins(bm, region, y, "crown")
        found = margins(bm, region, y, "alpha-crown")
        full = margins(bm, region, y, "alpha-crown", threshold=math.inf)
        decided = plain > 0
        assert decided.any() and (~decided).any() and ((full > 0) & ~decided).any()
        assert torch.equal(found[decided], plain[decided])
        assert (full[decided] > plain[decided]).any()
        assert torch.equal(found > 0, full > 0)
        shared = margins(bm, region, y, "alpha-crown", alpha="shared")
        assert (shared >= plain).all()
        # both sides of plain bounds: those on the right side of the threshold stay CROWN's
        crown, stopped = bm.bound(region, "crown"), bm.bound(region, "alpha-crown", threshold=0.1)
        done = crown.upper < 0.1
        assert done.any() and torch.equal(stopped.upper[done], crown.upper[done])


def test_certify_proves_more_and_cascades():
    torch.manual_seed(4)
    bm, x, _ = case("mlp", batch=60)
    y = bm.net(x).argmax(1)
    plain = certify(bm, x, y, eps=0.3)
    found = certify(bm, x, y, eps=0.3, method="alpha-crown", iterations=30)
    alone = certify(bm, x, y, eps=0.3, method="alpha-crown", iterations=30, cascade=False)
    assert (found.certified | ~plain.certified).all() and found.certified.sum() > plain.certified.sum()
    assert torch.equal(found.certified, alone.certified)


def test_bounds_are_differentiable_with_slopes_as_constants():
    """A step along the gradient of a parameter changes the bound as the gradient says."""
    net = mlp(4, 10, 8, 2, dtype=F64)
    bm, x = BoundedModule(net, torch.empty(1, 4, dtype=F64)), draw(2, 4, dtype=F64)
    eps = torch.tensor([0.3, 0.2], dtype=F64, requires_grad=True)
    for options in (dict(), dict(alpha="shared"), dict(intermediate="alpha-crown", iterations=3)):
        lower, upper = bm.bound(LpBall(x, eps), "alpha-crown", **PLAIN, **options)
        grads = torch.autograd.grad((upper - lower).sum(), [eps, *net.parameters()])
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0] > 0).all()
    options = dict(
        PLAIN, iterations=200, learning_rate=0.02
    )  # near the optimum the slopes' own share vanishes
    lower, upper = bm.bound(LpBall(x, eps), "alpha-crown", **options)
    (grad,) = torch.autograd.grad((upper - lower).sum(), [eps])
    with torch.no_grad():
        wide, narrow = (bm.bound(LpBall(x, eps + step), "alpha-crown", **options) for step in (1e-3, -1e-3))
        change = ((wide.upper - wide.lower) - (narrow.upper - narrow.lower)).sum(1) / 2e-3
    torch.testing.assert_close(grad, change, rtol=0.05, atol=0.05)


def test_bounds_under_inference_mode_and_with_frozen_parameters():
    bm, x, eps = case("residual")
    with torch.no_grad():
        expected = bm.bound(LpBall(x, eps), "alpha-crown").lower
    with torch.inference_mode():
        found = bm.bound(LpBall(x.clone(), eps), "alpha-crown", spec=torch.eye(4)).lower
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for parameter in bm.net.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(bm.bound(LpBall(x, eps), "alpha-crown").lower, expected)


def test_batch_norm_in_training_mode_and_max_min():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), pycert.nn.MaxMin(), nn.Linear(8, 3))
    bm, x = BoundedModule(net, torch.empty(1, 6)), draw(5, 6)
    for mode in (net.train(), net.eval()):
        with torch.no_grad():
            plain, found = bm.bound(LpBall(x, 0.4), "crown"), bm.bound(LpBall(x, 0.4), "alpha-crown")
        assert mode is net
        assert (found.lower >= plain.lower).all() and sum_of_widths(found) < sum_of_widths(plain)


def test_cost_is_predicted():
    bm, x, eps = case("mlp")
    plain, found = bm.estimate(LpBall(x, eps), "crown"), bm.estimate(LpBall(x, eps), "alpha-crown")
    assert found.flops > plain.flops and found.bytes >= plain.bytes
