"""Hulls of groups of other activations: sound in exact arithmetic where the activation allows it, and tighter than lines."""

from __future__ import annotations

import itertools
from decimal import Decimal, localcontext
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


DIGITS = 60


def as_decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def exact_value(activation: str, x: Fraction) -> Fraction:
    """Of softsign exactly, of the others to 60 digits."""
    if activation == "softsign":
        return x / (1 + abs(x))
    grown = (as_decimal(-abs(x)) * (2 if activation == "tanh" else 1)).exp()
    share = 1 / (1 + grown) if x >= 0 else grown / (1 + grown)
    return Fraction(2 * share - 1 if activation == "tanh" else share)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "softsign"])
def test_no_row_of_a_curve_is_violated_at_rational_points(activation, dtype):
    """Vertices of the octahedron and points between them: lines touch the curve, so that one rounding would show."""
    rng = np.random.default_rng(5)
    with localcontext() as context:
        context.prec = DIGITS
        for number, family in enumerate(FAMILIES):
            if family == "huge":
                continue  # exp of 1e4 has more digits than the context
            k = 2 + number % 2
            limit = torch.tensor(limits(rng, family, k), dtype=dtype).double().numpy()
            rows = rows_of(pycert.ops.activation_hull(*tensors(limit, dtype), activation, max_rows=12))
            corners = vertices(limit)
            points = [corners[i] for i in rng.permutation(len(corners))[:6]]
            for a, b in itertools.pairwise(points[:5]):
                share = Fraction(int(rng.integers(1, 8)), 8)
                points.append([share * p + (1 - share) * q for p, q in zip(a, b)])
            found = least(rows, points, lambda x: [exact_value(activation, v) for v in x])
            assert found >= 0, f"{family}: {float(found)}"


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


def check_maxima(k: int, family: str, number: int, dtype: torch.dtype, most: int | None = None) -> None:
    """Every row holds at every vertex of the octahedron, in rational arithmetic: -max is concave, y >= x_i are base rows."""
    rng = np.random.default_rng([k, number, FAMILIES.index(family)])
    limit = torch.tensor(limits(rng, family, k), dtype=dtype).double().numpy()
    rows = rows_of(pycert.ops.maximum_hull(*tensors(limit, dtype), max_rows=most))
    below = rows[:, -1] > 0
    unit = np.hstack([np.zeros((k, 1)), -np.eye(k), np.ones((k, 1))])
    np.testing.assert_array_equal(rows[below], unit)
    points = vertices(limit)
    if k == 4:
        points = [points[i] for i in rng.permutation(len(points))[:40]]
    assert least(rows, points, lambda x: [max(x)]) >= 0, f"{family} {number}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_row_of_a_maximum_of_three_is_violated_in_exact_arithmetic(family, dtype):
    check_maxima(3, family, 0, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [3, 4])
def test_no_row_of_many_maxima_is_violated_in_exact_arithmetic(k, family, dtype):
    for number in range(1, 31 if k == 3 else 3):
        check_maxima(k, family, number, dtype, 40)


def greatest(k: int, family: str, number: int, **options: int) -> list[tuple[float, float, float]]:
    """Optima over the hull, over what single values allow, and over the rows: of y less a linear function."""
    rng = np.random.default_rng([k, number])
    limit = limits(rng, family, k)
    x = ExactHull(limit).vertices()[:, :k]
    arguments = tensors(limit, torch.float64)
    rows = rows_of(pycert.ops.maximum_hull(*arguments, **options))
    alone = rows_of(pycert.ops.maximum_hull(*arguments, max_rows=0))
    found = []
    for _ in range(5):
        objective = np.append(-rng.dirichlet(np.ones(k)), 1.0)
        exact = (np.column_stack([x, x.max(1)]) @ objective).max()
        found.append((exact, optimum(alone, objective), optimum(rows, objective)))
    return found


@pytest.mark.parametrize("family", ["net", "correlated", "cloud", "thin", "box"])
def test_the_maximum_of_three_is_exact(family):
    for exact, alone, joint in greatest(3, family, 1):
        assert joint == pytest.approx(exact, abs=1e-6)
        assert alone > exact + 1e-3 * (family != "thin")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["net", "cloud", "box"])
