"""Cases of the kernels of boxes through layers, and of error charges."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pycert import _C

from .judging import OPS, Check, named_cases

CASES, case = named_cases()
UNIT: dict[str, Any] = dict(
    stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=False, output_padding=[0, 0], groups=1
)


# ---- boxes through layers -------------------------------------------------------------------------------------------


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
