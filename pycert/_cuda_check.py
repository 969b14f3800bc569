"""Whether the CUDA kernels give on this card what the processor's give, before a process trusts them.

Kernels that never ran on a GPU (``_C.untested_cuda_kernels()``) are off unless ``PYCERT_CUDA_UNTESTED=1``, and then
used only after this check, which runs once, when a process first uses a CUDA device: each kernel alone on small cases
with ragged ends, in float32 and float64, then the methods on two small networks. Results must agree with the
processor's within the rounding of their sums, and bounds must hold. ``PYCERT_CUDA_UNTESTED=unchecked`` leaves it out.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycert import _C, _choices

OPS = torch.ops.pycert
Case = Callable[["Check"], None]
#: By the kernel that a failure accuses: each uses, beside its own, only kernels of cases before it.
CASES: dict[str, Case] = {}
#: What is checked last.
METHODS = ("ibp", "crown-ibp", "fastlin", "crown", "forward", "alpha-crown")
EXTENT = [3, 5, 6]
#: Layouts of rows over a value of EXTENT: dense, stride, offset, size; as csrc/ops/backsub.cpp writes them.
LAYOUTS = ([1, 0, 0, 0, 0, 0, 0], [0, 4, 5, 2, -2, 1, -3])
UNIT: dict[str, Any] = dict(
    stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=False, output_padding=[0, 0], groups=1
)


class WrongResult(Exception):
    """What a kernel gave that it should not."""


class Check:
    """Calls operators on the device, within ``within``, and on the processor, and compares."""

    def __init__(self, device: torch.device, dtype: torch.dtype, within: Callable[[], Any]) -> None:
        self.device, self.dtype, self.within = device, dtype, within
        self.eps = torch.finfo(dtype).eps

    def draw(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return values.to(dtype or self.dtype)

    def box(self, *shape: int) -> tuple[Tensor, Tensor]:
        lower = self.draw(*shape, seed=1)
        return lower, lower + self.draw(*shape, seed=2).abs()

    def there(self, op: Callable[..., Any], *arguments: Any) -> tuple[Tensor | None, ...]:
        """What the operator gives on the device, brought back."""
        moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in arguments]
        with self.within():
            found = op(*moved)
        results = found if isinstance(found, (tuple, list)) else (found,)
        return tuple(None if t is None else t.detach().cpu() for t in results)

    def same(self, op: Callable[..., Any], *arguments: Any, close: float = 64) -> tuple[Tensor | None, ...]:
        """The operator on both, equal within ``close`` roundings of sums of a few hundred; what the device gave."""
        expected = op(*arguments)
        found = self.there(op, *arguments)
        self.agree(expected if isinstance(expected, (tuple, list)) else (expected,), found, close)
        return found

    def agree(
        self, expected: Sequence[Tensor | None], found: Sequence[Tensor | None], close: float = 64
    ) -> None:
        """Same shapes, same infinities; elsewhere within ``close`` roundings, of the largest value or one."""
        for right, mine in zip(expected, found, strict=True):
            if right is None or mine is None or right.numel() == 0:
                continue
            if right.shape != mine.shape:
                raise WrongResult(f"shape {list(mine.shape)} instead of {list(right.shape)}")
            right, mine = right.double(), mine.double()
            finite = right.isfinite()
            if not torch.equal(right[~finite].nan_to_num(0.5), mine[~finite].nan_to_num(0.5)):
                raise WrongResult("other infinite values")
            error = (right - mine)[finite].abs()
            size = right[finite].abs().max().clamp_min(1) if finite.any() else torch.ones(())
            if not bool((error <= close * self.eps * size).all()):
                raise WrongResult(f"off by {float(error.nan_to_num(math.inf).max()):.3g}")

    def holds(self, lower: Tensor | None, value: Tensor, upper: Tensor | None) -> None:
        """``value``, exact to the rounding of float64, is enclosed."""
        slack = 1e-13 * (1 + value.abs())
        below, above = torch.zeros(()), torch.zeros(())
        if lower is not None:
            below = (lower.double() - value - slack).clamp_min(0)
        if upper is not None:
            above = (value - upper.double() - slack).clamp_min(0)
        worst = max(float(below.nan_to_num(math.inf).max()), float(above.nan_to_num(math.inf).max()))
        if worst > 0:
            raise WrongResult(f"an exact value lies {worst:.3g} outside its bounds")


def case(name: str) -> Callable[[Case], Case]:
    def add(run: Case) -> Case:
        CASES[name] = run
        return run

    return add


# ---- intervals ------------------------------------------------------------------------------------------------------


def _products(check: Check, batch: int) -> None:
    weight, mid, radius = (
        check.draw(9, 70, seed=1),
        check.draw(batch, 70, seed=2),
        check.draw(batch, 70, seed=3).abs(),
    )
    found = check.there(OPS.dual_product, weight, mid, radius)
    wide = weight.double().t()
    check.agree((mid.double() @ wide, radius.double() @ wide.abs()), found)


@case("dual_product")
def _few(check: Check) -> None:
    for batch in (1, 3):
        _products(check, batch)


@case("dual_product_many")
def _many(check: Check) -> None:
    _products(check, 70)


@case("convolve")
def _convolve(check: Check) -> None:
    image, radius = check.draw(3, 4, 7, 9, seed=1), check.draw(3, 4, 7, 9, seed=2).abs()
    conv, transposed = nn.functional.conv2d, nn.functional.conv_transpose2d
    for size, groups, back in ((6, 2, False), (40, 1, False), (6, 1, True)):
        shape = (4, size // groups, 3, 2) if back else (size, 4 // groups, 3, 2)
        weight = check.draw(*shape, seed=3)
        options: dict[str, Any] = dict(stride=[2, 1], padding=[1, 1], groups=groups)
        geometry = (UNIT | options | {"transposed": back}).values()
        plain = transposed if back else conv
        expected = plain(image.double(), weight.double(), **options)
        spread = plain(radius.double(), weight.double().abs(), **options)
        check.agree((expected, spread), check.there(OPS.convolution, image, radius, weight, *geometry))
        check.agree((expected,), check.there(OPS.convolution, image, None, weight, *geometry)[:1])


@case("product")
def _product(check: Check) -> None:
    for rows, inner, columns in ((5, 33, 7), (130, 40, 140)):
        a, b = check.draw(rows, inner, seed=1), check.draw(inner, columns, seed=2)
        found = check.there(OPS.rows_product, a, b, None, None, None)
        check.agree((a.double() @ b.double(),), found)


def _affine(check: Check, *sizes: tuple[int, int]) -> None:
    for batch, inputs in sizes:
        weight, bias = check.draw(6, inputs, seed=3), check.draw(6, seed=4)
        for soundness in (0, 1, 2):
            for relu in (False, True):
                given = (*check.box(batch, inputs), weight, bias, soundness, 0, relu)
                check.same(OPS.interval_linear, *given, close=4 * inputs)
        point = check.draw(batch, inputs, seed=5)
        found = check.there(OPS.interval_linear, point, point, weight, bias, 1, 0)
        check.holds(found[0], point.double() @ weight.double().t() + bias.double(), found[1])
    image, weight = check.draw(2, 3, 8, 8, seed=6), check.draw(5, 3, 3, 3, seed=7)
    found = check.there(OPS.interval_conv2d, image, image, weight, None, *UNIT.values(), 1, 0)
    check.holds(found[0], nn.functional.conv2d(image.double(), weight.double()), found[1])


@case("prepare")
def _prepare(check: Check) -> None:
    _affine(check, (2, 70), (30, 33), (1, 9000))


@case("enclose")
def _enclose(check: Check) -> None:
    """By the library's products, whose ends are formed by a kernel of their own."""
    double = check.dtype == torch.float64
    _C.set_choices(check.device.type, [("dual_product", double, (1, 1, 1), 1.0, 0.5)])
    try:
        _affine(check, (40, 33))
    finally:
        _C.set_choices(check.device.type, [])


