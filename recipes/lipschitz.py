"""Training by local or global Lipschitz bounds (Huang et al., NeurIPS 2021) and its evaluation.

    python recipes/lipschitz.py mnist --data mnist.npz --out mnist.json                 # the published schedule
    python recipes/lipschitz.py mnist --data mnist.npz --out mnist.json --steps 1000 --batch 128   # a short one
    python recipes/lipschitz.py cifar --data cifar.npz --out cifar.json --activation maxmin

The data file holds ``x_train, y_train, x_test, y_test`` as ``np.savez`` writes them, images as uint8 with or without a
channel dimension. The result holds clean accuracy, accuracy under PGD and certified accuracy, with local and with
global bounds, and per layer the shares of eliminated rows and columns. Certificates are those of
``pycert.certify``, sound in floating point; the norms that training sees are estimates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import pycert
from pycert.train import losses


@dataclasses.dataclass
class Schedule:
    """Published settings: epochs, of them clean, of them ramping; eps in training and in the test, and the rest."""

    epochs: int
    warm_up: int
    ramp: int
    train_eps: float
    test_eps: float
    loss: str
    power_steps: int
    learning_rate: float
    theta: float
    sparsity: float | None = None
    augment: bool = False
    batch: int = 256


SCHEDULES = {
    "mnist": Schedule(300, 0, 150, 1.75, 1.58, "gloro", 5, 1e-3, 1.0),
    "cifar": Schedule(800, 20, 400, 0.1551, 36 / 255, "bcp", 2, 1e-3, 2.0, augment=True),
    "tiny": Schedule(250, 0, 125, 0.16, 36 / 255, "bcp", 1, 2.5e-4, 1.0, 0.1, True, 128),
}
#: Convolutions as (channels, kernel, stride, padding), then widths of dense layers.
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
            "maxmin": lambda: pycert.nn.ClippedMaxMin(x.shape[1:]),
        }
        add(kinds[activation]())

    for channels, kernel, stride, padding in convolutions:
        add(nn.Conv2d(x.shape[1], channels, kernel, stride, padding))
        activate()
    add(nn.Flatten())
    for width in widths[:-1]:
        add(nn.Linear(x.shape[1], width))
        activate()
    add(nn.Linear(x.shape[1], widths[-1]))
    return nn.Sequential(*layers)


def load(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    file = np.load(path)
    images = [torch.from_numpy(file[key]).float() / 255 for key in ("x_train", "x_test")]
    train, test = (x.unsqueeze(1) if x.dim() == 3 else x for x in images)
    labels = (torch.from_numpy(file[key]).long() for key in ("y_train", "y_test"))
    return train, next(labels), test, next(labels)


def augmented(x: Tensor) -> Tensor:
    """Random crops after padding by four, and flips."""
    padded = nn.functional.pad(x, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2,)).tolist()
    x = padded[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
    flip = torch.rand(len(x), 1, 1, 1) < 0.5
    return torch.where(flip, x.flip(3), x)


def train(net: nn.Sequential, x: Tensor, y: Tensor, plan: Schedule, args: argparse.Namespace) -> float:
    """Trains; seconds it took."""
    batch = args.batch or plan.batch
    per_epoch = -(-len(x) // batch)
    total = args.steps or plan.epochs * per_epoch
    optimizer = torch.optim.Adam(net.parameters(), lr=plan.learning_rate)
    store = losses.WarmStarts(net, x[:1], len(x)) if args.bound == "local" and args.store else None
    print(store if store is not None else "no warm starts are kept")
    kept: list[Tensor] | None = None
    started = time.perf_counter()
    for step in range(total):
        done = step / total
        share = min(1.0, max(0.0, (done - plan.warm_up / plan.epochs) * plan.epochs / plan.ramp))
        for group in optimizer.param_groups:  # constant until the ramp ends, then exponentially to 1e-6
            late = max(0.0, done - 0.53) / 0.47
            group["lr"] = plan.learning_rate * (1e-6 / plan.learning_rate) ** (late * args.decay)
        index = torch.randint(0, len(x), (batch,))
        images = augmented(x[index]) if plan.augment else x[index]
        starts = store.take(index) if store is not None else kept
        found = losses.worst_logits(
            net,
            images,
            y[index],
            plan.train_eps * share,
            bound=args.bound,
            steps=plan.power_steps,
            starts=starts,
            sparsity=plan.sparsity,
        )
        if store is not None:
            store.put(index, found.starts)
        elif args.bound == "global":
            kept = found.starts
        if plan.loss == "gloro":
            loss = losses.gloro_loss(found, y[index])
        else:
            loss = losses.bcp_loss(found, y[index], 1 - share)
        if found.sparsity is not None:
            loss = loss + 0.01 * found.sparsity
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        losses.project_thresholds(net)
        if step % max(1, total // 40) == 0 or step == total - 1:
            right = (found.clean.argmax(1) == y[index]).float().mean().item()
            robust = (found.worst.argmax(1) == y[index]).float().mean().item()
            live = [round(one.item(), 3) for one in found.live]
            print(
                f"step {step}/{total} eps {plan.train_eps * share:.3f} loss {loss.item():.3f} clean {right:.3f} "
                f"estimated robust {robust:.3f} live {live}",
                flush=True,
            )
    return time.perf_counter() - started


def evaluate(net: nn.Sequential, x: Tensor, y: Tensor, eps: float, args: argparse.Namespace) -> dict:
    """Accuracies on test samples, and what masks take away, per layer."""
    net.eval()
    bm = pycert.BoundedModule(net, x[:1])
    x, y = x[: args.samples], y[: args.samples]
    region = pycert.LpBall(x, eps, 2, (0, 1))
    with torch.no_grad():
        scores = net(x)
    found = pycert.attacks.pgd(net, region, y, steps=100, step_size=eps / 4, restarts=1)
    correct = scores.argmax(1) == y
    constants = pycert.lipschitz.global_bound(bm)
    gaps = scores.gather(1, y[:, None]) - scores
    globally = (gaps > eps * constants.margins[y].float()) | torch.nn.functional.one_hot(
        y, scores.shape[1]
    ).bool()
    local = pycert.certify(bm, x, y, eps, 2, "lipschitz", clip=(0, 1), batch_size=50)
    some = pycert.lipschitz.local_bound(bm, pycert.LpBall(x[:50], eps, 2, (0, 1)), layers=True)
    return {
        "samples": len(x),
        "eps": eps,
        "clean": correct.float().mean().item(),
        "pgd": (correct & ~found.success).float().mean().item(),
        "certified": local.accuracy,
        "certified_global": (correct & globally.all(1)).float().mean().item(),
        "certify_seconds": local.seconds,
        "global_constant": constants.value,
        "local_constant_median": some.as_subclass(Tensor).median().item(),
        "layers": [
            {
                "path": layer.path,
                "eliminated_columns": 1 - layer.live_in,
                "eliminated_rows": 1 - layer.live_out,
                "local_over_global": layer.ratio.median().item(),
            }
            for layer in some.layers
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=tuple(NETWORKS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--activation", choices=("relu", "theta", "maxmin"), default="theta")
    parser.add_argument("--bound", choices=("local", "global"), default="local")
    parser.add_argument("--steps", type=int, help="instead of the published number of epochs")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--decay", type=float, default=1.0, help="exponent of the learning rate's fall")
    parser.add_argument("--eps", type=float, help="test radius")
    parser.add_argument("--train-eps", type=float)
    parser.add_argument("--samples", type=int, default=1000, help="test samples to certify")
    parser.add_argument(
        "--store", action=argparse.BooleanOptionalAction, default=True, help="keep warm starts"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    plan = SCHEDULES[args.network]
    if args.train_eps is not None:
        plan = dataclasses.replace(plan, train_eps=args.train_eps)
    x, y, x_test, y_test = load(args.data)
    net = build(args.network, args.activation, plan.theta, tuple(x.shape[1:]))
    seconds = train(net, x, y, plan, args)
    torch.save(net.state_dict(), args.out.with_suffix(".pt"))
    torch.set_flush_denormal(False)
    result = evaluate(net, x_test, y_test, args.eps or plan.test_eps, args)
    result |= {
        "network": args.network,
        "activation": args.activation,
        "bound": args.bound,
        "train_seconds": seconds,
    }
    result |= {"steps": args.steps, "batch": args.batch or plan.batch, "train_eps": plan.train_eps}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