def test_the_maximum_of_four_is_close(family):
    exact, alone, joint = np.array(greatest(4, family, 1)).sum(0)
    assert joint - exact < 0.05 * (alone - exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_maximum_of_four_holds_at_points_and_gains(dtype):
    rng = np.random.default_rng(9)
    for _ in range(3):
        points = rng.uniform(-1, 1, (3000, 6)) @ rng.standard_normal((6, 4))
        points = torch.tensor(points, dtype=dtype).double().numpy()
        limit = torch.tensor((directions(4) @ points.T).max(1) + 1e-6, dtype=dtype).double().numpy()
        rows = rows_of(pycert.ops.maximum_hull(*tensors(limit, dtype)))
        lifted = np.column_stack([points, points.max(1)])
        assert (rows[:, :1] + rows[:, 1:] @ lifted.T).min() > -1e-13
        objective = np.array([-0.25, -0.25, -0.25, -0.25, 1])
        alone = rows[:85]
        assert optimum(rows, objective) < 0.9 * optimum(alone, objective)


def test_a_value_that_dominates_is_the_maximum():
    """x1 >= x2 and x1 >= x3 hold on the whole octahedron, not on its box."""
    points = np.random.default_rng(1).uniform(-1, 1, (40, 3))
    points[:, 0] = points[:, 1:].max(1) + 0.125
    limit = (directions(3) @ points.T).max(1)
    rows = rows_of(pycert.ops.maximum_hull(*tensors(limit, torch.float64)))
    assert optimum(rows, np.array([-1.0, 0, 0, 1])) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("k", [3, 4])
def test_maxima_of_what_is_flat_empty_or_not_finite(k):
    flat = [torch.full((1, k), 0.5), torch.full((1, k), 0.5), torch.zeros(1, 0, k), torch.zeros(1, 0)]
    rows = rows_of(pycert.ops.maximum_hull(*flat))
    assert (rows @ np.array([1.0, *[0.5] * (k + 1)])).min() == 0
    one = [flat[0].clone(), flat[1].clone(), *flat[2:]]
    one[0][0, 0], one[1][0, 0] = 0.0, 1.0  # max(x1, 1/2): y <= (1 + x1) / 2
    rows = rows_of(pycert.ops.maximum_hull(*one))
    assert optimum(rows, np.array([-1.0, *[0] * (k - 1), 1])) == pytest.approx(0.5, abs=1e-6)
    assert (rows @ np.array([1.0, 0.75, *[0.5] * (k - 1), 0.75])).min() >= 0
    C = directions(k)
    for limit in (
        np.where(np.arange(len(C)) == 0, -10.0, 1.0),
        np.where(np.arange(len(C)) % 3 == 0, np.nan, 1.0),
    ):
        box = [torch.full((1, k), -1.0, dtype=torch.float64), torch.full((1, k), 1.0, dtype=torch.float64)]
        made = rows_of(pycert.ops.maximum_hull(*box, torch.tensor(-C)[None], torch.tensor(limit)[None]))
        assert np.isfinite(made).all()
    wide = [torch.full((1, k), -torch.inf), torch.full((1, k), torch.inf), *flat[2:]]
    assert rows_of(pycert.ops.maximum_hull(*wide)).shape == (k, 2 + k)


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
    for k in (1, 5):
        wrong = [torch.zeros(1, k), torch.ones(1, k), torch.zeros(1, 0, k), torch.zeros(1, 0)]
        with pytest.raises(ValueError, match=r"maximum_hull: lower must be \[groups, k\] with k from 2 to 4"):
            pycert.ops.maximum_hull(*wrong)
    with pytest.raises(ValueError, match="maximum_hull: pivots must not be negative"):
        pycert.ops.maximum_hull(*ok, pivots=-1)
    with pytest.raises(ValueError, match="maximum_hull: A and b must be"):
        pycert.ops.maximum_hull(*ok[:3], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="maximum_hull: A must hold -1, 0 and 1 only"):
        pycert.ops.maximum_hull(*ok[:2], torch.full((1, 1, 3), 0.5), torch.zeros(1, 1))
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
