"""Bounds through ``pycert.compat.auto_LiRPA`` beside auto_LiRPA's own, output by output, in float64."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import libraries

#: Of what the differences are: rounding in float64, relative to the width and the values.
ROUNDING = 1e-9
SAMPLES = 8
SLOPES = ("adaptive", "same-slope", "zero-lb", "one-lb")
BALLS = {"inf": (math.inf, 0.05), "2": (2.0, 0.3), "1": (1.0, 0.6)}


class Apply(nn.Module):
    """A function of a linear layer, and a linear layer behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(6, 12), function, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


class Deep(nn.Module):
    """Three layers of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList([nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)])
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.function(layer(x))
        return self.last(x)


class Residual(nn.Module):
    """Two residual blocks with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.last = nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for first in (0, 2):
            inner = torch.relu(self.norms[first](self.convolutions[first](x)))
            x = torch.relu(x + self.norms[first + 1](self.convolutions[first + 1](inner)))
        return self.last(x.flatten(1))


def _convolutions(*pool: nn.Module) -> nn.Module:
    size = 8 * 16 if not pool else 8 * 4
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 4, stride=2, padding=1), nn.ReLU(),
        *pool, nn.Flatten(), nn.Linear(size, 5),
    )  # fmt: skip


#: Piecewise linear networks: name -> (network, shape of the input).
PIECEWISE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear, 3 ReLU layers": (lambda: Deep(torch.relu), (6,)),
    "convolutions": (lambda: _convolutions(), (1, 8, 8)),
    "convolutions, average pooling": (lambda: _convolutions(nn.AvgPool2d(2)), (1, 8, 8)),
    "convolutions, max pooling": (lambda: _convolutions(nn.MaxPool2d(2)), (1, 8, 8)),
    "residual, BatchNorm": (Residual, (1, 8, 8)),
    "LeakyReLU": (lambda: Deep(nn.LeakyReLU(0.1)), (6,)),
    "abs": (lambda: Deep(torch.abs), (6,)),
}
#: Networks of curved functions.
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "arctan": torch.arctan,
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "x^2": lambda x: x**2,
    "x^3": lambda x: x**3,
    "x sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "softmax": lambda x: torch.softmax(x, -1),
    "x tanh(x)": lambda x: x * torch.tanh(x),
    "sqrt(x^2 + 1)": lambda x: torch.sqrt(x**2 + 1),
    "1 / (1 + x^2)": lambda x: 1 / (1 + x**2),
    "log(1 + exp(x))": lambda x: torch.log(1 + torch.exp(x)),
}
_OPTIMISED = "CROWN-Optimized"


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The subject ``tightness`` has no options of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Two tables: networks of pieces by method and slope rule, and networks of curves."""
    if "auto_LiRPA" not in libraries.peer_paths(args.peer):
        raise ValueError("tightness needs --peer auto_LiRPA=PATH")
    notes = [
        f"Bounds of the 5 outputs of {SAMPLES} samples in float64; looser: by more than rounding "
        f"({ROUNDING:g}) than auto_LiRPA's; by how much of the width there, at worst; our mean width as a "
        f"share of theirs. Balls: {', '.join(f'l_{name} {eps}' for name, (_, eps) in BALLS.items())}.",
    ]
    return {"tables": tables(args.quick), "notes": notes}


def tables(quick: bool) -> list[dict[str, Any]]:
    """The tables of :func:`run`."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of tables that auto_LiRPA makes for itself
    try:
        return _tables(quick)
    finally:
        torch.set_default_dtype(usual)


def _tables(quick: bool) -> list[dict[str, Any]]:
    columns = ["network", "norm", "method", "slopes", "bounds", "looser", "worst looser %", "width, mean %"]
    pieces = [
        _row(name, build, shape, norm, method, slopes)
        for name, (build, shape) in list(PIECEWISE.items())[: 2 if quick else None]
        for norm in BALLS
        for method, slopes in _questions(norm, name)
    ]
    curves = [
        _row(name, _curved(function, deep), (6,), "inf", method, "")
        for name, function in list(SMOOTH.items())[: 2 if quick else None]
        for deep in (False, True)
        for method in ("IBP", "CROWN-IBP", "CROWN")
    ]
    made = []
    for title, rows in (("Tightness: pieces", pieces), ("Tightness: curves", curves)):
        made.append({"title": title, "columns": [*columns, "why not there"], "rows": rows})
    return made


