"""k-ReLU hulls: every row holds in exact arithmetic, pairs are exact, and what cannot be bounded is left out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import pycert
from hulls import FAMILIES, ExactHull, box_of, directions, gap_left, limits

DTYPES = [torch.float64, torch.float32]


def hull_of(limit: np.ndarray, dtype: torch.dtype = torch.float64, **options) -> np.ndarray:
    """Rows for one group with all directions, float64."""
    lower, upper = box_of(limit)
    C = directions(len(lower))
    arguments = [torch.tensor(t, dtype=dtype)[None] for t in (lower, upper, -C, limit)]
    rows, count = pycert.ops.krelu_hull(*arguments, **options)
    assert (rows[0, count[0] :] == 0).all()
    return rows[0, : count[0]].double().numpy()


def as_dtype(limit: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.tensor(limit, dtype=dtype).double().numpy()


def check_groups(seed: int, count: int, k: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng([seed, k])
    for number in range(count):
        family = FAMILIES[number % len(FAMILIES)]
        limit = as_dtype(limits(rng, family, k), dtype)
        rows = hull_of(limit, dtype)
        worst = ExactHull(limit).violated(rows)
        assert worst == 0, f"{family} {number}: a row is violated by {worst}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "count"), [(1, 24), (2, 80), (3, 60)])
def test_no_row_is_violated_in_exact_arithmetic(k, count, dtype):
    check_groups(1, count, k, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "count"), [(1, 200), (2, 600), (3, 500), (4, 12)])
def test_no_row_of_many_is_violated_in_exact_arithmetic(k, count, dtype, seed):
    check_groups(100 + seed, count, k, dtype)


def test_the_checker_finds_a_row_that_is_wrong_by_a_rounding():
    limit = limits(np.random.default_rng(3), "cloud", 2)
    rows = hull_of(limit)
    tightened = rows.copy()
    exact = ExactHull(limit)
    slack = (rows[:, :1] + rows[:, 1:] @ exact.vertices().T).min(1)
    tightened[:, 0] -= slack + 1e-14
    assert exact.violated(tightened) > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["net", "correlated", "cloud", "thin", "box", "stable", "near_zero"])
def test_pairs_are_exact(family, seed):
    linprog = pytest.importorskip(
        "scipy.optimize", reason="the exact hull is found by linear programs"
    ).linprog
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    limit = limits(rng, family, 2)
    rows, vertices = hull_of(limit), ExactHull(limit).vertices()
    for _ in range(8):
        objective = rng.standard_normal(4)
        exact = (vertices @ objective).max()
        relaxed = -linprog(-objective, A_ub=-rows[:, 1:], b_ub=rows[:, 0], bounds=(None, None)).fun
        assert relaxed == pytest.approx(exact, abs=1e-7 * np.abs(vertices).max())


@pytest.mark.parametrize(("k", "limit_gap"), [(3, 0.05), pytest.param(4, 0.10, marks=pytest.mark.slow)])
def test_larger_groups_are_close_to_their_hulls(k, limit_gap):
    pytest.importorskip("scipy.optimize", reason="the exact hull is found by linear programs")
    gaps = []
    for seed in range(6 if k == 3 else 2):
        rng = np.random.default_rng([seed, k])
        limit = limits(rng, ["net", "cloud"][seed % 2], k)
        gaps.append(gap_left(hull_of(limit), hull_of(limit, max_rows=0), limit, rng))
    assert np.mean(gaps) < limit_gap


def test_one_neuron_is_the_triangle():
    rows = hull_of(np.array([1.0, 3.0]))
    expected = [[1, 1, 0], [3, -1, 0], [0, 0, 1], [0, -1, 1], [0.75, 0.75, -1]]
    np.testing.assert_allclose(rows, expected, rtol=1e-15)


@pytest.mark.parametrize("ratio", [1e-5, 2.9e-7, 1e-8, 1e-12, 2.0**-60, 1e-300])
def test_a_nearly_stable_neuron_does_not_spoil_a_pair(ratio):
    """The limit of the second neuron's kink: what couples it must survive however near zero its end is."""
    linprog = pytest.importorskip(
        "scipy.optimize", reason="the exact hull is found by linear programs"
    ).linprog
    corners = np.array([[0, -1], [0, 1], [2, 0.5], [2, -0.5]])
    corners[:, 0] -= 2 * ratio
    limit = (directions(2) @ corners.T).max(1)
    rows, exact = hull_of(limit), ExactHull(limit)
    assert exact.violated(rows) == 0
    for objective in np.random.default_rng(0).standard_normal((8, 4)):
        best = -linprog(-objective, A_ub=-rows[:, 1:], b_ub=rows[:, 0], bounds=(None, None)).fun
        assert best == pytest.approx((exact.vertices() @ objective).max(), abs=3e-6)


