"""One adapter per library: the same question put to pycert, to a peer and to plain eager PyTorch.

An adapter is built for one network and input (not timed) and answers two questions: ``bounds`` on every
output over the box of radius eps, and ``margins``, lower bounds of the label's score minus each other score.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .nets import ResidualBlock

METHODS = ("ibp", "crown-ibp", "crown")
#: Not among the standard methods, as it takes long: ``--methods alpha-crown``.
OPTIMIZED = "alpha-crown"
ITERATIONS, LEARNING_RATE = 20, 0.5


class NotOfferedError(NotImplementedError):
    """The library has no such method, or not for this network."""


class Pycert:
    """pycert by its public names, without intersection: the bounds the peers compute."""

    def __init__(self, net: nn.Module, x: Tensor, method: str, **options: Any) -> None:
        import pycert

        self.pycert, self.method = pycert, method
        self.options = {"intersect": False, **options}
        if method == OPTIMIZED:
            self.options |= {"iterations": ITERATIONS, "learning_rate": LEARNING_RATE, "threshold": math.inf}
            self.options["intermediate"] = OPTIMIZED  # auto_LiRPA optimises every layer's bounds too
        self.bounded = pycert.BoundedModule(net, x[:1])

    def bounds(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        region = self.pycert.LpBall(x, eps=eps)
        lower, upper = self.bounded.bound(region, method=self.method, **self.options)
        assert lower is not None and upper is not None
        return lower, upper

    def margins(self, x: Tensor, eps: float, labels: Tensor) -> Tensor:
        region = self.pycert.LpBall(x, eps=eps)
        return self.pycert.margins(self.bounded, region, labels, method=self.method, **self.options)

    def fused_loss(self, x: Tensor, eps: float, labels: Tensor) -> Tensor:
        region = self.pycert.LpBall(x, eps=eps)
        return self.pycert.train.fused_loss(self.bounded, region, labels, self.method)


class AutoLirpa:
    """auto_LiRPA with its defaults; slopes are optimised with as many steps as pycert's."""

    def __init__(self, net: nn.Module, x: Tensor, method: str) -> None:
        steps = {"iteration": ITERATIONS, "lr_alpha": LEARNING_RATE}
        options = {"optimize_bound_args": steps} if method == OPTIMIZED else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import auto_LiRPA

            self.library = auto_LiRPA
            self.bounded = auto_LiRPA.BoundedModule(
                net, torch.empty_like(x), device=x.device, bound_opts=options
            )
        self.method = "CROWN-Optimized" if method == OPTIMIZED else method.upper()

    def _bounds(self, x: Tensor, eps: float, **options: Any) -> tuple[Tensor, Tensor]:
        region = self.library.PerturbationLpNorm(norm=float("inf"), eps=eps)
        bounded_x = self.library.BoundedTensor(x, region)
        with torch.set_grad_enabled(self.method == "CROWN-Optimized" or torch.is_grad_enabled()):
            return self.bounded.compute_bounds(x=(bounded_x,), method=self.method, **options)

    def bounds(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._bounds(x, eps)

    def margins(self, x: Tensor, eps: float, labels: Tensor) -> Tensor:
        return self._bounds(x, eps, C=margin_rows(labels, classes=10).to(x), bound_upper=False)[0]


class TorchIbp:
    """Interval propagation in plain eager PyTorch: centre and radius, ``|W|`` formed at each call."""

    def __init__(self, net: nn.Module, x: Tensor, method: str) -> None:
        if method != "ibp":
            raise NotOfferedError(method)
        if not isinstance(net, nn.Sequential) or not isinstance(net[-1], nn.Linear):
            raise NotOfferedError("networks other than an nn.Sequential that ends in nn.Linear")
        self.body, self.last = net[:-1], net[-1]

    def bounds(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return interval(self.last, *interval(self.body, x - eps, x + eps))

    def margins(self, x: Tensor, eps: float, labels: Tensor) -> Tensor:
        lower, upper = interval(self.body, x - eps, x + eps)
        rows = margin_rows(labels, self.last.out_features).to(x)
        weight, bias = rows @ self.last.weight, rows @ self.last.bias
        center, radius = (upper + lower) / 2, (upper - lower) / 2
        low = weight @ center.unsqueeze(-1) - weight.abs() @ radius.unsqueeze(-1)
        return low.squeeze(-1) + bias


def interval(layer: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Interval bounds of one layer, in plain PyTorch."""
    if isinstance(layer, nn.Sequential):
        for inner in layer:
            lower, upper = interval(inner, lower, upper)
        return lower, upper
    if isinstance(layer, ResidualBlock):
        first, second = interval(layer.residual, lower, upper), interval(layer.shortcut, lower, upper)
        return torch.relu(first[0] + second[0]), torch.relu(first[1] + second[1])
    if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)):
        return layer(lower), layer(upper)  # monotone: ReLU, Flatten, Identity, AvgPool
    center, radius = (upper + lower) / 2, (upper - lower) / 2
    if isinstance(layer, nn.Linear):
        center, radius = layer(center), functional.linear(radius, layer.weight.abs())
    elif isinstance(layer, nn.Conv2d):
        center = layer(center)
        radius = functional.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
    else:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        shape = (1, -1) + (1,) * (lower.dim() - 2)
        scale = (layer.weight / torch.sqrt(layer.running_var + layer.eps)).view(shape)
        center = (center - layer.running_mean.view(shape)) * scale + layer.bias.view(shape)
        radius = radius * scale.abs()
    return center - radius, center + radius


def margin_rows(labels: Tensor, classes: int) -> Tensor:
    """Rows ``e_label - e_j`` for every other class j, ascending: ``[B, classes - 1, classes]``."""
    identity = torch.eye(classes)
    rows = identity[labels].unsqueeze(1) - identity.unsqueeze(0)
    others = torch.arange(classes).unsqueeze(0) != labels.unsqueeze(1)
    return rows[others].view(len(labels), classes - 1, classes)


#: name of a column: builder. ``pycert`` has the default (deployed) soundness, ``pycert_none`` none.
LIBRARIES: dict[str, Callable[[nn.Module, Tensor, str], Any]] = {
    "pycert": Pycert,
    "pycert_none": lambda net, x, method: Pycert(net, x, method, soundness="none"),
    "torch_ibp": TorchIbp,
    "auto_LiRPA": AutoLirpa,
}
PEERS = ("auto_LiRPA", "CTRAIN", "fconv", "WraLU")


def peer_paths(peers: list[str]) -> dict[str, str]:
    """The ``NAME=PATH`` arguments as a dict.

    Raises:
        ValueError: an argument has no ``=``, names an unknown peer, or its path does not exist.
    """
    found = {}
    for text in peers:
        name, _, path = text.partition("=")
        if name not in PEERS or not path:
            raise ValueError(
                f"--peer: got {text!r}, accepted is NAME=PATH with NAME one of {', '.join(PEERS)}"
            )
        for folder in path.split(os.pathsep):
            if not os.path.isdir(folder):
                raise ValueError(f"--peer {name}: {folder!r} is not a folder")
        found[name] = path
    return found


def add_peers(peers: list[str]) -> None:
    """Put the peers' folders on the module path."""
    for path in peer_paths(peers).values():
        sys.path[:0] = path.split(os.pathsep)


def peer_versions(peers: list[str]) -> dict[str, str]:
    """Version of each peer that was brought by a path, from its own checkout: its commit."""
    versions = {}
    for name, path in peer_paths(peers).items():
        git = ["git", "-C", path.split(os.pathsep)[0], "log", "-1", "--format=%h of %cs"]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        versions[name] = done.stdout.strip() or "not a git checkout"
    return versions
