"""The CUDA kernels of the norm, ball-and-box and k-ReLU families on the host, against the CPU kernels and exact hulls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import host_kernels
import pycert
from hulls import FAMILIES, ExactHull, box_of, gap_left, limits
from pycert.ops.norm import power_norm
from pycert.train import losses
from test_cuda_host import DTYPES, compare, draw, on_both
from test_krelu import as_dtype, hull_of

OPS = torch.ops.pycert


@pytest.fixture(scope="module", autouse=True)
def _library():
    host_kernels.build()


# ---- power iteration ------------------------------------------------------------------------------------------------


def masks(kind: str, batch: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    values = draw(batch, *shape, seed=seed, dtype=dtype)
    return values > 0 if kind == "bits" else values.abs()


#: The last one is large enough for a sample to be shared by many blocks.
OPERATORS = {
    "linear": ((9, 13), None, (13,), (9,)),
    "conv": ((4, 3, 3, 2), dict(stride=(2, 1), padding=(1, 0)), (3, 7, 6), (4, 4, 5)),
    "large": ((3, 2, 1, 1), dict(), (2, 80, 80), (3, 80, 80)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "bits", "weights"])
@pytest.mark.parametrize("name", OPERATORS)
def test_power_iteration(name, kind, dtype):
    shape, conv, inputs, outputs = OPERATORS[name]
    weight = draw(*shape, seed=1, dtype=dtype)
    rows, columns = masks(kind, 2, outputs, 2, dtype), masks(kind, 2, inputs, 3, dtype)
    start = draw(2, *inputs, seed=4, dtype=dtype)
    start[1] = 0  # no direction: all of it is drawn anew
    geometry = None if conv is None else dict(input_shape=inputs, **conv)

    def run(given):
        leaf = weight.clone().requires_grad_()
        torch.manual_seed(7)
        value, u = power_norm(leaf, rows, columns, start if given else None, steps=3, conv=geometry)
        (value * torch.tensor([1.0, -2.0], dtype=dtype)[: len(value)]).sum().backward()
        return value.detach(), u, leaf.grad

    for given in (True, False):
        compare(*on_both(lambda given=given: run(given)), 1e-4 if dtype == torch.float32 else 1e-10)


def test_weights_out_of_range_and_nan():
    for scale in (1e-20, 1e15, 1e30):
        weight = draw(5, 6, seed=1, dtype=torch.float32) * scale

        def run(weight=weight):
            torch.manual_seed(1)
            return (power_norm(weight, steps=20).value,)

        compare(*on_both(run), 1e-4)
    weight = torch.full((3, 3), torch.nan)
    with host_kernels.replaced():
        assert power_norm(weight, steps=1).value.isnan().all()


# ---- ball and box ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clipped", [False, True], ids=["relu", "clipped"])
@pytest.mark.parametrize("shared", [False, True], ids=["two centres", "one centre"])
@pytest.mark.parametrize("shape", [(3, 5, 2, 3), (2, 37), (1, 1)])
def test_ball_and_box_through_relus(shape, shared, clipped, dtype):
    batch, channels = shape[0], shape[1]
    centres = draw(batch if shared else 2 * batch, *shape[1:], seed=1, dtype=dtype)
    inputs = [
        centres, draw(*shape, seed=2, dtype=dtype).abs(), draw(batch, seed=3, dtype=dtype).abs(),
        draw(channels, seed=4, dtype=dtype).abs(),
        draw(*shape[1:], seed=5, dtype=dtype).abs() if clipped else None,
    ]  # fmt: skip

    def run():
        leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
        out, spread, live, code = OPS.ball_box_relu(*leaves)
        weight = [draw(*t.shape, seed=seed, dtype=dtype) for seed, t in ((6, out), (7, spread))]
        ((out * weight[0]).sum() + (spread * weight[1]).sum()).backward()
        return (out.detach(), spread.detach(), live, code), [t.grad for t in leaves if t is not None]

    (values, grads), (found, found_grads) = on_both(run)
    compare(values, found, 0)
    compare(grads, found_grads, 1e-5 if dtype == torch.float32 else 1e-12, 10.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 6, 300])
def test_the_largest_value_over_ball_and_box(count, dtype):
    """By clipping step by step what the processor finds by sorting; the ends, the ball, both, and neither."""
    weight = draw(5, 3, count, seed=1, dtype=dtype)
    weight[0, 0] = 0
    lower, upper = -draw(5, count, seed=2, dtype=dtype).abs(), draw(5, count, seed=3, dtype=dtype).abs()
    lower[4, 0], upper[4] = 0, torch.inf
    radius = torch.tensor([0.0, 1e-6, 1.0, 1e6, 0.7], dtype=dtype)
    (value, scale), (found, t) = on_both(lambda: OPS.ball_box_maximum(weight, lower, upper, radius))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    compare((value,), (found,), tolerance)
    assert (t.isinf() == scale.isinf()).all()
    finite = scale.isfinite()
    torch.testing.assert_close(t[finite], scale[finite], rtol=tolerance, atol=tolerance)
    d = torch.where(weight == 0, 0, t.unsqueeze(-1) * weight).clamp(lower.unsqueeze(1), upper.unsqueeze(1))
    norm = d.double().norm(dim=2)
    assert (norm <= radius.double()[:, None] * (1 + 1e-5) + 1e-12).all()
    if count == 300:  # the ball is smaller than the box: it is reached
        torch.testing.assert_close(norm[2], radius[2].double().expand(3), rtol=1e-5, atol=0)


def test_a_ball_through_the_corner_of_a_box():
    """Coordinates that reach their ends exactly where the ball does: rounding must not move them in and out forever."""
    lower = torch.full((1, 6), -0.3, dtype=torch.float64)
    upper = torch.tensor([[0.3] * 5 + [3.0]], dtype=torch.float64)
    radius = torch.tensor([0.7348469228349533], dtype=torch.float64)  # sqrt(6) 0.3
    weight = torch.ones(1, 1, 6, dtype=torch.float64)
    (value, _), (found, _) = on_both(lambda: OPS.ball_box_maximum(weight, lower, upper, radius))
    compare((value,), (found,), 1e-14)
    assert found.item() == pytest.approx(1.8, rel=1e-14)


def test_training_through_ball_and_box():
    """The loss that trains by local Lipschitz bounds, with its gradient, on the host's run of all its kernels."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 10)
    )
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 10

    def run():
        torch.manual_seed(1)
        net.zero_grad()
        losses.bcp_loss(losses.worst_logits(net, x, y, 0.3), y).backward()
        return [p.grad.clone() for p in net.parameters()]

    compare(*on_both(run), 1e-4)