def test_two_neurons_of_the_primer():
    """Input [-1, 1]^2, x = (sum, difference), so |x1| + |x2| <= 2: one facet couples the neurons.

    With x1 + x2 <= 2 it gives y1 + y2 <= 1 + (x1 + x2) / 2 <= 2, where the triangles give 3.
    """
    rows = hull_of(np.full(8, 2.0))
    np.testing.assert_allclose(rows[14:], [[1, 0.5, 0.5, -1, -1]], atol=1e-12)


def test_an_identity_coordinate_makes_the_maximum_exact():
    """max(x1, x2) = x2 + relu(x1 - x2) over [0, 1]^2, with the group (x2, x1 - x2): at most 1, and 1.5 by the triangle."""
    linprog = pytest.importorskip(
        "scipy.optimize", reason="the exact hull is found by linear programs"
    ).linprog
    C = directions(2)
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) @ np.array([[0, 1], [1, -1]])
    limit = (C @ corners.T).max(1)
    lower, upper = box_of(limit)
    tensors = [torch.tensor(t)[None] for t in (lower, upper, -C, limit)]
    identity = torch.tensor([[True, False]])
    rows, count = pycert.ops.krelu_hull(*tensors, identity=identity)
    H = rows[0, : count[0]].numpy()
    assert (H[:, 3] == 0).all()
    objective = np.array([1.0, 0.0, 0.0, 1.0])

    def optimum(H: np.ndarray) -> float:
        return -linprog(-objective, A_ub=-H[:, 1:], b_ub=H[:, 0], bounds=(None, None)).fun

    plain, plain_count = pycert.ops.krelu_hull(*tensors, identity=identity, max_rows=0)
    assert optimum(plain[0, : plain_count[0]].numpy()) == pytest.approx(1.5)
    assert optimum(H) == pytest.approx(1.0)
    assert ExactHull(limit).violated(H, np.array([True, False])) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_subset_of_directions_is_sound(dtype):
    rng = np.random.default_rng(11)
    C = directions(3)
    for _ in range(12):
        limit = as_dtype(limits(rng, "cloud", 3), dtype)
        lower, upper = box_of(limit)
        chosen = rng.permutation(26)[: rng.integers(0, 26)]
        arguments = [torch.tensor(t, dtype=dtype)[None] for t in (lower, upper, -C[chosen], limit[chosen])]
        rows, count = pycert.ops.krelu_hull(*arguments)
        implied = np.where(C > 0, C * upper, C * lower).sum(1)
        known = np.where(np.isin(np.arange(26), chosen) | (np.abs(C).sum(1) == 1), limit, np.inf)
        full = np.where(np.isinf(known), np.nextafter(implied, np.inf) + 1e-12, known)
        assert ExactHull(np.minimum(limit, full)).violated(rows[0, : count[0]].double().numpy()) == 0
        assert count[0] >= len(set(chosen)) + 9


def test_groups_of_different_size_share_a_batch():
    """A group filled up with [0, 0] has the rows of the smaller group."""
    limit = limits(np.random.default_rng(2), "cloud", 2)
    C = directions(2)
    lower, upper = box_of(limit)
    padded = [np.append(lower, 0), np.append(upper, 0), np.c_[-C, np.zeros(8)], limit]
    rows, count = pycert.ops.krelu_hull(*[torch.tensor(t)[None] for t in padded])
    wide = rows[0, : count[0]].numpy()
    coupling = wide[(wide[:, 4:6] != 0).all(1)]
    assert (coupling[:, [3, 6]] == 0).all()
    expected = hull_of(limit)
    expected = expected[(expected[:, 3:] != 0).all(1)]
    np.testing.assert_allclose(np.sort(coupling[:, [0, 1, 2, 4, 5]], 0), np.sort(expected, 0), atol=1e-12)


def test_results_do_not_depend_on_the_batch():
    rng = np.random.default_rng(5)
    many = np.stack([limits(rng, "cloud", 3) for _ in range(5)])
    boxes = [box_of(limit) for limit in many]
    C = np.broadcast_to(-directions(3), (5, 26, 3)).copy()
    lower, upper = (torch.tensor(np.stack(ends)) for ends in zip(*boxes, strict=True))
    rows, count = pycert.ops.krelu_hull(lower, upper, torch.tensor(C), torch.tensor(many))
    for g in range(5):
        np.testing.assert_array_equal(rows[g, : count[g]].numpy(), hull_of(many[g]))


