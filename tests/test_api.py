"""BoundedModule and its relatives as a user meets them: life cycle, options, results and errors."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

import pycert
from pycert import _flags
from pycert.options import memory_bytes

METHODS = ("ibp", "fastlin", "crown-ibp", "crown", "forward", "alpha-crown")
SHAPE = (1, 5, 4)
CLASSES = 4


def network(seed: int = 0) -> nn.Sequential:
    """Every kind of slot: a convolution, BatchNorm statistics, linear layers; flat and curved activations."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                        nn.Linear(60, 9), nn.Tanh(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, CLASSES))  # fmt: skip
    net[1].running_mean.normal_(0, 0.1)
    net[1].running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture
def net() -> nn.Sequential:
    return network()


@pytest.fixture
def bm(net) -> pycert.BoundedModule:
    return pycert.BoundedModule(net, torch.empty(1, *SHAPE))


@pytest.fixture
def x() -> Tensor:
    return torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ball(x) -> pycert.LpBall:
    return pycert.LpBall(x, eps=0.05)


def every_method(bm: pycert.BoundedModule, region, **options) -> list[Tensor]:
    found = []
    with torch.no_grad():
        for method in METHODS:
            bounds = bm.bound(region, method=method, **options)
            found += [bounds.lower, bounds.upper]
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_fresh(bm: pycert.BoundedModule, region) -> None:
    """The bounds are those of the network as it is now, not as it was traced."""
    now = pycert.BoundedModule(bm.net, torch.empty(1, *region.lower.shape[1:], dtype=region.lower.dtype))
    assert_equal(every_method(bm, region), every_method(now, region))


# ---- life cycle -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_give_the_same_bits_and_live_on_their_own(bm, ball, way):
    expected = every_method(bm, ball)
    if way == "deepcopy":
        other = copy.deepcopy(bm)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(bm))
    else:
        buffer = io.BytesIO()
        torch.save(bm, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert_equal(every_method(other, ball), expected)
    bm.net[4].weight.data.mul_(2)
    assert_equal(every_method(other, ball), expected)
    other.net[8].bias.data.add_(1)
    assert_fresh(other, ball)


def test_a_state_dict_travels_between_bounded_modules(bm, ball):
    other = pycert.BoundedModule(network(seed=7), torch.empty(1, *SHAPE))
    other.load_state_dict(bm.state_dict())
    assert_equal(every_method(other, ball), every_method(bm, ball))


def test_every_change_of_the_network_is_seen_by_the_next_bound(bm, net, x, ball):
    before = every_method(bm, ball)
    optimiser = torch.optim.SGD(bm.parameters(), lr=0.1)
    bm.bound(ball, method="crown-ibp").upper.sum().backward()
    optimiser.step()
    assert not torch.equal(every_method(bm, ball)[0], before[0])
    assert_fresh(bm, ball)
    net.load_state_dict(network(seed=3).state_dict())
    assert_fresh(bm, ball)
    net[4].weight, net[8].bias = nn.Parameter(torch.randn(9, 60)), nn.Parameter(torch.randn(4))
    assert_fresh(bm, ball)
    net[1].running_var = torch.full((3,), 0.3)
    assert_fresh(bm, ball)
    bm.to(torch.float64)
    with pytest.raises(TypeError, match="Double.*region has Float"):
        bm.bound(ball)
    assert_fresh(bm, pycert.LpBall(x.double(), eps=0.05))


def test_a_parameter_taken_away_is_named(bm, ball):
    bm.net[8].bias = None
    with pytest.raises(
        RuntimeError, match=r"'8.bias' has changed from float(32|64) of shape \[\d+\] to None"
    ):
        bm.bound(ball)


@pytest.mark.parametrize("method", ["ibp", "crown", "forward"])
def test_a_parameter_of_another_shape_is_named(bm, net, ball, method):
    path, layer = next((path, m) for path, m in net.named_modules() if isinstance(m, nn.Linear))
    other = torch.ones(layer.out_features, layer.in_features + 1)
    kept, layer.weight.data = layer.weight.data, other
    with pytest.raises(ValueError, match=f"'{path}.weight' has shape .* make a new BoundedModule"):
        bm.bound(ball, method=method)
    layer.weight.data = kept
    layer.weight = nn.Parameter(other)
    with pytest.raises(RuntimeError, match=f"'{path}.weight' has changed from .* make a new BoundedModule"):
        bm.bound(ball, method=method)


def test_freezing_ends_gradients_and_unfreezing_returns_them(bm, ball):
    for method in METHODS:
        bm.requires_grad_(False)
        assert not bm.bound(ball, method=method).lower.requires_grad
        bm.net[4].weight.requires_grad_(True)
        bm.bound(ball, method=method).lower.sum().backward()
        assert bm.net[4].weight.grad.abs().sum() > 0 and bm.net[8].weight.grad is None
        bm.zero_grad()


def test_training_and_evaluation_mode_are_followed(bm, ball, x):
    evaluation = every_method(bm, ball)
    statistics = bm.net[1].running_mean.clone()
    bm.train()
    batch = every_method(bm, ball)
    assert not torch.equal(batch[0], evaluation[0])
    assert torch.equal(bm.net[1].running_mean, statistics)
    with pytest.raises(ValueError, match=r"certify: .*\.eval\(\)"):
        pycert.certify(bm, x, torch.zeros(5, dtype=torch.int64), eps=0.05)
    assert torch.equal(bm.net[1].running_mean, statistics)
    bm.eval()
    assert_equal(every_method(bm, ball), evaluation)


def test_threads_give_the_bits_of_one_thread(bm, ball):
    other = pycert.BoundedModule(network(seed=5), torch.empty(1, *SHAPE))
    modules = [bm, bm, other, copy.deepcopy(bm)]
    expected = [every_method(module, ball) for module in modules]
    found: list[list[Tensor]] = [[] for _ in modules]
    start = threading.Barrier(len(modules))

    def work(number: int) -> None:
        start.wait()
        for _ in range(5):
            found[number] += every_method(modules[number], ball)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(modules))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, alone in zip(found, expected, strict=True):
        assert_equal(mine, alone * 5)


