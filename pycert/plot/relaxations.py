"""What the pictures of relaxations show, as numbers; every set comes from rows and lines that pycert bounds with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pycert.bounded import BoundedModule
from pycert.krelu import Octahedra, octahedral_bounds
from pycert.ops.krelu import krelu_hull
from pycert.ops.relaxation import relu_relaxation
from pycert.plot.shapes import corners, faces, outline
from pycert.regions import Box

#: The first layer of the network in the pictures: x1 = z1 + z2, x2 = z1 - z2.
WEIGHT = ((1.0, 1.0), (1.0, -1.0))
#: What is maximised over the outputs y of its ReLUs.
OBJECTIVE = (1.0, 1.0)
#: Relaxations of one neuron, and the slope rule of those that are two lines.
LINES = {"zonotope": "parallel", "crown": "adaptive"}


def relaxation_data(lower: float = -1.0, upper: float = 1.0, digits: int | None = None) -> dict[str, Any]:
    """The sets between which relaxations differ, over ``[lower, upper]``, as plain numbers.

    Three scenes. ``neuron``: one ReLU over ``[lower, upper]``. ``plane``: ``y = relu(x)`` with
    ``x = (z1 + z2, z1 - z2)`` and inputs ``z`` in ``[lower, upper]^2``; what is known about ``x``, and the sets of
    ``y`` over which ``y1 + y2`` is maximised. ``solid``: ``(x1, x2, y1)`` of the same network.

    Args:
        lower: at most ``upper``; in the units of the input.
        upper: finite.
        digits: decimals to keep; all of them unless given.

    Returns:
        ``{"lower", "upper", "neuron", "plane", "solid"}``, of lists and floats alone, so that it can be written
        as JSON. ``neuron``: outlines ``[(x, y), ...]`` of ``box``, ``zonotope``, ``crown`` and ``triangle``,
        counter-clockwise. ``plane``: ``before`` (outlines of ``box`` and ``octahedron``), ``exact`` (outlines
        of the pieces of the image, which is not convex), ``sets`` (outlines of ``box``, ``triangles`` and
        ``hull``) and ``optima`` (of those and of ``exact``: ``value`` and the ``point`` y that has it).
        ``solid``: ``triangles`` and ``hull``, lists of faces ``[(x1, x2, y1), ...]``, and ``graph``, the
        two pieces of ``y1 = relu(x1)``.

    Raises:
        ValueError: the ends are not finite, or in the wrong order.

    Soundness: none: numbers to look at, rounded to nearest. The rows they come from are outward rounded.

    Example:
        >>> data = pycert.plot.relaxation_data(-1, 1, digits=6)
        >>> {name: at["value"] for name, at in data["plane"]["optima"].items()}
        {'box': 4.0, 'triangles': 3.0, 'hull': 2.0, 'exact': 2.0}
    """
    if not (np.isfinite([lower, upper]).all() and lower <= upper):
        raise ValueError(f"relaxation_data: needs finite lower <= upper, got {lower} and {upper}")
    octahedra, outputs = _toy(float(lower), float(upper))
    data = {
        "lower": float(lower),
        "upper": float(upper),
        "neuron": _neuron(float(lower), float(upper)),
        "plane": _plane(octahedra, outputs),
        "solid": _solid(octahedra),
    }
    return _plain(data, digits)


def _toy(lower: float, upper: float) -> tuple[Octahedra, np.ndarray]:
    """What is known about x in front of the ReLUs, and boxes of y by interval arithmetic, ``[2, 2]``."""
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor(WEIGHT, dtype=torch.float64)
    region = Box(torch.full((1, 2), lower).double(), torch.full((1, 2), upper).double())
    bm = BoundedModule(nn.Sequential(layer, nn.ReLU()), region.lower)
    outputs = bm.bound(region, method="ibp")
    assert outputs.lower is not None and outputs.upper is not None
    found = octahedral_bounds(bm, region, "0", torch.tensor([[0, 1]]))
    ends = torch.stack([outputs.lower[0], outputs.upper[0]], 1)
    return Octahedra(*(t[0] for t in found)), ends.detach().numpy()


def _rows(octahedra: Octahedra, **options: Any) -> np.ndarray:
    """Rows of :func:`krelu_hull` for the one group, ``[R, 5]``."""
    rows, count = krelu_hull(*octahedra, **options)
    return rows[0, : int(count[0])].numpy()


def _neuron(lower: float, upper: float) -> dict[str, np.ndarray]:
    ends = torch.tensor([[lower]], dtype=torch.float64), torch.tensor([[upper]], dtype=torch.float64)
    lowest, highest = max(lower, 0.0), max(upper, 0.0)
    found = {"box": [(lower, lowest), (upper, lowest), (upper, highest), (lower, highest)]}
    for name, slope in LINES.items():
        below, above, intercept = (float(t) for t in relu_relaxation(*ends, slope))
        found[name] = [
            (lower, below * lower),
            (upper, below * upper),
            (upper, above * upper + intercept),
            (lower, above * lower + intercept),
        ]
    outlines = {name: outline(np.array(points)) for name, points in found.items()}
    A = torch.tensor([[[1.0], [-1.0]]], dtype=torch.float64)
    rows, count = krelu_hull(*ends, A, torch.cat([-ends[0], ends[1]], 1))
    return outlines | {"triangle": outline(corners(rows[0, : int(count[0])].numpy()))}


def _plane(octahedra: Octahedra, outputs: np.ndarray) -> dict[str, Any]:
    known = _rows(octahedra, max_rows=0)
    of_x = known[(known[:, 3:] == 0).all(1), :3]
    (l1, l2), (u1, u2) = octahedra.lower[0].tolist(), octahedra.upper[0].tolist()
    box = np.array([(l1, l2), (u1, l2), (u1, u2), (l1, u2)])
    exact = []
    for signs in ((1, 1), (-1, 1), (-1, -1), (1, -1)):
        piece = corners(np.vstack([of_x, [[0, signs[0], 0], [0, 0, signs[1]]]]))
        if len(piece):
            exact.append(outline(np.maximum(piece, 0)))
    first, second = outputs
    sets = {
        "box": outline(np.array([(y1, y2) for y1 in first for y2 in second])),
        "triangles": outline(corners(known)[:, 2:]),
        "hull": outline(corners(_rows(octahedra))[:, 2:]),
    }
    optima = {name: _optimum(points) for name, points in (sets | {"exact": np.vstack(exact)}).items()}
    before = {"box": outline(box), "octahedron": outline(corners(of_x))}
    return {"before": before, "exact": exact, "sets": sets, "objective": OBJECTIVE, "optima": optima}


def _optimum(points: np.ndarray) -> dict[str, Any]:
    values = points @ np.array(OBJECTIVE)
    best = values.max()
    touching = points[values > best - 1e-9 * max(1.0, abs(best))]
    return {"value": float(best), "point": touching.mean(0)}


def _solid(octahedra: Octahedra) -> dict[str, Any]:
    """``x2`` takes part as an identity coordinate, so rows are over ``(x1, x2, y1)`` already."""
    identity = torch.tensor([[False, True]])
    columns = [0, 1, 2, 3]
    known = _rows(octahedra, identity=identity, max_rows=0)[:, columns]
    of_x = known[known[:, 3] == 0, :3]
    graph = []
    for sign in (1, -1):
        piece = corners(np.vstack([of_x, [[0, sign, 0]]]))
        if len(piece) > 2:
            flat = outline(piece)
            graph.append(np.column_stack([flat, np.maximum(flat[:, 0], 0)]))
    hull = _rows(octahedra, identity=identity)[:, columns]
    return {"triangles": faces(known), "hull": faces(hull), "graph": graph}


def _plain(value: Any, digits: int | None) -> Any:
    """Lists and floats in place of arrays, tuples and tensors; minus zero becomes zero."""
    if isinstance(value, dict):
        return {key: _plain(item, digits) for key, item in value.items()}
    if isinstance(value, (np.ndarray, Tensor)):
        return _plain(value.tolist(), digits)
    if isinstance(value, (list, tuple)):
        return [_plain(item, digits) for item in value]
    return (value if digits is None else round(value, digits)) + 0.0
