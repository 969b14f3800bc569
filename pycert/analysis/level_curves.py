"""Do piecewise linear networks limit Lipschitz certificates? The experiment of Leino (2023), in two dimensions.

    python -m pycert.analysis.level_curves --out level_curves

Classes are a known distance apart. Networks of growing width and several 1-Lipschitz activations are trained with the
GloRo loss; what the global constants certify is compared with the true distance to the network's decision
boundary, with local constants and with interval, CROWN and alpha-CROWN bounds of the same networks, and
between training and test points. Writes ``level_curves.json``, tables (``.md``), and a picture of
margin level curves, the boundary moved by eps, and the certified set. The same command goes on where it was stopped.

Source: Leino, "Limitations of Piecewise Linearity for Efficient Robustness Certification", 2023 (arXiv 2301.08842);
the data sets, the choice of smooth activations and the numbers are ours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pycert
from pycert.nn import MaxMin, SmoothMaxMin, SmoothRamp
from pycert.train.losses import WorstLogits, gloro_loss

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "maxmin": MaxMin,
    "smooth maxmin": SmoothMaxMin,
    "softplus ramp": SmoothRamp,
    "gelu ramp": lambda: SmoothRamp("gelu"),
}
SETS = ("circle", "square", "ring")
#: Certificates beside those by the global constant, which training uses.
METHODS = ("lipschitz", "ibp", "crown", "alpha-crown")
#: Half the distance between the classes.
SEPARATION = 0.2
#: What points lie in: [-EXTENT, EXTENT]^2.
EXTENT = 2.0


def signed_distance(name: str, x: Tensor) -> Tensor:
    """Of points ``[N, 2]`` to the ideal boundary, negative inside: a circle, a ring, or a square with its corners."""
    if name == "circle":
        return x.norm(dim=1) - 1
    if name == "ring":
        return (x.norm(dim=1) - 1).abs() - 0.45
    beyond = x.abs() - 1
    return beyond.clamp(min=0).norm(dim=1) + beyond.amax(1).clamp(max=0)


def points(name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points at least ``SEPARATION`` from the ideal boundary, evenly spread, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(count * 8, 2, generator=generator) * 2 - 1) * EXTENT
    distance = signed_distance(name, x)
    x, distance = x[distance.abs() >= SEPARATION], distance[distance.abs() >= SEPARATION]
    inside, outside = x[distance < 0][: count // 2], x[distance > 0][: count - count // 2]
    x = torch.cat([inside, outside])
    return x, torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()


def network(activation: str, width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    make = ACTIVATIONS[activation]
    net = nn.Sequential(
        nn.Linear(2, width), make(), nn.Linear(width, width), make(), nn.Linear(width, width), make(),
        nn.Linear(width, 2)
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    return net


def train(net: nn.Sequential, x: Tensor, y: Tensor, eps: float, steps: int) -> None:
    """GloRo with the exact norms of the layers: they are small."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    weights = [layer.weight for layer in net if isinstance(layer, nn.Linear)]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - 0.95 * step / steps)
        constant = torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in weights[:-1]]).prod()
        radius = eps * min(1.0, 2 * step / steps) * constant
        clean = net(x)
        gap = (weights[-1][0] - weights[-1][1]).norm()
        other = 1 - y
        worst = clean + torch.nn.functional.one_hot(other, 2) * (radius * gap)
        found = WorstLogits(clean, worst, radius.expand(len(x)), [], [])
        optimizer.zero_grad()
        gloro_loss(found, y).backward()
        optimizer.step()


def boundary(net: nn.Module, cells: int = 500) -> Tensor:
    """Points of the decision boundary, ``[N, 2]``: where the margin changes sign between neighbours of a grid."""
    axis = torch.linspace(-EXTENT - 0.5, EXTENT + 0.5, cells)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2).view(-1, 2)
    with torch.no_grad():
        scores = net(grid)
    margin = (scores[:, 0] - scores[:, 1]).view(cells, cells)
    grid = grid.view(cells, cells, 2)
    found = []
    for a, b, p, q in (
        (margin[1:], margin[:-1], grid[1:], grid[:-1]),
        (margin[:, 1:], margin[:, :-1], grid[:, 1:], grid[:, :-1]),
    ):
        crossing = (a > 0) != (b > 0)
        share = (a / (a - b))[crossing][:, None]
        found.append(p[crossing] * (1 - share) + q[crossing] * share)
    return torch.cat(found)


