"""Branching over the signs of neurons: every leaf is bounded by the engine, and the least leaf is the bound."""

from __future__ import annotations

import importlib.util
from fractions import Fraction

import pytest
import torch
from torch import nn

import pycert
from pycert import _branch, krelu
from tests.test_krelu_bound import CASES, least_by_vertices, outputs, primer_net, random_net, samples

LP = pytest.param(
    "lp",
    marks=pytest.mark.skipif(importlib.util.find_spec("highspy") is None, reason="method 'lp' needs highspy"),
)
METHODS = ["krelu", LP]


@pytest.mark.parametrize("seed", [0, 5, 7])
@pytest.mark.parametrize("method", METHODS)
def test_with_enough_leaves_the_bound_is_the_exact_minimum(seed, method):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    bm, region = pycert.BoundedModule(net, torch.empty(1, 2)), pycert.Box(-torch.ones(1, 2), torch.ones(1, 2))
    exact = least_by_vertices(net, region)
    options = dict(side="lower", soundness="real", rows=0)
    found = bm.bound(region, method, leaves=16, **options).lower.item()
    without = bm.bound(region, method, **options).lower.item()
    assert Fraction(found) <= exact
    assert without < float(exact) - 2e-2
    assert float(exact) - found < (1e-5 if method == "lp" else 0.25 * (float(exact) - without))


@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold_in_convolutional_networks(method):
    torch.manual_seed(1)
    net, shape = CASES["convolutional"]()
    x = torch.randn(2, *shape)
    bm, region = pycert.BoundedModule(net, x), pycert.LpBall(x, eps=0.3)
    options = dict(rows=0, iterations=5, soundness="real")
    few = bm.bound(region, method, **options)
    found = bm.bound(region, method, leaves=4, **options)
    values = outputs(net, samples(region))
    assert (found.lower.double() <= values.amin(0)).all() and (found.upper.double() >= values.amax(0)).all()
    assert (found.upper - found.lower).sum() < 0.99 * (few.upper - few.lower).sum()


def test_bounds_hold_with_other_activations():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 2))
    x = torch.randn(2, 4)
    bm, region = pycert.BoundedModule(net, x), pycert.LpBall(x, eps=1.0)
    few = bm.bound(region, "krelu", rows=0, iterations=5)
    found = bm.bound(region, "krelu", leaves=6, rows=0, iterations=5)
    values = outputs(net, samples(region))
    assert (found.lower.double() <= values.amin(0)).all() and (found.upper.double() >= values.amax(0)).all()
    assert (found.upper - found.lower).sum() < 0.999 * (few.upper - few.lower).sum()


@pytest.mark.parametrize("soundness", ["deployed", "real"])
@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold_in_deep_networks_and_more_leaves_tighten_them(method, soundness):
    bm, region = random_net(3)
    spec = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, 1.0]])
    options = dict(spec=spec, soundness=soundness, rows=0, iterations=5)
    values = outputs(bm.net, samples(region)) @ spec.double().T
    widths = []
    for leaves in (1, 4, 12):
        found = bm.bound(region, method, leaves=leaves, **options)
        assert (found.lower.double() <= values.amin(0)).all()
        assert (found.upper.double() >= values.amax(0)).all()
        widths.append(found.upper - found.lower)
    assert (widths[2] < 0.98 * widths[0]).all() and (widths[2] <= widths[1]).all()


def test_the_halves_cover_the_region_and_hold_their_own_points():
    bm, region = random_net(5)
    regions, _ = bm._regions(region)
    boxes, _ = krelu.known_boxes(bm, regions, pycert.options.parse("krelu", dict(rows=0)))
    boxes = {i: (lower[:1].detach(), upper[:1].detach()) for i, (lower, upper) in boxes.items()}
    node = max(boxes)
    number = int(((boxes[node][0] < 0) & (boxes[node][1] > 0))[0].nonzero()[0])
    halves = _branch._halves(_branch.Leaf(-1.0, boxes, (1.0, node, number)))
    assert [tuple(e[0, number].item() for e in half.boxes[node]) for half in halves] == [
        (0.0, boxes[node][1][0, number].item()),
        (boxes[node][0][0, number].item(), 0.0),
    ]
    for i, box in boxes.items():
        for e in (0, 1):
            for half in halves:
                changed = (half.boxes[i][e] != box[e]).nonzero().tolist()
                assert changed in ([], [[0, number]]) and (i == node or not changed)


