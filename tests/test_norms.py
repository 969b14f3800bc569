"""Norms of masked operators: never below the exact one, tight, and the power iteration's value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from operators import Case, random_case
from pycert import _C, _flags
from pycert.norms import bounds, dense
from pycert.norms.band import Band
from pycert.norms.dense import gram_bound
from pycert.norms.frequency import frequency_bound
from pycert.norms.operator import operator_of
from pycert.ops import masked_norm, power_norm

#: The SVD that judges has errors of its own.
JUDGE = 1e-12


def check(case: Case, seed: int, **options) -> None:
    value = masked_norm(case.weight, case.rows, case.columns, conv=case.conv, **options).double()
    exact = case.norms()
    assert value.shape == exact.shape
    assert (value >= exact * (1 - JUDGE)).all(), f"seed {seed}, {case}: {value} below {exact}"
    assert (value[exact == 0] < 1e-250).all(), f"seed {seed}, {case}"
    assert not value.isnan().any()


@pytest.mark.parametrize("block", range(8))
def test_gram_is_never_below_the_exact_norm(block):
    for seed in range(30 * block, 30 * block + 30):
        check(random_case(seed), seed)


@pytest.mark.parametrize("block", range(4))
def test_other_ways_to_the_bound_are_not_below_it_either(block, monkeypatch):
    """Small operators are written out; here they are not, so that frequencies and bands are tried on them."""
    monkeypatch.setattr(bounds, "_EXPLICIT", 0)
    for seed in range(1000 + 25 * block, 1025 + 25 * block):
        check(random_case(seed), seed, effort="high" if seed % 2 else "normal")


@pytest.mark.parametrize("part", ["frequency", "band", "schur", "gram"])
def test_each_bound_alone_is_not_below_the_exact_norm(part, monkeypatch):
    """The minimum hides a wrong bound behind a tighter one: every one by itself."""
    for seed in range(2000, 2050):
        case = random_case(seed, masks=False)
        if part == "gram":
            matrix = case.matrices()
            if matrix.numel() > 50_000:
                continue
            matrix = matrix / matrix.abs().amax().clamp(min=1e-300)
            square = matrix @ matrix.mT
            found = gram_bound(square).sqrt()
            exact = torch.linalg.matrix_norm(matrix, 2)
        elif case.conv is None:
            continue
        else:
            masks = bounds.prepare(operator_of(case.weight, case.conv), None, None)
            operator, _ = masks.operator.plain()
            exact = torch.linalg.matrix_norm(operator.explicit(), 2)[None]
            if part == "frequency":
                found = torch.stack([frequency_bound(operator), frequency_bound(operator, 1)])
            elif part == "band" and operator.geometry.groups == 1:
                ones = [
                    torch.ones(*s, dtype=torch.float64) for s in (operator.output_shape, operator.input_shape)
                ]
                found = torch.stack([Band(operator, inputs).bound(*ones) for inputs in (False, True)])
                assert (found <= exact * 1.01 + 1e-250).all(), f"seed {seed}, {case}"
            else:
                sums = [bounds.largest_sum(operator, None, None, 1, p) for p in (1, math.inf)]
                found = (sums[0] * sums[1]).sqrt()
        assert (found * (1 + 1e-15) >= exact * (1 - JUDGE)).all(), f"seed {seed}, {case}"


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_thousands_of_operators(block, monkeypatch):
    for seed in range(10_000 + 200 * block, 10_200 + 200 * block):
        monkeypatch.setattr(bounds, "_EXPLICIT", 0 if seed % 2 else 2**21)
        check(random_case(seed), seed, effort="high" if seed % 3 == 0 else "normal")


@pytest.mark.parametrize("p", [1, math.inf])
@pytest.mark.parametrize("seed", range(40))
def test_sums_are_exact_up_to_one_rounding(seed, p):
    case = random_case(seed)
    value = masked_norm(case.weight, case.rows, case.columns, p=p, conv=case.conv)
    exact = case.matrices().abs().sum(1 if p == 1 else 2).amax(1)
    assert (value.double() >= exact * (1 - JUDGE)).all()
    slack = 3e-7 if case.weight.dtype == torch.float32 else 1e-11
    assert (value.double() <= exact * (1 + slack) + 1e-250).all()


TIGHT = [
    (nn.Conv2d(1, 32, 3, padding=1), (1, 28, 28)),
    (nn.Conv2d(32, 32, 4, stride=2, padding=1), (32, 14, 14)),
    (nn.Conv2d(16, 16, 3, padding=1), (16, 16, 16)),
    (nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1), (8, 7, 7)),
    (nn.Conv2d(16, 16, 3, padding=1, groups=4), (16, 14, 14)),
]


def conv_of(layer: nn.Module, shape: tuple[int, ...]) -> dict:
    names = ["stride", "padding", "dilation", "groups"]
    conv = {name: getattr(layer, name) for name in names} | {"input_shape": shape}
    if isinstance(layer, nn.ConvTranspose2d):
        conv |= {"transposed": True, "output_padding": layer.output_padding}
    return conv


def converged(weight, rows=None, columns=None, conv=None):
    return power_norm(weight.double(), rows, columns, steps=1500, conv=conv).value


@pytest.mark.parametrize("number", range(len(TIGHT)))
def test_global_bounds_of_convolutions_are_within_two_percent(number):
    layer, shape = TIGHT[number]
    conv = conv_of(layer, shape)
    value = masked_norm(layer.weight.detach(), conv=conv).double()
    exact = converged(layer.weight.detach(), conv=conv)
    assert (value <= 1.02 * exact).all(), f"{value} {exact}"
    assert (value >= exact * (1 - 1e-9)).all()


def test_dead_channels_are_dropped():
    layer, shape = nn.Conv2d(32, 48, 3, padding=1), (32, 24, 24)
    conv = conv_of(layer, shape)
    rows, columns = torch.ones(2, 48, 24, 24), torch.ones(2, 32, 24, 24)
    rows[0, ::3] = 0
    columns[0, 1::3] = 0
    rows[1, :24] = 0
    value = masked_norm(layer.weight.detach(), rows, columns, conv=conv).double()
    exact = power_norm(layer.weight.detach(), rows, columns, steps=400, conv=conv).value.double()
    everywhere = masked_norm(layer.weight.detach(), conv=conv).double()
    assert (value <= 1.1 * exact).all() and (value <= everywhere).all()


@pytest.mark.parametrize("number", [0, 1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_third_of_the_channels_dead_at_random(number):
    layer, shape = [
        (nn.Conv2d(24, 32, 3, padding=1), (24, 14, 14)),
        (nn.Conv2d(24, 32, 4, 2, 1), (24, 16, 16)),
        (nn.Conv2d(24, 24, 5, padding=2), (24, 12, 12)),
        (nn.ConvTranspose2d(24, 16, 4, 2, 1), (24, 9, 9)),
    ][number]
    conv = conv_of(layer, shape)
    out = layer(torch.zeros(1, *shape)).shape[1:]
    torch.manual_seed(number)
    rows, columns = (
        (torch.rand(2, n[0]).argsort(1) >= -(-n[0] // 3))[:, :, None, None].expand(2, *n)
        for n in (out, shape)
    )
    weight = layer.weight.detach()
    exact = power_norm(weight.double(), rows, columns, steps=400, conv=conv).value
    value = masked_norm(weight, rows, columns, conv=conv).double()
    assert (value <= 1.1 * exact).all() and (value >= exact).all()
    assert (value <= masked_norm(weight, conv=conv).double()).all()


def downdated(weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor | None:
    return dense.Downdated(weight, weight @ weight.t()).bound(rows, columns)


@pytest.mark.parametrize("seed", range(20))
def test_downdating_is_sound_and_tight(seed):
    torch.manual_seed(seed)
    m = int(torch.randint(1, 40, ()))
    n = m + int(torch.randint(0, 60, ()))
    weight = torch.randn(m, n).double() * 10.0 ** torch.randint(-3, 1, (n,))
    rows = torch.rand(m).double() * (torch.rand(m) < 0.8)
    columns = 0.5 * (torch.rand(n) < 0.75).double()
    found = downdated(weight, rows, columns)
    exact = torch.linalg.matrix_norm(weight * rows[:, None] * columns, 2)
    assert found is not None and exact * (1 - JUDGE) <= found <= exact * 1.002 + 1e-100


def test_downdating_leaves_what_it_would_lose_to_others():
    torch.manual_seed(0)
    weight = torch.randn(4, 12).double()
    weight[:, 0] *= 1e9
    columns = torch.ones(12).double()
    columns[0] = 0
    assert downdated(weight, torch.ones(4).double(), columns) is None
    exact = torch.linalg.matrix_norm(weight[:, 1:], 2)
    value = masked_norm(weight, None, columns[None]).item()
    assert exact <= value <= exact * 1.002
    assert downdated(weight, torch.ones(4).double(), (torch.arange(12) < 5).double()) is None  # cheaper anew
    assert downdated(weight, torch.ones(4).double(), torch.rand(12).double()) is None


def test_the_charge_of_downdating_is_needed(monkeypatch):
    """Dead columns far larger than the rest: what subtracting them loses is more than the excess."""
    torch.manual_seed(0)
    monkeypatch.setattr(dense, "EXCESSES", (1e-15, 1e-12))
    below = 0
    for charged in (True, False):
        if not charged:
            monkeypatch.setattr(dense, "product_error", lambda length, is_complex: 0.0)
            monkeypatch.setattr(dense, "gamma", lambda terms: 0.0)
        for _ in range(20):
            weight = torch.randn(3, 40).double()
            weight[:, :4] *= 2e3
            columns = torch.ones(40).double()
            columns[:4] = 0
            found = downdated(weight, torch.ones(3).double(), columns)
            if found is None:
                continue
            exact = torch.linalg.matrix_norm(weight[:, 4:], 2)
            assert not charged or found >= exact * (1 - JUDGE)
            below += not charged and bool(found < exact * (1 - JUDGE))
    assert below > 0


def test_high_effort_is_tight_where_masks_are_scattered():
    layer, shape = nn.Conv2d(16, 16, 3, padding=1), (16, 20, 20)
    conv = conv_of(layer, shape)
    torch.manual_seed(0)
    rows, columns = torch.rand(1, 16, 20, 20) < 0.3, torch.rand(1, 16, 20, 20) < 0.3
    exact = converged(layer.weight.detach(), rows, columns, conv)
    value = masked_norm(layer.weight.detach(), rows, columns, conv=conv, effort="high").double()
    assert (value <= 1.002 * exact).all()
    assert (masked_norm(layer.weight.detach(), rows, columns, conv=conv).double() >= value * (1 - 1e-6)).all()


def test_masked_linear_is_within_five_percent():
    torch.manual_seed(0)
    weight = torch.randn(120, 300) / 10
    rows, columns = torch.rand(6, 120) < 0.6, torch.rand(6, 300) < 0.5
    value = masked_norm(weight, rows, columns).double()
    exact = torch.linalg.matrix_norm(weight.double() * rows[:, :, None] * columns[:, None, :], 2)
    assert (value <= 1.002 * exact).all()


def test_masks_that_grow_never_lower_the_norm_by_more_than_the_slack():
    torch.manual_seed(1)
    weight = torch.randn(30, 40)
    small = torch.rand(8, 40) < 0.3
    large = small | (torch.rand(8, 40) < 0.3)
    assert (masked_norm(weight, None, small) <= masked_norm(weight, None, large) * 1.002).all()


def test_empty_masks_give_exactly_zero():
    weight = torch.randn(3, 4)
    rows = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 1, 0]])
    columns = torch.ones(3, 4)
    columns[2] = 0
    for method in ("gram", "power"):
        value = masked_norm(weight, rows, columns, method=method)
        assert value[0] > 0 and value[1] == 0 and value[2] == 0
    value = masked_norm(
        torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([[True, False]]), torch.tensor([[True, False]])
    )
    assert value.item() == 0  # live row and live column meet in a zero


@pytest.mark.parametrize("method", ["gram", "power"])
def test_nan_never_becomes_a_number(method):
    weight = torch.randn(3, 4)
    weight[1, 2] = torch.nan
    assert masked_norm(weight, method=method).isnan().all()
    masks = torch.ones(2, 4)
    masks[1, 0] = torch.nan
    value = masked_norm(torch.randn(3, 4), None, masks, method=method)
    assert value[0] > 0 and value[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1e-7, 1.0, 1e9, 1e15])
def test_scales(scale, dtype):
    torch.manual_seed(3)
    weight = torch.randn(12, 9, dtype=dtype)
    one = masked_norm(weight).double()
    big = masked_norm(weight * scale).double()
    assert torch.allclose(big / scale, one, rtol=1e-5)
    estimate = masked_norm(weight * scale, method="power").double()
    assert torch.allclose(estimate, big, rtol=4e-3)


def test_subnormal_weights_are_not_taken_for_zeros():
    weight = torch.full((3, 3), 1e-40)
    exact = float(weight[0, 0].double()) * 3
    assert masked_norm(weight).item() >= exact
    torch.set_flush_denormal(True)
    try:
        assert masked_norm(weight).item() > 0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("seed", range(30))
def test_power_iteration_converges_to_the_norm(seed):
    case = random_case(seed)
    value = power_norm(case.weight, case.rows, case.columns, steps=4000, conv=case.conv).value.double()
    exact = case.norms()
    if not (1e-30 < exact.max() < 1e30) or exact.min() < exact.max() * 1e-3:
        pytest.skip("operators of very different sizes in one batch")
    assert torch.allclose(value, exact, rtol=1e-4, atol=0)


def test_gradient_is_that_of_the_singular_vectors():
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.rand(2, 3, 3, 3, dtype=torch.float64)
    columns = torch.rand(2, 2, 6, 6) < 0.6
    conv = dict(input_shape=(2, 6, 6), stride=2, padding=1)
    start = torch.randn(2, 2, 6, 6, dtype=torch.float64)

    def norm(w):
        torch.manual_seed(1)
        return power_norm(w, rows, columns, start, steps=400, conv=conv).value

    assert torch.autograd.gradcheck(norm, (weight,), eps=1e-6, atol=1e-5)
    matrix = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(2, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: masked_norm(w, None, masks, method="power", steps=400), (matrix,), atol=1e-5
    )
    for p in (1, math.inf):
        assert torch.autograd.gradcheck(lambda w: masked_norm(w, None, masks, p=p), (matrix,), atol=1e-5)  # noqa: B023


def test_gradient_with_gram_is_that_of_the_norm():
    torch.manual_seed(0)
    weight = torch.randn(5, 7, requires_grad=True)
    value = masked_norm(weight)
    value.sum().backward()
    left, _, right = torch.linalg.svd(weight.detach())
    assert torch.allclose(weight.grad.abs(), torch.outer(left[:, 0], right[0]).abs(), atol=1e-3)
    assert value >= torch.linalg.matrix_norm(weight.detach().double(), 2)


def saved_bytes(function) -> int:
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = function()
    del keep
    return sum(found.values())


def test_memory_does_not_depend_on_the_steps():
    weight = torch.randn(8, 8, 3, 3, requires_grad=True)
    columns = torch.rand(4, 8, 16, 16) < 0.5
    conv = dict(input_shape=(8, 16, 16), padding=1)
    few, many = (saved_bytes(lambda: power_norm(weight, None, columns, steps=s, conv=conv)) for s in (1, 20))  # noqa: B023
    assert few == many <= 3 * 4 * 4 * 8 * 256 + 4 * weight.numel() + 1000


def test_a_start_of_zeros_recovers():
    weight = torch.randn(10, 10)
    value = power_norm(weight, start=torch.zeros(1, 10), steps=200).value
    assert torch.allclose(value, torch.linalg.matrix_norm(weight, 2), rtol=1e-3)


def test_a_block_cut_off_from_the_start_is_seen():
    weight = torch.block_diag(torch.ones(1, 1), torch.full((1, 1), 2.0))
    start = torch.tensor([[1.0, 0.0]])
    for _ in range(3):
        value, start = power_norm(weight, start=start, steps=2)
    assert value > 1.5


def test_values_are_the_plain_formula_for_the_given_steps():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    rows, columns = torch.rand(2, 4, 5, 5) < 0.7, torch.rand(2, 3, 5, 5) < 0.7
    _, u = power_norm(weight, rows, columns, steps=3, conv=dict(input_shape=(3, 5, 5), padding=1))
    value = power_norm(weight, rows, columns, steps=3, conv=dict(input_shape=(3, 5, 5), padding=1)).value
    assert (u[~columns] == 0).all()
    image = F.conv2d(u, weight, padding=1) * rows
    quotient = image.flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)
    assert torch.allclose(quotient, value, rtol=0.1)


def test_bool_and_real_masks_agree():
    torch.manual_seed(0)
    weight, start = torch.randn(9, 13), torch.randn(4, 13)
    rows, columns = torch.rand(4, 9) < 0.5, torch.rand(4, 13) < 0.5
    values = []
    for dtype in (torch.bool, torch.float32):
        torch.manual_seed(5)
        values.append(power_norm(weight, rows.to(dtype), columns.to(dtype), start, steps=4).value)
    assert torch.allclose(*values, rtol=1e-5)


def test_cached_norms_follow_the_weight():
    weight = nn.Parameter(torch.randn(20, 20))
    first = masked_norm(weight.detach(), None, torch.ones(1, 20)).item()
    weight.data.mul_(3)
    assert masked_norm(weight.detach()).item() == pytest.approx(3 * first, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(p=3), "p must be 1, 2 or inf, got 3"),
        (dict(method="lanczos"), "method must be one of 'gram', 'power', got 'lanczos'"),
        (dict(effort="max"), "effort must be one of 'normal', 'high', got 'max'"),
        (dict(method="power", p=1), "p = 1 is exact with method 'gram'"),
        (dict(row_mask=torch.ones(2, 5)), r"row_mask must have shape \[B, 3\], got \[2, 5\]"),
        (dict(row_mask=torch.ones(2, 3), col_mask=torch.ones(3, 4)), "the same batch"),
        (dict(conv=dict(stride=1)), "conv needs input_shape"),
        (dict(conv=dict(input_shape=(3, 4), strides=1)), "conv has no 'strides'"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        masked_norm(torch.randn(3, 4), **arguments)


def test_half_precision_is_refused():
    with pytest.raises(TypeError, match="float16"):
        masked_norm(torch.randn(3, 4).half())


def test_dispatcher_checks():
    weight, start = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    arguments = (
        weight,
        None,
        torch.ones(2, 4) > 0,
        start,
        3,
        7,
        False,
        [2, 4],
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
    )
    torch.library.opcheck(
        torch.ops.pycert.masked_power, arguments, test_utils=("test_schema", "test_faketensor")
    )


def long_row() -> tuple[torch.Tensor, float]:
    """A row whose computed sum (in any usual order) lacks the small terms, and that sum, exactly."""
    large, count = 64, 2**20
    row = torch.full((1, count), 0.9 * 2.0**-54, dtype=torch.float64)
    row[0, :large] = 1
    return row, large + (count - large) * 0.9 * 2.0**-54


@pytest.fixture
def without_charges():
    _C.testing_disable("norm")
    yield
    _C.testing_enable_all()


def test_long_sums_are_charged():
    row, exact = long_row()
    assert masked_norm(row, p=math.inf).item() >= exact


def test_without_the_charges_long_sums_fall_below(without_charges):
    row, exact = long_row()
    assert masked_norm(row, p=math.inf).item() < exact


@pytest.mark.parametrize("charged", [True, False])
def test_the_charge_of_the_gram_product_is_needed(charged, monkeypatch):
    """The factorisation's excess of a thousandth hides it; here that is taken away."""
    monkeypatch.setattr(dense, "EXCESSES", (1e-13,))
    row, exact = long_row()
    row = row.sqrt()  # so that the sum of squares is the sum above, but for the rounding of the roots
    if not charged:
        _C.testing_disable("norm")
    try:
        value = dense.norm_bound(row[None]).item() ** 2
    finally:
        _C.testing_enable_all()
    assert (value >= exact) == charged


