"""Corners of small polytopes, for drawing: plain floating point, nothing here is a bound."""

from __future__ import annotations

import itertools

import numpy as np

#: How far apart points are to be told apart, in units of the polytope's size.
TOLERANCE = 1e-7


def corners(rows: np.ndarray) -> np.ndarray:
    """The vertices of ``{p : b + a . p >= 0}`` for rows ``(b, a)``, ``[R, 1 + n]``, as ``[V, n]``.

    Every ``n`` rows are solved for the point where they meet, and points outside are dropped, so this is for a few
    dozens of rows in up to four dimensions.
    """
    n = rows.shape[1] - 1
    rows = rows[np.abs(rows[:, 1:]).max(1) > 0]
    rows = np.unique(np.round(rows / np.abs(rows[:, 1:]).max(1, keepdims=True), 12), axis=0)
    chosen = np.array(list(itertools.combinations(range(len(rows)), n)))
    normals = rows[chosen, 1:]
    independent = np.abs(np.linalg.det(normals)) > 1e-9
    points = np.linalg.solve(normals[independent], -rows[chosen[independent], 0][..., None])[..., 0]
    size = max(float(np.abs(rows[:, 0]).max()), 1e-30)
    inside = (rows[:, :1] + rows[:, 1:] @ points.T).min(0) > -TOLERANCE * size
    return distinct(points[inside], size)


def distinct(points: np.ndarray, size: float) -> np.ndarray:
    """Points without those that coincide with an earlier one."""
    kept: list[np.ndarray] = []
    for point in points:
        if all(np.abs(point - other).max() > 10 * TOLERANCE * size for other in kept):
            kept.append(point)
    return np.array(kept).reshape(-1, points.shape[1])


def outline(points: np.ndarray) -> np.ndarray:
    """The convex hull of points of a plane, counter-clockwise, no three in a line; 1 or 2 points where it is flat."""
    size = max(float(np.abs(points).max()), 1e-30)
    points = distinct(points, size)
    across, up = np.round(points / size, 7).T  # noise must not decide the order of points above each other
    points = points[np.lexsort((up, across))]
    if len(points) < 3:
        return points

    def chain(points: np.ndarray) -> list[np.ndarray]:
        kept: list[np.ndarray] = []
        for point in points:
            while len(kept) > 1:
                (ax, ay), (bx, by) = kept[-1] - kept[-2], point - kept[-2]
                if ax * by - ay * bx > TOLERANCE * size * size:
                    break
                kept.pop()
            kept.append(point)
        return kept[:-1]

    return np.array(chain(points) + chain(points[::-1]))


def faces(rows: np.ndarray) -> list[np.ndarray]:
    """The faces of a polytope ``{p : b + a . p >= 0}`` of space: ``[V, 3]`` each, in order around it."""
    points = corners(rows)
    size = max(float(np.abs(points).max()), 1e-30)
    found: dict[frozenset[int], np.ndarray] = {}
    for b, *a in rows:
        normal = np.array(a)
        length = np.linalg.norm(normal)
        if length == 0:
            continue
        normal /= length
        on = np.nonzero(np.abs(b / length + points @ normal) < 100 * TOLERANCE * size)[0]
        if len(on) < 3:
            continue
        first = np.cross(normal, np.eye(3)[np.abs(normal).argmin()])
        first /= np.linalg.norm(first)
        plane = np.stack([first, np.cross(normal, first)])
        centred = (points[on] - points[on].mean(0)) @ plane.T
        if np.linalg.svd(centred, compute_uv=False)[1] < 100 * TOLERANCE * size:
            continue  # an edge of a flat polytope
        around = np.argsort(np.arctan2(centred[:, 1], centred[:, 0]))
        found.setdefault(frozenset(on.tolist()), points[on[around]])
    return list(found.values())