# ---- k-ReLU ---------------------------------------------------------------------------------------------------------


def sorted_rows(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(np.round(rows, 6).T)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "count"), [(1, 12), (2, 24), (3, 12)])
def test_no_row_of_the_warps_is_violated(k, count, dtype):
    check_hulls(3, k, count, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "count"), [(2, 240), (3, 120), (4, 12)])
def test_no_row_of_many_is_violated(k, count, dtype):
    check_hulls(4, k, count, dtype)


def check_hulls(seed: int, k: int, count: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng([seed, k])
    for number in range(count):
        family = FAMILIES[number % len(FAMILIES)]
        limit = as_dtype(limits(rng, family, k), dtype)
        with host_kernels.replaced():
            rows = hull_of(limit, dtype)
        worst = ExactHull(limit).violated(rows)
        assert worst == 0, f"{family} {number}: a row is violated by {worst}"


@pytest.mark.parametrize("k", [2, 3])
def test_warps_find_the_rows_that_the_processor_finds(k):
    """Base rows one after another; of a pair all facets. Triples are walked where the processor shoots rays."""
    rng, gaps = np.random.default_rng(k), []
    for family in ("net", "cloud", "box"):
        limit = limits(rng, family, k)
        expected = hull_of(limit, max_rows=2000)
        with host_kernels.replaced():
            found = hull_of(limit, max_rows=2000)
        base = len(limit) + 3 * k
        np.testing.assert_array_equal(found[:base], expected[:base])
        if k == 2:
            np.testing.assert_allclose(sorted_rows(found), sorted_rows(expected), rtol=1e-9, atol=1e-9)
        elif family != "box":  # independent neurons: the triangles are exact
            pytest.importorskip("scipy.optimize", reason="the exact hull is found by linear programs")
            gaps.append(gap_left(found, hull_of(limit, max_rows=0), limit, rng))
    assert len(gaps) == (2 if k == 3 else 0)
    assert sum(gaps) < 2 * 0.08


def test_few_rows_are_the_deepest():
    limit = limits(np.random.default_rng(5), "net", 3)
    base = len(limit) + 9
    with host_kernels.replaced():
        few, many = hull_of(limit, max_rows=8), hull_of(limit, max_rows=2000)
    assert len(few) == base + 8 < len(many)
    known = {row.tobytes() for row in many}
    assert all(row.tobytes() in known for row in few)
    lower, upper = box_of(limit)
    middle = (lower + upper) / 2
    triangle = upper * (middle - lower) / (upper - lower)
    depth = -(many[base:, 0] + many[base:, 1:] @ np.concatenate([middle, triangle]))
    kept = -(few[base:, 0] + few[base:, 1:] @ np.concatenate([middle, triangle]))
    np.testing.assert_allclose(kept, np.sort(depth)[::-1][:8], rtol=1e-9)


def test_groups_points_and_identities_in_one_batch():
    """More groups than one block, an identity, a point to cut off, rows that are no directions: nothing is violated."""
    rng = np.random.default_rng(11)
    chosen = [limits(rng, "net", 2) for _ in range(7)]
    lower, upper = (torch.tensor(np.stack(t)) for t in zip(*map(box_of, chosen), strict=True))
    b = torch.tensor(np.stack(chosen))
    A = -torch.tensor(pycert.ops.octahedral_directions(2, torch.float64).numpy()).expand(7, -1, -1).clone()
    identity = torch.zeros(7, 2, dtype=torch.bool)
    identity[3, 0] = True
    points = torch.cat([(lower + upper) / 2, upper], 1).unsqueeze(1)
    with host_kernels.replaced():
        rows, count = OPS.krelu_hull(lower, upper, A, b, identity, points, 60, 100)
        alone = [
            OPS.krelu_hull(*(t[i : i + 1] for t in (lower, upper, A, b, identity, points)), 60, 100)
            for i in range(7)
        ]
    for i, (own, its) in enumerate(alone):
        assert torch.equal(own[0], rows[i]) and its[0] == count[i]
    assert (rows[3, :, 3] == 0).all()
    for i in (0, 1, 2, 4, 5, 6):
        assert ExactHull(chosen[i]).violated(rows[i, : count[i]].numpy()) == 0


def test_hulls_of_the_unusable_are_no_error():
    lower = torch.tensor([[-1.0, -1.0], [torch.nan, -1.0], [-torch.inf, -1.0], [1.0, 1.0]])
    upper = torch.tensor([[1.0, 1.0], [1.0, 1.0], [torch.inf, 1.0], [-1.0, -1.0]])
    A = -pycert.ops.octahedral_directions(2, torch.float32).expand(4, -1, -1)
    with host_kernels.replaced():
        rows, count = OPS.krelu_hull(lower, upper, A, torch.full((4, 8), 2.0), None, None, 70, 0)
        none, zero = OPS.krelu_hull(lower[:0], upper[:0], A[:0], torch.ones(0, 8), None, None, 70, 0)
    assert rows.isfinite().all() and (count > 0).all()
    assert none.shape == (0, 70, 5) and zero.shape == (0,)


def test_a_bound_by_rows_of_the_warps():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    x = torch.rand(2, 4)
    with host_kernels.replaced():
        octahedra = pycert.krelu.octahedral_bounds(
            pycert.BoundedModule(net, x[:1]), pycert.LpBall(x, eps=0.3), "0", torch.tensor([[0, 1, 2]])
        )
        rows, count = pycert.ops.krelu_hull(*(t[0].contiguous() for t in octahedra))
    z = net[0](x[:1] + 0.3 * (2 * torch.rand(500, 4) - 1))[:, :3].double()
    points = torch.cat([torch.ones(500, 1, dtype=torch.float64), z, z.relu()], 1)
    assert (points @ rows[0, : count[0]].double().t() >= -1e-6).all()