def global_radii(bm: pycert.BoundedModule, x: Tensor) -> Tensor:
    """``[N]``: what the constant of the margin certifies, for the network in real arithmetic; either class."""
    constant = pycert.lipschitz.global_bound(bm).margins[0, 1]
    with torch.no_grad():
        scores = bm.net(x).double()
    return (scores[:, 0] - scores[:, 1]).abs() / constant


def measure(
    net: nn.Sequential, data: dict[str, tuple[Tensor, Tensor]], eps: float, methods: tuple[str, ...]
) -> dict[str, Any]:
    """Accuracies, certified ones by every method, and how much of the true distance is certified (medians)."""
    bm = pycert.BoundedModule(net, torch.empty(1, 2))
    row: dict[str, Any] = {}
    for part, (x, y) in data.items():
        with torch.no_grad():
            right = net(x).argmax(1) == y
        row[f"accuracy {part}"] = right.float().mean().item()
        row[f"global {part}"] = (right & (global_radii(bm, x) > eps)).float().mean().item()
        for method in methods if part == "test" else ():
            row[f"{method} {part}"] = pycert.certify(bm, x, y, eps, 2, method, cascade=False).accuracy
    row["gap"] = row["global train"] - row["global test"]
    x, y = data["test"]
    border = boundary(net)
    if len(border) and bool(right.any()):
        true = torch.cdist(x[right], border).amin(1).clamp(min=1e-6)
        row["truly robust test"] = (true > eps).sum().item() / len(x)
        row["global / true radius"] = (global_radii(bm, x[right]) / true).median().item()
        local = pycert.lipschitz.certified_radius(bm, x[right], y[right], steps=8)
        row["local / true radius"] = (local / true).median().item()
    return row


