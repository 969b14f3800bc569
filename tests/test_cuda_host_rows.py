"""The CUDA kernels on the host: rows through an activation and its linear layer in one pass, and rows that kernels leave
out because nobody waited to hear how many there are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import host_kernels
import pycert
from pycert import _C
from test_cuda_host import DTYPES, EXTENT, NETS, WINDOWS, bounded, boxes, compare, draw, lines, rounding

OPS = torch.ops.pycert


@pytest.fixture(scope="module", autouse=True)
def _library():
    host_kernels.build()


def rows_of(count: int, dtype: torch.dtype, source: bool):
    """Dense rows over two samples of 90 values: data, source, negative_from, sample."""
    data = draw(4 if source else count, 90, seed=8, dtype=dtype)
    pick = torch.arange(count) % 4 if source else None
    return data, pick, count * 2 // 3 if source else 2**62, torch.arange(count) * 2 // count


@pytest.mark.parametrize("source", [False, True], ids=["own", "source"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, columns", [(1, 1), (11, 140), (140, 7)])
def test_one_pass_gives_what_two_give(count, columns, dtype, source):
    data, pick, negative, sample = rows_of(count, dtype, source)
    ls, li, us, ui = lines(dtype)
    bias, charge = draw(90, seed=15, dtype=dtype), draw(2, 90, seed=16, dtype=dtype).abs()
    weight = draw(90, columns, seed=17, dtype=dtype)
    lower, upper = boxes(2, columns, dtype=dtype)
    eps = torch.tensor([0.5, 0.0], dtype=dtype)
    table = (torch.arange(count) % 2 + 2 * sample).contiguous()
    of_table = draw(4, 90, seed=20, dtype=dtype)
    ends = [None, (lower, upper, 0), (lower, eps, 1), (lower, eps, 2)]
    for intercept, b, c, by_row, end in [(li, bias, charge, None, ends[0]), (None, None, None, None, ends[1]), (None, bias, charge, table, ends[2]), (li, bias, charge, None, ends[3])]:  # fmt: skip
        line = (of_table if by_row is not None else ls, intercept, us, ui, b, c, by_row)
        arguments = (data, pick, negative, sample)
        out, sums = OPS.relax_rows(*arguments, None, WINDOWS["dense"], [1, 1, 90], *line)
        dense = out.view(count, 90).double() @ weight.double()
        with host_kernels.replaced():
            found, found_sums = OPS.relax_product(*arguments, [1, 1, 90], *line, weight, *(end or (None, None, 0)))  # fmt: skip
        compare((sums,), (found_sums,), 1e-12, 90.0)
        if end is None:
            compare((dense,), (found.double(),), rounding(dtype, 90), 90.0)
            continue
        rows = dense.to(dtype)
        expected = OPS.concretize_rows(rows, None, 2**62, sample, None, WINDOWS["dense"], [1, 1, columns], *end)  # fmt: skip
        compare((expected,), (found,), 1e-10 if dtype == torch.float64 else 1e-3, 90.0)


def test_the_concretised_rows_are_never_written():
    """With an end there is no [Q, columns] result: only two numbers a row come back."""
    data, pick, negative, sample = rows_of(5, torch.float32, False)
    lower, upper = boxes(2, 300, dtype=torch.float32)
    with host_kernels.replaced():
        found, _ = OPS.relax_product(data, pick, negative, sample, [1, 1, 90], *lines(torch.float32), None, None, None, draw(90, 300, dtype=torch.float32), lower, upper, 0)  # fmt: skip
    assert found.shape == (2, 5) and found.dtype == torch.float64


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_that_are_left_out_are_not_touched(window):
    """Marked by a negative sample: no step reads or writes anything of theirs, and the others are as before."""
    layout = WINDOWS[window]
    size = EXTENT if layout[0] else [EXTENT[0], *layout[1:3]]
    data = draw(9, *size, seed=8)
    sample = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1, 1])
    marked = torch.tensor([0, 0, -1, 1, -1, -1, 0, -1, 1])
    position = torch.stack([torch.arange(9) % 4, torch.arange(9) % 5], 1)
    ls, li, us, ui = lines(torch.float64)
    bias, charge = draw(90, seed=15), draw(2, 90, seed=16).abs()
    lower, upper = boxes(2, 90, dtype=torch.float64)

    def steps(of):
        rows = (data, None, 2**62, of, None if layout[0] else position, layout, EXTENT)
        relaxed, sums = OPS.relax_rows(*rows, ls, li, us, ui, bias, charge, None)
        least = OPS.concretize_rows(*rows, lower, upper, 0)
        moved = OPS.relayout_rows(*rows[:6], WINDOWS["dense"], EXTENT)
        return relaxed, sums.t(), OPS.dot_rows(*rows, bias, charge).t(), least.t(), moved

    with host_kernels.replaced():
        expected, found = steps(sample), steps(marked)
    kept = marked >= 0
    compare([t[kept] for t in expected], [t[kept] for t in found], 0)
    assert (found[1][~kept] == 0).all() and (found[2][~kept] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_convolutions_leave_rows_out(dtype):
    rows, weight = draw(300, 40, seed=1, dtype=dtype), draw(40, 30, seed=2, dtype=dtype)
    marked = torch.full((300,), -1)
    marked[:20] = 0
    marked[290:] = 1  # a tile of nothing but left-out rows lies between
    with host_kernels.replaced():
        expected = OPS.rows_product(rows, weight, None, None, None)
        found = OPS.rows_product(rows, weight, None, None, None, marked)
        compare((expected[marked >= 0],), (found[marked >= 0],), 0)
        images, kernel = draw(40, 3, 5, 6, seed=3, dtype=dtype), draw(4, 3, 3, 3, seed=4, dtype=dtype)
        geometry = ([1, 1], [1, 1], [1, 1], [0, 0], 1, False, None)
        some = torch.where(torch.arange(40) < 3, 0, -1)
        expected = OPS.rows_convolution(images, kernel, *geometry)
        found = OPS.rows_convolution(images, kernel, *geometry, some)
        compare((expected[:3],), (found[:3],), 0)
    with pytest.raises(ValueError, match="sample must be"):
        OPS.rows_product(rows, weight, None, None, None, marked[:3])


@pytest.mark.parametrize("p", [pytest.param(2, marks=pytest.mark.slow), math.inf])
@pytest.mark.parametrize("name", NETS)
def test_bounds_without_waiting_are_those_with(name, p):
    """As in a graph that is being recorded: all rows are made, and those that are not wanted left out."""
    bm, x = bounded(name, torch.float32)
    region = pycert.LpBall(x, eps=0.05, p=p)
    for options in ({}, {"intersect": True}, {"soundness": "none"}):
        with torch.no_grad():
            with host_kernels.replaced():
                expected = tuple(bm.bound(region, method="crown", **options))
            with host_kernels.captured():
                found = tuple(bm.bound(region, method="crown", **options))
        compare(expected, found, 1e-6)


def test_the_fused_pass_is_taken_and_can_be_chosen_against():
    """A profile names the kernels; a table of measured times decides which."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    bm, x = pycert.BoundedModule(net, torch.zeros(1, 6)), torch.rand(2, 6)

    def kernels() -> tuple[set[str], list[Tensor]]:
        with torch.no_grad(), host_kernels.replaced(), pycert.profile() as p:
            found = bm.bound(pycert.LpBall(x, eps=0.1), method="crown")
        return {entry.kernel for entry in p.entries}, list(found)

    fused, expected = kernels()
    assert "relax_product" in fused and "relax" not in fused
    assert "concretize" not in fused, "every row ends in the pass that makes it"
    try:
        for own in (2.0, 1.0):  # seconds, against 1.5 the other way
            _C.set_choices("cpu", [("relax_product", False, (40, 8, 6), own, 1.5), ("product", False, (4, 8, 6), own, 1.5)])  # fmt: skip
            named, found = kernels()
            assert ("relax" in named, "relax_product" in named) == (
                (True, False) if own == 2 else (False, True)
            )
            assert ("mm" in named) == (own == 2)
            compare(expected, found, 1e-5)
    finally:
        _C.set_choices("cuda", [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_gives_no_bound(bad):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[0].weight[0, 0] = bad
    bm, x = pycert.BoundedModule(net, torch.zeros(1, 4)), torch.rand(2, 4)
    region = pycert.LpBall(x, eps=0.1)
    native = bm._native("crown", pycert.options.parse("crown", {}, ()), False, x.device)
    given, _ = bm._regions(region)
    for within in (host_kernels.replaced, host_kernels.captured):
        with torch.no_grad(), within():
            lower, upper, *_ = bm._program.bound(
                [t.detach() for t in bm.graph.tensors()], given, native, None
            )
        assert (lower == -math.inf).all() and (upper == math.inf).all()
