"""Training through Lipschitz bounds: its values, gradients, losses and warm starts; the activations made for it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pycert
from pycert import lipschitz
from pycert.nn import ClippedMaxMin, GroupSort, Householder, MaxMin, ReLUTheta, SmoothMaxMin, SmoothRamp
from pycert.train import losses
from pycert.train.losses import bcp_loss, gloro_loss, project_thresholds, worst_logits


def net_of(kind: str, dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    activation = {
        "relu": lambda *shape: nn.ReLU(),
        "theta": lambda *shape: ReLUTheta(shape, 0.4),
        "maxmin": lambda *shape: MaxMin(),
        "clipped": lambda *shape: ClippedMaxMin(shape, -0.2, 0.3),
    }[kind]
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), activation(4, 6, 6), nn.Conv2d(4, 2, 4, 2, 1), activation(2, 3, 3), nn.Flatten(),
        nn.Linear(18, 8), activation(8), nn.Linear(8, 3),
    ).to(dtype)  # fmt: skip


def reference(net: nn.Sequential, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
    """Worst logits of relu and theta networks in plain torch, with exact norms by SVD and the last layer by bisection."""
    layers = list(net)
    mu, lower, upper = x, x - eps.view(-1, 1, 1, 1), x + eps.view(-1, 1, 1, 1)
    radius, live = eps, None
    position = 0
    while position < len(layers) - 1:
        layer = layers[position]
        if isinstance(layer, nn.Flatten):
            mu, lower, upper = (t.flatten(1) for t in (mu, lower, upper))
            live = live.flatten(1)
            position += 1
            continue
        absolute = type(layer).__new__(type(layer))
        absolute.__dict__ = dict(layer.__dict__)
        absolute._parameters = {"weight": nn.Parameter(layer.weight.detach().abs()), "bias": None}
        middle, half = layer((lower + upper) / 2), absolute((upper - lower) / 2)
        z = layer(mu)
        ball = radius.view(-1, *[1] * (z.dim() - 1)) * layer.weight.flatten(1).norm(dim=1).view(
            -1, *[1] * (z.dim() - 2)
        )
        low, high = torch.maximum(middle - half, z - ball), torch.minimum(middle + half, z + ball)
        activation = layers[position + 1]
        rows = high > 0
        if isinstance(activation, ReLUTheta):
            rows = rows & (low < activation.theta)
        count = mu[0].numel()
        basis = torch.eye(count, dtype=x.dtype).view(count, *mu.shape[1:])
        matrix = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).t()
        sigma = []
        for b in range(len(x)):
            masked = matrix * rows[b].flatten()[:, None]
            masked = masked if live is None else masked * live[b].flatten()
            sigma.append(torch.linalg.matrix_norm(masked, 2))
        radius, live = radius * torch.stack(sigma), rows
        mu, lower, upper = activation(z), activation(low), activation(high)
        position += 2
    weight, out = layers[-1].weight, layers[-1](mu)
    worst = out.clone()
    for b in range(len(x)):
        for j in range(3):
            if j == y[b]:
                continue
            w = weight[j] - weight[y[b]]
            a, c = torch.zeros(()).double(), torch.tensor(1e9).double()
            for _ in range(200):
                t = (a + c) / 2
                d = torch.minimum(torch.maximum(t * w, lower[b] - mu[b]), upper[b] - mu[b])
                a, c = (t, c) if d.norm() <= radius[b] else (a, t)
            worst[b, j] += (w * d).sum()
    return worst.detach()


@pytest.mark.parametrize("kind", ["relu", "theta"])
def test_worst_logits_are_those_of_the_paper(kind):
    net, x, y = net_of(kind), torch.rand(3, 1, 6, 6).double(), torch.tensor([0, 2, 1])
    for eps in (torch.full((3,), 0.05).double(), torch.tensor([0.2, 0.4, 1.0]).double()):
        found = worst_logits(net, x, y, eps, steps=3000)
        assert torch.allclose(found.worst, reference(net, x, y, eps), rtol=1e-5, atol=1e-7)
        assert torch.allclose(found.clean, net(x))


@pytest.mark.parametrize("bound", ["local", "global"])
@pytest.mark.parametrize("kind", ["relu", "theta", "maxmin", "clipped"])
def test_gradients_are_those_of_differences(kind, bound):
    net, x, y = net_of(kind), torch.rand(2, 1, 6, 6).double(), torch.tensor([0, 2])
    eps = torch.tensor([0.1, 0.3]).double()

    def loss() -> Tensor:
        torch.manual_seed(0)
        worst = worst_logits(net, x, y, eps, bound=bound, steps=300)
        return bcp_loss(worst, y, 0.3) + gloro_loss(worst, y) + gloro_loss(worst, y, "trades", 2.0)

    loss().backward()
    for parameter in net.parameters():
        gradient, flat = parameter.grad.view(-1), parameter.data.view(-1)
        for k in range(0, flat.numel(), max(1, flat.numel() // 2)):
            value = flat[k].item()
            ends = []
            for step in (1e-6, -1e-6):
                flat[k] = value + step
                ends.append(loss().item())
            flat[k] = value
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient[k].item(), abs=2e-5)


@pytest.mark.parametrize("kind", ["relu", "theta", "maxmin", "clipped"])
def test_worst_logits_bound_every_point_once_converged(kind):
    net, x, y = net_of(kind), torch.rand(4, 1, 6, 6).double(), torch.tensor([0, 2, 1, 1])
    for eps in (0.05, 0.5):
        local, everywhere = (worst_logits(net, x, y, eps, bound=b, steps=1000) for b in ("local", "global"))
        assert (local.radius <= everywhere.radius * (1 + 1e-6)).all()
        for worst in (local, everywhere):
            for _ in range(30):
                d = torch.randn_like(x)
                point = x + eps * d / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                gap = net(point) - net(point).gather(1, y[:, None])
                assert (gap <= worst.worst - worst.worst.gather(1, y[:, None]) + 1e-9).all()


def test_the_bound_trained_with_is_near_the_certified_one():
    net = net_of("theta", torch.float32)
    bm = pycert.BoundedModule(net, torch.empty(1, 1, 6, 6))
    x, y = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    worst = worst_logits(net, x, y, 0.1, steps=2000)
    others = ~F.one_hot(y, 3).bool()
    estimated = (worst.clean.gather(1, y[:, None]) - worst.worst)[others].view(4, 2)
    proved = pycert.margins(bm, pycert.LpBall(x, 0.1, 2), y, method="lipschitz")
    # The engine is a little tighter at borders, where a filter reads fewer pixels; its norms are a little larger.
    assert ((proved - estimated).abs() <= 0.02 * (estimated.abs() + 1)).all()


def test_losses_by_hand():
    worst = losses.WorstLogits(
        torch.tensor([[2.0, 0, 1]]), torch.tensor([[2.0, 1, 3]]), torch.ones(1), [], []
    )
    y = torch.tensor([0])
    clean, robust = (F.cross_entropy(t, y) for t in (worst.clean, worst.worst))
    assert bcp_loss(worst, y, 0.25) == 0.25 * clean + 0.75 * robust
    extended = torch.tensor([[2.0, 0, 1, 3]])
    assert gloro_loss(worst, y) == F.cross_entropy(extended, y)
    p, q = worst.clean.softmax(1), extended.softmax(1)[:, :3]
    assert gloro_loss(worst, y, "trades", 0.5).item() == pytest.approx(
        clean.item() + 0.5 * (p * (p / q).log()).sum().item(), rel=1e-5
    )
    assert gloro_loss(worst, y, reduction="none").shape == (1,)


def test_sparsity_pushes_neurons_out():
    net = net_of("theta", torch.float32)
    x, y = torch.rand(8, 1, 6, 6), torch.randint(0, 3, (8,))
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    live = []
    for _ in range(60):
        found = worst_logits(net, x, y, 0.02, sparsity=0.1)
        live.append(float(sum(found.live)))
        optimizer.zero_grad()
        found.sparsity.backward()
        optimizer.step()
        project_thresholds(net)
    assert live[-1] < live[0] - 0.3
    assert all((m.theta >= 0).all() for m in net.modules() if isinstance(m, ReLUTheta))


def test_warm_starts_are_kept_by_sample(tmp_path):
    net, x, y = net_of("relu", torch.float32), torch.rand(6, 1, 6, 6), torch.randint(0, 3, (6,))
    exact = worst_logits(net, x, y, 0.1, steps=1000).radius
    for path in (None, tmp_path / "starts"):
        for dtype in (torch.float16, torch.float32):
            store = losses.WarmStarts(net, x[:1], 6, dtype, path)
            numbers = 36 + 144 + 18
            assert store.nbytes == 6 * numbers * (2 if dtype == torch.float16 else 4)
            assert "6 samples, 3 layers" in repr(store) and "GB" in repr(store)
            for _ in range(60):
                index = torch.randperm(6)[:4]
                found = worst_logits(net, x[index], y[index], 0.1, steps=1, starts=store.take(index))
                store.put(index, found.starts)
            index = torch.arange(6)
            warm = worst_logits(net, x, y, 0.1, steps=1, starts=store.take(index)).radius
            assert torch.allclose(warm, exact, rtol=0.06)


def test_a_store_that_does_not_fit_is_refused_before_it_is_made(monkeypatch, tmp_path):
    net, x = net_of("relu"), torch.rand(1, 1, 6, 6, dtype=torch.float64)
    monkeypatch.setattr(losses, "free_bytes", lambda: 1000)
    with pytest.raises(
        MemoryError, match=r"WarmStarts: 0\.0 GB for 6 samples, .* keep them in files \(path=\)"
    ):
        losses.WarmStarts(net, x, 6)
    assert losses.WarmStarts(net, x, 6, path=tmp_path).nbytes > 1000


def test_what_training_does_not_cover_is_refused():
    x, y = torch.rand(2, 4), torch.zeros(2, dtype=torch.int64)
    for net, message in (
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), "got Tanh"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "ends in a Linear"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), "affine layer before ReLU"),
    ):
        with pytest.raises(ValueError, match=message):
            worst_logits(net, x, y, 0.1)
    with pytest.raises(ValueError, match="bound must be one of 'local', 'global', got 'loc'"):
        worst_logits(nn.Sequential(nn.Linear(4, 2)), x, y, 0.1, bound="loc")


ACTIVATIONS = {
    "theta": lambda: ReLUTheta((8,), 0.3),
    "clipped": lambda: ClippedMaxMin((8,), -0.1, 0.2),
    "maxmin": MaxMin,
    "groupsort": GroupSort,
    "smooth maxmin": SmoothMaxMin,
    "softplus ramp": lambda: SmoothRamp("softplus"),
    "gelu ramp": lambda: SmoothRamp("gelu"),
    "householder": lambda: Householder(8, 0.6),
}


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_are_one_lipschitz(name):
    activation = ACTIVATIONS[name]().double()
    torch.manual_seed(0)
    for scale in (0.01, 1.0, 100.0):
        x = torch.randn(300, 8).double() * scale
        y = x + torch.randn(300, 8) * scale * torch.rand(300, 1)
        assert ((activation(x) - activation(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("method", ["ibp", "crown", "forward", "lipschitz"])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_are_bounded_by_every_method(name, method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), ACTIVATIONS[name](), nn.Linear(8, 2))
    bm = pycert.BoundedModule(net, torch.empty(1, 3))
    x = torch.rand(4, 3)
    for eps in (1e-4, 0.1, 1.0):
        lower, upper = bm.bound(pycert.LpBall(x, eps, 2), method=method)
        for _ in range(60):
            d = torch.randn(4, 3)
            value = net(x + eps * (1 - 1e-5) * d / d.norm(dim=1, keepdim=True))
            assert (lower <= value).all() and (value <= upper).all()


@pytest.mark.parametrize("name", ["maxmin", "groupsort", "smooth maxmin", "householder"])
def test_known_activations_add_nothing_to_the_product(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), ACTIVATIONS[name](), nn.Linear(8, 2))
    bm = pycert.BoundedModule(net, torch.empty(1, 3))
    product = math.prod(torch.linalg.matrix_norm(net[i].weight.double(), 2).item() for i in (0, 2))
    assert lipschitz.global_bound(bm).value == pytest.approx(product, rel=5e-3)
    region = pycert.LpBall(torch.rand(2, 3), 0.1, 2)
    assert (lipschitz.local_bound(bm, region) <= product * 1.003).all()


def test_a_block_called_twice_is_taken_apart():
    """Its nodes cannot be told from each other by their paths, so nothing is assumed of them."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(3, 4), nn.Linear(4, 4), SmoothMaxMin()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.b(self.act(self.a(x)))) * 3

    net = Twice()
    bm = pycert.BoundedModule(net, torch.empty(1, 3))
    region = pycert.LpBall(torch.rand(2, 3), 0.1, 2)
    local = lipschitz.local_bound(bm, region)
    for b in range(2):
        jacobian = torch.func.jacrev(lambda z: net(z[None])[0])(region.x[b])
        assert torch.linalg.matrix_norm(jacobian, 2) <= local[b]


