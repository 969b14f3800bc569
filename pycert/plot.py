"""Plots of results; needs matplotlib, and no display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Colours that stay apart for every common form of colour blindness (Okabe and Ito); markers for print.
STYLES = {
    "ibp": ("#E69F00", "o"),
    "crown-ibp": ("#0072B2", "s"),
    "crown": ("#009E73", "^"),
    "alpha-crown": ("#56B4E9", "P"),
    "fastlin": ("#D55E00", "v"),
    "forward": ("#CC79A7", "D"),
    "lipschitz": ("#F0E442", "X"),
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
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install matplotlib", name="matplotlib"
        ) from error

    curves = _curves(results["rows"])
    if not curves:
        raise ValueError("certified_accuracy: results hold no rows, so there is nothing to plot")
    figure = Figure(figsize=(9.5, 5), dpi=150, layout="constrained")
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
