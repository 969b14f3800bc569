"""Training by local or global Lipschitz bounds (Huang et al., NeurIPS 2021) and its evaluation.

    python recipes/lipschitz.py mnist --data mnist.npz --out mnist.json                 # the published schedule
    python recipes/lipschitz.py mnist --data mnist.npz --out mnist.json --steps 1000 --batch 64    # a short one
    python recipes/lipschitz.py cifar --data train.npz test.npz --out cifar.json --activation maxmin
    python recipes/lipschitz.py tiny --data tiny.npz --out tiny.json --store-folder starts

The data file holds ``x_train, y_train, x_test, y_test`` as ``np.savez`` writes them, images as uint8 with or without a
channel dimension; of two files each holds ``x`` and ``y``, of training and of test. The result holds clean accuracy,
accuracy under PGD and certified accuracy, with local and with global bounds, and per layer the shares of
eliminated rows and columns. Certificates are those of ``pycert.certify``, sound in floating point; the norms that
training sees are estimates.

With fewer ``--steps`` every phase of the published schedule keeps its share. The result file is written as training
goes; a checkpoint beside it (``.ckpt``) lets the same command go on where it was stopped. Power iterations start
from what they found for the same sample in the epoch before (``--store``: gigabytes of memory, or of files with
``--store-folder``), or else from what they found in the batch before, which costs nothing and suits runs of few epochs.
``recipes/plot_lipschitz.py`` plots the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import pycert
from pycert.train import losses


@dataclasses.dataclass
class Schedule:
    """Published settings: epochs, of them clean, of them ramping; eps in training and in the test, and the rest.

    end_rate: what the learning rate falls to. sparsity: weight of the upper part of the sparsity loss, whose own weight
    is 0.01. local_layers: affine layers with norms of every sample; those of the others are global.
    """

    epochs: int
    warm_up: int
    ramp: int
    train_eps: float
    test_eps: float
    loss: str
    power_steps: int
    learning_rate: float
    end_rate: float
    theta: float
    sparsity: float | None = None
    augment: bool = False
    batch: int = 256
    local_layers: tuple[int, ...] | None = None


SCHEDULES = {
    "mnist": Schedule(300, 0, 150, 1.75, 1.58, "gloro", 5, 1e-3, 5e-6, 1.0),
    "cifar": Schedule(800, 20, 400, 0.1551, 36 / 255, "bcp", 2, 1e-3, 1e-6, 2.0, augment=True),
    "tiny": Schedule(
        250, 0, 125, 0.16, 36 / 255, "bcp", 1, 2.5e-4, 5e-7, 1.0, 0.1, True, 128, local_layers=(0, 3, 6, 7, 8)
    ),
}
#: What differs for clipped MaxMin.
OF_MAXMIN = {"tiny": {"power_steps": 3, "learning_rate": 1e-4}}
#: Its thresholds at the start, low and high, layer by layer.
THRESHOLDS = {
    "mnist": [(-1.2, 1.2)] * 6,
    "cifar": [(-0.1, 0.1), (-0.15, 0.1), (-0.15, 0.15), (-0.15, 0.15), (-0.2, 0.2), (-0.3, 0.3), (-1.2, 1.2)],
    "tiny": [(-high, high) for high in (0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6)],
}


def schedule(name: str, activation: str) -> Schedule:
    """Of one network with one activation."""
    return dataclasses.replace(SCHEDULES[name], **OF_MAXMIN.get(name, {}) if activation == "maxmin" else {})


#: Seconds between checkpoints.
SAVE_EVERY = 60.0
#: Of images; convolutions as (channels, kernel, stride, padding), then widths of dense layers.
SHAPES = {"mnist": (1, 28, 28), "cifar": (3, 32, 32), "tiny": (3, 64, 64)}
NETWORKS = {
    "mnist": ([(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)], [512, 512, 10]),
    "cifar": (
        [(32, 3, 1, 1), (32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 1)],
        [512, 10],
    ),
    "tiny": (
        [
            (64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 0), (128, 3, 1, 1), (128, 3, 1, 1), (128, 4, 2, 0),
            (256, 3, 1, 1), (256, 4, 2, 0),
        ],
        [256, 200],
    ),
}  # fmt: skip


def build(name: str, activation: str, theta: float, shape: tuple[int, ...]) -> nn.Sequential:
    """The network, its activations fitted to the shapes that they see."""
    convolutions, widths = NETWORKS[name]
    thresholds = iter(THRESHOLDS[name])
    layers: list[nn.Module] = []
    x = torch.zeros(1, *shape)

    def add(layer: nn.Module) -> None:
        nonlocal x
        layers.append(layer)
        with torch.no_grad():
            x = layer(x)

    def activate() -> None:
        kinds = {
            "relu": lambda: nn.ReLU(),
            "theta": lambda: pycert.nn.ReLUTheta(x.shape[1:], theta),
            "maxmin": lambda: pycert.nn.ClippedMaxMin(x.shape[1:], *next(thresholds)),
        }
        add(kinds[activation]())

    for channels, kernel, stride, padding in convolutions:
        layer = nn.Conv2d(x.shape[1], channels, kernel, stride, padding)
        nn.init.normal_(layer.weight, 0, (2 / (kernel * kernel * channels)) ** 0.5)
        nn.init.zeros_(layer.bias)
        add(layer)
        activate()
    add(nn.Flatten())
    for width in widths[:-1]:
        add(nn.Linear(x.shape[1], width))
        activate()
    add(nn.Linear(x.shape[1], widths[-1]))
    return nn.Sequential(*layers)


def load(paths: list[Path], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images in [0, 1] and labels of training, then of test."""
    wanted = [("x_train", "y_train", "x_test", "y_test")] if len(paths) == 1 else [("x", "y")] * 2
    if len(paths) != len(wanted):
        raise ValueError(f"--data takes one file, or one of training and one of test, got {len(paths)}")
    arrays = []
    for path, keys in zip(paths, wanted):
        file = np.load(path)
        for key in keys:
            if key not in file:
                raise ValueError(f"{path}: needs the arrays {', '.join(keys)}, has {', '.join(file)}")
            arrays.append(torch.from_numpy(file[key]))
    x, y, x_test, y_test = arrays
    images = [t.unsqueeze(1) if t.dim() == 3 else t for t in (x, x_test)]
    for name, t, labels in zip(("training", "test"), images, (y, y_test)):
        if t.dtype != torch.uint8 or tuple(t.shape[1:]) != shape or len(t) == 0:
            raise ValueError(
                f"images of {name}: need uint8 of [N, {shape}], got {t.dtype} of {list(t.shape)}"
            )
        if labels.shape != t.shape[:1]:
            raise ValueError(f"labels of {name}: {list(labels.shape)} for {len(t)} images")
    return images[0].float() / 255, y.long(), images[1].float() / 255, y_test.long()