def test_householder_reflects():
    activation = Householder(2, math.pi / 2)  # v = (0, 1): what lies below the axis is mirrored above
    z = torch.tensor([[0.3, 0.5], [0.3, -0.5]])
    assert torch.allclose(activation(z), torch.tensor([[0.3, 0.5], [0.3, 0.5]]), atol=1e-6)
    x = torch.randn(50, 2)
    assert torch.allclose(activation(x).norm(dim=1), x.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReLUTheta((3,), -1.0), "theta must be nonnegative, got -1.0"),
        (lambda: ClippedMaxMin((3,)), "even number of channels"),
        (lambda: ClippedMaxMin((4,), 1.0, 0.0), "low must not exceed high"),
        (lambda: SmoothMaxMin(0.0), "width must be positive and finite, got 0.0"),
        (lambda: SmoothRamp("silu"), "kind must be one of 'softplus', 'gelu', got 'silu'"),
        (lambda: Householder(3), "channels must be even and positive, got 3"),
        (
            lambda: losses.WarmStarts(net_of("relu"), torch.rand(1, 1, 6, 6), 0),
            "count must be at least 1, got 0",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def recipe():
    path = Path(__file__).parents[1] / "recipes" / "lipschitz.py"
    spec = importlib.util.spec_from_file_location("lipschitz_recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bound", ["local", "global"])
def test_the_recipe_writes_as_it_goes_and_resumes(bound, tmp_path, monkeypatch):
    """Stopped after two of four steps and started again, it ends with the weights of an uninterrupted run."""
    made = recipe()
    monkeypatch.setitem(made.NETWORKS, "mnist", ([(4, 4, 4, 0)], [8, 3]))
    torch.manual_seed(0)
    x, y = torch.rand(40, 1, 8, 8), torch.randint(0, 3, (40,))
    command = [
        "lipschitz.py",
        "mnist",
        "--data",
        "none.npz",
        "--bound",
        bound,
        "--steps",
        "4",
        "--batch",
        "8",
    ]
    monkeypatch.setattr(made, "load", lambda *_: (x, y, x[:6], y[:6]))
    flushing = torch.set_flush_denormal

    def run(out: Path) -> dict:
        monkeypatch.setattr(sys, "argv", [*command, "--no-store", "--out", str(out)])
        made.main()
        return json.loads(out.read_text())

    whole = run(tmp_path / "whole.json")
    update, count = made.update, []

    def stopping(*arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(made, "update", stopping)
    monkeypatch.setattr(made, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts.json")
    assert len(json.loads((tmp_path / "parts.json").read_text())["history"]) == 2
    parts = run(tmp_path / "parts.json")
    flushing(False)
    assert [one["step"] for one in parts["history"]] == [0, 1, 2, 3] and len(count) == 5
    for key in ("clean", "pgd", "certified", "certified_global", "curve", "layers", "global_constant"):
        assert parts[key] == whole[key], key
    assert (
        parts["certified_global"] <= parts["certified"] + 1e-6 <= parts["pgd"] + 2e-6 <= parts["clean"] + 3e-6
    )
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)


PUBLISHED = [
    ("mnist", "theta", (1, 28, 28)), ("cifar", "theta", (3, 32, 32)), ("cifar", "maxmin", (3, 32, 32)),
    ("tiny", "theta", (3, 64, 64)), ("tiny", "maxmin", (3, 64, 64)),
]  # fmt: skip


@pytest.mark.parametrize(
    "name,activation,shape",
    [pytest.param(*one, marks=pytest.mark.slow) if one[0] == "tiny" else one for one in PUBLISHED],
)
def test_recipes_train_the_published_networks(name, activation, shape, tmp_path, capsys):
    """Four steps of every recipe, in place of its epochs, from the store in files."""
    made = recipe()
    torch.manual_seed(0)
    plan = made.schedule(name, activation)
    net = made.build(name, activation, plan.theta, shape)
    affine = [type(m).__name__ for m in net if isinstance(m, (nn.Conv2d, nn.Linear))]
    convolutions, dense = {"mnist": (4, 3), "cifar": (6, 2), "tiny": (8, 2)}[name]
    assert affine == ["Conv2d"] * convolutions + ["Linear"] * dense
    classes = 200 if name == "tiny" else 10
    x, y = torch.rand(3, *shape), torch.tensor([0, 1, classes - 1])
    arguments = argparse.Namespace(
        out=tmp_path / "out.json", bound="local", store=True, store_folder=tmp_path / "starts", steps=4, batch=2,
        seed=0, clip=None, decay=1.0, evaluate=False)  # fmt: skip
    before = [parameter.detach().clone() for parameter in net.parameters()]
    progress = made.train(net, x, y, plan, arguments, {})
    printed = capsys.readouterr().out
    layers = convolutions + dense - 1
    assert f"WarmStarts(3 samples, {layers} layers, float16, " in printed
    history = progress.history
    assert [one["eps"] for one in history] == [
        plan.train_eps * made.share_of_ramp(k / 4, plan) for k in range(4)
    ]
    assert all(math.isfinite(one["loss"]) and len(one["live"]) in (layers, layers - 1) for one in history)
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters())]
    assert sum(moved) >= 2 * len(affine)  # weights and biases; thresholds that nothing reaches stay
    kept = [path.stat().st_size for path in sorted((tmp_path / "starts").iterdir())]
    shapes = losses.warm_start_shapes(net, x[:1])
    own = range(layers) if plan.local_layers is None else plan.local_layers
    assert kept == [2 * math.prod(one) * (3 if k in own else 1) for k, one in enumerate(shapes)]


