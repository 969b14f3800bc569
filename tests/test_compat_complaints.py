"""What users of auto_LiRPA and alpha-beta-CROWN reported, through auto_LiRPA's own calls.

One test an issue, named after it (``lirpa_76``: Verified-Intelligence/auto_LiRPA#76; ``abcrown_46``:
Verified-Intelligence/alpha-beta-CROWN#46). Issues about installation, attacks and file formats are not bounds.
"""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

import pycert
from pycert.compat.auto_LiRPA import (
    BoundedModule,
    BoundedParameter,
    BoundedTensor,
    CrossEntropyWrapper,
    PerturbationLpNorm,
)
from pycert.compat.auto_LiRPA.utils import get_spec_matrix

METHODS = ("IBP", "CROWN-IBP", "CROWN", "alpha-CROWN")


def points(x: torch.Tensor, ptb: PerturbationLpNorm, count: int = 64) -> torch.Tensor:
    """Random points and corners of a perturbation, ``[count, B, *in]``, float64."""
    generator = torch.Generator().manual_seed(0)
    x = x.double()
    noise = 2 * torch.rand(count, *x.shape, generator=generator, dtype=torch.float64) - 1
    noise[::2] = noise[::2].sign()
    if ptb.norm == math.inf:
        lower, upper = (end.double() for end in ptb.box(x))
        return lower + (noise + 1) / 2 * (upper - lower)
    size = noise.flatten(2).norm(ptb.norm, dim=2).view(count, -1, *[1] * (x.dim() - 1))
    eps = torch.as_tensor(ptb.eps, dtype=torch.float64).reshape(-1, *[1] * (x.dim() - 1))
    return x + noise / size * eps


def assert_holds(net: nn.Module, x: torch.Tensor, ptb: PerturbationLpNorm, methods=METHODS, **options):
    """Executions at points of the region lie within every method's bounds; returns the last bounds."""
    net = net.double().eval()
    x = x.double()
    for name in ("x_L", "x_U"):
        end = getattr(ptb, name)
        setattr(ptb, name, None if end is None else end.double())
    module = BoundedModule(net, x, bound_opts=options)
    with torch.no_grad():
        executed = torch.stack([net(point) for point in points(x, ptb)])
        for method in methods:
            lower, upper = module.compute_bounds(x=(BoundedTensor(x, ptb),), method=method)
            slack = 1e-9 * (1 + executed.abs())
            assert lower.isfinite().all(), method
            assert upper.isfinite().all(), method
            assert (lower - slack <= executed).all(), method
            assert (executed <= upper + slack).all(), method
    return lower, upper


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


@pytest.mark.parametrize("method", METHODS)
def test_abcrown_103_no_execution_leaves_the_bounds(method):
    """Unsat although a counterexample passes by 1.9: here PGD looks for one, on a net with every odd part."""
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 36, 3),
        )
    ).double()
    x = image(2, 2, 6, 6).double()
    module = BoundedModule(net, x)
    lower, upper = module.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(eps=0.1)),), method=method)
    for sign in (1, -1):
        for output in range(3):
            point = x.clone()
            for _ in range(20):
                point = point.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(sign * net(point)[:, output].sum(), point)
                point = (point + 0.02 * gradient.sign()).clamp(x - 0.1, x + 0.1)
            value = net(point)[:, output]
            assert (lower[:, output] - 1e-9 <= value).all()
            assert (value <= upper[:, output] + 1e-9).all()


def test_abcrown_83_options_change_no_validity():
    """Unsound under a configuration: bounds hold under each."""
    net = seeded(
        lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))
    )
    for options in (
        {"conv_mode": "matrix", "sparse_intermediate_bounds": False},
        {"activation_bound_option": "same-slope"},
        {"activation_bound_option": "one-lb"},
        {"compare_crown_with_ibp": True},
        {"optimize_bound_args": {"use_shared_alpha": True, "iteration": 5}},
    ):
        assert_holds(net, image(3, 5), PerturbationLpNorm(eps=0.5), **options)


@pytest.mark.parametrize("limit", ["2MiB"])
def test_abcrown_46_58_17_crown_keeps_to_a_memory_budget(limit):
    """Out of memory where all rows of a layer are held at once: rows go in chunks, with the same bounds."""
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 144, 10),
        )
    )  # fmt: skip
    x = image(1, 1, 12, 12)
    with torch.no_grad():
        found = [
            BoundedModule(net, x, bound_opts=options).compute_bounds(
                x=(BoundedTensor(x, PerturbationLpNorm(eps=0.05)),), method="CROWN"
            )[0]
            for options in ({}, {"memory": limit})
        ]
    assert torch.allclose(*found, atol=1e-5)