@case("scale")
def _scale(check: Check) -> None:
    a, channel = check.box(3, 4, 5, 6), [check.draw(4, seed=seed) for seed in (5, 6, 7)]
    for relu in (False, True):
        check.same(OPS.interval_scale, *a, *channel[:2], channel[2].abs(), 1e-5, True, relu, close=4)
    found = check.there(OPS.interval_scale, a[0], a[0], channel[0], channel[1], None, check.eps, True)
    scale, term = (t.double().view(1, 4, 1, 1) for t in channel[:2])
    check.holds(found[0], a[0].double() * scale + term, found[1])


@case("add")
def _add(check: Check) -> None:
    a, b = check.box(3, 40), (check.draw(3, 40, seed=8), check.draw(3, 40, seed=8) + 1)
    for subtract in (False, True):
        for relu in (False, True):
            check.same(OPS.interval_add, *a, *b, subtract, 1e-5, True, relu, close=4)
        found = check.there(OPS.interval_add, a[0], a[0], b[0], b[0], subtract, check.eps, True)
        check.holds(found[0], a[0].double() + (-1 if subtract else 1) * b[0].double(), found[1])


@case("linf_ball")
def _ball(check: Check) -> None:
    centre, eps = check.draw(3, 40, seed=1), torch.tensor([0.0, 0.3, 1e-30], dtype=check.dtype)
    check.same(OPS.linf_ball, centre, eps, -0.5, 0.7, close=2)
    found = check.there(OPS.linf_ball, centre, eps, -math.inf, math.inf)
    for sign in (-1, 1):
        check.holds(found[0], centre.double() + sign * eps.double().view(3, 1), found[1])