def test_schedules_are_the_published_ones():
    """From the scripts of Huang et al.: epochs, radii, iterations, learning rates, thresholds."""
    made = recipe()
    plans = {(name, kind): made.schedule(name, kind) for name, kind, _ in PUBLISHED}
    assert [(p.epochs, p.warm_up, p.ramp, p.power_steps, p.learning_rate, p.end_rate) for p in plans.values()] == [
        (300, 0, 150, 5, 1e-3, 5e-6), (800, 20, 400, 2, 1e-3, 1e-6), (800, 20, 400, 2, 1e-3, 1e-6),
        (250, 0, 125, 1, 2.5e-4, 5e-7), (250, 0, 125, 3, 1e-4, 5e-7)]  # fmt: skip
    cifar = plans["cifar", "theta"]
    assert made.learning_rate(424.9 / 800, cifar, 1.0) == 1e-3 > made.learning_rate(425 / 800, cifar, 1.0)
    assert made.learning_rate(799 / 800, cifar, 1.0) == pytest.approx(1e-6, rel=1e-6)
    assert [made.share_of_ramp(epoch / 800, cifar) for epoch in (0, 20, 220, 420, 800)] == [0, 0, 0.5, 1, 1]
    net = made.build("cifar", "maxmin", 2.0, (3, 32, 32))
    clipped = [layer for layer in net if isinstance(layer, ClippedMaxMin)]
    assert [round(layer.high.mean().item(), 4) for layer in clipped] == [0.1, 0.1, 0.15, 0.15, 0.2, 0.3, 1.2]
    assert [round(layer.low.mean().item(), 4) for layer in clipped] == [
        -0.1,
        -0.15,
        -0.15,
        -0.15,
        -0.2,
        -0.3,
        -1.2,
    ]
    thetas = [
        m.theta.unique().item() for m in made.build("tiny", "theta", 1.0, (3, 64, 64)) if hasattr(m, "theta")
    ]
    assert thetas == [1.0] * 9