def test_lirpa_43_time_on_deep_graphs_is_polynomial():
    """x = x + f(x), thirty times: walks over all paths would take 2^30 steps."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(30))

        def forward(self, x):
            for layer in self.layers:
                x = x + 0.1 * torch.relu(layer(x))
            return x

    net, x = seeded(Deep), image(1, 4)
    start = time.monotonic()
    assert_holds(net, x, PerturbationLpNorm(eps=0.01), ("IBP", "CROWN"))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("pool", [(3, 2, 1), (3, 1, 0), (2, 3, 0), ((3, 2), (2, 1), 0)], ids=str)
def test_lirpa_76_max_pool_whose_kernel_is_not_its_stride(pool):
    kernel, stride, padding = pool
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(kernel, stride, padding), nn.Flatten())
    size = net(torch.zeros(1, 1, 10, 9)).shape[1]
    assert_holds(
        seeded(lambda: nn.Sequential(net, nn.Linear(size, 2))),
        image(2, 1, 10, 9),
        PerturbationLpNorm(eps=0.2),
    )


def test_lirpa_90_alpha_crown_with_two_max_pools():
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3),
        )
    )  # fmt: skip
    assert_holds(net, image(2, 1, 8, 8), PerturbationLpNorm(eps=0.1))


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_lirpa_64_gelu(form):
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(approximate=form), nn.Linear(8, 3)))
    assert_holds(net, image(3, 4), PerturbationLpNorm(eps=0.7))


@pytest.mark.parametrize("size", [(50, 40), (6, 13)], ids=str)
def test_lirpa_81_73_inputs_that_are_not_square(size):
    net = nn.Sequential(
        nn.Conv2d(1, 2, 5, stride=3),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
    )
    count = net(torch.zeros(1, 1, *size)).shape[1]
    net = seeded(lambda: nn.Sequential(net, nn.Linear(count, 3)))
    assert_holds(net, image(1, 1, *size), PerturbationLpNorm(eps=0.05), ("IBP", "CROWN-IBP", "CROWN"))


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_lirpa_67_only_some_elements_are_perturbed(moved):
    net = seeded(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    )
    x = image(2, 6)
    upper = x.clone()
    upper[:, :moved] += 0.4
    lower, top = assert_holds(net, x, PerturbationLpNorm(x_L=x, x_U=upper), (*METHODS, "forward"))
    if moved == 0:
        assert torch.allclose(lower, top, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-3, 0.1, 10.0])
def test_lirpa_42_49_alpha_crown_at_every_radius(eps):
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3)
        )
    )
    assert_holds(net, image(3, 1, 6, 6), PerturbationLpNorm(eps=eps), ("alpha-CROWN",))


def test_lirpa_94_products_with_a_constant_matrix():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("left", torch.randn(5, 3))
            self.register_buffer("right", torch.randn(4, 2))

        def forward(self, x):  # [B, 3, 4]
            return torch.relu(torch.matmul(self.left, x)) @ self.right

    assert_holds(seeded(Net), image(2, 3, 4), PerturbationLpNorm(eps=0.2))


@pytest.mark.parametrize("norm", [1, 2, 3])
def test_lirpa_29_radii_per_sample_for_every_norm(norm):
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    x, eps = image(3, 5), torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64)
    methods = ("IBP", "CROWN-IBP", "CROWN")
    together = assert_holds(net, x, PerturbationLpNorm(norm=norm, eps=eps), methods)
    for sample, radius in enumerate(eps):
        ptb = PerturbationLpNorm(norm=norm, eps=float(radius))
        alone = assert_holds(net, x[sample : sample + 1], ptb, methods)
        assert torch.allclose(together[0][sample], alone[0][0], atol=1e-6)
        assert torch.allclose(together[1][sample], alone[1][0], atol=1e-6)


def test_lirpa_47_l2_local_lipschitz_constants():
    """Infinity only, there; here a bound of the l_2 constant holds for Jacobians at points of the ball."""
    net = seeded(
        lambda: nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    )
    x, eps = image(3, 5), 0.3
    bound = pycert.lipschitz.local_bound(pycert.BoundedModule(net, x), pycert.LpBall(x, eps, p=2), p=2)
    constant = torch.as_tensor(bound if isinstance(bound, torch.Tensor) else bound.value)
    for point in points(x, PerturbationLpNorm(norm=2, eps=eps), 16).float():
        for sample in range(3):
            jacobian = torch.autograd.functional.jacobian(net, point[sample])
            assert torch.linalg.matrix_norm(jacobian, 2) <= constant[sample] * (1 + 1e-5)


def test_lirpa_91_perturbed_weights_of_conv_and_batch_norm_are_refused_by_name():
    for build, name in ((lambda: nn.Conv2d(1, 2, 3), "conv"), (lambda: nn.BatchNorm2d(2), "norm")):
        layers = {"conv": nn.Conv2d(1, 2, 3), "norm": nn.BatchNorm2d(2), name: build()}
        net = nn.Sequential()
        for key, layer in layers.items():
            net.add_module(key, layer)
        weight = getattr(net, name).weight.data
        getattr(net, name).weight = BoundedParameter(weight, PerturbationLpNorm(eps=0.1))
        with pytest.raises(NotImplementedError, match=rf"'{name}\.weight'"):
            BoundedModule(net, torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("bound", ["IBP", "CROWN-IBP"])
def test_fast_certified_training_6_training_with_l2_balls(bound):
    """Steps on l_2 balls lower the certified loss."""
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
    )
    x, labels = image(12, 1, 6, 6), torch.arange(12) % 3
    module = BoundedModule(net, x)
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        lower, _ = module.compute_bounds(
            x=(BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.05)),),
            C=get_spec_matrix(x, labels, 3), method=bound, bound_upper=False,
        )  # fmt: skip
        loss = torch.log1p((-lower).exp().sum(1)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_abcrown_16_addition_of_two_linear_layers():
    """a(x) + b(x) is one linear layer, and its bounds are exact."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
            self.last = nn.Linear(6, 2)

        def forward(self, x):
            return self.last(torch.relu(self.a(x) + self.b(x)))

    net, x = seeded(Sum), image(2, 4)
    assert_holds(net, x, PerturbationLpNorm(eps=0.3))
    module = BoundedModule(net, x.double())
    x_bounded = BoundedTensor(x.double(), PerturbationLpNorm(eps=0.3))
    module.compute_bounds(x=(x_bounded,), method="CROWN")
    node = module.relus[0].inputs[0]
    weight = net.a.weight + net.b.weight
    exact = net.a(x.double()) + net.b(x.double()) - 0.3 * weight.abs().sum(1)
    unstable = (node.lower < 0) & (node.upper > 0)
    assert unstable.any()
    assert torch.allclose(node.lower[unstable], exact[unstable])