def test_rows_come_in_the_documented_order():
    """Octahedron, then an unstable neuron, one that is off, an identity; then what couples them."""
    rng = np.random.default_rng(4)
    points = rng.uniform(-1, 1, (30, 3)) @ rng.standard_normal((3, 3))
    points[:, 1] -= 9
    limit = (directions(3) @ points.T).max(1)
    lower, upper = box_of(limit)
    arguments = [
        torch.tensor(t)[None] for t in (lower, upper, -directions(3)[::-1].copy(), limit[::-1].copy())
    ]
    rows, count = pycert.ops.krelu_hull(*arguments, identity=torch.tensor([[False, False, True]]))
    H = rows[0, : count[0]].numpy()
    np.testing.assert_array_equal(H[:26, 0], limit)
    np.testing.assert_array_equal(H[:26, 1:4], -directions(3))
    slope = upper[0] / (upper[0] - lower[0])
    neurons = np.zeros((5, 7))
    neurons[[0, 1, 3], [4, 4, 5]] = 1
    neurons[1, 1] = -1
    neurons[2, [0, 1, 4]] = -slope * lower[0], slope, -1
    neurons[4, 5] = -1
    neurons[3:4, 5] = 1
    np.testing.assert_allclose(H[26:31], neurons, rtol=1e-14, atol=1e-300)
    assert len(H) > 31
    assert (H[31:, 6] == 0).all()
    assert (np.abs(H[31:, 4:6]).max(1) > 0).all()


def test_a_budget_keeps_the_rows_that_cut_deepest():
    limit = limits(np.random.default_rng(8), "cloud", 3)
    lower, upper = box_of(limit)
    point = np.concatenate([lower / 2 + upper / 2, upper / 2])
    points = torch.tensor(point)[None, None]
    every = hull_of(limit, points=points)[35:]
    few = hull_of(limit, points=points, max_rows=5)[35:]
    value = np.sort(every[:, 0] + every[:, 1:] @ point)
    np.testing.assert_array_equal(few[:, 0] + few[:, 1:] @ point, value[:5])
    assert value[0] < 0 < value[-1]


def test_threads_do_not_disturb_each_other():
    rng = np.random.default_rng(6)
    groups = [limits(rng, "cloud", int(k)) for k in rng.integers(2, 4, 24)]
    alone = [hull_of(limit) for limit in groups]
    with ThreadPoolExecutor(6) as pool:
        for rows, expected in zip(pool.map(hull_of, groups), alone, strict=True):
            np.testing.assert_array_equal(rows, expected)


def test_a_point_that_is_asked_for_is_cut_off():
    limit = limits(np.random.default_rng(8), "cloud", 4)
    lower, upper = box_of(limit)
    middle = (lower + upper) / 2
    chord = upper * (middle - lower) / (upper - lower)
    point = np.concatenate([middle, chord])
    rows = hull_of(limit, max_rows=1, pivots=0, points=torch.tensor(point)[None, None])
    assert (rows[:, 0] + rows[:, 1:] @ point).min() < -1e-3
    assert len(rows) == 80 + 12 + 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e308])
def test_what_is_not_finite_is_left_out(bad):
    limit = limits(np.random.default_rng(9), "cloud", 3)
    unknown = limit.copy()
    unknown[[0, 12, 20]] = bad
    rows = hull_of(unknown)
    assert np.isfinite(rows).all()
    exact = limit.copy()
    exact[[0, 12, 20]] = 10 * np.abs(limit).sum()
    assert ExactHull(exact).violated(rows) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_octahedron_alone_has_the_rows_of_a_batch(k, dtype):
    rng = np.random.default_rng(k)
    for family in FAMILIES:
        limit = as_dtype(limits(rng, family, k), dtype)
        octahedron = torch.tensor(np.column_stack([limit, -directions(k)]), dtype=dtype)
        shuffled = octahedron[torch.from_numpy(rng.permutation(len(limit)))].requires_grad_()
        rows = pycert.ops.octahedron_hull(shuffled)
        assert not rows.requires_grad
        np.testing.assert_array_equal(rows.double().numpy(), hull_of(limit, dtype))
        few = pycert.ops.octahedron_hull(octahedron, max_rows=2, pivots=10)
        np.testing.assert_array_equal(few.double().numpy(), hull_of(limit, dtype, max_rows=2, pivots=10))


