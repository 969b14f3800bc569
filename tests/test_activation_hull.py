"""Hulls of groups of other activations: sound in exact arithmetic where the activation allows it, and tighter than lines."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

import pycert
from hulls import FAMILIES, ExactHull, box_of, directions, limits

DTYPES = [torch.float64, torch.float32]


def tensors(limit: np.ndarray, dtype: torch.dtype) -> list[torch.Tensor]:
    lower, upper = box_of(limit)
    return [torch.tensor(t, dtype=dtype)[None] for t in (lower, upper, -directions(len(lower)), limit)]


def rows_of(made: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    rows, count = made
    assert (rows[0, count[0] :] == 0).all()
    return rows[0, : count[0]].double().numpy()


def vertices(limit: np.ndarray) -> list[list[Fraction]]:
    """Of the octahedron cut by the planes ``x_i = 0``, exact."""
    exact = ExactHull(limit)
    return [
        [Fraction(int(v), int(s) * exact.denominator) for v in point]
        for point, s in zip(exact.points, exact.determinant)
    ]


def least(rows: np.ndarray, points: list[list[Fraction]], values) -> Fraction:
    """The least value of a row at a point ``(x, values(x))``, exact."""
    fractions = [[Fraction(float(v)) for v in row] for row in rows]
    full = [[1, *x, *values(x)] for x in points]
    return min(sum(f * p for f, p in zip(row, point) if f) for row in fractions for point in full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [2, 3])
def test_no_row_of_leaky_relu_is_violated_in_exact_arithmetic(k, dtype):
    rng = np.random.default_rng(k)
    for number in range(len(FAMILIES) * (3 if k == 2 else 1)):
        limit = limits(rng, FAMILIES[number % len(FAMILIES)], k)
        limit = torch.tensor(limit, dtype=dtype).double().numpy()
        slope = [0.25, 0.01, 0.0][number % 3]
        made = pycert.ops.activation_hull(
            *tensors(limit, dtype), "leaky_relu", negative_slope=slope, max_rows=20
        )
        exact = Fraction(slope)
        points = vertices(limit)[:60]
        found = least(rows_of(made), points, lambda x, e=exact: [v if v > 0 else e * v for v in x])
        assert found >= 0, FAMILIES[number % len(FAMILIES)]


def optimum(rows: np.ndarray, objective: np.ndarray) -> float:
    linprog = pytest.importorskip("scipy.optimize", reason="the optimum is a linear program's").linprog
    return -linprog(-objective, A_ub=-rows[:, 1:], b_ub=rows[:, 0], bounds=(None, None)).fun


@pytest.mark.parametrize("family", ["net", "correlated", "cloud", "near_zero", "stable"])
def test_pairs_of_leaky_relu_are_exact(family):
    rng = np.random.default_rng(FAMILIES.index(family))
    limit = limits(rng, family, 2)
    made = rows_of(
        pycert.ops.activation_hull(*tensors(limit, torch.float64), "leaky_relu", negative_slope=0.1)
    )
    x = ExactHull(limit).vertices()[:, :2]
    points = np.hstack([x, np.where(x > 0, x, 0.1 * x)])
    for _ in range(6):
        objective = rng.standard_normal(4)
        exact = (points @ objective).max()
        assert optimum(made, objective) == pytest.approx(exact, abs=2e-6 * np.abs(points).max())


CURVES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "elu": torch.nn.functional.elu}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", CURVES)
def test_curves_hold_at_points_and_joint_rows_cut_lines_off(activation, dtype):
    rng = np.random.default_rng(4)
    gained = 0.0
    for k, _ in itertools.product((2, 3), range(4)):
        points = 1.5 * rng.uniform(-1, 1, (1000, 4)) @ rng.standard_normal(
            (4, k)
        ) + 0.3 * rng.standard_normal(k)
        points = torch.tensor(points, dtype=dtype).double().numpy()
        limit = (directions(k) @ points.T).max(1)
        limit = torch.tensor(limit + 1e-6, dtype=dtype).double().numpy()
        made = rows_of(pycert.ops.activation_hull(*tensors(limit, dtype), activation))
        values = CURVES[activation](torch.tensor(points)).numpy()
        assert (made[:, :1] + made[:, 1:] @ np.hstack([points, values]).T).min() > -1e-14
        alone = made[(made[:, 1 + k :] != 0).sum(1) <= 1]
        for objective in np.hstack([np.zeros((4, k)), rng.standard_normal((4, k))]):
            gained += optimum(alone, objective) - optimum(made, objective)
    assert gained > 0.01


def test_stable_and_identity_coordinates_and_one_neuron():
    limit = limits(np.random.default_rng(6), "cloud", 2)
    made = pycert.ops.activation_hull(
        *tensors(limit, torch.float64), "tanh", identity=torch.tensor([[True, False]])
    )
    rows = rows_of(made)
    assert (rows[:, 3] == 0).all()
    x = ExactHull(limit).vertices()[:, :2]
    assert (rows[:, 0] + np.hstack([x, np.tanh(x)]) @ rows[:, 1:].T).min() > -1e-14
    single = rows_of(pycert.ops.activation_hull(*tensors(np.array([1.0, 3.0]), torch.float64), "sigmoid"))
    x = np.linspace(-1, 3, 1000)
    assert (single[:, :1] + single[:, 1:] @ np.stack([x, 1 / (1 + np.exp(-x))])).min() > -1e-15
    assert len(single) > 4
    point = [torch.full((1, 2), 0.5), torch.full((1, 2), 0.5), torch.zeros(1, 0, 2), torch.zeros(1, 0)]
    rows = rows_of(pycert.ops.activation_hull(*point, "tanh"))
    assert (rows[:, 0] + rows[:, 1:] @ np.array([0.5, 0.5, np.tanh(0.5), np.tanh(0.5)])).min() >= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["net", "correlated", "cloud", "thin", "box", "tiny", "huge", "duplicate"])
def test_the_maximum_of_a_pair_is_sound_and_exact(family, dtype):
    rng = np.random.default_rng([3, FAMILIES.index(family)])
    limit = torch.tensor(limits(rng, family, 2), dtype=dtype).double().numpy()
    rows = rows_of(pycert.ops.maximum_hull(*tensors(limit, dtype)))
    corners = vertices(limit)
    assert least(rows, corners, lambda x: [max(x)]) >= 0
    # the maximum is convex: the hull's vertices are those of the octahedron, and where the octahedron meets x1 = x2
    turned = limits_of_sum_and_difference(limit)
    s, d = ExactHull(turned).vertices()[:, :2].T
    points = np.stack([(s + d) / 2, (s - d) / 2, np.maximum(s + d, s - d) / 2], 1)
    scale = np.abs(points).max()
    for objective in rng.standard_normal((6, 3)):
        exact = (points @ objective).max()
        scaled = rows * np.array([1 / scale, 1, 1, 1])
        assert scale * optimum(scaled, objective) == pytest.approx(exact, abs=3e-6 * scale)


def limits_of_sum_and_difference(limit: np.ndarray) -> np.ndarray:
    of = {tuple(c): value for c, value in zip(directions(2).astype(int), limit, strict=True)}

    def bound(c: tuple[int, int]) -> float:
        first, second = c  # c . (s, d) = (first + second) x1 + (first - second) x2
        if first == 0 or second == 0:
            return of[(first + second, first - second)]
        return 2 * of[((first + second) // 2, (first - second) // 2)]

    return np.array([bound(tuple(c)) for c in directions(2).astype(int)])


def test_errors_name_the_argument():
    ok = [torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1, 0, 3), torch.zeros(1, 0)]
    with pytest.raises(ValueError, match=r"maximum_hull: lower must be \[groups, 2\]"):
        pycert.ops.maximum_hull(*ok)
    with pytest.raises(ValueError, match="activation"):
        pycert.ops.activation_hull(*ok, "step")


@pytest.mark.parametrize(
    "hull", [pycert.ops.maximum_hull, lambda *a: pycert.ops.activation_hull(*a, "sigmoid")]
)
def test_arguments_that_do_not_fit_are_refused(hull):
    ends, A, b = torch.ones(1, 2), torch.zeros(1, 3, 2), torch.ones(1, 3)
    for given in (
        (-ends.half(), ends.half(), A.half(), b.half()),
        (-ends.long(), ends.long(), A.long(), b.long()),
    ):
        with pytest.raises(TypeError, match="float32 or float64"):
            hull(*given)
    for given in ((-ends.double(), ends, A, b), (-ends, ends, A.double(), b)):
        with pytest.raises(TypeError, match="like lower"):
            hull(*given)
    for given in ((-ends[0], ends[0], A, b), (-ends, ends, A[:, :, :1], b), (-ends, ends, A, b[:, :2])):
        with pytest.raises(ValueError, match="must be"):
            hull(*given)
