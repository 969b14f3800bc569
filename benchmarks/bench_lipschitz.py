"""Training by Lipschitz bounds and upper bounds of norms: time over the plain forward pass, memory, tightness."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

import pycert
from pycert.norms.operator import operator_of
from pycert.ops import masked_norm, power_norm
from pycert.train import losses

from . import isolate, timing

#: name -> (input shape, eps, power steps, loss), as published.
SETTINGS: dict[str, tuple[tuple[int, ...], float, int, str]] = {
    "mnist": ((1, 28, 28), 1.58, 5, "gloro"),
    "cifar": ((3, 32, 32), 36 / 255, 2, "bcp"),
}
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv 3x3, 1 to 32, 28x28": (nn.Conv2d(1, 32, 3, padding=1), (1, 28, 28)),
    "conv 4x4 stride 2, 32 to 32, 28x28": (nn.Conv2d(32, 32, 4, 2, 1), (32, 28, 28)),
    "conv 3x3, 32 to 64, 14x14": (nn.Conv2d(32, 64, 3, padding=1), (32, 14, 14)),
    "conv 4x4 stride 2, 64 to 64, 14x14": (nn.Conv2d(64, 64, 4, 2, 1), (64, 14, 14)),
    "linear, 3136 to 512": (nn.Linear(3136, 512), (3136,)),
    "linear, 512 to 512": (nn.Linear(512, 512), (512,)),
}


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``lipschitz``."""
    parser.add_argument("--batch", type=int, default=64, help="samples of a training step (default 64)")