def test_autocast_changes_nothing(bm, ball, x):
    class Product(nn.Module):
        """A weight that is computed at each call, by an operator that autocast would lower."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.a @ self.b).relu()

    product = pycert.BoundedModule(Product(), torch.empty(1, 6))
    small = pycert.LpBall(torch.rand(2, 6), eps=0.1)
    labels = bm(x).argmax(1)
    plain = every_method(bm, ball), every_method(product, small), pycert.certify(bm, x, labels, eps=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        cast = every_method(bm, ball), every_method(product, small), pycert.certify(bm, x, labels, eps=0.02)
        loss = bm.bound(ball, method="crown").lower.sum()
    loss.backward()
    assert_equal(cast[0] + cast[1], plain[0] + plain[1])
    assert torch.equal(cast[2].margin, plain[2].margin) and torch.equal(cast[2].correct, plain[2].correct)
    under = bm.net[0].weight.grad.clone()
    bm.zero_grad()
    bm.bound(ball, method="crown").lower.sum().backward()
    assert torch.equal(under, bm.net[0].weight.grad)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_bounds_without_gradients(bm, x, ball, context):
    expected = every_method(bm, ball)
    with context():
        inside = pycert.BoundedModule(bm.net, torch.empty(1, *SHAPE))
        region = pycert.LpBall(x.clone(), eps=0.05)
        for method, lower in zip(METHODS, expected[::2]):
            for module in (bm, inside):
                bounds = module.bound(region, method=method)
                assert torch.equal(bounds.lower, lower) and not bounds.lower.requires_grad
            assert not bm.layer_bounds(region, "crown")["4"].lower.requires_grad
    assert inside.bound(ball).lower.requires_grad


def test_functional_call_bounds_with_the_parameters_given(bm, ball):
    class Certified(nn.Module):
        def __init__(self, bm: pycert.BoundedModule, method: str) -> None:
            super().__init__()
            self.bm, self.method = bm, method

        def forward(self, region: pycert.LpBall) -> Tensor:
            return self.bm.bound(region, method=self.method).lower

    for method in METHODS:
        certified = Certified(bm, method)
        before = certified(ball).detach()
        given = {
            name: (value * 1.5).detach().requires_grad_() for name, value in certified.named_parameters()
        }
        found = torch.func.functional_call(certified, given, (ball,))
        other = copy.deepcopy(certified)
        other.load_state_dict({**certified.state_dict(), **given})
        assert torch.equal(found, other(ball))
        gradient = torch.autograd.grad(found.sum(), given["bm.net.4.weight"])[0]
        assert gradient.abs().sum() > 0
        assert torch.equal(certified(ball), before)


def test_data_parallel_networks_train_on_their_bounds(net, ball):
    expected = pycert.BoundedModule(net, torch.empty(1, *SHAPE)).bound(ball).lower.detach()
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(net)
            bm = pycert.BoundedModule(wrapped, torch.empty(1, *SHAPE))
            assert torch.equal(bm.bound(ball).lower, expected)
            bm.bound(ball, method="crown-ibp").lower.sum().backward()
            inner = pycert.BoundedModule(net, torch.empty(1, *SHAPE))
            around = nn.parallel.DistributedDataParallel(inner)
            assert torch.equal(around.module.bound(ball).lower, expected)
        finally:
            torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_the_same_call_gives_the_same_bits(bm, ball):
    assert_equal(every_method(bm, ball), every_method(bm, ball))


def test_strided_weights_specifications_and_radii_give_the_same_bounds(x):
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, CLASSES))
    bm = pycert.BoundedModule(net, torch.empty(1, *SHAPE))
    spec, eps = torch.randn(5, 3, CLASSES), torch.linspace(0.01, 0.1, 5)
    dense = every_method(bm, pycert.LpBall(x, eps=eps), spec=spec)
    for layer in (net[1], net[3]):
        layer.weight.data = layer.weight.detach().t().contiguous().t()
    strided = torch.stack([x, x], -1)[..., 0], torch.stack([eps, eps], -1)[..., 0]
    region = pycert.LpBall(strided[0], eps=strided[1])
    found = every_method(bm, region, spec=spec.transpose(1, 2).contiguous().transpose(1, 2))
    for mine, other in zip(found, dense, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


# ---- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("rows", [None, 3])
def test_linear_functions_hold_and_what_is_not_asked_for_is_none(bm, ball, x, method, rows):
    spec = None if rows is None else torch.randn(5, rows, CLASSES, generator=torch.Generator().manual_seed(2))
    count = rows or CLASSES
    with torch.no_grad():
        found = bm.bound(ball, method=method, spec=spec, return_linear=True)
        linear = found.linear
        for A, c in ((linear.A_lower, linear.c_lower), (linear.A_upper, linear.c_upper)):
            assert A.shape == (5, count, *SHAPE) and c.shape == (5, count) and A.dtype == x.dtype
        for side, other in (("lower", "upper"), ("upper", "lower")):
            part = bm.bound(ball, method=method, spec=spec, return_linear=True, side=side)
            assert getattr(part, other) is None
            assert getattr(part.linear, f"A_{other}") is None and getattr(part.linear, f"c_{other}") is None
            for name in ("A", "c"):
                torch.testing.assert_close(
                    getattr(part.linear, f"{name}_{side}"), getattr(linear, f"{name}_{side}")
                )
        net = copy.deepcopy(bm.net).double()
        for _ in range(20):
            point = (x + 0.05 * (2 * torch.rand_like(x) - 1)).clamp(ball.lower, ball.upper).double()
            value = net(point) if spec is None else torch.einsum("bsn,bn->bs", spec.double(), net(point))
            low, high = (
                (A.double() * point.unsqueeze(1)).flatten(2).sum(2) + c.double()
                for A, c in ((linear.A_lower, linear.c_lower), (linear.A_upper, linear.c_upper))
            )
            assert (low <= value).all() and (value <= high).all()


def test_linear_functions_need_a_method_that_has_them(bm, ball):
    with pytest.raises(ValueError, match="return_linear needs a method with linear bounds, not 'ibp'"):
        bm.bound(ball, method="ibp", return_linear=True)
    assert bm.bound(ball).linear is None


@pytest.mark.parametrize("method", METHODS[1:])
def test_several_inputs_have_a_linear_function_each(method):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 7), nn.Conv2d(1, 7, (2, 3)), nn.Linear(7, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.c((self.a(first) + self.b(second).flatten(1)).relu())

    torch.manual_seed(0)
    net, first, second = Two(), torch.rand(4, 6), torch.rand(4, 1, 2, 3)
    bm = pycert.BoundedModule(net, (first[:1], second[:1]))
    for width in (0.0, 0.1):  # the second input constant, and not
        regions = (pycert.LpBall(first, eps=0.2, p=2), pycert.Box(second, second + width))
        with torch.no_grad():
            found = bm.bound(regions, method=method, return_linear=True)
            assert [tuple(A.shape) for A in found.linear.A_lower] == [(4, 3, 6), (4, 3, 1, 2, 3)]
            move = nn.functional.normalize(torch.randn(4, 6), dim=1) * 0.19
            points = first + move, second + width * torch.rand_like(second)
            value = net(*points)
            assert (found.lower <= value).all() and (value <= found.upper).all()
            low = sum((A * p.unsqueeze(1)).flatten(2).sum(2) for A, p in zip(found.linear.A_lower, points))
            assert (low + found.linear.c_lower <= value + 1e-5).all()
    with pytest.raises(ValueError, match="2 inputs, got 1 regions"):
        bm.bound(regions[0], method=method)
    with pytest.raises(ValueError, match="same batch, got 4 and 2"):
        bm.bound((regions[0], pycert.Box(second[:2], second[:2])), method=method)


@pytest.mark.parametrize("method", METHODS[:4])
def test_layer_bounds_are_named_and_hold(bm, ball, x, method):
    with torch.no_grad():
        found = bm.layer_bounds(ball, method=method)
        assert list(found) == ["1", "4", "6"]
        net = copy.deepcopy(bm.net).double()
        for _ in range(10):
            point = (x + 0.05 * (2 * torch.rand_like(x) - 1)).clamp(ball.lower, ball.upper).double()
            for number, layer in enumerate(net):
                point = layer(point)
                if str(number) in found:
                    bounds = found[str(number)]
                    assert bounds.lower.shape == point.shape and bounds.soundness == "deployed"
                    assert (bounds.lower <= point).all() and (point <= bounds.upper).all()
    with pytest.raises(ValueError, match="'ibp', 'crown-ibp' or 'crown'"):
        bm.layer_bounds(ball, method="forward")
    with pytest.raises(ValueError, match="unknown option 'side'"):
        bm.layer_bounds(ball, method=method, side="lower")


def test_labels_of_every_integer_type_give_the_same_margins(bm, ball):
    labels = torch.tensor([0, 3, 1, 2, 3])
    expected = pycert.margins(bm, ball, labels)
    assert expected.shape == (5, CLASSES - 1)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(pycert.margins(bm, ball, labels.to(dtype)), expected)
    for bad in (labels.float(), labels.bool(), labels.tolist()):
        with pytest.raises(TypeError, match="y must be a tensor of integer class labels"):
            pycert.margins(bm, ball, bad)
    for bad, message in (
        (labels - 1, "classes 0 to 3, got -1 to 2"),
        (labels[:2], r"shape \[5\], got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pycert.margins(bm, ball, bad)
    with pytest.raises(ValueError, match="unknown option 'side'"):
        pycert.margins(bm, ball, labels, side="lower")
    with pytest.raises(ValueError, match="at least 2 outputs, the network has 1"):
        pycert.margins(
            pycert.BoundedModule(nn.Linear(3, 1), torch.empty(1, 3)),
            pycert.LpBall(torch.rand(1, 3), 0.1),
            labels[:1],
        )


@pytest.mark.parametrize("method", METHODS)
def test_certify(bm, x, method):
    labels = bm(x).argmax(1)
    labels[1] = (labels[1] + 1) % CLASSES  # misclassified
    eps = torch.tensor([0.001, 0.001, 0.02, 0.1, 5.0])
    found = pycert.certify(bm, x, labels, eps=eps, method=method, clip=(0, 1))
    assert found.correct.tolist() == [True, False, True, True, True]
    assert found.certified.dtype == torch.bool and found.margin.shape == (5,) and found.seconds > 0
    assert found.soundness == "deployed" and not found.margin.requires_grad
    assert torch.equal(found.certified, found.correct & (found.margin > 0))
    assert found.certified[0] and not found.certified[1] and not found.certified[4]
    assert found.margin[1] == -math.inf
    assert found.accuracy == pytest.approx(found.certified.float().mean().item())
    for batch_size in (1, 2, 100):
        other = pycert.certify(bm, x, labels, eps=eps, method=method, clip=(0, 1), batch_size=batch_size)
        assert torch.equal(other.certified, found.certified)
        torch.testing.assert_close(other.margin, found.margin, rtol=1e-4, atol=1e-5)
    alone = pycert.certify(bm, x, labels, eps=eps, method=method, clip=(0, 1), cascade=False)
    assert alone.margin[1] < 0, "without the cascade every sample is bounded"
    with torch.no_grad():
        direct = pycert.margins(bm, pycert.LpBall(x, eps, clip=(0, 1)), labels, method=method).amin(1)
    torch.testing.assert_close(alone.margin, direct, rtol=1e-5, atol=1e-6)
    assert not (alone.certified & ~found.certified).any(), "cheap methods first never lose a certificate"


def test_certify_refuses_what_does_not_fit(bm, x):
    labels = torch.zeros(5, dtype=torch.int64)
    for error, message, arguments in (
        (ValueError, "batch_size must be at least 1", dict(batch_size=0)),
        (
            ValueError,
            "unknown option 'bogus'; known are alpha, batch_size, cascade, cover",
            dict(bogus=1),
        ),
        (ValueError, "unknown option 'side'", dict(side="lower")),
        (ValueError, "did you mean 'crown'", dict(method="crwn")),
        (ValueError, "at least 0, got -0.1", dict(eps=-0.1)),
        (ValueError, r"input 0 of the network has shape \[B, 1, 5, 4\]", dict(x=x.flatten(1))),
        (TypeError, r"network's parameters \(torch.float32\), got torch.float64", dict(x=x.double())),
        (ValueError, r"y must have shape \[5\]", dict(y=labels[:4])),
    ):
        with pytest.raises(error, match=message):
            pycert.certify(bm, **{**dict(x=x, y=labels, eps=0.1), **arguments})


# ---- memory, interruption -----------------------------------------------------------------------


def test_estimates_are_positive_and_grow(bm, x):
    for method in METHODS:
        small, large = (
            bm.estimate(pycert.LpBall(x.repeat(copies, 1, 1, 1), eps=0.1), method=method)
            for copies in (1, 20)
        )
        assert small.bytes > 0 and small.flops > 0
        assert large.bytes > small.bytes and large.flops > 10 * small.flops
    region = pycert.LpBall(x, eps=0.1)
    assert bm.estimate(region, "crown").flops > bm.estimate(region, "ibp").flops
    many = bm.estimate(region, "crown-ibp", spec=torch.randn(50, CLASSES))
    assert many.flops > bm.estimate(region, "crown-ibp").flops


def test_memory_budgets_are_read():
    assert memory_bytes(5) == 5 and memory_bytes(1e9) == 10**9 and memory_bytes("3000") == 3000
    assert memory_bytes("2GiB") == 2**31 and memory_bytes(" 1.5 mib ") == 3 * 2**19
    assert memory_bytes("500MB") == 5 * 10**8 and memory_bytes(".5kb") == 500 and memory_bytes("7B") == 7
    assert memory_bytes("99999999999GiB") == 2**62
    assert memory_bytes(None) >= 2**26
    for bad in ("lots", "GiB", "1.2.3GiB", "2 TiB", "-1GiB", "", 0, -5, 0.5, math.nan):
        with pytest.raises(ValueError, match="memory must be"):
            memory_bytes(bad)
    for bad in ([1], True, b"1GiB"):
        with pytest.raises(TypeError, match="memory must be bytes or text"):
            memory_bytes(bad)


@pytest.mark.parametrize("memory", [1, "2KiB", "100KiB", "10GiB"])
def test_small_budgets_change_nothing_but_roundings(bm, ball, memory):
    spec = torch.randn(5, 6, CLASSES, generator=torch.Generator().manual_seed(0))
    for options in (dict(), dict(spec=spec)):
        for found, expected in zip(
            every_method(bm, ball, memory=memory, **options), every_method(bm, ball, **options), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for soundness in ("none", "deployed"):
            parts = bm.bound(ball, "crown", return_linear=True, memory=memory, soundness=soundness).linear
            whole = bm.bound(ball, "crown", return_linear=True, soundness=soundness).linear
            torch.testing.assert_close(parts.A_upper, whole.A_upper, rtol=1e-5, atol=1e-5)
    gradients = []
    for budget in (memory, None):
        bm.zero_grad()
        bm.bound(ball, "crown", memory=budget).lower.sum().backward()
        gradients.append(bm.net[4].weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def script(body: str, *arguments: object, timeout: float = 120) -> str:
    """What a fresh interpreter prints for ``body``, on one thread."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


