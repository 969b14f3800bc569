"""precision="fast": radii in bfloat16, rounded up; as sound as exact products and not much wider."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import pycert


def network(dtype=torch.float32, seed=0, scale=1.0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(9, 17, 3, padding=1), nn.ReLU(), nn.Conv2d(17, 33, 3, stride=2, groups=1), nn.ReLU(),
        nn.Conv2d(33, 24, (3, 2), padding=(1, 0), dilation=(1, 2)), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    net(torch.zeros(1, 9, 9, 9))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(scale)
    return net.to(dtype)


def exact_intervals(net, lower, upper):
    """In float64, layer by layer."""
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            middle, radius = (lower + upper) / 2, (upper - lower) / 2
            weight = layer.weight.double().abs()
            if isinstance(layer, nn.Linear):
                spread = functional.linear(radius, weight)
            else:
                spread = functional.conv2d(
                    radius, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
                )
            centre = layer.double()(middle)
            lower, upper = centre - spread, centre + spread
        else:
            lower, upper = layer(lower), layer(upper)
    return lower, upper


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e3])
@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-3, 0.5, 1e4])
@pytest.mark.parametrize("soundness", ["real", "deployed"])
def test_fast_bounds_enclose_the_exact_intervals(eps, scale, soundness):
    net = network(scale=scale)
    x = torch.rand(16, 9, 9, 9, generator=torch.Generator().manual_seed(1))
    bm, region = pycert.BoundedModule(net, x[:1]), pycert.LpBall(x, eps)
    found = bm.bound(region, "ibp", precision="fast", soundness=soundness)
    plain = bm.bound(region, "ibp", soundness=soundness)
    lower, upper = exact_intervals(network(scale=scale), x.double() - eps, x.double() + eps)
    assert (found.lower.double() <= lower).all() and (upper <= found.upper.double()).all()
    if eps in (1e-3, 0.5):
        extra = (found.upper - found.lower).sum() / (plain.upper - plain.lower).sum()
        assert extra <= 1.07


def test_every_method_takes_it_and_margins_and_certify():
    net = network()
    x = torch.rand(10, 9, 9, 9)
    y = net(x).argmax(1)
    bm, region = pycert.BoundedModule(net, x[:1]), pycert.LpBall(x, 1e-6)
    for method in ("ibp", "crown-ibp", "crown", "forward"):
        outputs = net(x)
        bounds = bm.bound(region, method, precision="fast")
        assert ((bounds.lower <= outputs) & (outputs <= bounds.upper)).all()
    assert (pycert.margins(bm, region, y, "ibp", precision="fast") > 0).all()
    assert pycert.certify(bm, x, y, 1e-6, method="ibp", precision="fast").certified.all()


def test_double_precision_and_small_batches_stay_exact():
    x = torch.rand(16, 9, 9, 9)
    for dtype, count in ((torch.float64, 16), (torch.float32, 3)):
        net, inputs = network(dtype), x[:count].to(dtype)
        bm, region = pycert.BoundedModule(net, inputs[:1]), pycert.LpBall(inputs, 0.01)
        exact, fast = (bm.bound(region, "ibp", precision=name) for name in ("exact", "fast"))
        assert torch.equal(exact.lower, fast.lower) and torch.equal(exact.upper, fast.upper)


def test_gradients_are_those_of_exact_products():
    x, grads = torch.rand(12, 9, 9, 9), []
    for precision in ("exact", "fast"):
        net = network()[:1]  # behind a ReLU another width is another gradient
        bounds = pycert.BoundedModule(net, x[:1]).bound(
            pycert.LpBall(x, 0.01), "ibp", precision=precision, soundness="none"
        )
        (bounds.upper - bounds.lower).sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    for exact, fast in zip(*grads, strict=True):
        torch.testing.assert_close(fast, exact)


def test_values_beyond_bfloat16_and_flushed_subnormals():
    x = torch.full((8, 8, 3, 3), 1e-38)
    net = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False)).float()
    with torch.no_grad():
        net[0].weight.fill_(3e38)
    bm = pycert.BoundedModule(net, x[:1])
    for eps in (1e-40, 1e-38, 3.3e38):
        bounds = bm.bound(pycert.LpBall(x, eps), "ibp", precision="fast")
        reach = 3e38 * 72 * (1e-38 + eps)
        assert (bounds.upper.double() >= min(reach, 3.4e38)).all()
        assert (bounds.lower.double() <= -min(3e38 * 72 * max(eps - 1e-38, 0) * 0.999, 3.4e38)).all()
