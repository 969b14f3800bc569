"""Local and global Lipschitz bounds, and what ``method="lipschitz"`` certifies with them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pycert
from lipschitz_nets import NETWORKS, balls, networks, operator_norm, trained
from pycert import lipschitz
from pycert.analysis import level_curves
from pycert.cli import main, records
from pycert.lipschitz import walk
from pycert.lipschitz.margins import ball_box_bound
from pycert.lipschitz.slopes import _SLOPES, largest_slope

PS = [1, 2, math.inf]


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_jacobian_exceeds_the_bounds(name, p):
    net, shape = networks()[name]
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    x = torch.rand(3, *shape)
    everywhere = lipschitz.global_bound(bm, p)
    double = networks()[name][0].double()
    for eps in (1e-3, 0.1, 1.0):
        local = lipschitz.local_bound(bm, pycert.LpBall(x, eps, p), p)
        assert local.sound and local.shape == (3,)
        assert (local <= everywhere.value * (1 + 1e-3)).all()
        for point in balls(x, eps, p, 8):
            for b in range(3):
                jacobian = torch.func.jacrev(lambda z: double(z[None])[0])(point[b]).flatten(1)
                assert operator_norm(jacobian, p) <= local[b].double(), (name, p, eps)


@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_within_the_bounds(name, p):
    net, shape = networks()[name]
    double = networks()[name][0].double()
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    x = torch.rand(3, *shape)
    rows = torch.randn(2, 3)
    for eps in (0.0, 1e-6, 0.05, 0.6):
        region = pycert.LpBall(x, eps, p)
        bounds = {s: bm.bound(region, method="lipschitz", soundness=s) for s in ("real", "deployed")}
        of_rows = bm.bound(region, method="lipschitz", spec=rows, soundness="real")
        with torch.no_grad():
            for point in balls(x, eps, p, 20):
                value = double(point)
                assert (bounds["real"].lower <= value).all() and (value <= bounds["real"].upper).all()
                assert (of_rows.lower <= value @ rows.double().t()).all()
                single = point.float()  # may leave the ball by a rounding, which 1e-6 of it allows for
                if eps > 0:
                    computed = net(single)
                    assert (bounds["deployed"].lower <= computed).all()
                    assert (computed <= bounds["deployed"].upper).all()


def test_the_corner_of_a_single_layer_is_reached():
    """One linear layer: the bounds are W x + b plus or minus eps times the dual norms, up to rounding."""
    layer = nn.Linear(6, 4)
    bm = pycert.BoundedModule(layer, torch.empty(1, 6))
    x = torch.rand(2, 6)
    for p, q in ((1, math.inf), (2, 2), (math.inf, 1)):
        bounds = bm.bound(pycert.LpBall(x, 0.3, p), method="lipschitz", soundness="real")
        reach = 0.3 * torch.linalg.vector_norm(layer.weight.double(), ord=q, dim=1)
        assert torch.allclose(bounds.upper.double(), layer(x).double() + reach, atol=1e-5)
        assert lipschitz.local_bound(bm, pycert.LpBall(x, 0.3, p), p)[0].double() == pytest.approx(
            operator_norm(layer.weight.double(), p).item(), rel=2e-3)  # fmt: skip


def test_deployed_bounds_are_wider_than_real_ones():
    net, shape = networks()["conv"]
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    region = pycert.LpBall(torch.rand(2, *shape), 0.01, 2)
    real, deployed = (bm.bound(region, method="lipschitz", soundness=s) for s in ("real", "deployed"))
    assert (deployed.lower < real.lower).all() and (real.upper < deployed.upper).all()


def test_dead_neurons_are_eliminated():
    first, second = nn.Linear(2, 4), nn.Linear(4, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [5, 5], [7, -7]]))
        first.bias.copy_(torch.tensor([2.0, 2, -100, -100]))
        second.weight.fill_(1)
    bm = pycert.BoundedModule(nn.Sequential(first, nn.ReLU(), second), torch.empty(1, 2))
    region = pycert.LpBall(torch.zeros(1, 2), 1.0, 2)
    local = lipschitz.local_bound(bm, region, layers=True)
    assert local.item() == pytest.approx(math.sqrt(2), rel=3e-3)  # the identity, then (1, 1)
    assert [layer.live_out for layer in local.layers] == [0.5, 1.0]
    assert local.layers[1].live_in == 0.5 and (local.layers[0].ratio < 0.2).all()
    assert lipschitz.global_bound(bm).value > 10


def test_maxmin_costs_nothing():
    net = nn.Sequential(
        nn.Linear(6, 8), pycert.nn.MaxMin(), nn.Linear(8, 8), pycert.nn.GroupSort(), nn.Linear(8, 2)
    )
    bm = pycert.BoundedModule(net, torch.empty(1, 6))
    product = math.prod(operator_norm(net[i].weight.double(), 2).item() for i in (0, 2, 4))
    assert lipschitz.global_bound(bm).value == pytest.approx(product, rel=5e-3)


def test_margin_constants_are_those_of_the_last_layer():
    net, shape = networks()["dense"]
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    constants = lipschitz.global_bound(bm).margins
    hidden = math.prod(operator_norm(net[i].weight.double(), 2).item() for i in (0, 2))
    weight = net[4].weight.detach().double()
    assert constants[0, 1].item() == pytest.approx(hidden * (weight[0] - weight[1]).norm().item(), rel=4e-3)
    assert (constants.diagonal() == 0).all() and torch.equal(constants, constants.t())


def test_an_estimate_says_so():
    net, shape = networks()["dense"]
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    region = pycert.LpBall(torch.rand(2, *shape), 0.1, 2)
    estimate, bound = (lipschitz.local_bound(bm, region, method=m) for m in ("power", "gram"))
    assert not estimate.sound and "estimate" in repr(estimate)
    assert bound.sound and "upper bound" in repr(bound)
    assert not hasattr(bound * 2, "sound")  # a plain tensor
    assert not lipschitz.global_bound(bm, method="power").sound
    y = torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda **options: pycert.certify(bm, region.x, y, 0.1, 2, "lipschitz", **options),
        lambda **options: pycert.margins(bm, region, y, "lipschitz", **options),
        lambda **options: bm.bound(region, "lipschitz", **options),
    ):
        call(norms="gram")
        with pytest.raises(ValueError, match="estimates from below, which prove nothing"):
            call(norms="power")
    with pytest.raises(ValueError, match="option 'norms' is one of 'lipschitz', not of 'crown'"):
        bm.bound(region, "crown", norms="gram")


def test_certificates_take_the_effort_asked_for(monkeypatch):
    net, shape = networks()["conv"]
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    region = pycert.LpBall(torch.rand(2, *shape), 0.1, 2)
    seen = []
    original = walk.upper_norm
    monkeypatch.setattr(walk, "upper_norm", lambda *given: seen.append(given[-1]) or original(*given))
    for effort in ("normal", "high"):
        seen.clear()
        bm.bound(region, "lipschitz", effort=effort)
        assert set(seen) == {effort}
    with pytest.raises(ValueError, match="effort must be one of 'normal', 'high', got 'most'"):
        bm.bound(region, "lipschitz", effort="most")


@pytest.mark.parametrize("seed", range(6))
def test_ball_box_bound_is_the_maximum(seed):
    generator = torch.Generator().manual_seed(seed)
    n = [1, 2, 5, 30, 200, 7][seed]
    weight = torch.randn(4, 3, n, generator=generator, dtype=torch.float64)
    weight[0, 0, ::2] = 0
    lower = -torch.rand(4, n, generator=generator, dtype=torch.float64)
    upper = torch.rand(4, n, generator=generator, dtype=torch.float64)
    lower[1, ::3], upper[2, ::2] = 0, 0
    for radius in (0.0, 1e-9, 0.1, 0.7, 3.0, 1e6):
        found = ball_box_bound(weight, lower, upper, torch.full((4,), radius, dtype=torch.float64))
        best = torch.zeros_like(found)
        for t in np.geomspace(1e-12, 1e12, 1501):
            d = torch.minimum(torch.maximum(t * weight, lower[:, None]), upper[:, None])
            inside = d.norm(dim=-1) <= radius
            best = torch.where(inside, torch.maximum(best, (weight * d).sum(-1)), best)
        assert (found >= best * (1 - 1e-15)).all()
        assert (found <= best * 1.05 + 1e-12 + radius * 1e-12).all()


def test_ball_box_bound_is_sound_for_any_multiplier(monkeypatch):
    """The sorting may go wrong without harm: only the tightness rests on it."""
    weight, lower, upper = (
        torch.randn(3, 4, 9).double(),
        -torch.rand(3, 9).double(),
        torch.rand(3, 9).double(),
    )
    radius = torch.rand(3).double()
    exact = ball_box_bound(weight, lower, upper, radius)
    original = torch.ops.pycert.ball_box_maximum
    for factor in (1e-3, 0.5, 2.0, 1e3):

        class Wrong:
            ball_box_maximum = staticmethod(lambda *a: (None, original(*a)[1] * factor))  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(torch.ops, "pycert", Wrong)
            assert (ball_box_bound(weight, lower, upper, radius) >= exact * (1 - 1e-13)).all()


def slope_cases():
    return [(op, {"slope": 0.1, "alpha": 1.3, "threshold": 20.0, "min": -0.5, "max": 0.7}) for op in _SLOPES]


@pytest.mark.parametrize("op,attrs", slope_cases(), ids=lambda c: c if isinstance(c, str) else "")
def test_slopes_hold(op, attrs):
    functions = {
        "relu": F.relu, "abs": torch.abs, "sin": torch.sin, "cos": torch.cos, "sigmoid": torch.sigmoid,
        "tanh": torch.tanh, "clamp": lambda x: x.clamp(-0.5, 0.7), "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
        "prelu": lambda x: F.leaky_relu(x, 0.1), "elu": lambda x: F.elu(x, 1.3), "softplus": F.softplus, "silu": F.silu,
        "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "mish": F.mish,
        "hardswish": F.hardswish, "softsign": F.softsign, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt,
        "reciprocal": torch.reciprocal, "square": torch.square}  # fmt: skip
    torch.manual_seed(0)
    middle, half = torch.randn(400).double() * 3, torch.rand(400).double() ** 3 * 4
    if op in ("log", "sqrt", "reciprocal"):
        middle = middle.abs() + half + 0.01
    lower, upper = middle - half, middle + half
    slope = largest_slope(op, lower, upper, attrs)
    points = (lower + (upper - lower) * torch.linspace(0, 1, 65).double()[:, None]).requires_grad_()
    (gradient,) = torch.autograd.grad(functions[op](points).sum(), points)
    inside = gradient[1:-1] if op in ("relu", "clamp", "leaky_relu", "prelu", "elu", "abs") else gradient
    assert (inside.abs() <= slope).all()
    assert (
        largest_slope(op, torch.full((1,), -math.inf), torch.full((1,), math.inf), attrs)
        >= gradient.abs().max()
    ).all()
    if op not in ("abs", "sin", "cos", "mish", "gelu_tanh"):
        assert slope.min() < slope.max()  # it does look at the interval


def test_certificates_are_not_broken_by_attacks():
    net, x, y = trained()
    bm = pycert.BoundedModule(net, torch.empty(1, 2))
    result = pycert.certify(bm, x, y, eps=0.2, p=2, method="lipschitz")
    assert 0.3 < result.accuracy <= 1
    assert result.soundness == "deployed"
    attacked = pycert.attacks.pgd(net, pycert.LpBall(x, 0.2, 2), y, steps=40, step_size=0.05, restarts=3)
    adversarial = attacked if isinstance(attacked, Tensor) else attacked[0]
    broken = net(adversarial).argmax(1) != y
    assert not (broken & result.certified).any()


def test_radii_are_certified_and_no_smaller_than_the_global_ones():
    net, x, y = trained()
    bm = pycert.BoundedModule(net, torch.empty(1, 2))
    radius = lipschitz.certified_radius(bm, x, y)
    assert radius.shape == (60,) and (radius > 0).sum() > 40
    good = radius > 0
    again = pycert.margins(bm, pycert.LpBall(x[good], radius[good], 2), y[good], method="lipschitz")
    assert (again > 0).all()
    scores = net(x).detach()
    top = scores.gather(1, y[:, None]) - scores
    constants = lipschitz.global_bound(bm).margins[y]
    plain = torch.where(constants > 0, top / constants.clamp(min=1e-12), torch.inf).amin(1).clamp(min=0)
    assert (radius >= plain * 0.99).all() and (radius > plain * 1.05).float().mean() > 0.3


def test_certify_also_gives_radii():
    net, x, y = trained()
    bm = pycert.BoundedModule(net, torch.empty(1, 2))
    assert pycert.certify(bm, x, y, 0.2, 2, "lipschitz").radius is None
    result = pycert.certify(bm, x, y, 0.2, 2, "lipschitz", radii=True, batch_size=25)
    assert result.radius.shape == (60,) and ((result.radius >= 0.2) | ~result.certified).all()
    assert (result.radius[~result.correct] == 0).all() and (result.radius > 0.25).sum() > 20
    good = result.radius > 0
    # The radius of a sample certified at eps alone may rest on another method of the cascade.
    again = pycert.certify(bm, x[good], y[good], result.radius[good], 2, "lipschitz")
    assert again.certified.all()
    with pytest.raises(ValueError, match="radii are of method 'lipschitz', got 'crown'"):
        pycert.certify(bm, x, y, 0.2, 2, "crown", radii=True)


def test_monotone_in_the_radius():
    net, shape = networks()["dense"]
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    x = torch.rand(4, *shape)
    values = torch.stack(
        [lipschitz.local_bound(bm, pycert.LpBall(x, e, 2)).as_subclass(Tensor) for e in (0.0, 0.1, 0.4, 2.0)]
    )
    assert (values[1:] >= values[:-1] * 0.998).all()


def test_several_inputs_and_boxes():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(2, 5)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.relu(self.a(x)) - self.b(z)

    net = Two()
    bm = pycert.BoundedModule(net, (torch.empty(1, 3), torch.empty(1, 2)))
    x, z = torch.rand(2, 3), torch.rand(2, 2)
    regions = (pycert.Box(x - 0.1, x + 0.2), pycert.LpBall(z, 0.3, 2))
    bounds = bm.bound(regions, method="lipschitz", soundness="real")
    double = Two().double()
    double.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
    for _ in range(50):
        u = x - 0.1 + 0.3 * torch.rand(2, 3)
        d = torch.randn(2, 2)
        v = z + 0.299 * d / d.norm(dim=1, keepdim=True)
        value = double(u.double(), v.double())
        assert (bounds.lower <= value).all() and (value <= bounds.upper).all()


def test_clip_with_the_centre_outside():
    net, shape = networks()["dense"]
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    x = torch.full((1, 4), -0.2)
    region = pycert.LpBall(x, 0.5, 2, clip=(0, 1))
    bounds = bm.bound(region, method="lipschitz", soundness="real")
    for point in balls(x, 0.5, 2, 200):
        if (point >= 0).all():
            value = net.double()(point)
            net.float()
            assert (bounds.lower <= value).all() and (value <= bounds.upper).all()
    assert (bounds.lower <= net(torch.zeros(1, 4))).all()


def test_what_is_not_covered_is_refused():
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.relu(x)

    bm = pycert.BoundedModule(Product(), torch.empty(1, 3))
    region = pycert.LpBall(torch.rand(1, 3), 0.1, 2)
    with pytest.raises(ValueError, match="does not cover the operator 'product'"):
        lipschitz.local_bound(bm, region)
    net, shape = networks()["dense"]
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    region = pycert.LpBall(torch.rand(1, *shape), 0.1, 2)
    with pytest.raises(ValueError, match="soundness='real' or 'deployed'"):
        bm.bound(region, method="lipschitz", soundness="none")
    with pytest.raises(ValueError, match="method must be one of 'gram', 'power'"):
        lipschitz.local_bound(bm, region, method="svd")
    for call in (bm.estimate, bm.layer_bounds):
        with pytest.raises(ValueError, match="lipschitz"):
            call(region, method="lipschitz")


def test_double_precision():
    net, shape = networks()["conv"]
    bm = pycert.BoundedModule(net.double(), torch.empty(1, *shape).double())
    region = pycert.LpBall(torch.rand(2, *shape).double(), 0.1, 2)
    assert lipschitz.local_bound(bm, region).dtype == torch.float64
    lower, upper = bm.bound(region, method="lipschitz")
    assert (lower < net(region.x)).all() and (net(region.x) < upper).all()


def test_the_command_line_certifies_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net, x, y = trained()
    (tmp_path / "lipnet.py").write_text(
        "from torch import nn\ndef make():\n"
        "    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))\n"
    )
    torch.save(net.state_dict(), "weights.pt")
    np.savez("data.npz", x=x.numpy(), y=y.numpy())
    command = "certify lipnet:make --weights weights.pt --data data.npz --eps 0.2 --p 2 --method lipschitz --no-plot"
    assert main(command.split()) == 0
    assert "lipschitz" in capsys.readouterr().out
    result = pycert.certify(pycert.BoundedModule(net, x[:1]), x, y, 0.2, 2, "lipschitz")
    found = [row["certified"] for row in records.read(tmp_path / "certify.jsonl")[1]]
    assert found == result.certified.tolist() and sum(found) > 20
    assert main([*command.split(), "--soundness", "none", "--overwrite"]) == 2
    more = [*command.split(), "--radii", "--effort", "high", "--out", "radii.jsonl"]
    assert main(more) == 0
    radii = [row["radius"] for row in records.read(tmp_path / "radii.jsonl")[1]]
    assert radii == pytest.approx(
        pycert.certify(
            pycert.BoundedModule(net, x[:1]), x, y, 0.2, 2, "lipschitz", radii=True
        ).radius.tolist()
    )
    assert f"{sum(radii) / len(radii):.4g}" in capsys.readouterr().out
    assert main([*more[:6], "--eps", "0.2", "--radii", "--no-plot"]) == 2
    assert "--radii is of --method lipschitz" in capsys.readouterr().err


def test_the_experiment_on_level_curves_runs(tmp_path):
    options = (
        "--widths 4 6 --steps 80 --samples 24 --seeds 0 1 --activations maxmin --sets circle "
        "--methods lipschitz crown --share 0.2"
    )
    assert level_curves.main([*options.split(), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "level_curves.json").read_text())
    rows = found["rows"]
    assert [(row["width"], row["seed"]) for row in rows] == [(4, 0), (4, 1), (6, 0), (6, 1)]
    for row in rows:
        # Whatever is certified is truly so; the local constant's ball is of float32, the grid's boundary of 0.01.
        assert 0 < row["global test"] <= row["lipschitz test"] + 1e-6 <= row["truly robust test"] + 0.1
        assert 0 < row["global / true radius"] <= row["local / true radius"] * 1.01 <= 1.05
        assert row["gap"] == row["global train"] - row["global test"]
    mean = sum(row["global test"] for row in rows[:2]) / 2
    text = (tmp_path / "level_curves.md").read_text()
    assert f"| circle | maxmin | {100 * mean:.1f} |" in text and "## Certified accuracy on training" in text
    assert found["width_needed"] == {"circle, maxmin": 4 if mean >= 0.2 else 6}
    assert (tmp_path / "level_curves.png").stat().st_size > 10_000
    ring = level_curves.signed_distance("ring", torch.tensor([[0.0, 0.3], [1.0, 0.0], [0.0, -2.0]]))
    assert torch.allclose(ring, torch.tensor([0.25, -0.45, 0.55]))
    assert (
        level_curves.signed_distance("square", torch.tensor([[2.0, 2.0], [0.5, 0.0]]))
        == torch.tensor([2**0.5, -0.5])
    ).all()


class TiedWeights(nn.Module):
    """One weight, read by a convolution and by a transposed one, whose output channels are its other dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 2, 2) * torch.tensor([10, 0.01, 1]).view(3, 1, 1, 1))
        self.last = nn.Linear(48, 2)

    def forward(self, x):
        hidden = torch.conv2d(x, self.weight, padding=1).relu()
        return self.last(torch.conv_transpose2d(hidden, self.weight, padding=1).relu().flatten(1))


