"""The CUDA kernels' bodies, run on the host, against the CPU kernels: indices, masks, sums, gradients, whole methods."""

# ruff: noqa: B023 - the closures of loops are called at once

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import host_kernels
import pycert
from pycert.ops.relaxation import SLOPES

OPS = torch.ops.pycert
DTYPES = [torch.float32, torch.float64]
CONVOLUTIONS = {
    "plain": dict(),
    "strided": dict(stride=[2, 1], padding=[1, 1]),
    "dilated": dict(dilation=[2, 2], padding=[2, 1]),
    "grouped": dict(groups=2, padding=[1, 0]),
    "transposed": dict(transposed=True, stride=[2, 2], padding=[1, 1], output_padding=[1, 0]),
    "transposed, grouped": dict(transposed=True, groups=2, stride=[1, 3], dilation=[2, 1]),
}
#: Windows of rows over a [3, 5, 6] value: stride, offset, size; corners outside the image included.
WINDOWS = {
    "dense": [1, 0, 0, 0, 0, 0, 0],
    "inside": [0, 2, 3, 1, 0, 1, 0],
    "outside": [0, 4, 5, 2, -2, 1, -3],
}
EXTENT = [3, 5, 6]


@pytest.fixture(scope="module", autouse=True)
def _library():
    host_kernels.build()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 99)) < 0.1] = 0
    return values.to(dtype)


def boxes(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lower = draw(*shape, seed=1, dtype=dtype)
    return lower, lower + draw(*shape, seed=2, dtype=dtype).abs()


def on_both(f):
    """What f gives on the CPU kernels and on the host's run of the CUDA kernels."""
    with host_kernels.replaced():
        found = f()
    return f(), found


def compare(expected, found, tolerance: float, scale: float = 1.0) -> None:
    for right, mine in zip(expected, found, strict=True):
        if right is None or right.numel() == 0:
            assert mine is None or mine.numel() == 0
            continue
        assert mine.shape == right.shape and mine.dtype == right.dtype
        if tolerance == 0:
            assert torch.equal(mine, right)
        else:
            torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance * scale)


def rounding(dtype: torch.dtype, terms: int) -> float:
    """Two sums of so many terms may differ by this much of the sum of magnitudes."""
    return 4 * terms * torch.finfo(dtype).eps


# ---- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, inputs, outputs", [(1, 1, 1), (1, 70, 33), (3, 33, 9), (4, 32, 5), (5, 100, 130), (67, 47, 3)]
)
def test_products_of_boxes(batch, inputs, outputs, dtype):
    weight, mid, radius = draw(outputs, inputs, dtype=dtype), draw(batch, inputs, seed=3, dtype=dtype), draw(batch, inputs, seed=4, dtype=dtype).abs()  # fmt: skip
    with host_kernels.replaced():
        centre, spread = OPS.dual_product(weight, mid, radius)
    scale = float(inputs)
    compare((mid.double() @ weight.double().t(),), (centre.double(),), rounding(dtype, inputs), scale)
    compare(
        (radius.double() @ weight.double().abs().t(),), (spread.double(),), rounding(dtype, inputs), scale
    )