def test_recipes_refuse_data_of_another_network(tmp_path):
    """Files of other arrays, images of another size or type, and labels that are too few are named."""
    made, shape = recipe(), (1, 28, 28)
    images, labels = np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8)
    one, train, test = (tmp_path / f"{name}.npz" for name in ("one", "train", "test"))
    np.savez(one, x_train=images, y_train=labels, x_test=images, y_test=labels)
    np.savez(train, x=images, y=labels)
    for x, y, message in (
        (images[:, :27], labels, r"images of test: need uint8 of \[N, \(1, 28, 28\)\], got torch.uint8 of \[3, 1, 27, 28\]"),
        (images.astype(np.float32), labels, "images of test: need uint8.*got torch.float32"),
        (images[:0], labels[:0], "images of test"),
        (images, labels[:2], r"labels of test: \[2\] for 3 images"),
    ):  # fmt: skip
        np.savez(test, x=x, y=y)
        with pytest.raises(ValueError, match=message):
            made.load([train, test], shape)
    with pytest.raises(
        ValueError, match="train.npz: needs the arrays x_train, y_train, x_test, y_test, has x, y"
    ):
        made.load([train], shape)
    with pytest.raises(ValueError, match="--data takes one file, or one of training and one of test, got 3"):
        made.load([train] * 3, shape)
    assert [tuple(t.shape) for t in made.load([one], shape)] == [(3, *shape), (3,)] * 2