@case("with_sign")
def _with_sign(check: Check) -> None:
    lower, upper = check.box(3, 20)
    grads = [check.draw(3, 6, seed=seed) for seed in (4, 5)]
    check.same(
        OPS.interval_linear_backward, *grads, lower, upper, check.draw(6, 20, seed=3), [True, True, True]
    )


# ---- error charges --------------------------------------------------------------------------------------------------


@case("magnitudes")
def _magnitudes(check: Check) -> None:
    for length in (30, 120):
        check.same(OPS.magnitudes, *check.box(3, 4, 30), length)


@case("squares")
def _squares(check: Check) -> None:
    for values in (check.draw(3, 4, 30, seed=1), check.draw(4, 30, seed=1)):
        check.same(OPS.squares, values)


@case("charge")
def _charge(check: Check) -> None:
    lower, upper = check.box(3, 4, 30)
    _, stats = OPS.magnitudes(lower, upper, 120)
    windows = check.draw(2, 3, 2, 5, seed=3, dtype=torch.float64).abs() * 10
    sums = [check.draw(3, 4, 5, seed=seed) for seed in (4, 5, 6, 7)]
    bias, weights = check.draw(4, seed=8), check.draw(4, seed=9, dtype=torch.float64).abs()
    constants = [1.1, 1e-5, 1e-6, 1e-12, 1e-5, 40.0, 2.0, 1.01, 1e-30, 1e-31]
    signed = (sums[0].abs(), None, windows, sums[1], sums[2].abs(), sums[3])
    for terms, network in ((signed, True), ((None, weights, windows, None, None, None), False)):
        check.same(OPS.affine_charge, lower, [3, 4, 5], *terms, bias, stats, network, constants)


# ---- back-substitution ----------------------------------------------------------------------------------------------


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


# ---- norms, ball and box, k-ReLU ------------------------------------------------------------------------------------