@pytest.mark.parametrize("p", [1, math.inf])
def test_norms_of_rows_of_a_weight_that_two_operators_share(p):
    torch.manual_seed(0)
    net, x = TiedWeights(), torch.randn(1, 3, 4, 4)
    bounds = pycert.BoundedModule(net, x).bound(pycert.LpBall(x, eps=0.05, p=p), method="lipschitz")
    step = torch.eye(48).repeat(2, 1) if p == 1 else torch.ones(2000, 48)
    step = step * torch.randn_like(step).sign() * 0.0499999
    y = net(x + step.view(-1, 3, 4, 4)).detach()
    assert (bounds.lower <= y).all() and (y <= bounds.upper).all()


def test_a_mean_over_all_elements_of_a_sample():
    net = LastMean()
    x = torch.randn(2, 5)
    bounds = pycert.BoundedModule(net, x).bound(pycert.LpBall(x, eps=0.1), method="lipschitz")
    assert (bounds.lower <= net(x)).all() and (net(x) <= bounds.upper).all()
    assert torch.isfinite(bounds.upper).all()


class LastMean(nn.Module):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)).relu()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(number):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    bm, region = pycert.BoundedModule(net, torch.empty(1, 4)), pycert.LpBall(torch.zeros(2, 4), eps=0.1)
    net[2].weight.data[0, 0] = number
    for bound in (lipschitz.local_bound, lipschitz.jacobian_bound):
        with pytest.raises(ValueError, match=r"2\.weight"):
            bound(bm, region)
    with pytest.raises(ValueError, match=r"2\.weight"):
        lipschitz.global_bound(bm)


def test_an_unknown_effort_is_named():
    bm = pycert.BoundedModule(nn.Linear(2, 2), torch.empty(1, 2))
    with pytest.raises(ValueError, match="effort must be one of"):
        lipschitz.local_bound(bm, pycert.LpBall(torch.zeros(1, 2), eps=0.1), effort="some")
