"""Bounds with k-ReLU rows as multipliers: sound whatever the multipliers are, and tighter than single neurons allow."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import pycert
from pycert import krelu

QUICK = dict(iterations=8, rows=4, ns=12)


def random_net(seed: int, dtype: torch.dtype = torch.float32) -> tuple[pycert.BoundedModule, pycert.LpBall]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)
    x = torch.randn(2, 6, dtype=dtype)
    return pycert.BoundedModule(net, x), pycert.LpBall(x, eps=0.3)


def primer_net() -> tuple[pycert.BoundedModule, pycert.Box]:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        net[2].weight.copy_(torch.tensor([[-1.0, -1.0]]))
    return pycert.BoundedModule(net, torch.empty(1, 2)), pycert.Box(-torch.ones(1, 2), torch.ones(1, 2))


def samples(region: pycert.LpBall, count: int = 4000) -> Tensor:
    """``[count, B, *in]``: corners and points inside."""
    width = region.upper - region.lower
    corners = torch.randint(0, 2, (count // 2, *width.shape)).to(width.dtype)
    inside = torch.rand(count - count // 2, *width.shape, dtype=width.dtype)
    return region.lower + torch.cat([corners, inside]) * width


def outputs(net: nn.Module, points: Tensor) -> Tensor:
    return net(points.flatten(0, 1)).detach().double().view(*points.shape[:2], -1)


# ---- octahedra and groups ---------------------------------------------------------------------


def test_octahedral_bounds_of_the_first_layer_are_exact():
    bm, region = primer_net()
    octahedra = krelu.octahedral_bounds(bm, region, "0", torch.tensor([[0, 1]]))
    assert octahedra.A.shape == (1, 1, 8, 2)
    torch.testing.assert_close(octahedra.b, torch.full((1, 1, 8), 2.0))
    torch.testing.assert_close(octahedra.lower, torch.full((1, 1, 2), -2.0))


@pytest.mark.parametrize("per_sample", [False, True])
def test_octahedral_bounds_hold_in_deeper_layers(per_sample, monkeypatch):
    monkeypatch.setattr(krelu, "_TABLE_BYTES", 500)  # several calls
    bm, region = random_net(0)
    groups = torch.tensor([[0, 3, 7], [11, 7, 3]])
    if per_sample:
        groups = torch.stack([groups, torch.tensor([[10, 6, 2], [0, 3, 7]])])
    octahedra = krelu.octahedral_bounds(bm, region, "2", groups)
    z = outputs(bm.net[:3], samples(region))
    for b, g in itertools.product(range(2), range(2)):
        group = groups[b, g] if per_sample else groups[g]
        values = octahedra.b[b, g].double() + z[:, b][:, group] @ octahedra.A[b, g].double().T
        assert values.min() >= -1e-6
        assert values.min(0).values.max() < 2.5  # and are near
        assert (z[:, b][:, group] >= octahedra.lower[b, g].double() - 1e-6).all()


def test_directions_are_bounded_once():
    half = torch.tensor([[0, 1], [1, -1], [1, 0], [1, 1]])
    table, number = krelu._shared_rows(torch.tensor([[[0, 1], [1, 2]], [[0, 1], [0, 1]]]), half)
    assert table.shape == (2, 7, 2)  # 3 neurons, 4 sums and differences; the second sample has 4 in all
    assert (table[1].abs().sum(1) == 0).sum() == 3
    for b, groups in enumerate([[[0, 1], [1, 2]], [[0, 1], [0, 1]]]):
        for g, group in enumerate(groups):
            for h, direction in enumerate(half.tolist()):
                wanted = {(n + 1) * s for n, s in zip(group, direction, strict=True) if s}
                assert {c for c in table[b, number[b, g, h]].tolist() if c} == wanted


def test_groups_are_windows_or_a_sparse_cover_of_the_largest_areas():
    lower = torch.tensor([-1.0, -2.0, 1.0, -3.0, -0.5])
    upper = torch.tensor([1.0, 2.0, 2.0, 3.0, 0.5])
    assert krelu.select_groups(lower, upper, k=2, s=1, cover="window").tolist() == [[3, 1], [1, 0], [0, 4]]
    assert krelu.select_groups(lower, upper, k=2, s=1, ns=2).tolist() == [[3, 1], [0, 4]]  # two blocks
    assert krelu.select_groups(lower, upper, k=3, s=1).tolist() == [[3, 1, 0]]
    assert krelu.select_groups(lower, upper, k=2, least=0.5).tolist() == [[3, 1], [3, 0], [1, 0]]
    assert krelu.select_groups(lower, lower, k=2).shape == (0, 2)


@pytest.mark.parametrize(
    ("count", "k", "s", "groups"), [(20, 3, 1, 45), (20, 4, 2, 189), (50, 3, 1, 326), (9, 3, 0, 3)]
)
def test_the_sparse_cover_has_the_published_size(count, k, s, groups):
    cover = krelu.sparse_cover(count, k, s)
    assert len(cover) == groups
    members = [set(g) for g in cover.tolist()]
    assert max(len(a & b) for a, b in itertools.combinations(members, 2)) <= s


# ---- the bound --------------------------------------------------------------------------------


def test_the_primers_sum_of_two_neurons():
    """max y1 + y2 is 2; single-neuron relaxations reach 3."""
    bm, region = primer_net()
    single = bm.bound(region, "alpha-crown", side="lower").lower.item()
    assert single == pytest.approx(-3.0, abs=1e-3)
    joint = bm.bound(region, "krelu", k=2, side="lower", iterations=100).lower.item()
    assert -2.05 < joint <= -2.0


CASES = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)),
        (6,),
    ),
    "convolutional": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
        ),
        (1, 8, 8),
    ),
}


@pytest.mark.parametrize("case", ["mlp", "convolutional"])
@pytest.mark.parametrize("soundness", ["deployed", "real"])
@pytest.mark.parametrize("intermediate", ["crown", "krelu"])
def test_bounds_are_sound_and_never_looser_than_alpha_crown(case, soundness, intermediate):
    torch.manual_seed(1)
    net, shape = CASES[case]()
    x = torch.randn(3, *shape)
    bm, region = pycert.BoundedModule(net, x), pycert.LpBall(x, eps=0.2)
    spec = torch.tensor([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0], [0.0, 1.0, 1.0]])
    options = dict(spec=spec, soundness=soundness)
    found = bm.bound(region, "krelu", intermediate=intermediate, **QUICK, **options)
    single = bm.bound(region, "alpha-crown", iterations=8, **options)
    assert (found.lower >= single.lower).all() and (found.upper <= single.upper).all()
    assert ((found.upper - found.lower) < 0.999 * (single.upper - single.lower)).any()
    values = outputs(net, samples(region)) @ spec.double().T
    assert (found.lower.double() <= values.amin(0)).all() and (found.upper.double() >= values.amax(0)).all()
    y = torch.zeros(3, dtype=torch.int64)
    worst = pycert.attacks.pgd(net, region, y, steps=40, restarts=3).margin
    margins = pycert.margins(bm, region, y, "krelu", intermediate=intermediate, **QUICK)
    assert (margins.amin(1) <= worst + 1e-6).all()


def test_a_batch_is_as_good_as_its_samples():
    bm, region = random_net(5)
    both = bm.bound(region, "krelu", intermediate="krelu", **QUICK).lower
    for b in range(2):
        alone = bm.bound(pycert.LpBall(region.x[b : b + 1], eps=0.3), "krelu", intermediate="krelu", **QUICK)
        torch.testing.assert_close(both[b], alone.lower[0], rtol=2e-2, atol=2e-2)


def least_by_vertices(net: nn.Sequential, region: pycert.Box) -> Fraction:
    """The least output of a network with two inputs and one hidden layer, in rational arithmetic: it lies where two of
    the lines of neurons and borders meet."""

    def exact(t: Tensor) -> list:
        return (
            [[Fraction(v) for v in row] for row in t.double().tolist()]
            if t.dim() == 2
            else [Fraction(v) for v in t.tolist()]
        )

    W, b, V = exact(net[0].weight), exact(net[0].bias), exact(net[2].weight)[0]
    low, high = exact(region.lower)[0], exact(region.upper)[0]
    lines = [(w, -c) for w, c in zip(W, b, strict=True)]
    lines += [([Fraction(i == j) for j in range(2)], limit[i]) for i in range(2) for limit in (low, high)]
    best = None
    for (p, r), (q, t) in itertools.combinations(lines, 2):
        det = p[0] * q[1] - p[1] * q[0]
        if det == 0:
            continue
        x = [(r * q[1] - p[1] * t) / det, (p[0] * t - r * q[0]) / det]
        if all(lo <= v <= hi for lo, v, hi in zip(low, x, high, strict=True)):
            z = [w[0] * x[0] + w[1] * x[1] + c for w, c in zip(W, b, strict=True)]
            value = sum(v * max(a, Fraction(0)) for v, a in zip(V, z, strict=True))
            best = value if best is None else min(best, value)
    assert best is not None
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["krelu"])
def test_bounds_against_the_exact_minimum_of_tiny_networks(seed, method):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    bm, region = pycert.BoundedModule(net, torch.empty(1, 2)), pycert.Box(-torch.ones(1, 2), torch.ones(1, 2))
    exact = least_by_vertices(net, region)
    found = bm.bound(
        region,
        method,
        side="lower",
        soundness="real",
        k=2,
        **({"iterations": 300} if method == "krelu" else {}),
    )
    single = bm.bound(region, "alpha-crown", side="lower", iterations=100).lower.item()
    assert Fraction(found.lower.double().item()) <= exact
    assert float(exact) - found.lower.item() <= 0.35 * (float(exact) - single) + 1e-3


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_multipliers_are_sound(scale, dtype):
    bm, region = random_net(7, dtype)
    cuts = krelu.hull_cuts(bm, region, k=2)
    multipliers = {a: scale * torch.rand(6, c.P_c.shape[1], dtype=dtype) for a, c in cuts.cuts.items()}
    rows, parsed = bound_arguments(bm, region)
    found = bm._bound(*rows, "alpha-crown", parsed, cuts=cuts, first=({}, multipliers)).lower
    values = outputs(bm.net, samples(region))
    assert (found.double() <= values.amin(0)).all()


def bound_arguments(bm: pycert.BoundedModule, region: pycert.LpBall, **options):
    regions, batch = bm._regions(region)
    count = bm.graph.numel(bm.graph.output)
    rows = bm._spec(torch.eye(count, dtype=region.lower.dtype), batch, region.lower)
    return (regions, rows), pycert.options.Options(iterations=0, side="lower", **options)


def test_multiples_that_cancel_leave_little():
    """Cuts in opposite pairs with large multipliers: sums in the network's own precision would be off by 1e-2."""
    bm, region = random_net(13)
    with torch.no_grad():
        bm.net[0].bias += 20
    region = pycert.Box(region.x, region.x)  # nothing is lost but by rounding
    truth = bm.net.double()(region.lower.double()).detach()
    bm.net.float()
    generator, cuts = torch.Generator().manual_seed(0), krelu.CutSet(bm)
    P = torch.randn(40, 12, generator=generator)
    pair = torch.cat([P, -P])
    cuts.add_cuts("0", pair, 2 * pair, torch.zeros(80))
    (regions, rows), parsed = bound_arguments(bm, region, intersect=False)
    multipliers = 1e4 * torch.rand(6, 40, generator=generator).repeat(1, 2)
    for sign in (1, -1):
        chosen = bm._bound(
            regions,
            (sign * rows[0], *rows[1:]),
            "alpha-crown",
            parsed,
            cuts=cuts,
            first=({}, {2: multipliers}),
        )
        assert (chosen.lower.double() <= sign * truth).all()
        assert (chosen.lower.double() >= sign * truth - 1e-3).all()


