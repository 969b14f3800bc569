"""PGD: inside the region without exception, exact where the answer is known, and without side effects."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pycert
from pycert._domains import Ball
from pycert.attacks import class_margin, pgd

INF = float("inf")


def small_net(dtype: torch.dtype = torch.float32, inputs: int = 24, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(inputs, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4)]
    return nn.Sequential(*layers).to(dtype)


def distance(a: Tensor, b: Tensor, p: float) -> Tensor:
    return (a.double() - b.double()).flatten(1).norm(p, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [None, (0, 1), (0.1, 0.9)])
@pytest.mark.parametrize(("p", "eps"), [(INF, 0.1), (INF, 1e-3), (2, 0.3), (2, 1e-3), (1, 0.7), (1, 1e-3)])
def test_points_lie_inside_the_ball_and_the_clip(p, eps, clip, dtype):
    net = small_net(dtype).eval()
    low, high = clip or (0, 1)
    torch.manual_seed(1)
    x = (torch.randint(0, 17, (40, 2, 3, 4)) / 16).to(dtype) * (high - low) + low
    x = x.clamp(torch.tensor(low, dtype=dtype) + 1e-7, torch.tensor(high, dtype=dtype) - 1e-7)
    region = pycert.LpBall(x, eps=eps, p=p, clip=clip)
    found = pgd(net, region, net(x).argmax(1), steps=7, restarts=2)
    assert (distance(found.inputs, x, p) <= region.eps.double()).all()
    assert (found.inputs != x).flatten(1).any(1).float().mean() > 0.5
    if clip is not None:
        assert (found.inputs.double() >= low).all()
        assert (found.inputs.double() <= high).all()


def test_points_lie_inside_a_box_with_fixed_coordinates():
    net = small_net().eval()
    lower = torch.rand(30, 24)
    upper = lower + torch.rand(30, 24) * (torch.rand(30, 24) > 0.5)
    found = pgd(net, pycert.Box(lower, upper), net(lower).argmax(1), steps=5)
    assert ((found.inputs >= lower) & (found.inputs <= upper)).all()


@pytest.mark.parametrize(("p", "dual"), [(INF, 1), (2, 2), (1, INF)])
def test_a_linear_network_is_attacked_to_its_exact_minimum(p, dual):
    torch.manual_seed(0)
    net = nn.Linear(12, 2, dtype=torch.float64)
    x, y, eps = (
        torch.randn(8, 12, dtype=torch.float64),
        torch.randint(0, 2, (8,)),
        torch.linspace(0.1, 2, 8).double(),
    )
    found = pgd(net, pycert.LpBall(x, eps=eps, p=p), y, steps=40, step_size=10.0, early_stop=False)
    slope = (net.weight[0] - net.weight[1]).norm(dual)
    expected = class_margin(net(x), y) - eps.double() * slope
    torch.testing.assert_close(found.margin, expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_projection_is_the_nearest_point(p, seed):
    """No direction towards another point of the region makes an acute angle with what is left."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(6, 15, generator=generator, dtype=torch.float64)
    eps = torch.full((6,), 0.8, dtype=torch.float64)
    ball = Ball(center, eps, p, torch.tensor(0.0).double(), torch.tensor(1.0).double())
    outside = center + 2 * torch.randn(center.shape, generator=generator, dtype=torch.float64)
    nearest = ball.project(outside)
    for _ in range(50):
        other = ball.random(generator)
        assert (((outside - nearest) * (other - nearest)).sum(1) <= 1e-9).all()


def test_sorting_and_bisection_agree_on_the_l1_ball():
    torch.manual_seed(0)
    center, eps = torch.randn(9, 30).double(), torch.linspace(0.01, 5, 9).double()
    point = center + torch.randn(9, 30).double()
    limits = [(-INF, INF), (-1e3, 1e3)]
    found = [Ball(center, eps, 1, torch.tensor(a), torch.tensor(b)).project(point) for a, b in limits]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-11)