def test_lirpa_63_no_nan_from_clamped_and_huge_values():
    net = seeded(
        lambda: nn.Sequential(
            nn.Linear(3, 6), nn.Hardtanh(-0.1, 0.1), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
        )
    )
    for eps in (0.0, 1e-30, 1.0, 1e20):
        assert_holds(net, image(2, 3), PerturbationLpNorm(eps=eps))
    wide = CrossEntropyWrapper(seeded(lambda: nn.Linear(3, 4)))
    labels = torch.tensor([0, 3])
    module = BoundedModule(wide, (image(2, 3), labels), bound_opts={"loss_fusion": True})
    x = BoundedTensor(image(2, 3), PerturbationLpNorm(eps=500.0))
    _, upper = module.compute_bounds(x=(x, labels), method="CROWN-IBP", bound_lower=False)
    exp = next(node for node in module.nodes() if type(node).__name__ == "BoundExp")
    assert (upper.log() + exp.max_input).isfinite().all()


def test_lirpa_16_residual_networks_with_batch_norm_train():
    """A residual block in training mode: finite gradients, and statistics of the clean batch."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
            self.last = nn.Linear(2 * 25, 3)

        def forward(self, x):
            return self.last((x + torch.relu(self.norm(self.conv(x)))).flatten(1))

    net, x = seeded(Block), image(4, 2, 5, 5)
    module = BoundedModule(net, x)
    module.train()
    lower, upper = module.compute_bounds(
        x=(BoundedTensor(x, PerturbationLpNorm(eps=0.01)),), method="CROWN-IBP"
    )
    out = module(x)
    assert (lower <= out + 1e-5).all()
    assert (out <= upper + 1e-5).all()
    (upper - lower).sum().backward()
    assert all(value.grad.isfinite().all() for value in net.parameters() if value.grad is not None)
    assert net.norm.weight.grad.abs().sum() > 0