def test_rows_left_out_of_a_long_ascent_cost_little():
    """Thousands of rows and 60 steps: most rows are left out half-way."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
    x = torch.randn(1, 6)
    bm, region = pycert.BoundedModule(net, x), pycert.LpBall(x, eps=0.8)
    options = dict(ns=20, cut_rate=0.2)
    single = bm.bound(region, "alpha-crown")
    found = bm.bound(region, "krelu", iterations=60, **options)
    before = bm.bound(region, "krelu", iterations=59, **options)  # too few steps for it
    assert min(c.P_c.shape[1] for c in krelu.hull_cuts(bm, region, ns=20).cuts.values()) > 400
    width, without, most = ((b.upper - b.lower).sum().item() for b in (found, before, single))
    assert most - width > 0.9 * (most - without)
    values = outputs(bm.net, samples(region))
    assert (found.lower.double() <= values.amin(0)).all() and (found.upper.double() >= values.amax(0)).all()


def test_rows_hold_for_executions_of_the_network():
    bm, region = random_net(3)
    points = samples(region)
    z = {"0": outputs(bm.net[:1], points), "2": outputs(bm.net[:3], points)}
    found = krelu.hull_cuts(bm, region, k=3, s=2, ns=12)
    assert sorted(c.layer for c in found.cuts.values()) == ["0", "2"]
    for cut in found.cuts.values():
        for b in range(2):
            own = cut.rows_of(b)
            x = z[cut.layer][:, b][:, own.index[0]]  # [N, R, k]
            value = own.P_c[0] + (x * own.P_x[0]).sum(-1) + (x.relu() * own.P_y[0]).sum(-1)
            assert len(own.P_c[0]) > 5
            assert value.min() >= 0


def test_general_cuts_enter_by_the_same_hook():
    """A cut x1 <= -1 leaves a part of the region, where triangles give 2 instead of 3."""
    bm, region = primer_net()
    single = bm.bound(region, "krelu", side="lower", rows=0, iterations=60).lower.item()
    cuts = krelu.CutSet(bm)
    cuts.add_cuts("0", torch.zeros(1, 2), torch.tensor([[-1.0, 0.0]]), -torch.ones(1))  # x1 <= -1
    half = bm.bound(region, "krelu", side="lower", rows=0, iterations=60, cuts=cuts).lower.item()
    assert single == pytest.approx(-3, abs=1e-2)
    assert -2.05 < half <= -2
    narrow = krelu.CutSet(bm)
    one = torch.ones(1, 1)
    narrow.add_cuts("0", 0 * one, -one, -torch.ones(1), index=torch.zeros(1, 1, dtype=torch.int64))
    again = bm.bound(region, "krelu", side="lower", rows=0, iterations=60, cuts=narrow).lower.item()
    assert again == pytest.approx(half, abs=1e-6)


def test_linear_functions_hold():
    bm, region = random_net(11)
    found = bm.bound(region, "krelu", return_linear=True, **QUICK)
    points = samples(region, 500)
    values = outputs(bm.net, points)
    linear = found.linear
    low = torch.einsum("bsi,nbi->nbs", linear.A_lower.double(), points.double()) + linear.c_lower.double()
    high = torch.einsum("bsi,nbi->nbs", linear.A_upper.double(), points.double()) + linear.c_upper.double()
    assert (low <= values + 1e-6).all() and (high >= values - 1e-6).all()


def test_gradients_are_those_of_the_bound_with_its_multipliers():
    bm, region = primer_net()
    bm.net.double()
    with torch.no_grad():  # away from kinks
        bm.net[0].weight += torch.tensor([[0.1, -0.1], [-0.2, -0.2]])
    x = torch.tensor([[0.1, -0.05]], dtype=torch.float64)

    def bound(eps: Tensor) -> Tensor:
        ball = pycert.LpBall(x, eps)
        cuts = krelu.CutSet(bm)
        row = torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
        cuts.add_cuts("0", row, -row / 2, torch.ones(1, dtype=torch.float64))  # y1 + y2 <= 1 + (x1 + x2) / 2
        (regions, rows), parsed = bound_arguments(bm, ball, soundness="none", intersect=False)
        first = (
            {2: torch.zeros(1, 2, dtype=torch.float64)},
            {2: torch.full((1, 1), 0.5, dtype=torch.float64)},
        )
        return bm._bound(regions, rows, "alpha-crown", parsed, cuts=cuts, first=first).lower.sum()

    eps = torch.ones(1, dtype=torch.float64, requires_grad=True)
    weight = bm.net[0].weight
    bound(eps).backward()
    assert (bm.net[0].weight.grad != 0).any()
    for tensor, grad in ((eps, eps.grad), (weight, weight.grad)):
        numeric = torch.zeros_like(tensor)
        for at in itertools.product(*map(range, tensor.shape)):
            with torch.no_grad():
                ends = []
                for step in (1e-6, -2e-6):
                    tensor[at] += step
                    ends.append(bound(eps.detach()).item())
                tensor[at] += 1e-6
            numeric[at] = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(grad, numeric, rtol=1e-4, atol=1e-5)


def test_certify_by_krelu():
    bm, region = random_net(2)
    y = bm.net(region.x).argmax(1)
    result = pycert.certify(bm, region.x, y, eps=0.05, method="krelu", **QUICK)
    assert result.certified.tolist() == (result.margin > 0).tolist()
    plain = pycert.certify(bm, region.x, y, eps=0.05, method="krelu", cascade=False, **QUICK)
    assert (result.certified == plain.certified).all()


def test_errors_name_the_argument():
    bm, region = random_net(0)
    none = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"layer must be one that a ReLU reads \(0, 2\), got '4'"):
        krelu.octahedral_bounds(bm, region, "4", none)
    with pytest.raises(ValueError, match="groups must hold neurons 0 to 11"):
        krelu.octahedral_bounds(bm, region, "0", torch.tensor([[0, 12]]))
    with pytest.raises(ValueError, match=r"groups must be \[G, k\] or \[B, G, k\] of int64"):
        krelu.octahedral_bounds(bm, region, "0", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch of 2"):
        krelu.octahedral_bounds(bm, region, "0", none[None].expand(3, 1, 2))
    for options, text in (
        (dict(k=5), "k must be 1 to 4"),
        (dict(cover="all"), "cover must be one of 'sparse', 'window'"),
        (dict(ns=10**6), "ns must be from k to"),
        (dict(rows=-1), "rows must be a number of at least 0"),
        (dict(intermediate="ibp"), "intermediate must be one of .*'krelu'"),
    ):
        with pytest.raises(ValueError, match=text):
            bm.bound(region, "krelu", **options)
    with pytest.raises(TypeError, match="cuts must be a pycert.krelu.CutSet"):
        bm.bound(region, "krelu", cuts=[1])
    with pytest.raises(ValueError, match="option 'ns' is one of 'krelu', 'lp'"):
        bm.bound(region, "crown", ns=20)
    cuts, row = krelu.CutSet(bm), torch.zeros(1, 12)
    with pytest.raises(ValueError, match="an activation reads"):
        cuts.add_cuts("4", row, row, row[:, 0])
    with pytest.raises(ValueError, match="has 12 neurons, got rows of 3"):
        cuts.add_cuts("0", row[:, :3], row[:, :3], row[:, 0])
    with pytest.raises(ValueError, match="must be finite"):
        cuts.add_cuts("0", row * torch.nan, row, row[:, 0])
    with pytest.raises(TypeError, match="dtypes must be equal"):
        cuts.add_cuts("0", row.double(), row, row[:, 0])
    with pytest.raises(ValueError, match="index must hold neurons 0 to 11"):
        cuts.add_cuts("0", row[:, :1], row[:, :1], row[:, 0], index=torch.full((1, 1), 12))
    cuts.add_cuts("0", row.double(), row.double(), row[:, 0].double())
    with pytest.raises(TypeError, match="cuts must have the dtype and device of the region"):
        bm.bound(region, "krelu", cuts=cuts, iterations=1)


def test_layer_bounds_are_tightened_by_rows_of_earlier_layers():
    bm, region = random_net(4)
    found = bm.layer_bounds(region, "krelu", **QUICK)
    single = bm.layer_bounds(region, "alpha-crown", iterations=8)
    points = samples(region)
    for layer, part in (("0", bm.net[:1]), ("2", bm.net[:3])):
        z = outputs(part, points)
        assert (found[layer].lower.double() <= z.amin(0)).all() and (
            found[layer].upper.double() >= z.amax(0)
        ).all()
    width = {name: (b["2"].upper - b["2"].lower).sum() for name, b in (("joint", found), ("single", single))}
    assert width["joint"] < width["single"]


def test_without_rows_values_and_gradients_are_those_of_crown():
    bm, region = random_net(12)
    grads = {}
    for method, options in (("crown", {}), ("krelu", dict(rows=0, iterations=0))):
        bm.net.zero_grad()
        bm.bound(region, method, soundness="none", **options).lower.sum().backward()
        grads[method] = bm.net[0].weight.grad.clone()
    torch.testing.assert_close(grads["krelu"], grads["crown"])


class TwoReaders(nn.Module):
    """A layer that a sigmoid reads before a ReLU does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.last(torch.cat([torch.sigmoid(z), torch.relu(z)], 1))