def test_the_same_seed_gives_the_same_points():
    net, x = small_net().eval(), torch.rand(10, 24)
    region, y = pycert.LpBall(x, eps=0.1), net(x).argmax(1)
    first, second, other = (pgd(net, region, y, steps=3, seed=seed).inputs for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(first, pgd(net, region, y, steps=3, generator=generator).inputs)


@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
def test_the_best_point_is_kept(loss):
    net, x = small_net().eval(), torch.rand(50, 24)
    y = net(x).argmax(1)
    region = pycert.LpBall(x, eps=0.2, clip=(0, 1))
    few = pgd(net, region, y, steps=5, loss=loss, early_stop=False)
    more = pgd(net, region, y, steps=5, loss=loss, restarts=4, early_stop=False)
    clean = class_margin(net(x), y)
    assert (few.margin <= clean).all()
    assert (more.margin <= few.margin).all()
    torch.testing.assert_close(more.margin, class_margin(net(more.inputs), y).detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(more.success, more.margin < 0)
    assert more.success.any()
    assert (~more.success).any()


def test_early_stop_breaks_the_same_samples_or_more_slowly_none():
    net, x = small_net().eval(), torch.rand(50, 24)
    region, y = pycert.LpBall(x, eps=0.2, clip=(0, 1)), net(x).argmax(1)
    slow = pgd(net, region, y, steps=5, early_stop=False)
    quick = pgd(net, region, y, steps=5, early_stop=True)
    assert torch.equal(slow.success, quick.success)
    assert (slow.margin <= quick.margin).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_network_is_left_as_it_was(context):
    net = small_net().train()
    net[4].weight.requires_grad_(False)
    net[2].eval()
    net[1].weight.grad = torch.ones_like(net[1].weight)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with context():
        pgd(net, pycert.LpBall(torch.rand(6, 24), eps=0.1), torch.zeros(6, dtype=torch.long), steps=2)
    assert [module.training for module in net] == [True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not net[4].weight.requires_grad
    assert net[1].weight.requires_grad
    assert torch.equal(net[1].weight.grad, torch.ones_like(net[1].weight))
    assert net[1].bias.grad is None


def test_a_bounded_module_is_attacked_like_its_network():
    net, x = small_net(), torch.rand(5, 24)
    net.eval()
    y = net(x).argmax(1)
    bm = pycert.BoundedModule(net, x[:1])
    region = pycert.LpBall(x, eps=0.1)
    assert torch.equal(pgd(net, region, y, steps=3).inputs, pgd(bm, region, y, steps=3).inputs)


def test_a_network_that_gives_nan_is_broken():
    net = nn.Linear(3, 2)
    nn.init.constant_(net.bias, float("nan"))
    assert pgd(net, pycert.LpBall(torch.rand(2, 3), eps=0.1), torch.zeros(2).long()).success.all()


def test_a_callable_objective_is_made_small():
    net, x = small_net().eval(), torch.rand(5, 24)
    found = pgd(
        net, pycert.LpBall(x, eps=0.1), None, loss=lambda out: out[:, 2] + 10, steps=5, early_stop=False
    )
    assert (found.margin <= net(x)[:, 2] + 10).all()
    assert not found.success.any()


def test_a_radius_of_zero_leaves_the_input():
    net = small_net().eval()
    x = torch.rand(4, 24)
    for p in (INF, 2, 1):
        found = pgd(net, pycert.LpBall(x, eps=0.0, p=p), net(x).argmax(1), steps=2)
        assert torch.equal(found.inputs, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must be >= 0"),
        ({"restarts": 0}, "restarts >= 1"),
        ({"step_size": 0.0}, "step_size must be > 0"),
        ({"loss": "hinge"}, "loss must be 'margin', 'cross-entropy' or a callable, got 'hinge'"),
        ({"y": torch.zeros(3, dtype=torch.long)}, r"y must have shape \[4\], got \[3\]"),
        ({"y": None}, r"y must have shape \[4\], got None"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    arguments = {"y": torch.zeros(4, dtype=torch.long), **arguments}
    with pytest.raises(ValueError, match=message):
        pgd(small_net().eval(), pycert.LpBall(torch.rand(4, 24), eps=0.1), **arguments)
