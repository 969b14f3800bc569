"""What other verifiers get wrong or refuse, as far as it is public: each a case that must work here.

Grouped, depthwise and dilated convolutions, inputs that are not square, norms above 2, radius zero, pooling
with a stride that is not its kernel, boxes that move some coordinates only, sums of two linear
layers, radii per sample for L2, and time that grows exponentially with the depth of a graph.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pycert
from nets import Apply, box_of, ends_by_ascent, points_in

METHODS = ("ibp", "fastlin", "crown-ibp", "crown", "forward", "alpha-crown")


def assert_holds(net: nn.Module, where, methods=METHODS) -> None:
    """Bounds of the output and of all layers hold at corners, samples and ends of ascent."""
    double = net.double()
    bm = pycert.BoundedModule(double, box_of(where)[0][:1])
    points = [*points_in(where, 0, 64, torch.float64), *ends_by_ascent(double, where, steps=20)]
    with torch.no_grad():
        outputs = torch.stack([double(x) for x in points])
        for method in methods:
            bounds = bm.bound(where, method=method)
            slack = 1e-11 * (1 + outputs.abs())
            assert (bounds.lower - slack <= outputs).all(), method
            assert (outputs <= bounds.upper + slack).all(), method
            assert (bounds.lower <= bounds.upper).all() and bounds.lower.isfinite().all()


def images(*shape: int) -> torch.Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CONVOLUTIONS = {
    "dilation in the second": lambda: (
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    ),
    "dilation in the first": lambda: (
        nn.Conv2d(2, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1),
    ),
    "groups in the first": lambda: (nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 4, 3)),
    "groups in the second": lambda: (nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3, groups=2)),
    "depthwise second": lambda: (nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4)),
    "strides, groups and dilation": lambda: (
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(0, 2), groups=2),
        nn.Conv2d(4, 4, 2, stride=(1, 2), dilation=(1, 2), groups=4),
    ),
}


@pytest.mark.parametrize("size", [(7, 7), (5, 9), (11, 6)], ids=str)
@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
def test_grouped_depthwise_and_dilated_convolutions(kind, size):
    torch.manual_seed(0)
    first, second = CONVOLUTIONS[kind]()
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = images(2, *size)
    net(x.float())
    for layer in (first, second):
        layer.weight.data.normal_(0, 0.4)
    for eps in (0.001, 0.02, 0.1):
        assert_holds(net, pycert.LpBall(x, eps=eps, p=math.inf))


@pytest.mark.parametrize("size", [(50, 4), (3, 40)], ids=str)
def test_patches_larger_than_one_side_of_the_image(size):
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.ReLU(),
              nn.Conv2d(2, 2, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)]  # fmt: skip
    net, x = nn.Sequential(*layers), images(1, *size)
    net(x.float())
    assert_holds(net, pycert.LpBall(x, eps=0.02, p=math.inf), methods=("ibp", "crown-ibp", "crown"))


@pytest.mark.parametrize("p", [3, 8, 2.5, 0, -1, math.nan])
def test_other_norms_are_refused_and_named(p):
    with pytest.raises(ValueError, match=r"p must be") as error:
        pycert.LpBall(images(1, 3, 3), eps=0.1, p=p)
    assert str(p) in str(error.value)


@pytest.mark.parametrize("p", [1, 2])
def test_first_convolution_under_l1_and_l2_is_exact_at_the_border(p):
    """The radius of an output is the dual norm of the weights that meet the image, no more."""
    conv = nn.Conv2d(1, 2, 3, padding=1, dtype=torch.float64)
    x = images(1, 4, 5)
    eps = torch.tensor([0.1, 0.7], dtype=torch.float64)
    with torch.no_grad():
        bounds = pycert.BoundedModule(conv, x).bound(
            pycert.LpBall(x, eps=eps, p=p), method="ibp", soundness="none"
        )
        shifts = torch.stack(
            [
                conv(unit) - conv(torch.zeros_like(unit))
                for unit in torch.eye(20).double().reshape(20, 1, 1, 4, 5)
            ]
        )
        dual = torch.linalg.vector_norm(shifts[:, 0], 2 if p == 2 else math.inf, dim=0)
        expected = conv(x) - eps.reshape(2, 1, 1, 1) * dual
    torch.testing.assert_close(bounds.lower, expected, rtol=1e-10, atol=1e-12)


def test_radius_zero_holds_the_real_output():
    """At a point, bounds in float32 must still hold the output of real arithmetic."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(100, 100), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(100, 10))
    x = torch.rand(64, 100)
    bm = pycert.BoundedModule(net, x)
    with torch.no_grad():
        found = [
            bm.bound(pycert.LpBall(x, eps=0.0, p=p), method=m) for p in (1, 2, math.inf) for m in METHODS
        ]
        exact = net.double()(x.double())
    for bounds in found:
        assert (bounds.lower.double() <= exact).all()
        assert (exact <= bounds.upper.double()).all()
        assert (bounds.upper - bounds.lower).max() < 0.1


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2), nn.MaxPool2d((3, 2), (2, 1)), nn.MaxPool2d(3, 2, padding=1), nn.MaxPool2d(2, 3),
        nn.MaxPool2d(2, 1, dilation=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, padding=1),
    ],
    ids=str,
)  # fmt: skip
def test_pooling_with_a_stride_that_is_not_its_kernel(pool):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(2, 2, 2), nn.MaxPool2d(2, 1),
                        nn.Flatten(), nn.LazyLinear(2))  # fmt: skip
    x = images(1, 9, 11)
    net(x.float())
    for eps in (0.01, 0.3):
        assert_holds(net, pycert.LpBall(x, eps=eps, p=math.inf))