def draw(nets: dict[tuple[str, str], nn.Sequential], eps: float, path: Path) -> None:
    """One panel a set and activation: level curves of the margin over its constant, the boundary and its offset."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _ in nets))
    activations = list(dict.fromkeys(activation for _, activation in nets))
    figure = Figure(figsize=(3.2 * len(activations), 3.4 * len(names)), dpi=130, layout="constrained")
    axes = figure.subplots(len(names), len(activations), squeeze=False)
    axis = torch.linspace(-EXTENT, EXTENT, 300)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2).view(-1, 2)
    for i, name in enumerate(names):
        for j, activation in enumerate(activations):
            net = nets[name, activation]
            bm = pycert.BoundedModule(net, torch.empty(1, 2))
            with torch.no_grad():
                scores = net(grid)
            radius = global_radii(bm, grid) * (scores[:, 0] - scores[:, 1]).sign()
            radius = radius.float().view(300, 300)
            border = boundary(net)
            distance = torch.cdist(grid, border).amin(1).view(300, 300) if len(border) else radius.abs()
            ax = axes[i][j]
            ax.contourf(axis, axis, (radius.abs() > eps).float(), levels=[0.5, 1.5], colors=["#cfe3f3"])
            ax.contour(
                axis, axis, radius, levels=[-2 * eps, -eps, eps, 2 * eps], colors="#0072B2", linewidths=0.8
            )
            ax.contour(axis, axis, radius, levels=[0], colors="black", linewidths=1.5)
            ax.contour(axis, axis, distance, levels=[eps], colors="#D55E00", linewidths=1, linestyles="--")
            ax.set_title(f"{name}, {activation}", fontsize=9)
            ax.set_aspect("equal")
            ax.tick_params(labelsize=6)
    figure.suptitle(
        "black: decision boundary; blue: certified radius eps and 2 eps; orange: truly eps away; shaded: certified",
        fontsize=9,
    )
    figure.savefig(path)


Rows = list[dict[str, Any]]


def mean_of(rows: Rows, name: str, activation: str, width: int, key: str) -> float:
    """Over seeds, of values to the fourth digit (of float32, too); NaN where none has the value."""
    found = [
        round(row[key], 4) for row in rows
        if (row["set"], row["activation"], row["width"]) == (name, activation, width) and key in row
    ]  # fmt: skip
    return math.fsum(found) / len(found) if found else float("nan")


def table(rows: Rows, columns: dict[str, tuple[int, str, float]]) -> str:
    """A line per set and activation; columns are (width, key, factor), means over seeds."""
    lines = ["| " + " | ".join(["set", "activation", *columns]) + " |", "|" + "---|" * (len(columns) + 2)]
    for name, activation in dict.fromkeys((row["set"], row["activation"]) for row in rows):
        cells = [name, activation]
        for width, key, factor in columns.values():
            value = factor * mean_of(rows, name, activation, width, key)
            cells.append(f"{value:.1f}" if factor == 100 else f"{value:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: Rows, widths: list[int], methods: list[str], needed: dict[str, Any], share: float) -> str:
    """All tables, in Markdown."""

    def against_width(key: str, factor: float) -> str:
        return table(rows, {f"width {width}": (width, key, factor) for width in widths})

    last = widths[-1]
    same = {name: (last, f"{name} test", 100.0) for name in ("accuracy", "truly robust", "global", *methods)}
    widths_needed = "\n".join(f"* {key}: {value or 'none of these'}" for key, value in needed.items())
    parts = {
        "Certified test accuracy by global constants, percent": against_width("global test", 100),
        f"Least width with {share:.0%}": widths_needed,
        f"The same networks by every method, width {last}, percent": table(rows, same),
        "Radius certified by global constants over the true one, medians": against_width(
            "global / true radius", 1
        ),
        "Radius certified by local constants over the true one, medians": against_width(
            "local / true radius", 1
        ),
        "Certified accuracy on training less on test points": against_width("gap", 100),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items()) + "\n"


def width_needed(rows: Rows, share: float) -> dict[str, Any]:
    """Per set and activation the least width that certifies ``share`` of the test points (mean over seeds), or None."""
    found: dict[str, Any] = {}
    for name, activation, width in dict.fromkeys(
        (row["set"], row["activation"], row["width"]) for row in sorted(rows, key=lambda row: row["width"])
    ):
        key = f"{name}, {activation}"
        found.setdefault(key, None)
        if found[key] is None and mean_of(rows, name, activation, width, "global test") >= share:
            found[key] = width
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """In one move, so that being stopped never leaves half a file."""
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def kept_rows(path: Path, settings: dict[str, Any]) -> Rows:
    """What an earlier run with these settings has measured: an interrupted run goes on with it."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    return found["rows"] if all(found.get(key) == value for key, value in settings.items()) else []


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("level_curves"), help="folder (default %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="even numbers")
    parser.add_argument("--eps", type=float, default=0.18, help=f"below {SEPARATION}, half the separation")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of initialisation")
    parser.add_argument("--samples", type=int, default=400, help="training points; half as many test points")
    parser.add_argument("--activations", nargs="+", choices=tuple(ACTIVATIONS), default=list(ACTIVATIONS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument(
        "--share", type=float, default=0.9, help="certified accuracy that widths are compared at"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-plot", action="store_true")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = parser_of().parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(args, key) for key in ("eps", "steps", "samples", "methods")}
    path = args.out / "level_curves.json"
    known = kept_rows(path, settings)
    rows, nets = [], {}
    for name in args.sets:
        data = {"train": points(name, args.samples, 0), "test": points(name, args.samples // 2, 1)}
        for activation, width, seed in itertools.product(args.activations, args.widths, args.seeds):
            net = network(activation, width, seed)
            row = {"set": name, "activation": activation, "width": width, "seed": seed}
            started = time.perf_counter()
            found = next((one for one in known if row.items() <= one.items()), None)
            drawn = not args.no_plot and seed == args.seeds[0] and width == args.widths[-1]
            if found is None or drawn:
                train(net, *data["train"], args.eps, args.steps)
            if found is None:
                found = row | measure(net, data, args.eps, tuple(args.methods))
                found["seconds"] = time.perf_counter() - started
            rows.append(found)
            write(path, settings | {"rows": rows + [one for one in known if one not in rows]})
            if seed == args.seeds[0]:
                nets[name, activation] = net
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    needed = width_needed(rows, args.share)
    write(
        path, settings | {"separation": SEPARATION, "share": args.share, "width_needed": needed, "rows": rows}
    )
    text = report(rows, args.widths, args.methods, needed, args.share)
    (args.out / "level_curves.md").write_text(f"# Level curves\n\n{settings}\n\n{text}")
    print(text)
    if not args.no_plot:
        draw(nets, args.eps, args.out / "level_curves.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