@pytest.mark.parametrize("soundness", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 40), (70, 5), (2, 3, 17), (1, 9000)])
def test_boxes_through_linear_layers(shape, dtype, soundness):
    lower, upper = boxes(*shape, dtype=dtype)
    weight, bias = draw(6, shape[-1], seed=3, dtype=dtype), draw(6, seed=4, dtype=dtype)
    for relu in (False, True):
        expected, found = on_both(lambda: OPS.interval_linear(lower, upper, weight, bias, soundness, 0, relu))
        compare(expected, found, rounding(dtype, shape[-1]), float(shape[-1]))
        assert (found[0].min() >= 0) == relu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_boxes_through_convolutions(name, dtype):
    geometry = dict(stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=False, output_padding=[0, 0], groups=1) | CONVOLUTIONS[name]  # fmt: skip
    groups, transposed = geometry["groups"], geometry["transposed"]
    weight = (
        draw(4, 6 // groups, 3, 2, seed=3, dtype=dtype)
        if transposed
        else draw(6, 4 // groups, 3, 2, seed=3, dtype=dtype)
    )
    lower, upper = boxes(3, 4, 7, 9, dtype=dtype)
    bias = draw(6, seed=4, dtype=dtype)
    arguments = list(geometry.values())
    for relu in (False, True):
        expected, found = on_both(
            lambda: OPS.interval_conv2d(lower, upper, weight, bias, *arguments, 2, 0, relu)
        )
        compare(expected, found, rounding(dtype, 24), 24.0)
        assert (found[0].min() >= 0) == relu
    with host_kernels.replaced():
        single, _ = OPS.convolution(lower, None, weight, *arguments)
    options = dict(
        stride=geometry["stride"], padding=geometry["padding"], dilation=geometry["dilation"], groups=groups
    )
    if transposed:
        plain = F.conv_transpose2d(
            lower.double(), weight.double(), output_padding=geometry["output_padding"], **options
        )
    else:
        plain = F.conv2d(lower.double(), weight.double(), **options)
    compare((plain,), (single.double(),), rounding(dtype, 24), 24.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_steps_agree_bit_for_bit(dtype):
    a, b = boxes(3, 4, 5, 6, dtype=dtype), boxes(3, 4, 5, 6, dtype=dtype)
    scale, term, size = (
        draw(4, seed=5, dtype=dtype),
        draw(4, seed=6, dtype=dtype),
        draw(4, seed=7, dtype=dtype).abs(),
    )
    eps = torch.tensor([0.0, 0.3, 1e-30], dtype=dtype)
    for f in (
        lambda: OPS.interval_scale(*a, scale, term, size, 1e-5, True),
        lambda: OPS.interval_scale(*a, None, term, None, 1e-5, True),
        lambda: OPS.interval_scale(*a, scale, term, None, 1e-5, True, relu=True),
        lambda: OPS.interval_scale(*a, scale, None, None, 0.0, False),
        lambda: OPS.interval_add(*a, *b, True, 1e-5, True),
        lambda: OPS.interval_add(*a, *b, True, 1e-5, True, relu=True),
        lambda: OPS.interval_add(*a, *b, False, 1e-5, False),
        lambda: OPS.linf_ball(a[0], eps, -0.5, 0.7),
        lambda: OPS.linf_ball(a[0], eps, -math.inf, math.inf),
    ):
        compare(*on_both(f), 0)


@pytest.mark.parametrize("slope", range(len(SLOPES)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_relaxations_agree_bit_for_bit(dtype, slope):
    scales = 10.0 ** torch.arange(-8, 8, dtype=torch.float64)
    lower = (draw(16, 64, seed=1) * scales[:, None]).to(dtype)
    upper = lower + (draw(16, 64, seed=2).abs() * scales[:, None]).to(dtype)
    lower[0, 0], upper[0, 0], upper[1, 1] = -math.inf, math.nan, math.inf
    compare(*on_both(lambda: OPS.relu_relaxation(lower, upper, slope)), 0)
    grads = [draw(16, 64, seed=seed, dtype=dtype) for seed in (3, 4, 5, 6)]
    compare(*on_both(lambda: OPS.relu_relaxation_backward(lower, upper, *grads[:3], slope)), 0)
    parameters = draw(64, seed=7, dtype=dtype).abs()
    # LeakyReLU, PReLU, clamp, sigmoid, sin, ELU, GELU: csrc/core/relaxation_lines.h
    for kind, a, b in [(1, 0.1, 0.0), (2, 0.0, 0.0), (3, -0.5, 0.5), (4, 0.0, 0.0), (8, 0.0, 0.0), (10, 1.0, 0.0), (14, 0.0, 0.0)]:  # fmt: skip
        parameter = parameters if kind == 2 else None
        for deployed in (False, True):
            compare(
                *on_both(lambda: OPS.activation_lines(lower, upper, kind, parameter, a, b, slope, deployed)),
                0,
            )
            compare(
                *on_both(lambda: OPS.activation_interval(lower, upper, kind, parameter, a, b, deployed)), 0
            )
        compare(
            *on_both(
                lambda: OPS.activation_lines_backward(lower, upper, parameter, *grads, kind, a, b, slope)
            ),
            1e-12,
        )
        compare(
            *on_both(
                lambda: OPS.activation_interval_backward(lower, upper, parameter, *grads[:2], kind, a, b)
            ),
            1e-12,
        )


# ---- back-substitution ----------------------------------------------------------------------------------------------


def rows_of(window: str, dtype: torch.dtype, source: bool):
    """Rows over two samples, with their map: data, source, negative_from, sample, position."""
    layout = WINDOWS[window]
    size = EXTENT if layout[0] else [EXTENT[0], *layout[1:3]]
    count, table = 11, 4 if source else 11
    generator = torch.Generator().manual_seed(5)
    data = draw(table, *size, seed=8, dtype=dtype)
    pick = torch.randint(0, table, (count,), generator=generator) if source else None
    position = torch.stack([torch.randint(0, 4, (count,), generator=generator), torch.randint(0, 5, (count,), generator=generator)], 1)  # fmt: skip
    sample = torch.arange(2).repeat_interleave(6)[:count]
    return data, pick, 7 if source else 2**62, sample, None if layout[0] else position


def lines(dtype: torch.dtype, groups: int = 2):
    return [draw(groups, 90, seed=seed, dtype=dtype) for seed in (11, 12, 13, 14)]


@pytest.mark.parametrize("source", [False, True], ids=["own", "source"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_steps_on_rows(window, dtype, source):
    data, pick, negative, sample, position = rows_of(window, dtype, source)
    rows = (data, pick, negative, sample, position, WINDOWS[window], EXTENT)
    ls, li, us, ui = lines(dtype)
    bias, charge = draw(90, seed=15, dtype=dtype), draw(2, 90, seed=16, dtype=dtype).abs()
    for intercept, b, c in [(li, bias, charge), (None, bias, None), (li, None, charge), (None, None, None)]:
        expected, found = on_both(lambda: OPS.relax_rows(*rows, ls, intercept, us, ui, b, c, None))
        compare(expected[:1], found[:1], 0)
        compare(expected[1:], found[1:], 1e-13, 90.0)
    table = torch.arange(11) % 5
    expected, found = on_both(lambda: OPS.relax_rows(*rows, draw(5, 90, seed=20, dtype=dtype), None, us, ui, bias, charge, table))  # fmt: skip
    compare(expected[:1], found[:1], 0)
    compare(expected[1:], found[1:], 1e-13, 90.0)
    compare(*[(t,) for t in on_both(lambda: OPS.dot_rows(*rows, bias, charge))], 1e-13, 90.0)
    lower, upper = boxes(2, 90, dtype=dtype)
    eps = torch.tensor([0.5, 0.0], dtype=dtype)
    compare(*[(t,) for t in on_both(lambda: OPS.concretize_rows(*rows, lower, upper, 0))], 1e-13, 90.0)
    for norm in (1, 2):
        compare(*[(t,) for t in on_both(lambda: OPS.concretize_rows(*rows, lower, eps, norm))], 1e-13, 90.0)
    for target in WINDOWS.values():
        if position is not None or target[0]:
            compare(*[(t,) for t in on_both(lambda: OPS.relayout_rows(*rows[:6], target, EXTENT))], 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_gradients_of_steps_on_rows(window, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    data, _, _, sample, position = rows_of(window, dtype, False)
    layout = WINDOWS[window]
    ls, li, us, ui = lines(dtype)
    bias, out, sums = (
        draw(90, seed=15, dtype=dtype),
        draw(*data.shape, seed=17, dtype=dtype),
        draw(3, 11, seed=18),
    )

    def relax(data, source, negative, lower, intercept, table, wanted):
        return OPS.relax_rows_backward(out, sums, data, source, negative, sample, position, layout, EXTENT, lower, intercept, us, ui, bias, table, wanted)  # fmt: skip

    for wanted in ([1, 1, 1], [1, 0, 0], [0, 1, 0]):
        compare(*on_both(lambda: relax(data, None, 2**62, ls, li, None, wanted)), tolerance, 10.0)
    shared, pick, negative, *_ = rows_of(window, dtype, True)
    table = torch.tensor([0, 1, 0, 1, 2, 2, 3, 4, 3, 4, 4])
    compare(*on_both(lambda: relax(shared, pick, negative, draw(5, 90, seed=20, dtype=dtype), None, table, [0, 1, 0])), tolerance, 10.0)  # fmt: skip
    lower, upper = boxes(2, 90, dtype=dtype)
    eps, grad = torch.tensor([0.5, 0.25], dtype=dtype), draw(2, 11, seed=19)
    for norm, second in ((0, upper), (1, eps), (2, eps)):
        for of_region in (False, True):
            compare(
                *on_both(
                    lambda: OPS.concretize_rows_backward(
                        grad, data, sample, position, layout, EXTENT, lower, second, norm, of_region
                    )
                ),
                tolerance,
                10.0,
            )
    for target in WINDOWS.values():
        if position is None and not target[0]:
            continue
        size = EXTENT if target[0] else [EXTENT[0], *target[1:3]]
        moved = draw(11, *size, seed=21, dtype=dtype)
        for source, at in ((pick, negative), (None, 2**62)):
            compare(
                *[
                    (t,)
                    for t in on_both(
                        lambda: OPS.relayout_rows_backward(
                            moved,
                            4 if source is not None else 11,
                            source,
                            at,
                            sample,
                            position,
                            layout,
                            target,
                            EXTENT,
                        )
                    )
                ],
                tolerance,
                10.0,
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, inner, columns", [(1, 1, 1), (5, 33, 7), (130, 40, 140), (3, 0, 4)])
def test_products_of_rows(rows, inner, columns, dtype):
    a, b = draw(rows, inner, seed=1, dtype=dtype), draw(inner, columns, seed=2, dtype=dtype)
    with host_kernels.replaced():
        found = OPS.rows_product(a, b, None, None, None)
    compare((a.double() @ b.double(),), (found.double(),), rounding(dtype, inner + 1), inner + 1.0)
    if rows < 5 or inner == 0:
        return
    segments, live = torch.tensor([0, 2, rows]), [torch.arange(0, inner, 2), torch.arange(1, inner, 3)]
    masked = a.clone()
    for begin, end, kept in ((0, 2, live[0]), (2, rows, live[1])):
        dead = torch.ones(inner, dtype=torch.bool).index_fill(0, kept, False)
        masked[begin:end, dead] = 0
    starts = torch.tensor([0, len(live[0]), len(live[0]) + len(live[1])])
    with host_kernels.replaced():
        found = OPS.rows_product(a, b, segments, torch.cat(live), starts)
    compare((masked.double() @ b.double(),), (found.double(),), rounding(dtype, inner), float(inner))


@pytest.mark.parametrize("dtype", DTYPES)
def test_charges_and_ascent(dtype):
    lower, upper = boxes(3, 4, 30, dtype=dtype)
    for length in (30, 120, 360):
        compare(*on_both(lambda: OPS.magnitudes(lower, upper, length)), 1e-13)
    compare(*[(t,) for t in on_both(lambda: OPS.squares(lower))], 1e-13)
    compare(*[(t,) for t in on_both(lambda: OPS.squares(lower[0]))], 1e-13)
    _, stats = OPS.magnitudes(lower, upper, 120)
    windows = draw(2, 3, 2, 5, seed=3).abs() * 10
    sums = [draw(3, 4, 5, seed=seed, dtype=dtype) for seed in (4, 5, 6, 7)]
    bias, weights = draw(4, seed=8, dtype=dtype), draw(4, seed=9).abs()
    constants = [1.1, 1e-5, 1e-6, 1e-12, 1e-5, 40.0, 2.0, 1.01, 1e-30, 1e-31]

    def charge(absolute, squares, signed, radius, centre, network):
        return (OPS.affine_charge(lower, [3, 4, 5], absolute, squares, windows, signed, radius, centre, bias, stats, network, constants),)  # fmt: skip

    for arguments in ((sums[0].abs(), None, sums[1], None, None, True), (sums[0].abs(), None, sums[1], sums[2].abs(), sums[3], True), (None, weights, None, None, None, False)):  # fmt: skip
        compare(*on_both(lambda: charge(*arguments)), 1e-13 if dtype == torch.float64 else 1e-6)
    state = [draw(4, 9, seed=seed, dtype=dtype) for seed in (1, 2, 3, 4, 5)]
    state[2].abs_()
    limits = [torch.zeros(2, 9, dtype=dtype), torch.ones(2, 9, dtype=dtype)]
    groups = [torch.tensor([0, 1, 1, 0]), torch.tensor([3, 1, 0, 2]), torch.tensor([True, False, True, True])]

    def ascend():
        slope, first, second, best, grad = (t.clone() for t in state)
        OPS.ascend_slopes(slope, first, second, best, grad, *limits, *groups, 3, 0.5)
        return slope, first, second, best

    compare(*on_both(ascend), 1e-6 if dtype == torch.float32 else 1e-13)


def test_the_tables_are_replaced_and_come_back():
    """An operator that only the CUDA kernels offer runs within, and says so without."""
    image, weight = draw(1, 2, 4, 4), draw(3, 2, 2, 2)
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    with host_kernels.replaced():
        assert OPS.convolution(image, None, weight, *geometry)[0].shape == (1, 3, 3, 3)
    with pytest.raises(RuntimeError, match="convolution: no kernel of its own on cpu"):
        OPS.convolution(image, None, weight, *geometry)


def test_empty_work_launches_nothing():
    with host_kernels.replaced():
        lower = torch.empty(0, 5)
        assert OPS.interval_linear(lower, lower, torch.ones(3, 5), None, 2, 0)[0].shape == (0, 3)
        assert OPS.relu_relaxation(lower, lower, 0)[0].shape == (0, 5)
        assert OPS.rows_product(torch.empty(0, 5), torch.ones(5, 2), None, None, None).shape == (0, 2)
        nothing = torch.empty(0, 90)
        empty = torch.empty(0, dtype=torch.long)
        assert OPS.dot_rows(
            nothing, None, 2**62, empty, None, WINDOWS["dense"], EXTENT, torch.ones(90), None
        ).shape == (3, 0)


# ---- whole methods --------------------------------------------------------------------------------------------------


def dense_net() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.Sigmoid(), nn.Linear(12, 4)
    ), draw(3, 8)


def conv_net() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)]  # fmt: skip
    return nn.Sequential(*layers).eval(), draw(2, 2, 8, 8)


def residual_net() -> tuple[nn.Module, Tensor]:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
            self.last = nn.Linear(50, 3)

        def forward(self, x):
            return self.last((torch.relu(self.second(torch.relu(self.first(x)))) + x).flatten(1))

    return Residual(), draw(2, 2, 5, 5)


NETS = {"dense": dense_net, "conv": conv_net, "residual": residual_net}


def bounded(name: str, dtype: torch.dtype):
    torch.manual_seed(3)
    net, x = NETS[name]()
    return pycert.BoundedModule(net.to(dtype), x[:1].to(dtype)), x.to(dtype)


@pytest.mark.parametrize("p", [*(pytest.param(p, marks=pytest.mark.slow) for p in (1, 2)), math.inf])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown", "forward"])
@pytest.mark.parametrize("name", NETS)
def test_methods_give_the_same_bounds(name, method, p):
    bm, x = bounded(name, torch.float32)
    region = pycert.LpBall(x, eps=0.05, p=p)
    options = {"iterations": 3} if method == "alpha-crown" else {}
    with torch.no_grad():
        expected, found = on_both(lambda: tuple(bm.bound(region, method=method, **options)))
    compare(expected, found, 2e-4)
    noise = 2 * torch.rand(200, *x.shape, generator=torch.Generator().manual_seed(1)) - 1
    size = noise.flatten(2).norm(p=p, dim=2).clamp_min(1e-9)
    outputs = bm((x + 0.0499 * noise / size.view(200, -1, *[1] * (x.dim() - 1))).flatten(0, 1)).view(
        200, x.shape[0], -1
    )
    assert (found[0] <= outputs).all() and (outputs <= found[1]).all()


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("name", NETS)
def test_methods_give_the_same_gradients(name, method):
    bm, x = bounded(name, torch.float64)

    def gradients():
        leaf = x.clone().requires_grad_()
        bounds = bm.bound(
            pycert.LpBall(leaf, eps=torch.full((x.shape[0],), 0.05, dtype=x.dtype)), method=method
        )
        (bounds.upper - 2 * bounds.lower).sum().backward()
        found = (leaf.grad, *(p.grad.clone() for p in bm.parameters()))
        bm.zero_grad()
        return found

    compare(*on_both(gradients), 1e-9, 10.0)


def test_the_same_bits_twice():
    bm, x = bounded("conv", torch.float32)
    with host_kernels.replaced(), torch.no_grad():
        first, second = (tuple(bm.bound(pycert.LpBall(x, eps=0.05), method="crown")) for _ in range(2))
    compare(first, second, 0)
