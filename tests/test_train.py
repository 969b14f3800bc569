"""Certified training: schedules, the worst-case loss, and a run that can be continued."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import pycert
from pycert import train
from pycert.attacks import pgd


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def blobs(count: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clusters in the unit square."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    centers = torch.tensor([[0.2, 0.2], [0.8, 0.2], [0.5, 0.8]])
    return (centers[y] + 0.05 * torch.randn(count, 2, generator=generator)).clamp(0, 1), y


def test_ramps_meet_their_ends_and_never_fall():
    for kind in ("linear", "smooth"):
        ramp = train.Ramp(10, 30, 0.0, 0.3, kind=kind)
        values = [ramp(step) for step in range(41)]
        assert values[:11] == [0.0] * 11
        assert values[30:] == [0.3] * 11
        assert values == sorted(values)
    assert train.Ramp(10, 20, 1.0, 0.5)(15) == 0.75
    assert train.Ramp(5, 5, 0.0, 1.0)(5) == 1.0


def test_the_smooth_ramp_has_no_kink_in_the_middle():
    below, above = (train.smooth(0.25 + shift) - train.smooth(0.25) for shift in (-1e-6, 1e-6))
    assert -below / 1e-6 == pytest.approx(above / 1e-6, rel=1e-3)
    assert train.smooth(0.05) < 0.05 / 50


@pytest.mark.parametrize(("arguments", "message"), [((0, 1, 0, 1, "cubic"), "kind"), ((2, 1, 0, 1), "end")])
def test_ramp_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.Ramp(*arguments)


def test_the_worst_case_loss_by_hand():
    loss = train.worst_case_loss(torch.tensor([[1.0, 2.0]]), reduction="none")
    expected = math.log(1 + math.exp(-1) + math.exp(-2))
    torch.testing.assert_close(loss, torch.tensor([expected]))


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_the_certified_loss_bounds_the_loss_of_every_attack(method):
    net = small_net().double()
    x, y = blobs(30)
    x = x.double()
    region = pycert.LpBall(x, eps=0.1, clip=(0, 1))
    bound = train.certified_loss(pycert.BoundedModule(net, x[:1]), region, y, method, reduction="none")
    attacked = pgd(net, region, y, loss="cross-entropy", early_stop=False).inputs
    assert (functional.cross_entropy(net(attacked), y, reduction="none") <= bound + 1e-12).all()
    bound.sum().backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in net.parameters())


@pytest.mark.parametrize("method", ["fastlin", "crown-ibp", "crown"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 2.0, 50.0])
def test_the_fused_loss_bounds_the_loss_of_every_attack(method, eps):
    net = small_net().double()
    x, y = blobs(30)
    x = x.double()
    region = pycert.LpBall(x, eps=eps)
    bm = pycert.BoundedModule(net, x[:1])
    bound = train.fused_loss(bm, region, y, method, reduction="none")
    assert bound.isfinite().all()
    corners = x + eps * (2 * torch.randint(0, 2, (50, *x.shape)) - 1)
    for inputs in (pgd(net, region, y, loss="cross-entropy", early_stop=False).inputs, *corners):
        assert (functional.cross_entropy(net(inputs), y, reduction="none") <= bound + 1e-12).all()
    torch.testing.assert_close(train.fused_loss(bm, region, y, method), bound.mean())
    if eps == 0:
        torch.testing.assert_close(bound, functional.cross_entropy(net(x), y, reduction="none"))


def test_the_fused_loss_has_the_gradient_of_differences():
    net = small_net().double()
    x, y = blobs(6)
    bm, region = pycert.BoundedModule(net, x[:1].double()), pycert.LpBall(x.double(), eps=0.1)
    train.fused_loss(bm, region, y).backward()
    for parameter in net.parameters():
        at, step = parameter.grad.abs().argmax(), 1e-6
        with torch.no_grad():
            flat = parameter.view(-1)
            kept = flat[at].clone()
            flat[at] = kept + step
            above = train.fused_loss(bm, region, y)
            flat[at] = kept - step
            below = train.fused_loss(bm, region, y)
            flat[at] = kept
        torch.testing.assert_close(
            parameter.grad.view(-1)[at], (above - below) / (2 * step), rtol=1e-4, atol=1e-8
        )


def test_the_fused_loss_names_what_it_does_not_take():
    net, (x, y) = small_net(), blobs(4)
    bm, region = pycert.BoundedModule(net, x[:1]), pycert.LpBall(x, eps=0.1)
    with pytest.raises(ValueError, match="method must be one of 'crown-ibp', 'fastlin', 'crown', got 'ibp'"):
        train.fused_loss(bm, region, y, "ibp")
    with pytest.raises(ValueError, match="reduction must be"):
        train.fused_loss(bm, region, y, reduction="max")
    with pytest.raises(ValueError, match="y must hold classes"):
        train.fused_loss(bm, region, y + 100)


def test_beta_mixes_the_margins():
    net, (x, y) = small_net(), blobs(10)
    bm, region = pycert.BoundedModule(net, x[:1]), pycert.LpBall(x, eps=0.05)
    interval, tight, mixed = (
        train.mixed_margins(bm, region, y, "crown-ibp", beta) for beta in (0.0, 1.0, 0.25)
    )
    torch.testing.assert_close(mixed, 0.75 * interval + 0.25 * tight)
    torch.testing.assert_close(interval, train.mixed_margins(bm, region, y, "ibp", 0.7))
    with pytest.raises(ValueError, match="beta must lie in"):
        train.mixed_margins(bm, region, y, "crown-ibp", 1.5)


def test_initialization_keeps_the_width_of_intervals():
    torch.manual_seed(0)
    net = nn.Sequential(
        *[layer for _ in range(8) for layer in (nn.Linear(200, 200), nn.ReLU())], nn.Linear(200, 2)
    )
    last = net[-1].weight.clone()
    train.initialize_for_ibp(net)
    bm = pycert.BoundedModule(net[:-1], torch.empty(1, 200))
    bounds = bm.bound(pycert.LpBall(torch.rand(8, 200), eps=0.01), method="ibp")
    width = (bounds.upper - bounds.lower).mean()
    assert 0.2 < width / 0.02 < 5
    assert torch.equal(net[-1].weight, last)


RECIPE = train.Recipe(
    eps=0.1,
    epochs=10,
    warmup_epochs=1,
    ramp_epochs=5,
    mix_start=6,
    mix_epochs=2,
    batch_size=20,
    learning_rate=0.02,
)


def test_training_makes_a_network_certifiable(tmp_path):
    net, (x, y) = small_net(), blobs()
    rows = train.train(net, (x, y), RECIPE, history=tmp_path / "history.jsonl", progress=False)
    bm = pycert.BoundedModule(net, x[:1])
    found = pycert.certify(bm, x, y, eps=0.1, method="crown", clip=(0, 1))
    assert found.certified.float().mean() > 0.9
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == rows
    assert [row["epoch"] for row in rows] == list(range(10))
    assert rows[0]["eps"] == 0
    assert rows[-1]["eps"] == 0.1
    assert rows[5]["beta"] == 0
    assert rows[-1]["beta"] == 0.9


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    data = blobs(60)
    whole = small_net()
    train.train(whole, data, RECIPE, progress=False)

    def stopped(run, epoch, bar, original=train.trainer._Run.epoch):
        if epoch == 4:
            raise KeyboardInterrupt
        return original(run, epoch, bar)

    files = {
        "checkpoint": tmp_path / "checkpoint.pt",
        "history": tmp_path / "history.jsonl",
        "progress": False,
    }
    parts = small_net()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.trainer._Run, "epoch", stopped)
        train.train(parts, data, RECIPE, **files)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 4
    parts = small_net()
    rows = train.train(parts, data, RECIPE, **files)
    assert len(rows) == len((tmp_path / "history.jsonl").read_text().splitlines()) == RECIPE.epochs
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="belongs to another recipe"):
        train.train(parts, data, train.Recipe(eps=0.2), **files)
    assert set(torch.load(tmp_path / "checkpoint.pt", weights_only=True)) == {
        "net",
        "optimizer",
        "order",
        "recipe",
        "rows",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs and batch_size must be >= 1"),
        ({"warmup_epochs": -1}, "must be >= 0"),
        ({"epochs": 5, "ramp_epochs": 10}, "must not exceed epochs"),
        ({"eps": -1.0}, "eps must be >= 0"),
    ],
)
def test_recipe_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.Recipe(**{"eps": 0.1, **arguments})


def test_wrong_labels_are_refused():
    with pytest.raises(ValueError, match=r"y must have shape \[120\]"):
        train.train(small_net(), (blobs()[0], torch.zeros(5, dtype=torch.long)), RECIPE, progress=False)