_POWER = ([2, 3, 9, 9], [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def _power(check: Check, masks: tuple[Tensor | None, Tensor | None], steps: int, results: int) -> None:
    weight = check.draw(4, 3, 3, 2, seed=1)
    arguments = (weight, *masks, None, steps, 5, True, *_POWER)
    expected = OPS.masked_power(*arguments)
    found = check.there(OPS.masked_power, *arguments)
    # a few steps of an iteration that is not contracting: roundings grow
    order = slice(1, 2) if results == 1 else slice(0, 2)
    check.agree(expected[order], found[order], 64 if steps == 0 else 65536)


@case("mix_signs")
def _mix_signs(check: Check) -> None:
    _power(check, (None, None), 0, 1)


@case("mask_scale")
def _mask_scale(check: Check) -> None:
    _power(check, (None, None), 2, 2)
    weights = (check.draw(2, 4, 7, 8, seed=2).abs(), check.draw(2, 3, 9, 9, seed=3).abs())
    _power(check, weights, 2, 2)


@case("pack_bits")
def _pack_bits(check: Check) -> None:
    _power(check, (check.draw(2, 4, 7, 8, seed=2) > 0, check.draw(2, 3, 9, 9, seed=3) > 0), 2, 2)


def _ball_box_inputs(check: Check) -> list[Tensor]:
    shapes = ((6, 5, 2, 3), (3, 5, 2, 3), (3,), (5,), (5, 2, 3))
    values = [check.draw(*shape, seed=5 + i) for i, shape in enumerate(shapes)]
    return [values[0], *(t.abs() for t in values[1:])]


@case("ball_box")
def _ball_box(check: Check) -> None:
    check.same(OPS.ball_box_relu, *_ball_box_inputs(check), close=4)


@case("ball_box_backward")
def _ball_box_backward(check: Check) -> None:
    def run(*given: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in given]
        out, spread, *_ = OPS.ball_box_relu(*leaves)
        ((out * out).sum() + (spread * spread).sum()).backward()
        return [t.grad for t in leaves if t.grad is not None]

    with torch.enable_grad():
        check.same(run, *_ball_box_inputs(check))


@case("ball_box_maximum")
def _ball_box_maximum(check: Check) -> None:
    lower, upper = -check.draw(3, 40, seed=8).abs(), check.draw(3, 40, seed=9).abs()
    reach = torch.tensor([0.0, 0.7, 1e6], dtype=check.dtype)
    arguments = (check.draw(3, 4, 40, seed=10), lower, upper, reach)
    check.agree(OPS.ball_box_maximum(*arguments)[:1], check.there(OPS.ball_box_maximum, *arguments)[:1], 1024)


@case("krelu_hull")
def _krelu_hull(check: Check) -> None:
    """Rows are limits of the points (x, relu x) of octahedra: none may cut one off, and the base rows are there."""
    from pycert.ops import krelu_hull, octahedral_directions

    for k in (1, 2, 3):
        directions = -octahedral_directions(k, check.dtype)
        points = check.draw(4, 200, k, seed=k).double()
        A = directions.expand(4, -1, -1)
        b = (-(A.double() @ points.transpose(1, 2))).amax(2).to(check.dtype) * 1.001 + 0.01
        lower, upper = (points.amin(1) - 0.02).to(check.dtype), (points.amax(1) + 0.02).to(check.dtype)
        expected, _ = krelu_hull(lower, upper, A, b)
        found = check.there(krelu_hull, lower, upper, A, b)
        rows, count = found[0], found[1]
        assert rows is not None and count is not None
        base = directions.shape[0]
        check.agree((expected[:, :base],), (rows[:, :base],))
        lifted = torch.cat([torch.ones(4, 200, 1, dtype=torch.float64), points, points.relu()], 2)
        check.holds(None, -(lifted @ rows.double().transpose(1, 2)), torch.zeros(()))
        if not bool((count > base).all()):
            raise WrongResult("rows are missing")


# ---- relaxations ----------------------------------------------------------------------------------------------------

#: LeakyReLU, clamp, sigmoid, sin, GELU: kind and its two numbers (csrc/core/relaxation_lines.h).
_KINDS = ((1, 0.1, 0.0), (3, -0.5, 0.5), (4, 0.0, 0.0), (8, 0.0, 0.0), (14, 0.0, 0.0))


@case("relu_lines")
def _relu_lines(check: Check) -> None:
    lower, upper = check.box(16, 64)
    for slope in range(4):
        found = check.same(OPS.relu_relaxation, lower, upper, slope, close=2)
        low, high, at = (t.double() for t in found if t is not None)
        for x in (lower.double(), upper.double(), torch.zeros_like(lower, dtype=torch.float64)):
            x = torch.minimum(torch.maximum(x, lower.double()), upper.double())
            check.holds(low * x, x.relu(), high * x + at)


@case("relu_backward")
def _relu_backward(check: Check) -> None:
    grads = [check.draw(16, 64, seed=seed) for seed in (3, 4, 5)]
    for slope in range(4):
        check.same(OPS.relu_relaxation_backward, *check.box(16, 64), *grads, slope)


@case("activation_interval")
def _activation_interval(check: Check) -> None:
    for kind, a, b in _KINDS:
        check.same(OPS.activation_interval, *check.box(6, 64), kind, None, a, b, True)


@case("activation_interval_backward")
def _activation_interval_backward(check: Check) -> None:
    grads = [check.draw(6, 64, seed=seed) for seed in (3, 4)]
    for kind, a, b in _KINDS:
        check.same(OPS.activation_interval_backward, *check.box(6, 64), None, *grads, kind, a, b, close=2**20)


@case("activation_lines")
def _activation_lines(check: Check) -> None:
    """Lines may be placed a little otherwise where an elementary function differs in its last bits: they must hold."""
    lower, upper = check.box(6, 64)
    for kind, a, b in _KINDS:
        found = check.there(OPS.activation_lines, lower, upper, kind, None, a, b, 0, True)
        check.agree(OPS.activation_lines(lower, upper, kind, None, a, b, 0, True), found, 2**20)
        ls, li, us, ui = (t.double() for t in found if t is not None)
        for share in (0.0, 0.3, 0.8, 1.0):
            x = lower.double() + share * (upper.double() - lower.double())
            values = OPS.activation_interval(x, x, kind, None, a, b, False)
            middle, width = (values[0] + values[1]) / 2, 1e-9
            check.holds(ls * x + li - width, middle, us * x + ui + width)


@case("activation_lines_backward")
def _activation_lines_backward(check: Check) -> None:
    grads = [check.draw(6, 64, seed=seed) for seed in (3, 4, 5, 6)]
    for kind, a, b in _KINDS:
        check.same(OPS.activation_lines_backward, *check.box(6, 64), None, *grads, kind, a, b, 0, close=2**20)


# ---- methods --------------------------------------------------------------------------------------------------------


def _nets() -> list[tuple[nn.Module, tuple[int, ...]]]:
    conv = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(18, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip
    dense = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 5), nn.Sigmoid(), nn.Linear(5, 3))
    return [(conv, (2, 6, 6)), (dense, (9,))]


def _weights(check: Check, net: nn.Module) -> nn.Module:
    for number, parameter in enumerate(net.parameters()):
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data = check.draw(*parameter.shape, seed=number) / math.sqrt(fan_in)
    return net


def _method(check: Check, method: str) -> None:
    from pycert.bounded import BoundedModule
    from pycert.regions import LpBall

    options: dict[str, Any] = {"iterations": 2} if method == "alpha-crown" else {}
    nets = _nets()
    for net, shape in nets[1:] if method == "forward" else nets:  # forward lines are for few inputs
        _weights(check, net)
        x = check.draw(3, *shape, seed=30)
        # a point's bounds show the rounding alone
        radii = (0.0, 0.05) if method in ("ibp", "crown-ibp", "crown") else (0.05,)
        expected = {}
        for eps in radii:
            bounds = BoundedModule(net, x[:1]).bound(LpBall(x, eps=eps), method=method, **options)
            expected[eps] = (bounds.lower, bounds.upper)
        noise = 2 * torch.rand(50, *x.shape, generator=torch.Generator().manual_seed(1)).to(check.dtype) - 1
        points = x + 0.0499 * noise
        exact = {0.05: net.double()(points.double().flatten(0, 1)).view(50, 3, -1), 0.0: net(x.double())}
        there = net.to(check.dtype).to(check.device)
        for eps in radii:
            found = check.there(
                lambda t, bounded=there, eps=eps: tuple(
                    BoundedModule(bounded, t[:1]).bound(LpBall(t, eps=eps), method=method, **options)
                )[:2],
                x,
            )
            check.agree(expected[eps], found, 2**13)
            check.holds(found[0], exact[eps], found[1])


# ---- the whole ------------------------------------------------------------------------------------------------------


def run(device: torch.device, within: Callable[[], Any] = contextlib.nullcontext) -> None:
    """Check every kernel and method on the device.

    Args:
        device: whose kernels are compared with the processor's.
        within: entered around every call that goes to the device; for tests that put kernels in the processor's place.

    Raises:
        RuntimeError: naming the kernel or method that gave a wrong result, or could not run.
    """
    cases: list[tuple[str, Case]] = [(f"kernel {name!r}", one) for name, one in CASES.items()]
    for method in METHODS:
        cases.append((f"bounds by method={method!r}", lambda check, method=method: _method(check, method)))  # type: ignore[misc]
    # gradients are formed by the thread that asks for them: no other may use the kernels before the end
    alone = torch.autograd.set_multithreading_enabled(False)
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), alone, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's settings: they are for the networks of the user
        for name, one in cases:
            for dtype in (torch.float32, torch.float64):
                try:
                    one(Check(device, dtype, within))
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                except torch.OutOfMemoryError:  # says nothing of the kernels
                    raise
                except (WrongResult, RuntimeError, ValueError) as error:
                    raise RuntimeError(_failure(name, device, dtype, error)) from error