def test_one_octahedron_may_lack_directions_but_no_end():
    octahedron = torch.tensor([[2.0, 1, 0], [2, -1, 0], [2, 0, 1], [2, 0, -1], [2, -1, -1]])
    rows = pycert.ops.octahedron_hull(octahedron)
    box, A, b = torch.full((1, 2), 2.0), octahedron[None, :, 1:], octahedron[None, :, 0]
    expected, count = pycert.ops.krelu_hull(-box, box, A, b)
    assert torch.equal(rows, expected[0, : count[0]])
    for wrong, message in [
        (octahedron[1:], "every neuron, but neuron 0 has no finite lower end"),
        (octahedron[:3], "every neuron, but neuron 1 has no finite upper end"),
        (torch.where(octahedron == 2, torch.nan, octahedron), "neuron 0 has no finite lower end"),
        (octahedron * 0.5, "A must hold -1, 0 and 1 only"),
        (octahedron[0], r"octahedron must be \[rows, 1 \+ k\] with k from 1 to 4"),
        (torch.zeros(3, 6), r"octahedron must be \[rows, 1 \+ k\] with k from 1 to 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            pycert.ops.octahedron_hull(wrong)
    with pytest.raises(ValueError, match="max_rows must not be negative"):
        pycert.ops.octahedron_hull(octahedron, max_rows=-1)
    with pytest.raises(TypeError, match="octahedron_hull"):
        pycert.ops.octahedron_hull(octahedron.half())
    with pytest.raises(TypeError, match="octahedron must be a tensor, got ndarray"):
        pycert.ops.octahedron_hull(octahedron.numpy())
    with pytest.raises(TypeError, match="pivots must be an integer"):
        pycert.ops.octahedron_hull(octahedron, pivots=1.5)


def test_gradients_are_refused():
    limit = limits(np.random.default_rng(1), "cloud", 2)
    lower, upper = box_of(limit)
    arguments = [torch.tensor(t)[None] for t in (lower, upper, -directions(2), limit)]
    plain, _ = pycert.ops.krelu_hull(*arguments)
    arguments[0].requires_grad_()
    rows, count = pycert.ops.krelu_hull(*arguments)
    assert torch.equal(rows, plain)
    assert not count.requires_grad
    with pytest.raises(NotImplementedError, match="krelu_hull: has no gradient"):
        rows.sum().backward()


def test_an_empty_octahedron_is_no_error():
    limit = np.full(26, 1.0)
    limit[0] = -10.0
    assert np.isfinite(hull_of(limit)).all()


def test_sampled_points_hold():
    rng = np.random.default_rng(21)
    for k in (2, 3, 4):
        points = rng.uniform(-1, 1, (4000, 6)) @ rng.standard_normal((6, k))
        limit = (directions(k) @ points.T).max(1)
        rows = hull_of(np.nextafter(limit, np.inf) + 1e-15)
        assert (rows[:, :1] + rows[:, 1:] @ np.c_[points, np.maximum(points, 0)].T).min() > -1e-14


def test_errors_name_the_argument():
    ok = [torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 3, 2), torch.zeros(1, 3)]
    pycert.ops.krelu_hull(*ok)
    for place, value, message in [
        (0, torch.zeros(1, 5), r"lower must be \[groups, k\] with k from 1 to 4"),
        (1, torch.ones(1, 3), "lower and upper must have the same shape"),
        (2, torch.zeros(1, 3, 3), r"A must be \[1, rows, 2\]"),
        (2, torch.full((1, 3, 2), 0.5), "A must hold -1, 0 and 1 only"),
        (3, torch.zeros(1, 4), r"b must be \[1, 3\]"),
    ]:
        arguments = list(ok)
        arguments[place] = value
        with pytest.raises(ValueError, match=message):
            pycert.ops.krelu_hull(*arguments)
    with pytest.raises(TypeError, match="must have the same dtype"):
        pycert.ops.krelu_hull(ok[0].double(), *ok[1:])
    with pytest.raises(TypeError, match="float32 or float64"):
        pycert.ops.krelu_hull(*[t.half() for t in ok])
    with pytest.raises(TypeError, match="identity must be bool"):
        pycert.ops.krelu_hull(*ok, identity=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="points must be"):
        pycert.ops.krelu_hull(*ok, points=torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="max_rows must not be negative"):
        pycert.ops.krelu_hull(*ok, max_rows=-1)
    with pytest.raises(ValueError, match="k must be 1, 2, 3 or 4"):
        pycert.ops.octahedral_directions(5)


def test_batches_may_be_empty_and_operators_are_registered_well():
    empty = [torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 26, 3), torch.zeros(0, 26)]
    rows, count = pycert.ops.krelu_hull(*empty)
    assert rows.shape == (0, 26 + 9 + 160, 7)
    assert count.shape == (0,)
    limit = limits(np.random.default_rng(1), "net", 2)
    lower, upper = box_of(limit)
    arguments = [torch.tensor(t)[None] for t in (lower, upper, -directions(2), limit)]
    torch.library.opcheck(torch.ops.pycert.krelu_hull.default, (*arguments, None, None, 40, 0))


def test_no_tensors_and_no_integers_are_refused():
    ends, A, b = torch.ones(1, 2), torch.zeros(1, 0, 2), torch.zeros(1, 0)
    with pytest.raises(TypeError, match="lower must be a tensor"):
        pycert.ops.krelu_hull([[-1.0, -1.0]], ends, A, b)
    with pytest.raises(TypeError, match="max_rows must be an integer"):
        pycert.ops.krelu_hull(-ends, ends, A, b, max_rows=1.5)
