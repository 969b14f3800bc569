"""method="lp": the optimum of the relaxed network, recomputed by the engine and sound whatever the solver says."""

from __future__ import annotations

import importlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import pycert
from pycert import _lp, krelu
from tests.test_krelu_bound import CASES, least_by_vertices, outputs, primer_net, random_net, samples

highspy = pytest.importorskip("highspy", reason="method 'lp' needs highspy")


def test_the_primers_sum_of_two_neurons():
    bm, region = primer_net()
    assert bm.bound(region, "lp", side="lower").lower.item() == pytest.approx(-3, abs=1e-4)
    assert bm.bound(region, "lp", side="lower", k=2, rows=8).lower.item() == pytest.approx(-2, abs=1e-4)


def triangle_optimum(net: nn.Sequential, boxes: list, x_box: tuple, row: np.ndarray) -> float:
    """The least ``row @ net(x)`` over triangles, by another solver from other matrices."""
    linprog = pytest.importorskip("scipy.optimize", reason="the optimum by another solver").linprog
    layers = [m for m in net if isinstance(m, nn.Linear)]
    sizes = [layers[0].in_features, *(m.out_features for m in layers[:-1])]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    A, b, ends = [], [], [*zip(*x_box, strict=True)]
    for i, (m, (low, high)) in enumerate(zip(layers[:-1], boxes, strict=True)):
        W, c = m.weight.detach().double().numpy(), m.bias.detach().double().numpy()
        for j, (lo, up) in enumerate(zip(low, high, strict=True)):
            z, y = np.zeros(starts[-1]), np.zeros(starts[-1])
            z[starts[i] : starts[i + 1]] = W[j]
            y[starts[i + 1] + j] = 1
            ends.append((max(lo, 0), max(up, 0)))
            A += [z, -z]  # its box
            b += [up - c[j], c[j] - lo]
            if up <= 0:
                continue
            A.append(z - y)  # y >= z
            b.append(-c[j])
            slope, at = (1.0, 0.0) if lo >= 0 else (up / (up - lo), lo)
            A.append(y - slope * z)
            b.append(slope * (c[j] - at))
    W, c = layers[-1].weight.detach().double().numpy(), layers[-1].bias.detach().double().numpy()
    cost = np.zeros(starts[-1])
    cost[starts[-2] :] = row @ W
    return linprog(cost, np.array(A), np.array(b), bounds=ends).fun + row @ c


@pytest.mark.parametrize("seed", range(2))
def test_it_is_the_optimum_of_the_triangles(seed):
    bm, region = random_net(seed)
    found = bm.bound(region, "lp", soundness="none")
    boxes = bm.layer_bounds(region, "crown", soundness="none")
    for b in range(2):
        ends = [
            tuple(t[b].detach().double().numpy() for t in (boxes[n].lower, boxes[n].upper))
            for n in ("0", "2")
        ]
        x_box = (region.lower[b].double().numpy(), region.upper[b].double().numpy())
        for s in range(3):
            low = triangle_optimum(bm.net, ends, x_box, np.eye(3)[s])
            high = -triangle_optimum(bm.net, ends, x_box, -np.eye(3)[s])
            assert found.lower[b, s].item() == pytest.approx(low, abs=2e-4)
            assert found.upper[b, s].item() == pytest.approx(high, abs=2e-4)


@pytest.mark.parametrize("case", ["mlp", "convolutional"])
@pytest.mark.parametrize("soundness", ["deployed", "real"])
def test_bounds_hold_and_rows_tighten_them(case, soundness):
    torch.manual_seed(1)
    net, shape = CASES[case]()
    x = torch.randn(2, *shape)
    bm, region = pycert.BoundedModule(net, x), pycert.LpBall(x, eps=0.2)
    options = dict(soundness=soundness, iterations=5, ns=12)
    triangle = bm.bound(region, "lp", **options)
    joint = bm.bound(region, "lp", rows=6, **options)
    dual = bm.bound(region, "krelu", rows=6, **options)
    single = bm.bound(region, "alpha-crown", soundness=soundness)
    values = outputs(net, samples(region))
    for found in (triangle, joint):
        assert (found.lower.double() <= values.amin(0)).all() and (
            found.upper.double() >= values.amax(0)
        ).all()
    assert (joint.lower >= dual.lower).all() and (joint.upper <= dual.upper).all()
    assert ((triangle.upper - triangle.lower) <= (single.upper - single.lower) * 1.001).all()
    assert (joint.upper - joint.lower).sum() < 0.99 * (triangle.upper - triangle.lower).sum()