def _questions(norm: str, name: str) -> list[tuple[str, str]]:
    """Methods and slope rules; only for ReLU are the rules the same on both sides."""
    rules = SLOPES if name not in ("LeakyReLU", "abs") else ("adaptive",)
    rules = rules if norm == "inf" else ("adaptive",)
    found = [("IBP", ""), *((method, slope) for method in ("CROWN-IBP", "CROWN") for slope in rules)]
    return [*found, (_OPTIMISED, "adaptive")] if norm == "inf" and name.startswith("linear") else found


def _curved(function: Callable[[Tensor], Tensor], deep: bool) -> Callable[[], nn.Module]:
    return lambda: Deep(function) if deep else Apply(function)


def _row(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], norm: str, method: str, slopes: str
) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build().double().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
        x = torch.rand(SAMPLES, *shape, dtype=torch.float64)
    depth = ", 3 layers" if isinstance(net, Deep) and name in SMOOTH else ""
    row: dict[str, Any] = {"network": name + depth, "norm": norm, "method": method, "slopes": slopes}
    import auto_LiRPA

    import pycert.compat.auto_LiRPA

    ours = _bounds(pycert.compat.auto_LiRPA, net, x, norm, method, slopes)
    try:
        theirs = _bounds(auto_LiRPA, net, x, norm, method, slopes)
    except Exception as error:
        return {**row, "bounds": 2 * ours[0].numel(), "why not there": type(error).__name__}
    if not _holds(net, x, norm, ours):
        raise AssertionError(f"an execution lies outside of our bounds: {row}")
    if not _holds(net, x, norm, theirs):
        return {**row, "bounds": 2 * ours[0].numel(), "why not there": "an execution lies outside"}
    return {**row, **_compared(ours, theirs)}


def _holds(net: nn.Module, x: Tensor, norm: str, bounds: tuple[Tensor, Tensor], count: int = 60) -> bool:
    """Whether executions at random points of the ball lie within the bounds, corners among them for infinity."""
    p, eps = BALLS[norm]
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        step = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1
        if p == math.inf:
            step = eps * (step.sign() if number % 2 else step)
        else:
            step = (eps / step.flatten(1).norm(p, dim=1)).view(-1, *[1] * (x.dim() - 1)) * step
        with torch.no_grad():
            out = net(x + step)
        slack = 1e-7 * (1 + out.abs())
        if bool(((out < bounds[0] - slack) | (out > bounds[1] + slack)).any()):
            return False
    return True


def _bounds(
    library: Any, net: nn.Module, x: Tensor, norm: str, method: str, slopes: str
) -> tuple[Tensor, Tensor]:
    p, eps = BALLS[norm]
    options: dict[str, Any] = {"activation_bound_option": slopes} if slopes else {}
    if method == _OPTIMISED:
        options["optimize_bound_args"] = {"iteration": 20, "lr_alpha": 0.1}
    with warnings.catch_warnings(), torch.set_grad_enabled(method == _OPTIMISED):
        warnings.simplefilter("ignore")
        module = library.BoundedModule(net, x, bound_opts=options)
        region = library.PerturbationLpNorm(norm=p, eps=eps)
        lower, upper = module.compute_bounds(x=(library.BoundedTensor(x, region),), method=method)
    return lower.detach(), upper.detach()


def _compared(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """How many bounds are looser than theirs, by how much of their width, and the ratio of the mean widths."""
    width = theirs[1] - theirs[0]
    excess = torch.stack([theirs[0] - ours[0], ours[1] - theirs[1]])
    looser = excess > ROUNDING * (1 + width + theirs[0].abs() + theirs[1].abs())
    share = torch.where(looser, excess / width.clamp(min=1e-300), 0.0)
    return {
        "bounds": looser.numel(),
        "looser": int(looser.sum()),
        "worst looser %": round(100 * float(share.max()), 4),
        "width, mean %": round(100 * float((ours[1] - ours[0]).mean() / width.mean()), 4),
    }
