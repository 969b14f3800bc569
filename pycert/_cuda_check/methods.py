"""Whole methods on two small networks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .judging import Check

#: What is checked.
METHODS = ("ibp", "crown-ibp", "fastlin", "crown", "forward", "alpha-crown")


def _nets() -> list[tuple[nn.Module, tuple[int, ...]]]:
    conv = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(18, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip
    dense = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 5), nn.Sigmoid(), nn.Linear(5, 3))
    return [(conv, (2, 6, 6)), (dense, (9,))]


def _weights(check: Check, net: nn.Module) -> nn.Module:
    for number, parameter in enumerate(net.parameters()):
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data = check.draw(*parameter.shape, seed=number) / math.sqrt(fan_in)
    return net


def check_method(check: Check, method: str) -> None:
    from pycert.bounded import BoundedModule
    from pycert.regions import LpBall

    options: dict[str, Any] = {"iterations": 2} if method == "alpha-crown" else {}
    nets = _nets()
    for net, shape in nets[1:] if method == "forward" else nets:  # forward lines are for few inputs
        _weights(check, net)
        x = check.draw(3, *shape, seed=30)
        # a point's bounds show the rounding alone
        radii = (0.0, 0.05) if method in ("ibp", "crown-ibp", "crown") else (0.05,)
        expected = {}
        for eps in radii:
            bounds = BoundedModule(net, x[:1]).bound(LpBall(x, eps=eps), method=method, **options)
            expected[eps] = (bounds.lower, bounds.upper)
        noise = 2 * torch.rand(50, *x.shape, generator=torch.Generator().manual_seed(1)).to(check.dtype) - 1
        points = x + 0.0499 * noise
        exact = {0.05: net.double()(points.double().flatten(0, 1)).view(50, 3, -1), 0.0: net(x.double())}
        there = net.to(check.dtype).to(check.device)
        for eps in radii:
            found = check.there(
                lambda t, bounded=there, eps=eps: tuple(
                    BoundedModule(bounded, t[:1]).bound(LpBall(t, eps=eps), method=method, **options)
                )[:2],
                x,
            )
            check.agree(expected[eps], found, 2**13)
            check.holds(found[0], exact[eps], found[1])