def test_rows_of_relus_stay_with_the_relu():
    torch.manual_seed(1)
    net = TwoReaders()
    for p in net.parameters():
        p.data.normal_()
    region = pycert.LpBall(torch.randn(4, 3), eps=1.0)
    bm = pycert.BoundedModule(net, torch.empty(1, 3))
    bounds = bm.bound(region, method="krelu", k=2)
    y = outputs(net, samples(region))
    assert (bounds.lower <= y.amin(0)).all() and (y.amax(0) <= bounds.upper).all()
    row = torch.ones(1, 4)
    with pytest.raises(ValueError, match="read by sigmoid and relu"):
        krelu.CutSet(bm).add_cuts("first", row, row, torch.ones(1))


def test_cuts_of_another_network_are_refused():
    bm, region = random_net(0)
    wide = nn.Sequential(nn.Linear(6, 500), nn.ReLU(), nn.Linear(500, 3))
    cuts = krelu.CutSet(pycert.BoundedModule(wide, torch.empty(1, 6)))
    cuts.add_cuts("0", torch.ones(1, 500), torch.ones(1, 500), torch.ones(1))
    for method in ("krelu", "lp"):
        with pytest.raises(ValueError, match="another BoundedModule"):
            bm.bound(region, method=method, cuts=cuts, **QUICK)


def test_what_makes_no_sense_is_named():
    bm, region = random_net(0)
    cuts, ones = krelu.CutSet(bm), torch.ones
    cuts.add_cuts("0", ones(2, 1, 12), ones(2, 1, 12), ones(2, 1))
    with pytest.raises(ValueError, match="batches of 2 and 3"):
        cuts.add_cuts("0", ones(3, 1, 12), ones(3, 1, 12), ones(3, 1))
    with pytest.raises(TypeError, match="P_x must be a tensor"):
        cuts.add_cuts("0", ones(1, 12), [1.0], ones(1))
    with pytest.raises(ValueError, match="at least one group"):
        krelu.octahedral_bounds(bm, region, "0", torch.zeros(0, 2, dtype=torch.int64))
    for name in ("k", "ns", "s", "rows", "directions"):
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            bm.bound(region, method="krelu", **{name: 2.5})
