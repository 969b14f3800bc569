"""Pictures of relaxations; need matplotlib, and no display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycert.plot.figures import make_figure

#: Fill colours (Okabe and Ito), and how sets are called.
COLOURS = {
    "box": "#E69F00",
    "octahedron": "#0072B2",
    "zonotope": "#CC79A7",
    "crown": "#56B4E9",
    "triangle": "#009E73",
    "triangles": "#009E73",
    "hull": "#0072B2",
    "exact": "#D55E00",
}
NAMES = {
    "box": "box",
    "octahedron": "octahedron",
    "zonotope": "zonotope",
    "crown": "CROWN, DeepPoly",
    "triangle": "triangle",
    "triangles": "product of triangles",
    "hull": "2-ReLU hull",
    "exact": "exact image",
}


def relaxation_neuron(data: Mapping[str, Any], path: str | Path) -> Path:
    """One ReLU: its box, zonotope, CROWN lines and triangle, side by side.

    Args:
        data: what :func:`relaxation_data` returns; the scene ``neuron``.
        path: of the picture; the suffix decides the format (png, svg, pdf).

    Returns:
        ``path`` as a Path.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    lower, upper = data["lower"], data["upper"]
    figure = make_figure((10, 2.9))
    panels = figure.subplots(1, len(data["neuron"]), sharex=True, sharey=True)
    for axes, (name, points) in zip(panels, data["neuron"].items(), strict=True):
        _fill(axes, points, COLOURS[name])
        axes.plot([lower, min(max(lower, 0), upper), upper], _relu([lower, 0, upper]), "k-", linewidth=2)
        axes.set_title(f"{NAMES[name]}\narea {_area(points):.3g}", fontsize=10)
        axes.set_xlabel("x")
        axes.grid(color="0.92")
    panels[0].set_ylabel("y = relu(x)")
    return _save(figure, path)


def relaxation_plane(data: Mapping[str, Any], path: str | Path) -> Path:
    """Two ReLUs: what is known before them, and the sets behind them over which ``y1 + y2`` is maximised.

    On the right, dashed lines are those of equal ``y1 + y2`` that touch each set: what lies between one of them and
    the exact one is lost.

    Args, returns, raises: as :func:`relaxation_neuron`; the scene ``plane``.
    """
    plane = data["plane"]
    figure = make_figure((10, 6.2))
    before, after = figure.subplots(1, 2)
    for name, points in plane["before"].items():
        _fill(before, points, COLOURS[name], f"{NAMES[name]} before")
    before.axhline(0, color="0.5", linewidth=0.8)
    before.axvline(0, color="0.5", linewidth=0.8)
    before.set(title="before: x = (z1 + z2, z1 - z2)", xlabel="x1", ylabel="x2", aspect="equal")
    for name, points in plane["sets"].items():
        _fill(after, points, COLOURS[name], f"{NAMES[name]}: at most {plane['optima'][name]['value']:.4g}")
    label = f"{NAMES['exact']}: at most {plane['optima']['exact']['value']:.4g}"
    for points in plane["exact"]:
        _fill(after, points, COLOURS["exact"], label, hatch="///")
        label = ""
    size = max(max(point) for point in plane["sets"]["box"])
    for name, optimum in plane["optima"].items():
        value = optimum["value"]
        after.plot([0, value], [value, 0], color=COLOURS[name], linestyle="--", linewidth=1.2)
        after.plot(*optimum["point"], color=COLOURS[name], marker="o", markersize=5)
    after.set(
        title="behind: y = relu(x), and y1 + y2 at its largest", xlabel="y1", ylabel="y2", aspect="equal"
    )
    after.set_xlim(-0.08 * size, 1.12 * size + 1e-9)
    after.set_ylim(-0.08 * size, 1.12 * size + 1e-9)
    for axes in (before, after):
        axes.grid(color="0.92")
    figure.legend(loc="outside lower center", fontsize=9, ncols=3, frameon=False)
    return _save(figure, path)


def relaxation_solid(data: Mapping[str, Any], path: str | Path) -> Path:
    """``(x1, x2, y1)``: the triangle over the octahedron, and the convex hull, both around ``y1 = relu(x1)``.

    Args, returns, raises: as :func:`relaxation_neuron`; the scene ``solid``.
    """
    figure = make_figure((10, 4.8))
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    for number, name in enumerate(("triangles", "hull")):
        axes: Any = figure.add_subplot(1, 2, number + 1, projection="3d")
        solid, graph = data["solid"][name], data["solid"]["graph"]
        shown = {"facecolor": COLOURS[name], "edgecolor": COLOURS[name], "alpha": 0.22, "linewidths": 1.2}
        axes.add_collection3d(Poly3DCollection(solid, **shown))
        axes.add_collection3d(Poly3DCollection(graph, facecolor=COLOURS["exact"], edgecolor="k", alpha=0.75))
        points = [point for face in [*data["solid"]["triangles"], *graph] for point in face]
        ranges = [(min(c), max(c)) for c in zip(*points)] or [(-1.0, 1.0)] * 3
        axes.set(**{f"{axis}lim": ends for axis, ends in zip("xyz", ranges) if ends[0] < ends[1]})
        axes.set(xlabel="x1", ylabel="x2", zlabel="y1")
        axes.set_title("octahedron and triangle" if name == "triangles" else "convex hull", fontsize=10)
        axes.view_init(elev=22, azim=-62)
    return _save(figure, path)


def _save(figure: Any, path: str | Path) -> Path:
    figure.savefig(path)
    return Path(path)


def _relu(values: list[float]) -> list[float]:
    lower, kink, upper = values
    return [max(lower, 0.0), max(min(max(lower, kink), upper), 0.0), max(upper, 0.0)]


def _fill(axes: Any, points: Any, colour: str, label: str = "", hatch: str | None = None) -> None:
    x, y = zip(*[*points, points[0]])
    axes.fill(x, y, facecolor=colour, alpha=0.2, linewidth=0, hatch=hatch, edgecolor=colour)
    axes.plot(x, y, color=colour, linewidth=1.8, label=label or None)


def _area(points: Any) -> float:
    following = [*points[1:], points[0]]
    return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, following))) / 2
