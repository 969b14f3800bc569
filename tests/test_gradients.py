"""Gradients under every soundness: charges are constants, so that they are those of plain arithmetic but for rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pycert


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(h + self.inner(h)))


class ReadThreeTimes(Residual):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(h + self.inner(h) - 0.5 * torch.tanh(h)))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(1, 3, 2), nn.Conv2d(3, 3, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x.reshape(-1, 1, 2, 3)))
        return self.last(torch.cat([h, torch.relu(self.inner(h))], 1).flatten(1))


class Largest(Residual):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.maximum(h, self.inner(h)))


class Gated(Residual):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(h * torch.sigmoid(self.inner(h)))


NETWORKS = [Residual, ReadThreeTimes, Concatenated, Largest, Gated]
METHODS = ["ibp", "fastlin", "crown-ibp", "crown", "alpha-crown", "forward"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", NETWORKS)
def test_gradients_do_not_depend_on_soundness(build, method):
    torch.manual_seed(2)
    net = build().double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    eps = torch.full((3,), 0.02, dtype=torch.float64, requires_grad=True)
    bm = pycert.BoundedModule(net, x.detach())
    values = [x, eps, *net.parameters()]
    rows = torch.randn(3, 2, 4, dtype=torch.float64)
    found = {}
    for soundness in ("none", "real", "deployed"):
        region = pycert.LpBall(x, eps)
        bounds = bm.bound(region, method, soundness=soundness)
        margins = bm.bound(region, method, spec=rows, soundness=soundness)
        loss = (bounds.lower - 2 * bounds.upper).sum() + (margins.lower - 3 * margins.upper).sum()
        found[soundness] = torch.autograd.grad(loss, values)
    for soundness in ("real", "deployed"):
        for a, b in zip(found["none"], found[soundness]):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["ibp", "crown"])
@pytest.mark.parametrize("memory", [None, "1KiB"])
def test_second_derivatives_of_a_single_step_are_refused(method, memory):
    """Its gradient is a function of weight and input, with nothing before it that would have a gradient of its own."""
    net = nn.Linear(6, 4)
    x, eps = torch.randn(3, 6, requires_grad=True), torch.full((3,), 0.1, requires_grad=True)
    bounds = pycert.BoundedModule(net, x.detach()).bound(pycert.LpBall(x, eps, 2), method, memory=memory)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(bounds.lower.sum(), net.weight, create_graph=True)


@pytest.mark.parametrize("memory", ["1GiB", "8KiB"])
def test_padding_of_a_convolution_meets_no_bias(memory):
    """Rows through a padded convolution, then at once at what has a term: a normalisation, another convolution."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2).eval()
    norm.running_mean.copy_(torch.tensor([0.7, -0.4]))
    layers = [norm, nn.Conv2d(2, 2, 2, stride=2, padding=2), nn.Conv2d(2, 3, 2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(108, 5), nn.ReLU(), nn.Linear(5, 2)]  # fmt: skip
    net = nn.Sequential(*layers).double()
    x = torch.rand(2, 2, 6, 6, dtype=torch.float64)
    bm = pycert.BoundedModule(net, x[:1])

    def objective() -> torch.Tensor:
        bounds = bm.bound(pycert.LpBall(x, eps=0.1), method="crown", soundness="none", memory=memory)
        return (bounds.upper - 2 * bounds.lower).sum()

    objective().backward()
    for parameter in (*norm.parameters(), *layers[1].parameters(), *layers[2].parameters()):
        at, step = parameter.detach().view(-1), 1e-5
        for k in range(min(2, len(at))):
            ends = []
            for sign in (1, -2):  # to one side, then to the other
                at[k] += sign * step
                with torch.no_grad():
                    ends.append(objective().item())
            at[k] += step
            expected = (ends[0] - ends[1]) / (2 * step)
            assert parameter.grad.view(-1)[k].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