@pytest.mark.parametrize("moved", [0, 1, 5, 40])
def test_boxes_that_move_some_coordinates_only(moved):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = images(1, 6, 8)
    net(x.float())
    upper = x.flatten(1).clone()
    upper[:, :moved] += 0.4
    assert_holds(net, pycert.Box(x, upper.reshape(x.shape)))


def test_a_sum_of_two_linear_layers_is_one_linear_layer():
    """Nothing is lost where the two sum: back-substitution adds their coefficients."""
    torch.manual_seed(4)
    net = Apply(lambda self, x: self.a(x) - self.b(x), a=nn.Linear(6, 4), b=nn.Linear(6, 4)).double()
    merged = nn.Linear(6, 4, dtype=torch.float64)
    merged.weight.data, merged.bias.data = net.a.weight - net.b.weight, net.a.bias - net.b.bias
    where = pycert.LpBall(images(6), eps=0.3, p=math.inf)
    with torch.no_grad():
        for method in METHODS[1:]:
            ours = pycert.BoundedModule(net, images(6)).bound(where, method=method, soundness="none")
            exact = pycert.BoundedModule(merged, images(6)).bound(where, method="ibp", soundness="none")
            torch.testing.assert_close(ours.lower, exact.lower, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_radii_per_sample(p):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    bm = pycert.BoundedModule(net, images(7))
    x, eps = images(7), torch.tensor([0.01, 0.8], dtype=torch.float64)
    assert_holds(net, pycert.LpBall(x, eps=eps, p=p))
    with torch.no_grad():
        for method in METHODS:
            together = bm.bound(pycert.LpBall(x, eps=eps, p=p), method=method)
            for sample in range(2):
                one = slice(sample, sample + 1)
                alone = bm.bound(pycert.LpBall(x[one], eps=float(eps[sample]), p=p), method=method)
                torch.testing.assert_close(together.lower[one], alone.lower, rtol=1e-10, atol=1e-12)


class Ladder(nn.Module):
    """Every rung reads the two below it: the number of paths grows like the Fibonacci numbers."""

    def __init__(self, rungs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(rungs))
        for layer in self.layers:
            layer.weight.data.mul_(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, now = x, x
        for layer in self.layers:
            before, now = now, torch.relu(layer(now) + before)
        return now


@pytest.mark.parametrize("method", METHODS)
def test_deep_graphs_take_polynomial_time(method):
    """Sixty rungs have 10^12 paths: a walk that visits paths instead of nodes would never end."""
    torch.manual_seed(6)
    net, x = Ladder(60), images(4).float()
    bounds = pycert.BoundedModule(net, x).bound(pycert.LpBall(x, eps=1e-4, p=math.inf), method=method)
    bounds.lower.sum().backward()
    assert bounds.lower.isfinite().all()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_net_may_be_traced_at_batch_one_and_bounded_at_any_other():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    net(torch.rand(1, 1, 5, 5))
    bm = pycert.BoundedModule(net, torch.rand(1, 1, 5, 5))
    for batch in (1, 2, 33):
        x = torch.rand(batch, 1, 5, 5)
        for method in METHODS:
            assert bm.bound(pycert.LpBall(x, eps=0.1, p=math.inf), method=method).lower.shape == (batch, 2)
