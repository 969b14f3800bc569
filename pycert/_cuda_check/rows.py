"""Cases of the kernels of back-substitution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .judging import OPS, Check, named_cases

CASES, case = named_cases()
EXTENT = [3, 5, 6]
#: Layouts of rows over a value of EXTENT: dense, stride, offset, size; as csrc/ops/backsub.cpp writes them.
LAYOUTS = ([1, 0, 0, 0, 0, 0, 0], [0, 4, 5, 2, -2, 1, -3])


def _rows(check: Check, layout: list[int], source: bool) -> tuple[Any, ...]:
    """Rows over two samples with their map: table, source, sign, sample, position."""
    size = EXTENT if layout[0] else [EXTENT[0], *layout[1:3]]
    count = torch.arange(11)
    position = torch.stack([count * 3 % 4, count * 2 % 5], 1)
    pick = count * 5 % 4 if source else None
    data = check.draw(4 if source else 11, *size, seed=8)
    return data, pick, 7 if source else 2**62, count // 6, None if layout[0] else position


def _lines(check: Check, size: int = 90) -> list[Tensor]:
    return [check.draw(2, size, seed=seed) for seed in (11, 12, 13, 14)]


def _each_layout(check: Check, run: Callable[[tuple[Any, ...], list[int]], None]) -> None:
    for layout in LAYOUTS:
        for source in (False, True):
            run(_rows(check, layout, source), layout)


@case("relax")
def _relax(check: Check) -> None:
    bias, charge = check.draw(90, seed=15), check.draw(2, 90, seed=16).abs()

    def run(rows: tuple[Any, ...], layout: list[int]) -> None:
        check.same(OPS.relax_rows, *rows, layout, EXTENT, *_lines(check), bias, charge, None)

    _each_layout(check, run)


@case("dot")
def _dot(check: Check) -> None:
    bias, charge = check.draw(90, seed=15), check.draw(2, 90, seed=16).abs()

    def run(rows: tuple[Any, ...], layout: list[int]) -> None:
        check.same(OPS.dot_rows, *rows, layout, EXTENT, bias, charge)

    _each_layout(check, run)


@case("concretize")
def _concretize(check: Check) -> None:
    lower, upper = check.box(2, 90)
    eps = torch.tensor([0.5, 0.0], dtype=check.dtype)

    def run(rows: tuple[Any, ...], layout: list[int]) -> None:
        for norm, second in ((0, upper), (1, eps), (2, eps)):
            check.same(OPS.concretize_rows, *rows, layout, EXTENT, lower, second, norm)

    _each_layout(check, run)


@case("relayout")
def _relayout(check: Check) -> None:
    def run(rows: tuple[Any, ...], layout: list[int]) -> None:
        for target in LAYOUTS if not layout[0] else LAYOUTS[:1]:
            check.same(OPS.relayout_rows, *rows, layout, target, EXTENT, close=0)

    _each_layout(check, run)


@case("relax_product")
def _relax_product(check: Check) -> None:
    bias, charge, weight = (
        check.draw(90, seed=15),
        check.draw(2, 90, seed=16).abs(),
        check.draw(90, 140, seed=17),
    )
    lower, upper = check.box(2, 140)
    for source in (False, True):
        rows = _rows(check, LAYOUTS[0], source)
        line = (*_lines(check), bias, charge, None)
        out, sums = OPS.relax_rows(*rows, LAYOUTS[0], [1, 1, 90], *line)
        expected = (out.view(-1, 90).double() @ weight.double()).to(check.dtype)
        arguments = (*rows[:4], [1, 1, 90], *line, weight)
        check.agree((expected, sums), check.there(OPS.relax_product, *arguments, None, None, 0))
        ends = OPS.concretize_rows(
            expected, None, 2**62, rows[3], None, LAYOUTS[0], [1, 1, 140], lower, upper, 0
        )
        check.agree((ends, sums), check.there(OPS.relax_product, *arguments, lower, upper, 0), 4096)


@case("relax_convolution")
def _relax_convolution(check: Check) -> None:
    """The activation of a layer with EXTENT outputs, and the transpose of that layer's convolution."""
    bias, charge = check.draw(90, seed=15), check.draw(2, 90, seed=16).abs()
    after = [4, 9, 11]  # its input
    weight = check.draw(EXTENT[0], after[0], 3, 3, seed=18)
    lower, upper = check.box(2, math.prod(after))

    def run(rows: tuple[Any, ...], layout: list[int]) -> None:
        line = (*_lines(check), bias, charge, None)
        out, sums = OPS.relax_rows(*rows, layout, EXTENT, *line)
        images = out.view(11, EXTENT[0], *(EXTENT[1:] if layout[0] else layout[1:3])).double()
        moved: dict[str, Any] = dict(stride=[2, 2], padding=[1, 1] if layout[0] else [0, 0])
        expected = nn.functional.conv_transpose2d(images, weight.double(), **moved).to(check.dtype)
        _, height, width, down, top, across, left = layout
        to = [0, 2 * height + 1, 2 * width + 1, 2 * down, 2 * top - 1, 2 * across, 2 * left - 1]
        to = LAYOUTS[0] if layout[0] else to
        arguments = (*rows, layout, EXTENT, *line, weight, [2, 2], [1, 1], [1, 1], 1, to, after)
        found = check.there(OPS.relax_convolution, *arguments, None, None, 0)
        check.agree((sums,), found[1:])
        # what lies outside the image has no meaning
        kept = (None, 2**62, rows[3], rows[4], to, to, after)
        check.agree((OPS.relayout_rows(expected, *kept),), (OPS.relayout_rows(found[0], *kept),))
        ends = OPS.concretize_rows(expected, *kept[:5], after, lower, upper, 0)
        check.agree((ends, sums), check.there(OPS.relax_convolution, *arguments, lower, upper, 0), 4096)

    _each_layout(check, run)


