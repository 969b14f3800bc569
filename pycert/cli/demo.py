"""``pycert demo`` (``make demo``): train a small convolutional network on the digits and certify it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pycert
from pycert import attacks, plot, train
from pycert._progress import progress_bar
from pycert.cli import certify, environment, inputs

METHODS = ("ibp", "crown-ibp", "crown")
RADII = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2)
RECIPE = train.Recipe(eps=0.1)


def add_parser(subparsers: Any) -> None:
    """Options of the command."""
    parser = subparsers.add_parser(
        "demo",
        help="train and certify a small network on the digits (two minutes)",
        description="Certified training on the digits; then clean, PGD and certified accuracy.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), metavar="FOLDER", help="default %(default)s"
    )
    parser.add_argument(
        "--epochs", type=int, help=f"of training (default {RECIPE.epochs}); fewer for a quick look"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="test samples to certify (default all)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def network() -> nn.Sequential:
    """Two convolutions and two linear layers for 8x8 images: 1,636 ReLUs."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def digits(seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The digits of scikit-learn, 8x8 pixels in [0, 1]: 1,297 samples to train on, 500 to test.

    Returns:
        ``(x, y), (x, y)`` of training and test: ``x [N, 1, 8, 8]`` float32, ``y [N]`` int64.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits need scikit-learn: pip install scikit-learn", name="sklearn"
        ) from error
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return (x[order[500:]], y[order[500:]]), (x[order[:500]], y[order[:500]])


def run(args: argparse.Namespace) -> int:
    """Train, attack, certify; write weights, test data, history, results and the plot."""
    inputs.set_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    (x_train, y_train), (x, y) = digits()
    x, y = x[: args.samples], y[: args.samples]
    recipe = shortened(RECIPE, args.epochs)
    print(
        f"1. Certified training on {len(x_train)} digits (8x8 pixels in [0, 1]) for eps {recipe.eps:g}:\n"
        f"   interval bounds (IBP) first, then CROWN-IBP, {recipe.epochs} epochs",
        flush=True,
    )
    torch.manual_seed(recipe.seed)
    net = network()
    train.initialize_for_ibp(net, recipe.seed)
    started = time.perf_counter()
    history = train.train(
        net, (x_train, y_train), recipe, history=args.out / "history.jsonl", progress=not args.quiet
    )
    seconds = time.perf_counter() - started
    torch.save(net.state_dict(), args.out / "weights.pt")
    np.savez_compressed(args.out / "digits.npz", x=x.numpy(), y=y.numpy())

    print(f"   took {seconds:.0f} s\n2. Attack by PGD and certification of {len(x)} test digits", flush=True)
    rows = evaluate(net, x, y, show=not args.quiet)
    with torch.no_grad():
        clean = float((net(x).argmax(1) == y).float().mean())
    results = {
        "network": "small convolutional net",
        "data": "digits",
        "samples": len(x),
        "p": "inf",
        "soundness": "deployed",
        "training_eps": recipe.eps,
        "clean": clean,
        "rows": rows,
        "training": {"seconds": seconds, **history[-1]},
        "machine": environment.machine(),
        "library": environment.library(),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    picture = plot.certified_accuracy(results, args.out / "certified.png")
    print(certify.table(results))
    explain(results, args.out, picture)
    return 0


def shortened(recipe: train.Recipe, epochs: int | None) -> train.Recipe:
    """The recipe with every phase scaled to ``epochs``."""
    if epochs is None:
        return recipe
    names = ("warmup_epochs", "ramp_epochs", "mix_start", "mix_epochs")
    phases = {name: getattr(recipe, name) * epochs // recipe.epochs for name in names}
    return dataclasses.replace(recipe, epochs=epochs, **phases)


def evaluate(net: nn.Module, x: Tensor, y: Tensor, show: bool = True) -> list[dict[str, Any]]:
    """One row per method and eps: ``method, eps, accuracy, samples, seconds``; the attack is the method
    ``pgd``."""
    net.eval()
    bm = pycert.BoundedModule(net, x[:1])
    bar = progress_bar((1 + len(METHODS)) * len(RADII), description="certifying", unit="run", show=show)
    rows = []
    for method in ("pgd", *METHODS):
        for eps in RADII:
            started = time.perf_counter()
            if method == "pgd":
                found = attacks.pgd(net, pycert.LpBall(x, eps=eps, clip=(0, 1)), y, steps=40, restarts=2)
                good = ~found.success
            else:  # each method by itself, so that the lines and times are its own
                result = pycert.certify(bm, x, y, eps=eps, method=method, clip=(0, 1), cascade=False)
                good = result.certified
            seconds = time.perf_counter() - started
            accuracy = float(good.float().mean())
            rows.append(
                {"method": method, "eps": eps, "accuracy": accuracy, "samples": len(x), "seconds": seconds}
            )
            bar.set_postfix_str(f"{method} eps {eps:g}: {accuracy:.1%}")
            bar.update()
    bar.close()
    return rows


def explain(results: dict[str, Any], folder: Path, picture: Path) -> None:
    """Say in words what the table shows, and how to go on."""
    at = {row["method"]: row for row in results["rows"] if row["eps"] == results["training_eps"]}
    best = max(METHODS, key=lambda method: at[method]["accuracy"])
    share = at[best]["accuracy"]
    lines = [
        "",
        f"At eps {results['training_eps']:g}, {share:.1%} of the test digits are proved robust by {best}:",
        "no change of the pixels by at most that much can make this network err on them. The attack",
        f"finds such a change for {1 - at['pgd']['accuracy']:.1%}; the rest is undecided.",
        "Tighter methods decide more and cost more.",
        "",
        f"plot:    {picture}",
        f"results: {folder / 'results.json'}",
        "",
        "The same for a network of yours; with this one:",
        f"  pycert certify pycert.cli.demo:network --weights {folder / 'weights.pt'} \\",
        f"    --data {folder / 'digits.npz'} --eps 0.05 0.1 --clip 0 1 --method ibp crown --attack \\",
        f"    --out {folder / 'certify.jsonl'} --report {folder / 'report.html'}",
    ]
    print("\n".join(lines))
