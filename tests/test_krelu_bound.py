"""Bounds with k-ReLU rows as multipliers: sound whatever the multipliers are, and tighter than single neurons allow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pycert
from pycert import krelu


def random_net(seed: int, dtype: torch.dtype = torch.float32) -> tuple[pycert.BoundedModule, pycert.LpBall]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)
    x = torch.randn(1, 6, dtype=dtype)
    return pycert.BoundedModule(net, x), pycert.LpBall(x, eps=0.3)


def primer_net() -> tuple[pycert.BoundedModule, pycert.Box]:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        net[2].weight.copy_(torch.tensor([[-1.0, -1.0]]))
    return pycert.BoundedModule(net, torch.empty(1, 2)), pycert.Box(-torch.ones(1, 2), torch.ones(1, 2))


def samples(region: pycert.LpBall, count: int = 4000) -> torch.Tensor:
    width = region.upper - region.lower
    corners = torch.randint(0, 2, (count // 2, width.shape[1])).to(width.dtype)
    inside = torch.rand(count - count // 2, width.shape[1], dtype=width.dtype)
    return region.lower + torch.cat([corners, inside]) * width


def test_octahedral_bounds_of_the_first_layer_are_exact():
    bm, region = primer_net()
    octahedra = krelu.octahedral_bounds(bm, region, "0", torch.tensor([[0, 1]]))
    assert octahedra.A.shape == (1, 1, 8, 2)
    torch.testing.assert_close(octahedra.b, torch.full((1, 1, 8), 2.0))
    torch.testing.assert_close(octahedra.lower, torch.full((1, 1, 2), -2.0))


def test_octahedral_bounds_hold_in_deeper_layers():
    bm, region = random_net(0)
    groups = torch.tensor([[0, 3, 7], [3, 7, 11]])
    octahedra = krelu.octahedral_bounds(bm, region, "2", groups)
    z = bm.net[:3](samples(region)).detach().double()
    for g, group in enumerate(groups):
        values = octahedra.b[0, g].double() + z[:, group] @ octahedra.A[0, g].double().T
        assert values.min() >= -1e-6
        assert (z[:, group] >= octahedra.lower[0, g].double() - 1e-6).all()


def test_the_primers_sum_of_two_neurons():
    """max y1 + y2 is 2; single-neuron relaxations reach 3."""
    bm, region = primer_net()
    single = bm.bound(region, "alpha-crown", side="lower").lower.item()
    assert single == pytest.approx(-3.0, abs=1e-3)
    cuts = krelu.hull_cuts(bm, region, k=2)
    joint = krelu.lower_bound(bm, region, torch.ones(1, 1), cuts, steps=100, learning_rate=0.1).item()
    assert -2.05 < joint <= -2.0


@pytest.mark.parametrize("seed", range(3))
def test_bounds_are_sound_and_never_below_alpha_crown(seed):
    bm, region = random_net(seed)
    spec = torch.tensor([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]])
    cuts = krelu.hull_cuts(bm, region, k=3)
    bound = krelu.lower_bound(bm, region, spec, cuts, steps=8)
    single = bm.bound(region, "alpha-crown", spec=spec, side="lower").lower[0]
    assert (bound >= single).all()
    values = bm.net(samples(region)).detach().double() @ spec.double().T
    assert (bound.double() <= values.min(0).values).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_any_multipliers_are_sound(scale):
    bm, region = random_net(7)
    spec = torch.eye(3)
    augmented = krelu.CutModule(bm, spec)
    cuts = krelu.hull_cuts(bm, region, k=2)
    for cut in cuts:
        augmented.add_cuts(cut.layer, cut.P_y, cut.P_x, cut.P_c, cut.largest)
    augmented.set_multipliers([scale * torch.rand(3, len(c.P_c), dtype=torch.float64) for c in cuts])
    bound = augmented.module().bound(region, "crown", side="lower").lower[0]
    values = bm.net(samples(region)).detach().double()
    assert (bound.double() <= values.min(0).values).all()


def test_rows_hold_for_executions_of_the_network():
    bm, region = random_net(3)
    z = {"0": bm.net[:1](samples(region)), "2": bm.net[:3](samples(region))}
    for cut in krelu.hull_cuts(bm, region, k=3, s=2):
        x = z[cut.layer].detach().double()
        assert (cut.P_c + x @ cut.P_x.T + x.relu() @ cut.P_y.T).min() >= 0


def test_groups_are_windows_over_the_largest_areas():
    lower = torch.tensor([-1.0, -2.0, 1.0, -3.0, -0.5])
    upper = torch.tensor([1.0, 2.0, 2.0, 3.0, 0.5])
    groups = krelu.select_groups(lower, upper, k=2, s=1)
    assert groups.tolist() == [[3, 1], [1, 0], [0, 4]]
    assert krelu.select_groups(lower, upper, k=2, s=1, ns=2).tolist() == [[3, 1]]
    assert krelu.select_groups(lower, lower, k=2).shape == (0, 2)


def test_errors_name_the_argument():
    bm, region = random_net(0)
    with pytest.raises(ValueError, match=r"layer must be one that a ReLU reads \(0, 2\), got '4'"):
        krelu.octahedral_bounds(bm, region, "4", torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="groups must hold neurons 0 to 11"):
        krelu.octahedral_bounds(bm, region, "0", torch.tensor([[0, 12]]))
    with pytest.raises(ValueError, match=r"groups must be \[G, k\] of int64"):
        krelu.octahedral_bounds(bm, region, "0", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="k must be 1 to 4"):
        krelu.select_groups(torch.zeros(3), torch.ones(3), k=5)
    with pytest.raises(ValueError, match="batch of 1"):
        krelu.hull_cuts(bm, pycert.LpBall(torch.zeros(2, 6), eps=0.1))
