"""Groups of neurons with octahedral bounds, and their hulls in exact rational arithmetic, for small groups."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import numpy as np

FAMILIES = (
    "net",
    "correlated",
    "cloud",
    "thin",
    "box",
    "near_zero",
    "stable",
    "duplicate",
    "point",
    "tiny",
    "huge",
    "mixed",
)


def directions(k: int) -> np.ndarray:
    return np.array([c for c in itertools.product((-1, 0, 1), repeat=k) if any(c)], dtype=np.float64)


def _tight(points: np.ndarray) -> np.ndarray:
    return (directions(points.shape[1]) @ points.T).max(1)


def _cloud(rng: np.random.Generator, k: int) -> np.ndarray:
    shape = rng.standard_normal((k, k))
    return rng.uniform(-1, 1, (6 * k + 10, k)) @ shape.T + 0.25 * rng.standard_normal(k)


def _net(rng: np.random.Generator, k: int, correlation: float) -> np.ndarray:
    """Limits of an affine layer over a box of 8 inputs, where a direction of neurons is one affine function."""
    W = rng.standard_normal((k, 8))
    W = correlation * rng.standard_normal((1, 8)) + (1 - correlation) * W
    C = directions(k)
    return C @ (0.3 * rng.standard_normal(k)) + np.abs(C @ W).sum(1) * 0.4


def limits(rng: np.random.Generator, family: str, k: int) -> np.ndarray:
    """``limit(c)`` of every direction, float64, of a random group of the family."""
    C = directions(k)
    cloud = _cloud(rng, k)
    if family == "net":
        return _net(rng, k, 0.0)
    if family == "correlated":
        return _net(rng, k, 0.7)
    if family == "thin":  # all neurons nearly equal
        return _tight(rng.uniform(-1, 1, (20, 1)) + 1e-3 * rng.standard_normal((20, k)))
    if family == "box":
        lower, upper = -rng.uniform(0.1, 2, k), rng.uniform(0.1, 2, k)
        return np.where(C > 0, C * upper, C * lower).sum(1)
    if family == "near_zero":  # one end of one neuron just past zero
        cloud[:, 0] -= cloud[:, 0].max() - rng.choice([2.0**-40, 2.0**-20, 2.0**-60])
        return _tight(cloud)
    if family == "stable":
        cloud[:, 0] += 5 * rng.choice([-1, 1])
        return _tight(cloud)
    if family == "duplicate":  # two neurons that are one, and coincident facets
        cloud[:, -1] = cloud[:, 0]
        return _tight(np.round(cloud * 8) / 8)
    if family == "point":  # flat in one coordinate
        cloud[:, -1] = rng.choice([0.0, -0.5, 0.75])
        return _tight(cloud)
    if family == "tiny":
        return _tight(cloud) * 1e-12
    if family == "huge":
        return _tight(cloud) * 1e4
    if family == "mixed":  # neurons of sizes that have nothing to do with each other
        return _tight(cloud * 10.0 ** rng.uniform(-12, 4, k))
    return _tight(cloud)


def box_of(limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k = {2: 1, 8: 2, 26: 3, 80: 4}[len(limit)]
    C = directions(k)
    of = {tuple(c): value for c, value in zip(C.astype(int), limit, strict=True)}
    unit = np.eye(k, dtype=int)
    return (
        np.array([-of[tuple(-e)] for e in unit], dtype=limit.dtype),
        np.array([of[tuple(e)] for e in unit], dtype=limit.dtype),
    )


def _as_integers(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Floats as integers over one power of two."""
    fractions = [Fraction(float(v)) for v in np.ravel(values)]
    denominator = max((f.denominator for f in fractions), default=1)
    exact = np.array([f.numerator * (denominator // f.denominator) for f in fractions], dtype=object)
    return exact.reshape(np.shape(values)), denominator


@functools.lru_cache
def _bases(k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All sets of k independent rows among directions and planes, with determinants and adjugates."""
    rows = np.vstack([directions(k), np.eye(k)])
    subsets = np.array(list(itertools.combinations(range(len(rows)), k)), dtype=np.int16)
    determinant = np.rint(np.linalg.det(rows[subsets]))
    subsets, determinant = subsets[determinant != 0], determinant[determinant != 0]
    return subsets, determinant, np.rint(np.linalg.inv(rows[subsets]) * determinant[:, None, None])


class ExactHull:
    """The vertices of an octahedron cut by the planes ``x_i = 0``, over common denominators, found in rational arithmetic.

    ``points[v] / (determinant[v] * denominator)``. Candidates are chosen in floats with a wide tolerance; whether
    one is feasible is decided exactly. ``relu`` of any point is a combination of these vertices' images.
    """

    def __init__(self, limit: np.ndarray) -> None:
        k = {2: 1, 8: 2, 26: 3, 80: 4}[len(limit)]
        C = directions(k)
        self.k = k
        exact, self.denominator = _as_integers(limit)
        rhs = np.concatenate([limit, np.zeros(k)])
        subsets, determinant, adjugate = _bases(k)
        size = np.abs(C) @ np.abs(np.stack(box_of(np.asarray(limit, dtype=np.float64)))).max(0)
        x = np.einsum("nij,nj->ni", adjugate, rhs[subsets]) / determinant[:, None]
        near = np.arange(len(x))
        for c, most in zip(C, limit + 1e-9 * size + 1e-300, strict=True):
            near = near[x[near] @ c <= most]
        sign = np.sign(determinant[near]).astype(int).astype(object)
        integer_rhs = np.concatenate([exact, np.zeros(k, dtype=object)])
        points = (adjugate[near].astype(int).astype(object) * integer_rhs[subsets[near]][:, None, :]).sum(
            2
        ) * sign[:, None]
        scale = np.abs(determinant[near]).astype(int).astype(object)
        feasible = (points @ C.astype(int).astype(object).T <= exact[None, :] * scale[:, None]).all(1)
        unique = {
            tuple(Fraction(int(v), int(s)) for v in p): n
            for n, (p, s) in enumerate(zip(points, scale))
            if feasible[n]
        }
        self.points, self.determinant = points[list(unique.values())], scale[list(unique.values())]

    def violated(self, rows: np.ndarray, identity: np.ndarray | None = None) -> float:
        """The largest amount by which a row falls below zero at a vertex, over its largest coefficient; exact sign."""
        if len(rows) == 0 or len(self.points) == 0:
            return 0.0
        exact, denominator = _as_integers(rows)
        k = self.k
        y = np.where(self.points > 0, self.points, 0)
        if identity is not None:
            y = np.where(identity[None, :], self.points, y)
        values = (
            exact[:, :1] * (self.determinant * self.denominator)[None, :]
            + exact[:, 1 : 1 + k] @ self.points.T
            + exact[:, 1 + k :] @ y.T
        )
        if not (values < 0).any():
            return 0.0
        worst = min(values[values < 0])
        return float(-worst / (denominator * self.denominator))

    def vertices(self) -> np.ndarray:
        """``(x, relu(x))`` rounded to float64, ``[V, 2 k]``."""
        x = np.array(
            [
                [float(Fraction(int(v), int(s) * self.denominator)) for v in p]
                for p, s in zip(self.points, self.determinant)
            ]
        )
        return np.hstack([x, np.maximum(x, 0)])


def gap_left(rows: np.ndarray, triangles: np.ndarray, limit: np.ndarray, rng: np.random.Generator) -> float:
    """Share of the gap between ``triangles`` (1) and the exact hull (0) that ``rows`` leave, over six random objectives."""
    from scipy.optimize import linprog

    vertices = ExactHull(limit).vertices()
    k = vertices.shape[1] // 2
    objectives = rng.standard_normal((6, 2 * k))
    objectives[3:, :k] = 0

    def optimum(constraints: np.ndarray) -> float:
        found = (
            linprog(-d, A_ub=-constraints[:, 1:], b_ub=constraints[:, 0], bounds=(None, None))
            for d in objectives
        )
        return sum(-each.fun for each in found)

    exact = (vertices @ objectives.T).max(0).sum()
    return float((optimum(rows) - exact) / (optimum(triangles) - exact))