WIDE = """
import os, resource, signal, sys, threading, time
import torch, pycert
torch.set_num_threads(1)
torch.manual_seed(0)
width, batch = int(sys.argv[1]), int(sys.argv[2])
layers = [layer for _ in range(3) for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())]
bm = pycert.BoundedModule(torch.nn.Sequential(*layers, torch.nn.Linear(width, 10)), torch.empty(1, width))
region = pycert.LpBall(torch.rand(batch, width), eps=0.05)
torch.set_grad_enabled(False)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc")
@pytest.mark.slow
def test_a_failed_allocation_halves_the_chunk():
    """With three quarters of the address space that the call takes (and keeps) when free, the same bounds come out."""
    body = (
        WIDE
        + """
def pages(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024
bm.bound(pycert.LpBall(region.x[:1], eps=0.05), "crown", memory="1MiB")
start, room = pages("VmSize"), int(sys.argv[3])
if room:
    resource.setrlimit(resource.RLIMIT_AS, (start + room, start + room))
bounds = bm.bound(region, "crown", memory="1GiB")
print(pages("VmSize") - start, *bounds.lower.flatten()[:5].tolist())
"""
    )
    taken, *expected = map(float, script(body, 384, 48, 0).split())
    assert taken > 2**23, "the network is too small for the test to say anything"
    limited, *found = map(float, script(body, 384, 48, int(0.75 * taken)).split())
    assert limited <= 0.75 * taken
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupts_end_long_calls_and_leave_a_working_module():
    body = (
        WIDE
        + """
sent = []
def interrupt():
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
threading.Timer(0.3, interrupt).start()
try:
    bm.bound(pycert.LpBall(region.x, eps=0.1), "crown")  # nearly every neuron unstable: minutes
    print("finished")
except KeyboardInterrupt:
    print(time.perf_counter() - sent[0])
few = pycert.LpBall(region.x[:2], eps=0.001)
lower, upper = bm.bound(few, "crown-ibp")
print(bool((lower <= bm(few.x)).all() and (bm(few.x) <= upper).all()))
"""
    )
    waited, holds = script(body, 1024, 256).split()
    assert float(waited) < 2 and holds == "True"


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="crwn"), r"'ibp', 'crown-ibp', 'fastlin', 'crown', 'alpha-crown', 'forward', 'lipschitz', 'krelu', 'lp', got 'crwn'; did you mean 'crown'"),
        (dict(method=None), r"method must be one of 'ibp'"),
        (dict(slop="zero"), r"unknown option 'slop'; known are .*memory.*slope.*spec.* Did you mean 'slope'"),
        (dict(slope="steep"), r"slope must be one of 'adaptive', 'parallel', 'zero', 'one', got 'steep'"),
        (dict(side="left"), r"side must be one of 'both', 'lower', 'upper', got 'left'"),
        (dict(soundness=True), r"soundness must be one of 'none', 'real', 'deployed', got True"),
        (dict(precision="double"), r"precision must be one of 'exact', 'fast'"),
        (dict(intersect="no"), r"intersect must be True or False, got 'no'"),
        (dict(memory="lots"), r"memory must be bytes or text such as '2GiB'"),
        (dict(memory="lots", method="ibp"), r"memory must be bytes or text such as '2GiB'"),
    ],
)  # fmt: skip
def test_options_are_checked_and_the_known_ones_named(bm, ball, options, message):
    for call in (bm.bound, bm.estimate):
        with pytest.raises(ValueError, match=message):
            call(ball, **options)


X = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pycert.LpBall(X.half(), 0.1), TypeError, "x must be float32 or float64, got torch.float16"),
        (lambda: pycert.LpBall(X.bfloat16(), 0.1), TypeError, "float32 or float64, got torch.bfloat16"),
        (lambda: pycert.LpBall(X.long(), 0.1), TypeError, "float32 or float64, got torch.int64"),
        (lambda: pycert.LpBall([1.0], 0.1), TypeError, "x must be a tensor, got list"),
        (lambda: pycert.LpBall(X[:0], 0.1), ValueError, r"x must have a batch of at least 1, got shape \(0, 1"),
        (lambda: pycert.LpBall(X, -0.1), ValueError, "eps must be finite and at least 0, got -0.1"),
        (lambda: pycert.LpBall(X, math.nan), ValueError, "eps must be finite"),
        (lambda: pycert.LpBall(X, "0.1"), TypeError, "eps must be a number or a tensor, got str"),
        (lambda: pycert.LpBall(X, torch.tensor([0.1, -1, 0])), ValueError, "at least 0, got -1"),
        (lambda: pycert.LpBall(X, torch.rand(2)), ValueError, r"have shape \[3\], got \(2,\)"),
        (lambda: pycert.LpBall(X, torch.rand(3).double()), TypeError, "eps must have the dtype"),
        (lambda: pycert.LpBall(X, 0.1, p=3), ValueError, "p must be 1, 2 or inf, got 3"),
        (lambda: pycert.LpBall(X, 0.1, p="inf"), ValueError, "p must be 1, 2 or inf, got 'inf'"),
        (lambda: pycert.LpBall(X, 0.1, clip=(1, 0)), ValueError, r"low <= high, got \(1, 0\)"),
        (lambda: pycert.LpBall(X, 0.1, clip=(0, math.nan)), ValueError, "low <= high"),
        (lambda: pycert.LpBall(X, 0.1, clip=1), TypeError, r"clip must be two numbers \(low, high\), got 1"),
        (lambda: pycert.LpBall(X, 0.1, clip=(0, 1, 2)), TypeError, "clip must be two numbers"),
        (lambda: pycert.LpBall(X, 0.1, clip=(5, 6)), ValueError, "does not meet the range"),
        (lambda: pycert.Box(X, X - 1), ValueError, r"lower must not exceed upper, but it does at \(0, 0, 0, 0\)"),
        (lambda: pycert.Box(X, X[:2]), ValueError, "same shape"),
        (lambda: pycert.Box(X, X.double()), TypeError, "same dtype and device"),
        (lambda: pycert.Box(X, X + math.inf), ValueError, "upper must be finite, got inf"),
        (lambda: pycert.Box(X * math.nan, X), ValueError, "lower must be finite, got nan"),
        (lambda: pycert.Box(X[:0], X[:0]), ValueError, "lower must have a batch of at least 1"),
    ],
)  # fmt: skip
def test_regions_are_checked_when_they_are_built(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (torch.rand(2, 5), ValueError, r"spec must have shape \[S, 4\] or \[5, S, 4\], got \[2, 5\]"),
        (torch.rand(2, 2, 4), ValueError, r"got \[2, 2, 4\]"),
        (torch.rand(4), ValueError, r"got \[4\]"),
        (torch.rand(0, 4), ValueError, "at least one row"),
        (torch.full((1, 4), math.nan), ValueError, "spec must be finite"),
        (torch.full((1, 4), math.inf), ValueError, "spec must be finite"),
        (torch.rand(2, 4).double(), TypeError, "spec must have the dtype and device of the region"),
        ([[1.0, 0, 0, 0]], TypeError, "spec must be a tensor, got list"),
    ],
)  # fmt: skip
def test_specifications_are_checked(bm, ball, spec, error, message):
    with pytest.raises(error, match=message):
        bm.bound(ball, spec=spec)


def test_regions_that_do_not_fit_the_network_are_refused(bm, x, ball):
    with pytest.raises(ValueError, match=r"shape \[B, 1, 5, 4\], got \[5, 20\]"):
        bm.bound(pycert.LpBall(x.flatten(1), 0.1))
    with pytest.raises(TypeError, match="region must be a pycert.LpBall or pycert.Box, got Tensor"):
        bm.bound(x)
    with pytest.raises(ValueError, match="has 1 inputs, got 2 regions"):
        bm.bound((ball, ball))
    for method in METHODS:
        with pytest.raises(TypeError, match="'0' has parameters of dtype Float, the region has Double"):
            bm.bound(pycert.LpBall(x.double(), 0.1), method=method)
        with pytest.raises(TypeError, match="'0' has parameters of dtype Half"):
            copy.deepcopy(bm).half().bound(ball, method=method)


def test_outputs_that_are_no_tensor_are_refused():
    class Several(nn.Module):
        def __init__(self, make) -> None:
            super().__init__()
            self.layer, self.make = nn.Linear(3, 2), make

        def forward(self, x: Tensor):
            return self.make(self.layer(x))

    for make, kind in ((lambda y: (y, y.relu()), "tuple"), (lambda y: {"scores": y}, "dict")):
        with pytest.raises(
            pycert.UnsupportedOperator, match=f"output of type {kind}.*wrap the module to choose"
        ):
            pycert.BoundedModule(Several(make), torch.empty(1, 3))
    with pytest.raises(TypeError, match="net must be a torch.nn.Module, got function"):
        pycert.BoundedModule(lambda x: x, torch.empty(1, 3))
    with pytest.raises(TypeError, match="example must be float32 or float64, got torch.float16"):
        pycert.BoundedModule(nn.Linear(3, 2).half(), torch.empty(1, 3).half())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("path", ["0.weight", "1.running_var", "4.bias", "6.weight", "8.bias"])
def test_bad_values_are_named_by_path(bm, ball, path, bad):
    """Also in front of tanh, whose range is finite whatever it reads."""
    bm.net.state_dict()[path].view(-1)[0] = bad
    for method in METHODS:
        with pytest.raises(ValueError, match=f"'{path}' has NaN or infinite values"):
            bm.bound(ball, method=method)
    if path != "8.bias":  # behind the last activation
        with pytest.raises(ValueError, match=f"'{path}' has NaN or infinite values"):
            bm.layer_bounds(ball, method="crown-ibp")


def test_huge_weights_give_infinite_bounds_and_no_nan(x):
    net = network()
    del net[5]  # tanh would bring the values back to [-1, 1]
    for parameter in net.parameters():
        parameter.data.mul_(1e25)
    bm = pycert.BoundedModule(net, torch.empty(1, *SHAPE))
    found = every_method(bm, pycert.LpBall(x, eps=0.1))
    assert not any(value.isnan().any() for value in found)
    assert all(
        (lower == -math.inf).all() or (upper == math.inf).all()
        for lower, upper in zip(found[::2], found[1::2])
    )
    with torch.no_grad():
        assert not any(b.lower.isnan().any() for b in bm.layer_bounds(pycert.LpBall(x, eps=0.1)).values())
    result = pycert.certify(bm, x, torch.zeros(5, dtype=torch.int64), eps=0.1)
    assert not result.certified.any() and not result.margin.isnan().any()


def test_uncovered_executions_are_warned_of_once_and_reported(bm, ball, monkeypatch):
    monkeypatch.setattr(_flags, "_warned", set())
    monkeypatch.setattr(_flags, "nnpack_enabled", lambda: True)
    with pytest.warns(UserWarning, match="does not cover: NNPACK convolutions"):
        first = bm.bound(ball)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = bm.bound(ball, method="ibp")
        real = bm.bound(ball, soundness="real")
    assert any("NNPACK" in phrase for phrase in first.excludes) and first.excludes == second.excludes
    assert first.soundness == "deployed" and real.soundness == "real" and real.excludes == ()
    monkeypatch.setattr(_flags, "nnpack_enabled", lambda: False)
    assert bm.bound(ball).excludes == ()


def test_bounds_with_statistics_of_a_batch_say_so():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    bm, region = pycert.BoundedModule(net, torch.empty(1, 3)), pycert.LpBall(torch.randn(4, 3), eps=0.1)
    for soundness in ("real", "deployed"):
        assert any("training mode" in text for text in bm.bound(region, soundness=soundness).excludes)
    net.eval()
    assert not any("training mode" in text for text in bm.bound(region).excludes)