def augmented(x: Tensor) -> Tensor:
    """Crops after padding by four, and flips, at random for every image."""
    batch, channels, height, width = x.shape
    padded = nn.functional.pad(x, (4, 4, 4, 4))
    rows, columns = (torch.randint(0, 9, (batch, 1)) + torch.arange(size) for size in (height, width))
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    of_batch, of_channels = (
        torch.arange(batch)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
    )
    return padded[of_batch, of_channels, rows[:, None, :, None], columns[:, None, None, :]]


def batch_of(step: int, count: int, size: int, seed: int) -> Tensor:
    """Which samples a step sees: every epoch goes through all of them in an order of its own."""
    per_epoch = -(-count // size)
    generator = torch.Generator().manual_seed(1_000_003 * seed + step // per_epoch)
    first = step % per_epoch * size
    return torch.randperm(count, generator=generator)[first : first + size]


def share_of_ramp(done: float, plan: Schedule) -> float:
    """How much of the training radius is in force after this share of the schedule."""
    return min(1.0, max(0.0, (done - plan.warm_up / plan.epochs) * plan.epochs / plan.ramp))


def learning_rate(done: float, plan: Schedule, decay: float) -> float:
    """Constant until 25 epochs after half of them, then exponentially to the last."""
    half = plan.epochs / 2
    epoch = done * plan.epochs
    late = (epoch - (half + 24)) / (half - 25) if epoch >= half + 25 else 0.0
    return plan.learning_rate * (plan.end_rate / plan.learning_rate) ** (late * decay)


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds beside weights and the optimizer's state."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict] = dataclasses.field(default_factory=list)
    starts: list[Tensor] | None = None

    def save(self, path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """In one move, so that being stopped never leaves half a file."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        state |= {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    @staticmethod
    def load(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        if not path.exists():
            return Progress()
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        return Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})


def train(
    net: nn.Sequential, x: Tensor, y: Tensor, plan: Schedule, args: argparse.Namespace, settings: dict
) -> Progress:
    """Trains, from the checkpoint if there is one, writing as it goes."""
    total = args.steps or plan.epochs * -(-len(x) // args.batch)
    optimizer = torch.optim.Adam(net.parameters(), lr=plan.learning_rate)
    checkpoint = args.out.with_suffix(".ckpt")
    progress = Progress.load(checkpoint, net, optimizer)
    store = None
    if args.bound == "local" and (args.store or args.store_folder is not None):
        store = losses.WarmStarts(net, x[:1], len(x), path=args.store_folder, local_layers=plan.local_layers)
    print(store if store is not None else "power iterations start from the batch before")
    saved = time.perf_counter()
    for step in range(progress.step, progress.step if args.evaluate else total):
        started = time.perf_counter()
        found = update(net, x, y, plan, args, optimizer, step, total, progress, store)
        progress.step = step + 1
        progress.seconds += time.perf_counter() - started
        if step % max(1, total // 60) == 0 or step == total - 1:
            progress.history.append(found | {"step": step})
            print(progress.history[-1], flush=True)
            write(args.out, settings | {"history": progress.history})
        if time.perf_counter() - saved >= SAVE_EVERY or step == total - 1:
            progress.save(checkpoint, net, optimizer)
            saved = time.perf_counter()
    return progress


def update(
    net: nn.Sequential,
    x: Tensor,
    y: Tensor,
    plan: Schedule,
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer,
    step: int,
    total: int,
    progress: Progress,
    store: losses.WarmStarts | None,
) -> dict:
    """One step of the optimizer; what it saw."""
    done = step / total
    share = share_of_ramp(done, plan)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(done, plan, args.decay)
    index = batch_of(step, len(x), args.batch, args.seed)
    images, labels = augmented(x[index]) if plan.augment else x[index], y[index]
    found = losses.worst_logits(
        net,
        images,
        labels,
        plan.train_eps * share,
        bound=args.bound,
        steps=plan.power_steps,
        starts=starts_of(progress, len(index)) if store is None else store.take(index),
        sparsity=plan.sparsity,
        local_layers=plan.local_layers,
    )
    if store is None:
        progress.starts = [start.detach() for start in found.starts]
    else:
        store.put(index, found.starts)
    if plan.loss == "gloro":
        loss = losses.gloro_loss(found, labels)
    else:
        loss = losses.bcp_loss(found, labels, 1 - share)
    if found.sparsity is not None:
        loss = loss + share * 0.01 * found.sparsity
    optimizer.zero_grad()
    loss.backward()
    if args.clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), args.clip)
    optimizer.step()
    losses.project_thresholds(net)
    return {
        "eps": plan.train_eps * share,
        "loss": loss.item(),
        "clean": (found.clean.argmax(1) == labels).float().mean().item(),
        "estimated_robust": (found.worst.argmax(1) == labels).float().mean().item(),
        "live": [round(one.item(), 4) for one in found.live],
    }


def starts_of(progress: Progress, batch: int) -> list[Tensor] | None:
    """What the batch before ended with, for as many samples as there are now (an epoch's last batch may be short)."""
    if progress.starts is None:
        return None
    return [
        start if len(start) in (1, batch) else start[torch.arange(batch) % len(start)]
        for start in progress.starts
    ]


def write(path: Path, result: dict) -> None:
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def global_radii(bm: pycert.BoundedModule, x: Tensor, y: Tensor) -> Tensor:
    """``[B]`` radii certified by the global constants, for the network in real arithmetic; 0 where it errs."""
    constants = pycert.lipschitz.global_bound(bm).margins
    gaps = torch.cat(
        [
            pycert.margins(bm, pycert.LpBall(some, 0.0, 2), labels, "crown", soundness="real")
            for some, labels in zip(x.split(100), y.split(100))
        ]
    )
    others = torch.arange(len(constants)).expand(len(y), -1)
    others = others[others != y[:, None]].view(len(y), -1)
    return (gaps.double() / constants[y[:, None], others]).amin(1).clamp(min=0)


def evaluate(net: nn.Module, x: Tensor, y: Tensor, eps: float, args: argparse.Namespace) -> Iterator[dict]:
    """Accuracies on test samples, and what masks take away, per layer; one entry at a time, as they are found."""
    net.eval()
    bm = pycert.BoundedModule(net, x[:1])
    x, y = x[: args.samples], y[: args.samples]
    with torch.no_grad():
        correct = net(x).argmax(1) == y
    yield {"samples": len(x), "eps": eps, "clean": correct.float().mean().item()}
    found = pycert.attacks.pgd(
        net, pycert.LpBall(x, eps, 2, (0, 1)), y, steps=100, step_size=eps / 4, restarts=1
    )
    yield {"pgd": (correct & ~found.success).float().mean().item()}
    radii = global_radii(bm, x, y)
    grid = [eps * share / 20 for share in range(1, 31)]
    yield {
        "global_constant": pycert.lipschitz.global_bound(bm).value,
        "certified_global": (radii > eps).float().mean().item(),
        "curve_global": [
            {"eps": radius, "certified": (radii > radius).float().mean().item()} for radius in grid
        ],
    }
    curve: list[dict] = []
    for radius, open_ones in (
        (eps, correct & ~found.success),
        (eps / 2, correct),
    ):  # an attack leaves no certificate
        count = 0
        if bool(open_ones.any()):
            count = int(
                pycert.certify(
                    bm,
                    x[open_ones],
                    y[open_ones],
                    radius,
                    2,
                    "lipschitz",
                    (0, 1),
                    batch_size=25,
                    cascade=False,
                ).certified.sum()
            )
        curve.append({"eps": radius, "certified": count / len(x)})
        yield {"certified": curve[0]["certified"], "curve": curve}
        if radius == eps:
            yield {
                "layers": {share * eps: layers(bm, x[:20], share * eps) for share in (0.1, 0.25, 0.5, 1.0)}
            }


def layers(bm: pycert.BoundedModule, x: Tensor, eps: float) -> list[dict]:
    """What masks take away from every affine layer, and what that does to its norm: medians over samples."""
    found = pycert.lipschitz.local_bound(bm, pycert.LpBall(x, eps, 2, (0, 1)), layers=True)
    return [
        {
            "path": layer.path,
            "eliminated_columns": 1 - layer.live_in,
            "eliminated_rows": 1 - layer.live_out,
            "local_over_global": layer.ratio.median().item(),
        }
        for layer in found.layers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=tuple(NETWORKS), help="4C3F, 6C2F, 8C2F")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="one file, or of training and of test"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON; checkpoint and weights beside it")
    parser.add_argument(
        "--activation", choices=("relu", "theta", "maxmin"), default="theta", help="clipped: theta, maxmin"
    )
    parser.add_argument("--bound", choices=("local", "global"), default="local", help="norms in training")
    parser.add_argument("--steps", type=int, help="instead of the published number of epochs")
    parser.add_argument("--batch", type=int, help="samples a step; as published where not given")
    parser.add_argument("--decay", type=float, default=1.0, help="exponent of the learning rate's fall")
    parser.add_argument("--eps", type=float, help="test radius")
    parser.add_argument("--train-eps", type=float, help="training radius")
    parser.add_argument("--samples", type=int, default=1000, help="test samples to certify")
    parser.add_argument(
        "--store", action=argparse.BooleanOptionalAction, default=True, help="keep warm starts per sample"
    )
    parser.add_argument("--store-folder", type=Path, help="keep them in files of this folder")
    parser.add_argument("--clip", type=float, help="largest norm of the gradient; as published: none")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument(
        "--evaluate", action="store_true", help="evaluate the checkpoint as it is, untrained further"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    plan = schedule(args.network, args.activation)
    if args.train_eps is not None:
        plan = dataclasses.replace(plan, train_eps=args.train_eps)
    args.batch = args.batch or plan.batch
    try:
        x, y, x_test, y_test = load(args.data, SHAPES[args.network])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    net = build(args.network, args.activation, plan.theta, tuple(x.shape[1:]))
    keys = ("network", "activation", "bound", "steps", "batch", "decay", "store", "clip", "seed")
    settings = {key: getattr(args, key) for key in keys} | {"schedule": dataclasses.asdict(plan)}
    settings["command"] = "python " + shlex.join(sys.argv)
    progress = train(net, x, y, plan, args, settings)
    torch.save(net.state_dict(), args.out.with_suffix(".pt"))
    torch.set_flush_denormal(False)
    settings |= {"steps_done": progress.step, "train_seconds": progress.seconds, "history": progress.history}
    for part in evaluate(net, x_test, y_test, args.eps or plan.test_eps, args):
        settings |= part
        write(args.out, settings)
        print(part, flush=True)


if __name__ == "__main__":
    main()
