"""Plots of results; needs matplotlib, and no display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycert.plot.figures import make_figure

#: Colours that stay apart for every common form of colour blindness (Okabe and Ito); markers for print.
STYLES = {
    "ibp": ("#E69F00", "o"),
    "crown-ibp": ("#0072B2", "s"),
    "crown": ("#009E73", "^"),
    "alpha-crown": ("#56B4E9", "P"),
    "fastlin": ("#D55E00", "v"),
    "forward": ("#CC79A7", "D"),
    "lipschitz": ("#F0E442", "X"),
    "krelu": ("#882255", "*"),
    "lp": ("#332288", "d"),
}


def certified_accuracy(results: Mapping[str, Any], path: str | Path) -> Path:
    """Certified accuracy against eps: one line a method, PGD as the upper limit, clean accuracy beside.

    The true robust accuracy lies between the highest certified line and the PGD line.

    Args:
        results: what ``pycert certify`` and ``pycert demo`` write as JSON: ``rows`` (a list of dicts
            ``method, eps, accuracy``; the method ``"pgd"`` is the attack), ``clean`` (accuracy), and for the
            labels ``network, data, samples, p, soundness`` and, where known, ``training_eps``. Accuracies lie
            in [0, 1].
        path: of the picture; the suffix decides the format (png, svg, pdf).

    Returns:
        ``path`` as a Path.

    Raises:
        ValueError: there are no rows.
        ModuleNotFoundError: matplotlib is missing.
    """
    curves = _curves(results["rows"])
    if not curves:
        raise ValueError("certified_accuracy: results hold no rows, so there is nothing to plot")
    figure = make_figure((9.5, 5), dpi=150)
    axes = figure.add_subplot()
    attack = curves.pop("pgd", None)
    _areas(axes, curves, attack)
    axes.axhline(
        100 * results["clean"], color="0.4", linestyle=":", label=f"clean accuracy ({results['clean']:.1%})"
    )
    if attack:
        axes.plot(
            *attack, color="black", linestyle="--", marker="x", markersize=5, label="PGD attack (upper limit)"
        )
    for method, curve in curves.items():
        color, marker = STYLES.get(method, ("0.3", "."))
        axes.plot(
            *curve, color=color, marker=marker, markersize=5, linewidth=2, label=f"certified by {method}"
        )
    if results.get("training_eps") is not None:
        axes.axvline(results["training_eps"], color="0.7", linewidth=1, zorder=0)
        axes.annotate(" eps in training", (results["training_eps"], 2), color="0.4", fontsize=8)
    axes.set_xlabel(
        f"eps: radius of the L{_norm(results.get('p', 'inf'))} ball around each input, in input units"
    )
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 102)
    axes.margins(x=0.01)
    axes.grid(color="0.9")
    figure.legend(loc="outside right upper", fontsize=9)
    axes.set_title(_title(results), fontsize=11)
    figure.savefig(path)
    return Path(path)


def _curves(rows: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Method -> (eps ascending, accuracy in percent)."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["eps"]):
        eps, accuracy = curves.setdefault(row["method"], ([], []))
        eps.append(row["eps"])
        accuracy.append(100 * row["accuracy"])
    order = [*STYLES, *(name for name in curves if name not in STYLES)]
    return {name: curves[name] for name in order if name in curves}


def _areas(axes: Any, curves: Mapping[str, tuple[list[float], list[float]]], attack: Any) -> None:
    """Shade what is proved and what an attack breaks, where every line has the same eps."""
    lines = [*curves.values(), *([attack] if attack else [])]
    if not curves or any(line[0] != lines[0][0] for line in lines) or len(lines[0][0]) < 2:
        return
    eps = lines[0][0]
    best = [max(values) for values in zip(*(line[1] for line in curves.values()), strict=True)]
    axes.fill_between(eps, 0, best, color="#009E73", alpha=0.08, linewidth=0, label="proved robust")
    if attack:
        axes.fill_between(eps, best, attack[1], color="0.5", alpha=0.18, linewidth=0, label="undecided")
        axes.fill_between(
            eps, attack[1], 102, color="#D55E00", alpha=0.08, linewidth=0, label="broken by the attack"
        )


def _norm(p: Any) -> str:
    return "inf" if str(p) == "inf" else f"{float(p):g}"


def _title(results: Mapping[str, Any]) -> str:
    about = [str(results[key]) for key in ("network", "data") if results.get(key)]
    if results.get("samples"):
        about.append(f"{results['samples']} samples")
    second = f"\nsoundness: {results['soundness']}" if results.get("soundness") else ""
    return "How much is provably robust? " + ", ".join(about) + second


def profile_picture(profile: Any, path: str | Path, kernels: int = 8, layers: int = 20) -> Path:
    """The roofline of a :class:`pycert.profiling.Profile` and the time of its layers.

    Left: every kernel of every layer by its operations per byte and its speed, the area of a point its time, below
    the device's measured roofs. Right: time by layer, divided by kernel.

    Args:
        profile: as ``pycert.profile()`` left it.
        path: of the picture; the suffix decides the format (png, svg, pdf).
        kernels: so many get a colour; the others are grey.
        layers: so many, the longest, get a bar.

    Returns:
        ``path`` as a Path.

    Raises:
        ValueError: nothing was recorded.
        ModuleNotFoundError: matplotlib is missing.
    """
    if not profile.entries:
        raise ValueError("profile_picture: nothing was recorded, so there is nothing to plot")
    palette = ["#E69F00", "#0072B2", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#F0E442", "#000000"]
    longest = [entry.kernel for entry in profile.summed("kernel")]
    colours = dict(zip(longest[: min(kernels, len(palette))], palette))
    figure = make_figure((12, 5), dpi=100)
    roofline, bars = figure.subplots(1, 2)
    _roofline(roofline, profile, colours)
    _layer_bars(bars, profile, colours, layers)
    figure.savefig(path)
    return Path(path)


def _roofline(axes: Any, profile: Any, colours: Mapping[str, str]) -> None:
    roofs = profile.roofs()
    points = [e for e in profile.entries if e.bytes > 0 and e.flops > 0 and e.seconds > 0]
    most = max((entry.seconds for entry in points), default=1.0)
    for entry in points:
        axes.scatter(
            entry.flops / entry.bytes,
            entry.flops / entry.seconds / 1e9,
            s=8 + 250 * entry.seconds / most,
            color=colours.get(entry.kernel, "0.7"),
            alpha=0.7,
            linewidths=0,
        )
    ridge = roofs.rate / roofs.bandwidth
    low = min([0.05, *(entry.flops / entry.bytes for entry in points)])
    high = max([10 * ridge, *(entry.flops / entry.bytes for entry in points)])
    roof = [low * roofs.bandwidth / 1e9, roofs.rate / 1e9, roofs.rate / 1e9]
    axes.plot([low, ridge, high], roof, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"roofs: {roofs.bandwidth / 1e9:.3g} GB/s, {roofs.rate / 1e9:.4g} GFLOP/s", fontsize=10)


def _layer_bars(axes: Any, profile: Any, colours: Mapping[str, str], layers: int) -> None:
    names = [entry.layer for entry in profile.summed("layer")[:layers]]
    left = dict.fromkeys(names, 0.0)
    parts = [entry for entry in profile.summed("layer", "kernel") if entry.layer in left]
    labelled: set[str] = set()
    for entry in sorted(
        parts, key=lambda e: list(colours).index(e.kernel) if e.kernel in colours else len(colours)
    ):
        name = entry.kernel if entry.kernel in colours else "other kernels"
        label = None if name in labelled else name
        labelled.add(name)
        colour = colours.get(entry.kernel, "0.7")
        axes.barh(
            names.index(entry.layer), 1e3 * entry.seconds, left=left[entry.layer], color=colour, label=label
        )
        left[entry.layer] += 1e3 * entry.seconds
    axes.set_yticks(range(len(names)), [name or "outside layers" for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(f"time by layer, {1e3 * profile.seconds:.3g} ms in all", fontsize=10)