@pytest.mark.parametrize("seed", range(3))
def test_bounds_against_the_exact_minimum_of_tiny_networks(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    bm = pycert.BoundedModule(net, torch.empty(1, 2))
    region = pycert.Box(-torch.ones(1, 2), torch.ones(1, 2))
    exact = least_by_vertices(net, region)
    found = bm.bound(region, "lp", side="lower", soundness="real", k=2, rows=64).lower.item()
    assert Fraction(found) <= exact
    single = bm.bound(region, "alpha-crown", side="lower", iterations=100).lower.item()
    assert float(exact) - found <= 0.35 * (float(exact) - single) + 1e-3


@pytest.mark.parametrize("lie", ["random", "negative", "huge", "nan"])
def test_bounds_are_sound_whatever_the_solver_says(lie, monkeypatch):
    truth = _lp.Program._multipliers
    generator = np.random.default_rng(0)

    def wrong(self, solution):
        slopes, multipliers = truth(self, solution)
        for table in (slopes, multipliers):
            for key, value in table.items():
                noise = generator.standard_normal(value.shape)
                table[key] = {
                    "random": noise,
                    "negative": -abs(noise),
                    "huge": 1e9 * noise,
                    "nan": noise * np.nan,
                }[lie]
        return slopes, multipliers

    monkeypatch.setattr(_lp.Program, "_multipliers", wrong)
    bm, region = random_net(6)
    found = bm.bound(region, "lp", rows=4, ns=12, iterations=2)
    values = outputs(bm.net, samples(region))
    assert (found.lower.double() <= values.amin(0)).all() and (found.upper.double() >= values.amax(0)).all()
    single = bm.bound(region, "alpha-crown", iterations=2)
    assert (found.lower >= single.lower).all()


def test_out_of_time_the_bounds_of_the_ascent_stay():
    bm, region = random_net(8)
    found = bm.bound(region, "lp", time_limit=0, iterations=20)
    single = bm.bound(region, "alpha-crown", iterations=20)
    assert (found.lower >= single.lower).all()
    torch.testing.assert_close(found.lower, single.lower, rtol=1e-3, atol=1e-3)


def test_certify_by_lp_and_what_is_decided_is_not_solved(monkeypatch):
    bm, region = random_net(2)
    y = bm.net(region.x).argmax(1)
    result = pycert.certify(bm, region.x, y, eps=0.3, method="lp", cascade=False, rows=4, ns=12)
    plain = pycert.certify(bm, region.x, y, eps=0.3, method="alpha-crown", cascade=False)
    assert (result.margin >= plain.margin - 1e-6).all()
    monkeypatch.setattr(_lp.Program, "solve", None)  # would be an error if it were called
    small = pycert.certify(bm, region.x, y, eps=1e-4, method="lp", cascade=False)
    assert small.certified.all()


def test_errors_say_what_is_missing(monkeypatch):
    bm, region = random_net(0)
    with pytest.raises(ValueError, match="time_limit must be seconds or None, got -1"):
        bm.bound(region, "lp", time_limit=-1)
    with pytest.raises(ValueError, match="option 'time_limit' is one of 'krelu', 'lp', not of 'crown'"):
        bm.bound(region, "crown", time_limit=1)
    curved = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2))
    with pytest.raises(pycert.UnsupportedOperator, match="sigmoid.*method 'lp' takes ReLU networks"):
        pycert.BoundedModule(curved, torch.empty(1, 2)).bound(pycert.LpBall(torch.zeros(1, 2), 0.1), "lp")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="method 'lp' needs HiGHS: pip install highspy"):
        bm.bound(region, "lp")


def test_cuts_of_the_caller_are_rows():
    bm, region = primer_net()
    cuts = krelu.CutSet(bm)
    cuts.add_cuts("0", torch.zeros(1, 2), torch.tensor([[-1.0, 0.0]]), -torch.ones(1))  # x1 <= -1
    assert bm.bound(region, "lp", side="lower", cuts=cuts).lower.item() == pytest.approx(-2, abs=1e-4)


def test_a_network_without_relu_has_its_exact_bounds():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    region = pycert.LpBall(torch.zeros(2, 3, dtype=torch.float64), eps=0.5)
    bm = pycert.BoundedModule(net, region.x)
    for found, expected in zip(bm.bound(region, method="lp"), bm.bound(region, method="crown"), strict=True):
        torch.testing.assert_close(found, expected)


def test_shared_slopes_are_those_of_the_ascent_alone():
    """The programs' own slopes belong to a row each, whatever the ascent before them shares."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(2, 4)
    bm = pycert.BoundedModule(net, x)
    region = pycert.LpBall(x, 0.3)
    shared, own = (bm.bound(region, "lp", alpha=alpha) for alpha in ("shared", "per spec"))
    torch.testing.assert_close(shared.lower, own.lower, rtol=1e-3, atol=1e-3)
    assert (shared.lower >= bm.bound(region, "alpha-crown", alpha="shared").lower - 1e-5).all()


@pytest.mark.parametrize("method", ["krelu", "lp"])
def test_branching_without_relus_and_in_inference_mode(method):
    net, x = nn.Linear(4, 3), torch.randn(2, 4)
    bm, region = pycert.BoundedModule(net, x), pycert.LpBall(x, 0.3)
    torch.testing.assert_close(bm.bound(region, method, leaves=4).lower, bm.bound(region, "crown").lower)
    deep = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"no_grad"):
        pycert.BoundedModule(deep, x).bound(pycert.LpBall(x.clone(), 0.3), method, leaves=4)
