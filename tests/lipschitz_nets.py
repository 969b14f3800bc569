"""Networks, points of balls and norms for the tests of Lipschitz bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pycert


class Residual(nn.Module):
    """Branches, a BatchNorm, a concatenation and a smooth activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(24, 3)
        self.norm = nn.BatchNorm1d(12)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        g = h + F.gelu(self.norm(self.second(h)))
        return self.last(torch.cat([h, g], 1))


def clipped_maxmin(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return torch.cat(
        [torch.maximum(first, second).clamp(max=0.3), torch.minimum(first, second).clamp(min=-0.2)], 1
    )


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.theta = (
            nn.Linear(4, 12),
            nn.Linear(12, 3),
            nn.Parameter(torch.rand(12) / 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(clipped_maxmin(torch.minimum(torch.relu(self.first(x)), self.theta)))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "dense": (
            nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)), (4,)),
        "conv": (
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 4, 2, 1), nn.LeakyReLU(0.1), nn.Flatten(),
                nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 3)), (1, 8, 8)),
        "maxmin": (
            nn.Sequential(
                nn.Linear(4, 20), pycert.nn.MaxMin(), nn.Linear(20, 20), pycert.nn.GroupSort(), nn.Linear(20, 3)), (4,)),
        "residual": (Residual().eval(), (4,)),
        "clipped": (Clipped(), (4,)),
        "pooled": (
            nn.Sequential(
                pycert.nn.Normalize([0.4], [0.5]), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.ConvTranspose2d(4, 3, 2), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)), (1, 8, 8)),
    }  # fmt: skip


NETWORKS = list(networks())


def balls(x: Tensor, eps: float, p: float, count: int) -> Tensor:
    """``[count, *x.shape]``: points of the balls, on the sphere half of the time, also sparse ones."""
    d = torch.randn(count, *x.shape, dtype=torch.float64)
    d[::3] *= torch.rand_like(d[::3]) < 0.2
    if p == math.inf:
        d[1::2] = d[1::2].sign()
    size = torch.linalg.vector_norm(d.flatten(2), ord=p, dim=2).clamp(min=1e-12)
    scale = torch.where(torch.arange(count) % 2 == 0, torch.rand(count, dtype=torch.float64), 1.0)
    d = d / size.view(*size.shape, *[1] * (x.dim() - 1)) * scale.view(-1, *[1] * x.dim()) * eps * (1 - 1e-6)
    return x.double() + d


def operator_norm(matrix: Tensor, p: float) -> Tensor:
    return torch.linalg.matrix_norm(matrix, ord=2 if p == 2 else p)


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    y = torch.arange(3).repeat(20)
    x = centres[y] + 0.3 * torch.randn(60, 2)
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02, weight_decay=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net, x, y