def test_a_weight_without_elements_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        masked_norm(torch.zeros(0, 4))


def test_norms_on_a_gpu_keep_to_products_that_the_error_bounds_cover(monkeypatch):
    """Needs no GPU: what a device does with convolutions is decided by torch's flags and cuBLAS' variables."""
    seen = []
    with _flags.plain_convolutions(torch.device("cuda")):
        seen.append(torch.backends.cudnn.enabled)
    with _flags.plain_convolutions(torch.device("cpu")):
        seen.append(torch.backends.cudnn.enabled)
    assert seen == [False, torch.backends.cudnn.enabled]
    monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
    _flags.refuse_emulation(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="CUBLAS_EMULATE_DOUBLE_PRECISION"):
        _flags.refuse_emulation(torch.device("cuda"))
    monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "0")
    _flags.refuse_emulation(torch.device("cuda"))


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_what_is_left_of_a_weight_may_be_tiny(p, flush):
    """Beside the largest weight or mask it may underflow, and squares of it do long before."""
    double, single = torch.float64, torch.float32
    cases = [
        (torch.tensor([[1.0], [1e-170]], dtype=double), torch.tensor([[0.0, 1.0]], dtype=double), None, 1e-170),
        (torch.tensor([[1.0], [1.3e-161]], dtype=double), torch.tensor([[0.0, 1.0]], dtype=double), None, 1.3e-161),
        (torch.tensor([[1e300, 1e-100]], dtype=double), None, torch.tensor([[0.0, 1.0]], dtype=double), 1e-100),
        (torch.tensor([[0.0], [1.0]]), torch.tensor([[1e170, 1.0]], dtype=double), None, 1.0),
        (torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0**1000, 2.0**-74]], dtype=double), None, 2.0**-74),
        (torch.tensor([[1e38, 0.0], [0.0, 2e-44]], dtype=single), torch.tensor([[0.0, 1.0]]), None, 1e-44),
    ]  # fmt: skip
    torch.set_flush_denormal(flush)
    try:
        for weight, rows, columns, norm in cases:
            found = masked_norm(weight, rows, columns, p=p).item()
            assert found >= norm  # and no NaN; in float32 it may be infinite
        dead = masked_norm(torch.tensor([[1.0, 0.0]]), None, torch.tensor([[0.0, 1.0]]), p=p)
        assert dead.item() == 0
    finally:
        torch.set_flush_denormal(False)


def test_norms_kept_for_a_weight_see_changes_of_subnormal_ones():
    weight = torch.full((4, 4), 1e-44)
    other = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 1e-40
    rows = torch.full((1, 4), 1e38)
    exact = torch.linalg.matrix_norm(other.double() * 1e38, 2).item()
    torch.set_flush_denormal(True)
    try:
        masked_norm(weight, rows)
        weight.view(torch.int32).copy_(other.view(torch.int32))
        assert masked_norm(weight, rows).item() >= exact * (1 - 1e-6)
    finally:
        torch.set_flush_denormal(False)