def test_the_bound_of_a_tree_is_that_of_its_worst_leaf():
    tree = _branch.Tree(0, torch.zeros(1), 0.0, [])
    for bound, gain in ((1.0, 1.0), (-0.5, 1.0), (-0.2, 1.0)):
        tree.add(_branch.Leaf(bound, {}, (gain, 0, 0)))
    assert tree.bound == -0.5 and tree.can_gain and len(tree.leaves) == 2
    assert [leaf.bound for leaf in tree.take(1, 100)] == [-0.5]
    assert tree.bound == -0.2
    tree.add(_branch.Leaf(-2.0, {}, (0.0, 0, 0)))  # nothing left to split
    assert tree.bound == -2.0 and not tree.can_gain


def test_leaves_of_every_sample_are_bounded_on_their_own_region():
    """Samples that lie far apart: a leaf on another sample's region would be wrong for both."""
    bm, _ = random_net(3)
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(3, 6, generator=generator)
    region = pycert.LpBall(x, eps=torch.tensor([0.1, 0.3, 0.5]))
    found = bm.bound(region, "krelu", rows=0, iterations=5, leaves=6)
    values = outputs(bm.net, samples(region))
    assert (found.lower.double() <= values.amin(0)).all() and (found.upper.double() >= values.amax(0)).all()
    for b in range(3):
        alone = bm.bound(
            pycert.LpBall(x[b : b + 1], eps=region.eps[b : b + 1]), "krelu", rows=0, iterations=5, leaves=6
        )
        torch.testing.assert_close(alone.lower[0], found.lower[b], rtol=1e-3, atol=1e-3)


def test_rows_of_the_caller_stay_in_the_leaves():
    bm, region = primer_net()
    cuts = krelu.CutSet(bm)
    cuts.add_cuts("0", torch.zeros(1, 2), torch.tensor([[-1.0, 0.0]]), -torch.ones(1))  # x1 <= -1
    # On x1 + x2 <= -1 the sum of both activations is relu(x1 - x2), at most 1.
    whole = bm.bound(region, "krelu", side="lower", rows=0, leaves=4, iterations=60).lower.item()
    half = bm.bound(region, "krelu", side="lower", rows=0, leaves=4, iterations=60, cuts=cuts).lower.item()
    assert whole == pytest.approx(-2, abs=1e-3) and -1.5 < half <= -1


def counting(monkeypatch) -> list[int]:
    counts: list[int] = []
    truth = _branch._bound_leaves

    def counted(bm, regions, parsed, trees, leaves, solve):
        counts.append(len(leaves))
        return truth(bm, regions, parsed, trees, leaves, solve)

    monkeypatch.setattr(_branch, "_bound_leaves", counted)
    return counts


def test_no_more_leaves_than_asked_for_and_none_beyond_the_threshold(monkeypatch):
    counts = counting(monkeypatch)
    bm, region = random_net(3)
    options = dict(rows=0, iterations=2, side="lower")
    root = bm.bound(region, "krelu", **options).lower
    assert counts == []
    bm.bound(region, "krelu", leaves=3, **options)
    assert counts[0] == 6 and sum(counts[1:]) == 6 * 2 * 2  # two splits of each of six rows
    del counts[:]
    bm.bound(region, "krelu", leaves=3, threshold=root.min().item() - 1, **options)
    assert counts == []
    found = bm.bound(region, "krelu", leaves=100, threshold=root.min().item() + 1e-4, **options).lower
    assert found.min() > root.min() + 1e-4 and counts[0] < 6 and sum(counts) < 20


