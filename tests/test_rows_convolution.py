"""The convolution of coefficient rows against torch in float64, within what its summation chain allows."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pycert

convolution = torch.ops.pycert.rows_convolution

# rows, in channels, out channels, height, width, taps, stride, padding, dilation, groups, transposed
SHAPES = [
    (5, 3, 4, 7, 6, 3, 1, 1, 1, 1, True),
    (13, 64, 16, 3, 3, 3, 1, 0, 1, 1, True),
    (40, 16, 3, 8, 8, 4, 2, 1, 1, 1, True),
    (9, 8, 20, 9, 5, 3, 2, 1, 1, 2, True),
    (33, 8, 8, 6, 6, 3, 1, 2, 2, 1, True),
    (17, 5, 37, 6, 7, 3, 2, 1, 1, 1, False),
    (50, 6, 2, 9, 9, 5, 3, 2, 1, 1, False),
    (12, 40, 40, 5, 5, 2, 1, 0, 1, 1, True),
    (1, 16, 16, 1, 1, 3, 1, 0, 1, 1, True),
    (70, 4, 4, 4, 4, 1, 1, 0, 1, 1, True),
    (3, 2, 33, 30, 30, 3, 1, 1, 1, 1, True),
    (6, 16, 16, 32, 32, 3, 1, 1, 1, 1, True),  # in bands
    (4, 6, 6, 5, 5, 3, 1, 1, 1, 6, True),  # depthwise: left to the library
]


def case(shape, dtype):
    rows, inner, outer, height, width, taps, stride, padding, dilation, groups, transposed = shape
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    x = torch.randn(rows, inner, height, width, generator=generator, dtype=dtype)
    x[:, torch.rand(inner, height, width, generator=generator) < 0.4] = 0  # dead in all rows
    x[: rows // 2, torch.rand(inner, height, width, generator=generator) < 0.4] = 0  # and in some
    size = (inner, outer // groups, taps, taps) if transposed else (outer, inner // groups, taps, taps)
    weight = torch.randn(size, generator=generator, dtype=dtype)
    rest = [stride - 1 if transposed and padding else 0] * 2
    arguments = ([stride] * 2, [padding] * 2, [dilation] * 2, rest, groups, transposed)

    def exact(a: Tensor, w: Tensor) -> Tensor:
        common = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if transposed:
            return functional.conv_transpose2d(a, w, output_padding=rest, **common)
        return functional.conv2d(a, w, **common)

    return x, weight, arguments, exact


def chain(shape, weight: Tensor) -> float:
    """Roundings of one sum: blocks of 32 products and the sums of the blocks; all of them in the library."""
    inner, taps, groups = shape[1] // shape[9], weight.shape[2] * weight.shape[3], shape[9]
    if pycert._C.isa() == "portable" or inner * shape[2] // groups < 16:
        return inner * taps
    return min(inner * taps, 32) + taps * math.ceil(inner / 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sum_is_within_its_chain(shape, dtype):
    x, weight, arguments, exact = case(shape, dtype)
    runs = torch.tensor([0, len(x) // 3, len(x) // 2, len(x)])
    slack = chain(shape, weight) * torch.finfo(dtype).eps / 2 * 1.001 + 1e-15
    want, size = exact(x.double(), weight.double()), exact(x.double().abs(), weight.double().abs())
    for segments in (None, runs):
        found = convolution(x, weight, *arguments, segments)
        assert found.dtype == dtype and found.shape == want.shape
        assert ((found.double() - want).abs() <= slack * size).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_runs_change_no_bit(threads):
    x, weight, arguments, _ = case(SHAPES[3], torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = convolution(x, weight, *arguments, None)
        torch.set_num_threads(threads)
        found = convolution(x, weight, *arguments, None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, want)


UNIT = Fraction(1, 2**24)


@pytest.mark.parametrize("method", ["crown", "crown-ibp"])
@pytest.mark.parametrize("count", [32, 64, 1024])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_bounds_charge_the_whole_chain(kind, count, method):
    """Coefficients that lose what they can: 1, then numbers just too small to be added to it, in blocks of 32.

    f = sum_k c_k x over [-1, 1] has the maximum sum c_k; the sum in float32 lacks one unit for every number lost.
    """
    coefficients = torch.zeros(1, count)
    coefficients[:, :32] = coefficients[:, ::32] = 2.0**-24 * (1 - 2.0**-10)
    coefficients[0, 0] = 1
    exact = sum(Fraction(value) for value in coefficients[0].tolist())
    shape = (1, 1, 1, 1) if kind == "convolution" else (1, 1)
    first = nn.Conv2d(1, count, 1, bias=False) if kind == "convolution" else nn.Linear(1, count, bias=False)
    net = nn.Sequential(first, nn.Flatten(), nn.Linear(count, 1, bias=False)).requires_grad_(False)
    nn.init.ones_(net[0].weight)
    net[2].weight.copy_(coefficients)
    bm, box = pycert.BoundedModule(net, torch.zeros(shape)), pycert.Box(-torch.ones(shape), torch.ones(shape))
    for soundness in ("real", "deployed"):
        bounds = bm.bound(box, method, soundness=soundness, intersect=False)
        assert Fraction(bounds.upper.item()) >= exact and Fraction(bounds.lower.item()) <= -exact
    plain = bm.bound(box, method, soundness="none", intersect=False).upper.item()
    assert exact - Fraction(plain) > 30 * UNIT, "the example must lose nearly a whole block"


def test_nan_and_infinity_are_not_taken_for_zero():
    x, weight, arguments, _ = case(SHAPES[0], torch.float32)
    x[2, 0, 3, 3], x[4, 1, 2, 2] = math.nan, math.inf
    found = convolution(x, weight, *arguments, None)
    assert found[2].isnan().any() and not found[4].isfinite().all()
    assert found[[0, 1, 3]].isfinite().all()


def test_empty_batches_and_wrong_shapes():
    x, weight, arguments, _ = case(SHAPES[0], torch.float32)
    assert convolution(x[:0], weight, *arguments, None).shape[0] == 0
    with pytest.raises(ValueError, match="channels of the weight"):
        convolution(x[:, :2], weight, *arguments, None)
    with pytest.raises(TypeError, match="same dtype"):
        convolution(x, weight.double(), *arguments, None)
