"""Figures of what ``recipes/lipschitz.py`` wrote, several runs side by side.

    python recipes/plot_lipschitz.py --out lipschitz_mnist.png local.json global.json

Certified accuracy against the radius, with the constants of the region and with those of the whole network; training;
and per layer the shares of rows and columns that masks eliminate at the tested radius and below.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def certified(axes: Any, runs: list[dict]) -> None:
    for number, run in enumerate(runs):
        radii = [point["eps"] for point in run["curve_global"]]
        heights = [100 * point["certified"] for point in run["curve_global"]]
        axes.plot(
            radii, heights, f"C{number}--", label=f"trained with {run['bound']} norms: global certificate"
        )
        axes.plot(
            [point["eps"] for point in run["curve"]],
            [100 * point["certified"] for point in run["curve"]],
            f"C{number}o",
            label="… local certificate",
        )
        axes.plot([run["eps"]], [100 * run["pgd"]], f"C{number}x", label="… PGD, 100 steps")
    axes.set_xlabel("radius (l2)")
    axes.set_ylabel("test accuracy, percent")
    axes.legend(fontsize=6)


def training(axes: Any, runs: list[dict]) -> None:
    for number, run in enumerate(runs):
        steps = [one["step"] for one in run["history"]]
        for name, style in (("clean", ":"), ("estimated_robust", "-")):
            values = [100 * one[name] for one in run["history"]]
            smooth = [
                sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1])
                for i in range(len(values))
            ]
            axes.plot(steps, smooth, f"C{number}{style}", label=f"{run['bound']}, {name.replace('_', ' ')}")
    axes.set_xlabel("step (the radius grows over the first half)")
    axes.set_ylabel("training batches, percent")
    axes.legend(fontsize=6)


def eliminated(axes: Any, run: dict) -> None:
    """Rows as bars to the right, columns to the left, one pair per layer and radius."""
    radii = sorted(run["layers"], key=float)
    paths = [layer["path"] for layer in run["layers"][radii[0]]]
    width = 0.8 / len(radii)
    for number, radius in enumerate(radii):
        at = [i + (number - (len(radii) - 1) / 2) * width for i in range(len(paths))]
        layers = run["layers"][radius]
        axes.bar(
            at,
            [100 * one["eliminated_rows"] for one in layers],
            width,
            color=f"C{number}",
            label=f"eps {float(radius):.2g}",
        )
        axes.bar(
            at, [-100 * one["eliminated_columns"] for one in layers], width, color=f"C{number}", alpha=0.5
        )
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xticks(range(len(paths)), [f"layer {path}" for path in paths], fontsize=6)
    axes.set_ylabel("columns (below 0), rows eliminated, percent")
    axes.set_title(f"trained with {run['bound']} norms", fontsize=8)
    axes.legend(fontsize=6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in args.results]
    figure, axes = plt.subplots(1, 2 + len(runs), figsize=(5 * (2 + len(runs)), 4))
    certified(axes[0], runs)
    training(axes[1], runs)
    for one, run in zip(axes[2:], runs):
        eliminated(one, run)
    figure.tight_layout()
    figure.savefig(args.out, dpi=90)


if __name__ == "__main__":
    main()