def test_out_of_time_the_bounds_before_stay(monkeypatch):
    bm, region = random_net(3)
    counts = counting(monkeypatch)
    options = dict(rows=0, iterations=2, side="lower")
    found = bm.bound(region, "krelu", leaves=1000, time_limit=0, **options).lower
    assert sum(counts) == 6
    assert (found >= bm.bound(region, "krelu", **options).lower).all()


@pytest.mark.parametrize("lie", [float("nan"), float("inf")])
def test_gains_may_be_anything(lie, monkeypatch):
    truth = _branch._gains
    monkeypatch.setattr(_branch, "_gains", lambda b, g: {i: t * lie for i, t in truth(b, g).items()})
    bm, region = random_net(3)
    found = bm.bound(region, "krelu", leaves=5, rows=0, iterations=2)
    values = outputs(bm.net, samples(region))
    assert (found.lower.double() <= values.amin(0)).all() and (found.upper.double() >= values.amax(0)).all()


def test_branched_bounds_have_no_gradient_and_others_keep_theirs():
    bm, region = random_net(3)
    options = dict(rows=0, iterations=2, side="lower")
    root = bm.bound(region, "krelu", **options).lower.detach()
    options["threshold"] = root.flatten().sort().values[2].item() - 1e-6  # three rows are good enough
    found = bm.bound(region, "krelu", leaves=4, **options).lower
    found.sum().backward()
    branched = bm.net[0].weight.grad.clone()
    assert (branched != 0).any()
    bm.net.zero_grad()
    before = bm.bound(region, "krelu", **options).lower
    kept = found.detach() == before.detach()
    assert 0 < int(kept.sum()) < kept.numel()
    before[kept].sum().backward()
    torch.testing.assert_close(branched, bm.net[0].weight.grad)


def test_leaves_of_larger_networks_are_bounded_by_ascent_with_the_rows_that_the_program_used(monkeypatch):
    pytest.importorskip("highspy", reason="method 'lp' needs highspy")
    from pycert import _lp

    solved, used = [], []
    solve, choose = _lp.Program.solve, _lp._used
    monkeypatch.setattr(_lp, "LARGEST_BRANCHED", 3)
    monkeypatch.setattr(_lp.Program, "solve", lambda self, *a: solved.append(1) or solve(self, *a))
    monkeypatch.setattr(_lp, "_used", lambda *a: used.append((a[0], choose(*a))) or used[0][1])
    bm, _ = random_net(3)
    region = pycert.LpBall(torch.zeros(2, 6), eps=torch.tensor([0.8, 0.5]))
    options = dict(rows=12, ns=12, iterations=20, side="lower", cut_rate=0.2)
    before = bm.bound(region, "lp", **options).lower
    assert len(solved) == 6
    found = bm.bound(region, "lp", leaves=12, **options).lower
    assert len(solved) == 12  # the same programs, and none for a leaf
    every, few = used[0]
    assert 0 < few.count < every.count
    values = outputs(bm.net, samples(region))
    assert (found.double() <= values.amin(0)).all()
    assert (found > before + 1e-3).any() and (found >= before).all()


def test_certify_by_branching():
    bm, region = random_net(3)
    y = bm.net(region.x).argmax(1)
    options = dict(method="krelu", cascade=False, rows=0, iterations=5)
    few = pycert.certify(bm, region.x, y, eps=0.3, **options)
    many = pycert.certify(bm, region.x, y, eps=0.3, leaves=12, **options)
    assert (many.margin >= few.margin).all()


def test_errors_name_the_argument():
    bm, region = random_net(0)
    for value in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"leaves must be an integer of at least 1, got {value}"):
            bm.bound(region, "krelu", leaves=value)
    with pytest.raises(ValueError, match="option 'leaves' is one of 'krelu', 'lp', not of 'crown'"):
        bm.bound(region, "crown", leaves=2)
    with pytest.raises(
        ValueError, match="return_linear must be False where leaves is above 1, got leaves = 2"
    ):
        bm.bound(region, "krelu", leaves=2, return_linear=True)
    with pytest.raises(ValueError, match="unknown option 'leaves'"):
        bm.layer_bounds(region, "krelu", leaves=2)