def test_epochs_go_through_all_samples():
    made = recipe()
    epochs = [torch.cat([made.batch_of(3 * epoch + k, 11, 4, 0) for k in range(3)]) for epoch in range(2)]
    assert all(torch.equal(epoch.sort().values, torch.arange(11)) for epoch in epochs)
    assert not torch.equal(*epochs)
    x = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).view(2, 3, 6, 6) + 1
    torch.manual_seed(0)
    seen = set()
    for _ in range(200):
        for source, image in zip(x, made.augmented(x)):
            padded = F.pad(source, (4, 4, 4, 4))
            crops = [
                (dy, dx, flip)
                for dy in range(9) for dx in range(9) for flip in (0, 1)
                if torch.equal((padded.flip(2) if flip else padded)[:, dy : dy + 6, dx : dx + 6], image)
            ]  # fmt: skip
            assert crops
            seen.add(crops[0])
    assert len(seen) > 100  # of 162; images that are cut off entirely do not occur


def test_local_norms_of_some_layers(tmp_path):
    """The other layers' norms and vectors are those of the global bound; the store keeps one for all samples."""
    net, x, y = net_of("relu", torch.float32), torch.rand(5, 1, 6, 6), torch.randint(0, 3, (5,))
    norms = {}
    for local in (None, (0, 2), ()):
        found = worst_logits(net, x, y, 0.05, steps=2000, local_layers=local)
        norms[local] = found.radius
        assert [len(start) for start in found.starts] == [
            5 if local is None or k in local else 1 for k in range(3)
        ]
    everywhere = worst_logits(net, x, y, 0.05, bound="global", steps=2000)
    assert torch.allclose(norms[()], everywhere.radius, rtol=1e-4)
    assert (norms[None] <= norms[0, 2] * (1 + 1e-4)).all() and (norms[0, 2] < norms[()] * 0.999).any()
    store = losses.WarmStarts(net, x[:1], 5, torch.float32, tmp_path, (0, 2))
    assert store.nbytes == 4 * (5 * 36 + 144 + 5 * 18)
    found = worst_logits(net, x, y, 0.05, steps=2000, starts=store.take(torch.arange(5)), local_layers=(0, 2))
    store.put(torch.arange(5), found.starts)
    again = losses.WarmStarts(net, x[:1], 5, torch.float32, tmp_path, (0, 2))  # the files are taken over
    for kept, opened in zip(store.tensors, again.tensors):
        assert torch.equal(kept, opened) and kept.abs().amax() > 0
    other = losses.WarmStarts(net, x[:1], 4, torch.float32, tmp_path, (0, 2))  # another size: begun anew
    assert other.tensors[0].shape == (4, 1, 6, 6) and not other.tensors[0].any()


def test_thresholds_are_projected():
    net = nn.Sequential(ReLUTheta((2,), 1.0), ClippedMaxMin((4,), -1.0, 1.0))
    with torch.no_grad():
        net[0].theta.copy_(torch.tensor([-0.5, 2.0]))
        net[1].low.copy_(torch.tensor([0.5, -1.0]))
        net[1].high.copy_(torch.tensor([-0.1, 1.0]))
    project_thresholds(net)
    assert net[0].theta.tolist() == [0.0, 2.0]
    assert torch.allclose(net[1].low, torch.tensor([0.2, -1.0])) and torch.allclose(
        net[1].high, torch.tensor([0.2, 1.0])
    )
