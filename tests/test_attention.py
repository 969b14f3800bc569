"""Softmax, normalisation and attention as torch runs them, at points and over boxes, and the edges of products."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pycert
from nets import Apply

METHODS = ("ibp", "crown-ibp", "crown")
GENERATOR = torch.Generator()
SCALES = {
    "1": lambda *shape: normal(*shape),
    "30": lambda *shape: 30 * normal(*shape),
    "1e-20": lambda *shape: 1e-20 * normal(*shape),
    "far": lambda *shape: normal(*shape) + 1e4,
    "equal": lambda *shape: torch.full(shape, 3.3),
    "outlier": lambda *shape: normal(*shape).index_fill(-1, torch.tensor([0]), 1e3),
    "mixed": lambda *shape: normal(*shape) * 10 ** (4 * torch.rand(shape, generator=GENERATOR) - 2),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.flip(1), x.flip(-1))


def flash(x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend(x)


def by_hand(x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return attend(x)


#: name: (function, shape of a sample, other executions)
FUNCTIONS = {
    "softmax": (lambda x: x.softmax(-1), (17,), ()),
    "log_softmax": (lambda x: x.log_softmax(-1), (9,), ()),
    "layer_norm": (lambda x: F.layer_norm(x, (5,)), (5,), ()),
    "layer_norm_long": (lambda x: F.layer_norm(x, (300,)), (300,), ()),
    "layer_norm_tiny_eps": (lambda x: F.layer_norm(x, (8,), eps=1e-12), (8,), ()),
    "rms_norm": (lambda x: F.rms_norm(x, (64,), eps=1e-6), (64,), ()),
    "group_norm": (lambda x: F.group_norm(x, 2), (4, 3, 3), ()),
    "attention": (attend, (2, 5, 8), (flash, by_hand)),
    "long_attention": (attend, (1, 20, 16), (flash, by_hand)),
    "causal": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (2, 4, 3), ()),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_executions_of_torch_stay_inside(name, scale):
    """Float32 executions at a point, and at the ends of a small box."""
    function, shape, others = FUNCTIONS[name]
    GENERATOR.manual_seed(len(name))
    net = Apply(lambda self, x: function(x)).eval()
    bm = pycert.BoundedModule(net, torch.zeros(1, *shape))
    x = SCALES[scale](3, *shape)
    for where in (pycert.Box(x, x.clone()), pycert.Box(x - 1e-3 * x.abs(), x + 1e-3 * x.abs())):
        with torch.no_grad():
            points = [where.lower, where.upper, x]
            runs = [run(p) for p in points for run in (net, *others)] + [
                torch.cat([net(row[None]) for row in x])
            ]
            for method in METHODS if math.prod(shape) <= 40 else METHODS[:2]:
                bounds = bm.bound(where, method=method)
                assert not (bounds.lower.isnan() | bounds.upper.isnan()).any()
                for y in runs:
                    assert ((bounds.lower <= y) & (y <= bounds.upper)).all(), method


def test_points_have_tight_bounds():
    """What soundness costs at a point: little, also where softmax is saturated."""
    GENERATOR.manual_seed(1)
    for name, scale, most in (("softmax", 100.0, 2e-5), ("layer_norm", 1.0, 1e-3), ("attention", 5.0, 1e-2)):
        function, shape, _ = FUNCTIONS[name]
        bm = pycert.BoundedModule(Apply(lambda self, x, f=function: f(x)), torch.zeros(1, *shape))
        x = scale * normal(4, *shape)
        with torch.no_grad():
            for method in METHODS:
                bounds = bm.bound(pycert.Box(x, x.clone()), method=method)
                assert (bounds.upper - bounds.lower).max() < most, (name, method)


@pytest.mark.parametrize("method", (*METHODS, "forward"))
def test_softmax_of_one_element_is_known(method):
    x = torch.randn(2, 1, generator=torch.Generator().manual_seed(0))
    for name, value in (("softmax", 1.0), ("log_softmax", 0.0)):
        net = Apply(lambda self, x, name=name: getattr(x, name)(-1) + 0 * x)
        with torch.no_grad():
            bounds = pycert.BoundedModule(net, x).bound(pycert.LpBall(x, 1e3), method=method)
        for end in bounds:
            torch.testing.assert_close(end, torch.full_like(end, value), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_known_ranges(method):
    x = 10 * torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    where = pycert.LpBall(x, eps=5.0, p=math.inf)
    slack = 1e-5
    with torch.no_grad():
        shares = pycert.BoundedModule(nn.Softmax(1), x).bound(where, method=method)
        assert (shares.lower >= -slack).all() and (shares.upper <= 1 + slack).all()
        logs = pycert.BoundedModule(nn.LogSoftmax(1), x).bound(where, method=method)
        assert (logs.upper <= slack).all()
        normed = pycert.BoundedModule(nn.LayerNorm(6), x).bound(where, method=method)
        assert torch.maximum(normed.lower.abs(), normed.upper.abs()).max() <= math.sqrt(5) + 0.2
        rms = pycert.BoundedModule(nn.RMSNorm(6), x).bound(where, method=method)
        assert torch.maximum(rms.lower.abs(), rms.upper.abs()).max() <= math.sqrt(6) + 0.2


@pytest.mark.parametrize("method", METHODS)
def test_quotients_by_a_box_that_holds_zero_are_unbounded(method):
    bm = pycert.BoundedModule(Apply(lambda self, x: x[:, :1] / x[:, 1:]), torch.zeros(1, 2))
    with torch.no_grad():
        bounds = bm.bound(pycert.Box(torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[2.0, 1.0], [2.0, 4.0]])),
                          method=method)  # fmt: skip
    assert bounds.lower[0] == -math.inf and bounds.upper[0] == math.inf
    torch.testing.assert_close(bounds.lower[1], torch.tensor([0.25]), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(bounds.upper[1], torch.tensor([2.0]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("method", (*METHODS, "forward"))
def test_products_of_huge_and_infinite_boxes(method):
    product = Apply(lambda self, x: (x[:, :2] * x[:, 2:]).relu() - x[:, :2] * (3e38 * x[:, 2:]))
    bm = pycert.BoundedModule(product, torch.zeros(1, 4))
    x = torch.tensor([[3e38, -3e38, 3e38, 2.0], [0.0, 1e-45, -3e38, 1e-45], [1e-30, 0.0, 1e-30, 3e38]])
    with torch.no_grad():
        for where in (pycert.Box(x, x.clone()), pycert.Box(x.clamp(max=0), x.clamp(min=0))):
            bounds = bm.bound(where, method=method)
            assert not (bounds.lower.isnan() | bounds.upper.isnan()).any()
            y = bm(x)
            known = y.isfinite()
            assert ((bounds.lower <= y) & (y <= bounds.upper))[known].all()


def test_specifications_of_products_and_spare_sides():
    """Rows over a batch of several samples, by chunks and by one side, are those of the whole."""
    torch.manual_seed(0)
    net = Apply(
        lambda self, x: self.first(x) @ self.second(x).mT, first=nn.Linear(3, 3), second=nn.Linear(3, 3)
    )
    x, spec = torch.randn(5, 4, 3).double(), torch.randn(7, 16).double()
    bm = pycert.BoundedModule(net.double(), x)
    where = pycert.LpBall(x, eps=0.1, p=math.inf)
    with torch.no_grad():
        whole = bm.bound(where, spec=spec, intersect=False, soundness="none")
        for b in range(5):
            one = bm.bound(
                pycert.LpBall(x[b : b + 1], eps=0.1, p=math.inf), spec=spec, intersect=False, soundness="none"
            )
            torch.testing.assert_close(one.lower[0], whole.lower[b])
            torch.testing.assert_close(one.upper[0], whole.upper[b])
        small = bm.bound(where, spec=spec, intersect=False, soundness="none", memory=4096)
        torch.testing.assert_close(small.lower, whole.lower)
        above = bm.bound(where, spec=spec, intersect=False, soundness="none", side="upper")
        torch.testing.assert_close(above.upper, whole.upper)


def test_bad_weights_before_a_softmax_are_named():
    net = nn.Sequential(nn.Linear(3, 3), nn.Softmax(1))
    net[0].weight.data[0, 0] = math.nan
    bm = pycert.BoundedModule(net, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"0\.weight"):
        bm.bound(pycert.LpBall(torch.zeros(1, 3), eps=0.1, p=math.inf))