@case("relax_backward")
def _relax_backward(check: Check) -> None:
    sums, bias = check.draw(3, 11, seed=18, dtype=torch.float64), check.draw(90, seed=15)
    ls, li, us, ui = _lines(check)
    for layout in LAYOUTS:
        data, _, _, sample, position = _rows(check, layout, False)
        arguments = (data, None, 2**62, sample, position, layout, EXTENT, ls, li, us, ui, bias, None)
        for wanted in ([1, 1, 1], [1, 0, 0], [0, 1, 0]):
            check.same(OPS.relax_rows_backward, check.draw(*data.shape, seed=17), sums, *arguments, wanted)


@case("concretize_backward")
def _concretize_backward(check: Check) -> None:
    lower, upper = check.box(2, 90)
    eps, grad = torch.tensor([0.5, 0.25], dtype=check.dtype), check.draw(2, 11, seed=19, dtype=torch.float64)
    for layout in LAYOUTS:
        data, _, _, sample, position = _rows(check, layout, False)
        for norm, second in ((0, upper), (1, eps), (2, eps)):
            check.same(
                OPS.concretize_rows_backward, grad, data, sample, position, layout, EXTENT, lower, second, norm, True
            )  # fmt: skip


@case("relayout_backward")
def _relayout_backward(check: Check) -> None:
    for source in (False, True):
        _, pick, negative, sample, position = _rows(check, LAYOUTS[1], source)
        moved = check.draw(11, *EXTENT, seed=21)
        rows = (pick, negative, sample, position, LAYOUTS[1], LAYOUTS[0], EXTENT)
        check.same(OPS.relayout_rows_backward, moved, 4 if source else 11, *rows)


@case("ascend")
def _ascend(check: Check) -> None:
    state = [check.draw(4, 9, seed=seed) for seed in (1, 2, 3, 4, 5)]
    state[2].abs_()
    limits = [torch.zeros(2, 9, dtype=check.dtype), torch.ones(2, 9, dtype=check.dtype)]
    groups = [torch.tensor([0, 1, 1, 0]), torch.tensor([3, 1, 0, 2]), torch.tensor([True, False, True, True])]

    def step(*arguments: Tensor) -> list[Tensor]:
        changed = [t.clone() for t in arguments[:5]]
        OPS.ascend_slopes(*changed, *arguments[5:], 3, 0.5)
        return changed[:4]

    check.same(step, *state, *limits, *groups)