def _failure(name: str, device: torch.device, dtype: torch.dtype, error: Exception) -> str:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return (
        f"pycert's check of its CUDA kernels failed on {card}: {name} ({str(dtype).removeprefix('torch.')}): "
        f"{str(error).splitlines()[0]}. Bounds on this device cannot be trusted: use the CPU, and please report this. "
        "PYCERT_CUDA_UNTESTED=unchecked, set before the process starts, uses the kernels without the check"
    )


_lock = threading.RLock()
_state = "due"  # "running", "passed", or why it failed


def ensure(device: torch.device | None = None, within: Callable[[], Any] = contextlib.nullcontext) -> bool:
    """Run the check once a process; True when it has passed, False inside of it.

    Raises:
        RuntimeError: it failed, now or before.
    """
    global _state
    with _lock:  # other threads wait; the one that checks comes by again
        if _state == "due":
            if device is None and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "pycert's CUDA kernels are checked when a process first uses them, which waits for the device: "
                    "compute one bound before a CUDA graph is captured"
                )
            _state = "running"
            start = time.perf_counter()
            try:
                run(device or torch.device("cuda", torch.cuda.current_device()), within)
            except BaseException as error:
                failed = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
                _state = str(error) if failed else "due"
                raise
            finally:
                _choices.load.cache_clear()
            _state = "passed"
            warnings.warn(
                "pycert's CUDA kernels were not run on a GPU by their authors. A check of each against the processor "
                f"passed on this one, in {time.perf_counter() - start:.1f} s (docs/cuda.md)",
                stacklevel=2,
            )
        elif _state not in ("running", "passed"):
            raise RuntimeError(_state)
        return _state == "passed"


_C.set_cuda_check(ensure)