def network(name: str) -> nn.Sequential:
    """4C3F for MNIST or 6C2F for CIFAR-10 with ReLU-theta, as recipes/lipschitz.py builds it."""
    path = isolate.ROOT / "recipes" / "lipschitz.py"
    spec = importlib.util.spec_from_file_location("lipschitz_recipe", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    torch.manual_seed(0)
    made: nn.Sequential = recipe.build(name, "theta", recipe.SCHEDULES[name].theta, SETTINGS[name][0])
    return made


def held_megabytes(function: Callable[[], Any]) -> float:
    """Of distinct storages that autograd keeps for the backward pass of what ``function`` returns."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = function()
    del kept
    return sum(found.values()) / 2**20


Layer = tuple[Tensor, dict[str, Any] | None, tuple[int, ...]]


def hidden_layers(net: nn.Sequential, shape: tuple[int, ...]) -> list[Layer]:
    """Weight, convolution and input shape of every affine layer but the last."""
    found: list[Layer] = []
    x = torch.zeros(1, *shape)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                found.append((layer.weight, conv_of(layer, tuple(x.shape[1:])), tuple(x.shape[1:])))
            x = layer(x)
    return found[:-1]


def norms_by_pycert(layers: list[Layer], starts: list[Tensor | None], steps: int) -> Tensor:
    """The logarithm of the product of the layers' norms, from warm starts, which are replaced."""
    total = torch.zeros(())
    for number, (weight, conv, _) in enumerate(layers):
        found = power_norm(weight, start=starts[number], steps=steps, conv=conv, batch=1)
        starts[number] = found.vector
        total = total + found.value.log().sum()
    return total


def norms_by_torch(layers: list[Layer], starts: list[Tensor | None], steps: int) -> Tensor:
    """The same in plain torch operations, with autograd through every step, as training code commonly has it."""
    total = torch.zeros(())
    for number, (weight, conv, shape) in enumerate(layers):
        operator = operator_of(weight, conv)
        start = starts[number]
        u = torch.randn(1, *shape) if start is None else start
        v = u
        for _ in range(steps):
            v = operator.apply(u)
            v = v / (v.norm() + 1e-12)
            u = operator.apply_adjoint(v)
            u = u / (u.norm() + 1e-12)
        starts[number] = u.detach()
        total = total + (v * operator.apply(u)).sum().log()
    return total


def training_rows(
    threads: int, name: str, batch: int, seconds: float, clock: str
) -> Iterator[dict[str, Any]]:
    """One row: a robust loss and its gradient, locally and globally, over the plain forward pass."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    net = network(name)
    shape, eps, steps, loss = SETTINGS[name]
    x, y = torch.rand(batch, *shape), torch.randint(0, 10, (batch,))
    starts: dict[str, Any] = {}

    def robust(bound: str) -> Tensor:
        found = losses.worst_logits(net, x, y, eps, bound=bound, steps=steps, starts=starts.get(bound))
        starts[bound] = found.starts
        return losses.gloro_loss(found, y) if loss == "gloro" else losses.bcp_loss(found, y)

    def step(function: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            net.zero_grad(set_to_none=True)
            function().backward()  # type: ignore[no-untyped-call]

        return call

    def forward() -> None:
        with torch.no_grad():
            net(x)

    layers = hidden_layers(net, shape)
    warm: dict[str, list[Tensor | None]] = {"pycert": [None] * len(layers), "torch": [None] * len(layers)}
    times = timing.alternate(
        {
            "forward": forward,
            "plain step": step(lambda: functional.cross_entropy(net(x), y)),
            "local": step(lambda: robust("local")),
            "global": step(lambda: robust("global")),
            "norms": step(lambda: norms_by_pycert(layers, warm["pycert"], steps)),
            "torch norms": step(lambda: norms_by_torch(layers, warm["torch"], steps)),
        },
        seconds,
        clock,
    )
    row: dict[str, Any] = {"network": name, "batch": batch, "forward ms": times["forward"].median * 1e3}
    for key in ("plain step", "local", "global", "norms", "torch norms"):
        row[f"{key} x forward"] = timing.ratio(times[key], times["forward"])[0]
    row["plain MB"] = held_megabytes(lambda: functional.cross_entropy(net(x), y))
    row["local MB"] = held_megabytes(lambda: robust("local"))
    row["norms MB"] = held_megabytes(lambda: norms_by_pycert(layers, warm["pycert"], steps))
    row["torch norms MB"] = held_megabytes(lambda: norms_by_torch(layers, warm["torch"], steps))
    yield row


def conv_of(layer: nn.Module, shape: tuple[int, ...]) -> dict[str, Any] | None:
    if not isinstance(layer, nn.Conv2d):
        return None
    return {"input_shape": shape, "stride": layer.stride, "padding": layer.padding}


def norm_rows(threads: int, name: str, seconds: float, clock: str) -> Iterator[dict[str, Any]]:
    """One row: upper bounds over converged power iteration in float64, without masks and with three kinds of them."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    weight = layer.weight.detach()  # type: ignore[union-attr, operator]
    conv = conv_of(layer, shape)
    out = tuple(layer(torch.zeros(1, *shape)).shape[1:])
    channels = torch.ones(1, *out), torch.ones(1, *shape)
    channels[0][:, ::3] = 0
    if shape[0] > 1:
        channels[1][:, ::3] = 0
    masks: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "none": (None, None),
        "third of channels dead": channels,
        "half dead, scattered": (torch.rand(1, *out) < 0.5, torch.rand(1, *shape) < 0.5),
    }
    row: dict[str, Any] = {"layer": name}
    for kind, (rows, columns) in masks.items():
        exact = power_norm(weight.double(), rows, columns, steps=200, conv=conv).value
        efforts = ("normal", "high") if kind == "half dead, scattered" and conv is not None else ("normal",)
        for effort in efforts:
            bound = masked_norm(weight, rows, columns, effort=effort, conv=conv).double()
            label = kind if effort == "normal" else f"{kind}, high effort"
            row[label] = 100 * ((bound / exact).item() - 1)
    rows, columns = masks["half dead, scattered"]
    times = timing.alternate(
        {"bound": lambda: masked_norm(weight, rows, columns, conv=conv)}, seconds / 4, clock
    )
    row["scattered ms"] = times["bound"].median * 1e3
    yield row


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps of both networks, then norms of the layers of 4C3F."""
    common = {"threads": args.threads, "seconds": args.seconds, "clock": args.clock}
    training, norms = [], []
    for name in list(SETTINGS)[:1] if args.quick else SETTINGS:
        batch = 4 if args.quick else args.batch
        training += isolate.run_case(
            "benchmarks.bench_lipschitz:training_rows", {**common, "name": name, "batch": batch}, 900
        )
        print(training[-1], flush=True)
    for name in list(LAYERS)[:1] if args.quick else LAYERS:
        norms += isolate.run_case("benchmarks.bench_lipschitz:norm_rows", {**common, "name": name}, 900)
        print(norms[-1], flush=True)
    columns = [
        "network",
        "batch",
        "forward ms",
        "plain step x forward",
        "local x forward",
        "global x forward",
    ]
    columns += [
        "norms x forward",
        "torch norms x forward",
        "plain MB",
        "local MB",
        "norms MB",
        "torch norms MB",
        "failed",
    ]
    kinds = ["none", "third of channels dead", "half dead, scattered", "half dead, scattered, high effort"]
    notes = [
        f"pycert {pycert.__version__}. A step is the loss of the published schedule (GloRo with 5 power steps for "
        "MNIST, BCP with 2 for CIFAR-10) and its gradient, divided by the plain forward pass of the same batch; MB "
        "is what autograd keeps for the backward pass. norms: power iteration of every hidden layer without masks, "
        "with warm starts and as many steps, and the gradient of the product; torch norms: the same in plain torch "
        "operations with autograd through every step.",
        "Norms: the guaranteed upper bound over the norm (200 steps of power iteration in float64), random weights.",
    ]
    heads = ["layer", *kinds, "scattered ms", "failed"]
    tables = [
        {"title": "Training by Lipschitz bounds", "columns": columns, "rows": training},
        {"title": "Upper bounds of norms, percent above the norm", "columns": heads, "rows": norms},
    ]
    return {"tables": tables, "notes": notes}
