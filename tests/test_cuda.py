"""On a GPU (`pytest -m cuda`): every operator and method against the processor, sampled soundness, streams, graphs,
determinism, running out of memory.

With PYCERT_TEST_ON_HOST=1 most of it runs on the processor, the kernels' bodies in place of its own: for the tests' sake.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import host_kernels
import pycert
from hulls import FAMILIES, ExactHull, box_of, limits
from pycert import _C, _cuda_check
from test_cuda_host import CONVOLUTIONS, EXTENT, NETS, WINDOWS, boxes, draw, lines, rounding, rows_of
from test_krelu import as_dtype

OPS = torch.ops.pycert
DTYPES = [torch.float32, torch.float64]
ON_HOST = os.environ.get("PYCERT_TEST_ON_HOST") == "1"
DEVICE = "cpu" if ON_HOST else "cuda"
WHY_NOT = (
    ""
    if ON_HOST or os.environ.get("PYCERT_CUDA") == "1"  # asked for: then without a GPU all fail
    else "pycert is built without CUDA"
    if not _C.has_cuda()
    else "torch sees no GPU"
    if not torch.cuda.is_available()
    else ""
)
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
needs_a_card = pytest.mark.skipif(ON_HOST, reason="streams, graphs and memory are the card's")


@pytest.fixture(autouse=True)
def _bodies_on_the_host():
    with host_kernels.replaced() if ON_HOST else contextlib.nullcontext():
        yield


def moved(value):
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    return value


def on_both(op, *arguments):
    """Results of an operator on the processor and, brought back, on the GPU."""
    _C.testing_replace_kernels(0, 0)
    expected = op(*arguments)
    with host_kernels.replaced() if ON_HOST else contextlib.nullcontext():
        found = op(*[moved(a) for a in arguments])
    if isinstance(expected, Tensor):
        expected, found = (expected,), (found,)
    return expected, tuple(None if t is None else t.cpu() for t in found)


def compare(expected, found, tolerance: float, scale: float = 1.0) -> None:
    for right, mine in zip(expected, found, strict=True):
        if right is None or right.numel() == 0:
            continue
        assert mine.shape == right.shape and mine.dtype == right.dtype
        if tolerance == 0:
            torch.testing.assert_close(mine, right, rtol=0, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, inputs, outputs", [(1, 1, 1), (1, 700, 333), (3, 33, 9), (5, 1000, 130), (167, 470, 300)]
)
def test_products(batch, inputs, outputs, dtype):
    weight, mid, radius = draw(outputs, inputs, dtype=dtype), draw(batch, inputs, seed=3, dtype=dtype), draw(batch, inputs, seed=4, dtype=dtype).abs()  # fmt: skip
    centre, spread = OPS.dual_product(weight.to(DEVICE), mid.to(DEVICE), radius.to(DEVICE))
    compare(
        (mid.double() @ weight.double().t(),),
        (centre.cpu().double(),),
        rounding(dtype, inputs),
        float(inputs),
    )
    exact = radius.double() @ weight.double().abs().t()
    compare((exact,), (spread.cpu().double(),), rounding(dtype, inputs), float(inputs))
    product = OPS.rows_product(mid.to(DEVICE), weight.t().contiguous().to(DEVICE), None, None, None)
    compare(
        (mid.double() @ weight.double().t(),),
        (product.cpu().double(),),
        rounding(dtype, inputs),
        float(inputs),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, dtype):
    geometry = dict(stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=False, output_padding=[0, 0], groups=1) | CONVOLUTIONS[name]  # fmt: skip
    groups = geometry["groups"]
    shape = (4, 6 // groups, 3, 2) if geometry["transposed"] else (6, 4 // groups, 3, 2)
    lower, upper = boxes(3, 4, 17, 19, dtype=dtype)
    weight, bias = draw(*shape, seed=3, dtype=dtype), draw(6, seed=4, dtype=dtype)
    for soundness, relu in itertools.product((0, 1, 2), (False, True)):
        expected, found = on_both(
            OPS.interval_conv2d, lower, upper, weight, bias, *geometry.values(), soundness, 0, relu
        )
        compare(expected, found, rounding(dtype, 24), 24.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_operators_agree_bit_for_bit(dtype):
    a, b = boxes(3, 4, 5, 6, dtype=dtype), boxes(3, 4, 5, 6, dtype=dtype)
    channel = [draw(4, seed=seed, dtype=dtype) for seed in (5, 6, 7)]
    for relu in (False, True):
        compare(*on_both(OPS.interval_scale, *a, *channel, 1e-5, True, relu), 0)
        compare(*on_both(OPS.interval_add, *a, *b, True, 1e-5, True, relu), 0)
    compare(*on_both(OPS.linf_ball, a[0], torch.tensor([0.0, 0.3, 1e-30], dtype=dtype), -0.5, 0.7), 0)
    for slope in range(4):
        compare(*on_both(OPS.relu_relaxation, *a, slope), 0)
        for kind, x, y in [(1, 0.1, 0.0), (6, 0.0, 0.0), (3, -0.5, 0.5)]:
            compare(*on_both(OPS.activation_lines, *a, kind, None, x, y, slope, True), 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", range(22))
def test_lines_of_every_activation_hold(kind, dtype):
    """Elementary functions differ in their last bits between devices; the lines of each hold by themselves."""
    lower, upper = boxes(4096, dtype=dtype)
    if kind in (18, 19, 20):  # log, sqrt, reciprocal
        lower, upper = lower.abs() + 0.01, lower.abs() + upper.abs() + 0.02
    parameter = torch.full((1,), 0.2, dtype=dtype) if kind == 2 else None
    a, b = (-0.5, 0.5) if kind == 3 else (1.0, 20.0)
    at_both = on_both(OPS.activation_lines, lower, upper, kind, parameter, a, b, 0, True)
    points = (lower + (upper - lower) * torch.linspace(0, 1, 33, dtype=dtype).unsqueeze(1)).clamp(
        lower, upper
    )
    with torch.no_grad():
        box = OPS.activation_interval(points.double(), points.double(), kind, None if parameter is None else parameter.double(), a, b, False)  # fmt: skip
    value = (box[0] + box[1]) / 2
    for ls, li, us, ui in at_both:
        slack = 1e-9 * (1 + value.abs())
        assert (ls.double() * points + li.double() <= value + slack).all()
        assert (value - slack <= us.double() * points + ui.double()).all()


@pytest.mark.parametrize("source", [False, True], ids=["own", "source"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_steps_on_rows(window, dtype, source):
    data, pick, negative, sample, position = rows_of(window, dtype, source)
    rows = (data, pick, negative, sample, position, WINDOWS[window], EXTENT)
    ls, li, us, ui = lines(dtype)
    bias, charge = draw(90, seed=15, dtype=dtype), draw(2, 90, seed=16, dtype=dtype).abs()
    expected, found = on_both(OPS.relax_rows, *rows, ls, li, us, ui, bias, charge, None)
    compare(expected[:1], found[:1], 0)
    compare(expected[1:], found[1:], 1e-13, 90.0)
    compare(*on_both(OPS.dot_rows, *rows, bias, charge), 1e-13, 90.0)
    lower, upper = boxes(2, 90, dtype=dtype)
    compare(*on_both(OPS.concretize_rows, *rows, lower, upper, 0), 1e-13, 90.0)
    for norm in (1, 2):
        compare(
            *on_both(OPS.concretize_rows, *rows, lower, torch.tensor([0.5, 0.0], dtype=dtype), norm),
            1e-13,
            90.0,
        )
    for target in WINDOWS.values():
        if position is not None or target[0]:
            compare(*on_both(OPS.relayout_rows, *rows[:6], target, EXTENT), 0)


def bounded(name: str, dtype: torch.dtype, device: str):
    torch.manual_seed(3)
    net, x = NETS[name]()
    net = net.to(dtype).to(device)
    return pycert.BoundedModule(net, x[:1].to(dtype)), x.to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "fastlin", "crown", "alpha-crown", "forward"])
@pytest.mark.parametrize("name", NETS)
def test_methods_match_and_hold(name, method, p, dtype):
    bm, x = bounded(name, dtype, "cpu")
    gm, _ = bounded(name, dtype, DEVICE)
    options = {"iterations": 3} if method == "alpha-crown" else {}
    with torch.no_grad():
        expected = tuple(bm.bound(pycert.LpBall(x, eps=0.05, p=p), method=method, **options))
        found = tuple(gm.bound(pycert.LpBall(x.to(DEVICE), eps=0.05, p=p), method=method, **options))
        compare(expected, tuple(t.cpu() for t in found), 5e-4 if dtype == torch.float32 else 1e-8)
        noise = 2 * torch.rand(500, *x.shape, dtype=dtype, device=DEVICE) - 1
        size = noise.flatten(2).norm(p=p, dim=2).clamp_min(1e-9).view(500, -1, *[1] * (x.dim() - 1))
        outputs = gm((x.to(DEVICE) + 0.0499 * noise / size).flatten(0, 1)).view(500, x.shape[0], -1)
    violations = int((found[0] > outputs).sum() + (outputs > found[1]).sum())
    assert violations == 0


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("name", NETS)
def test_gradients_match(name, method):
    found = []
    for device in ("cpu", DEVICE):
        bm, x = bounded(name, torch.float64, device)
        leaf = x.clone().requires_grad_()
        bounds = bm.bound(pycert.LpBall(leaf, eps=0.05), method=method)
        (bounds.upper - 2 * bounds.lower).sum().backward()
        found.append([leaf.grad.cpu(), *(p.grad.cpu() for p in bm.parameters())])
    compare(*found, 1e-9, 10.0)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_the_same_bits_twice(method):
    bm, x = bounded("conv", torch.float32, DEVICE)
    found = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        bounds = bm.bound(pycert.LpBall(leaf, eps=0.05), method=method)
        (bounds.upper - bounds.lower).sum().backward()
        found.append((bounds.lower.detach(), bounds.upper.detach(), leaf.grad))
    compare(*found, 0)


@needs_a_card
def test_work_goes_to_the_current_stream():
    bm, x = bounded("dense", torch.float32, DEVICE)
    region = pycert.LpBall(x, eps=0.05)
    expected = bm.bound(region, method="crown-ibp").lower
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs elsewhere would finish first and find stale values
        later = x + 1
        found = bm.bound(pycert.LpBall(later - 1, eps=0.05), method="crown-ibp").lower
    stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_a_card
@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_a_training_step_is_captured_in_a_graph(method):
    """Bounds and gradients of the weights, replayed on other values."""
    bm, x = bounded("conv", torch.float32, DEVICE)
    lower, upper = (x - 0.05).clone(), (x + 0.05).clone()
    native = bm._native(method, pycert.options.parse(method, {"memory": "1GiB"}, ()), True, x.device)
    weights = list(bm.parameters())

    def step():
        low, high, *_ = bm._program.bound(
            bm.graph.tensors(), [(lower, upper, None, None, 0, False)], native, None
        )
        return torch.autograd.grad((high - low).sum(), weights)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lower.add_(0.1)
    upper.add_(0.15)
    graph.replay()
    compare(step(), captured, 1e-5)


@needs_a_card
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "forward", "crown"])
def test_methods_without_waiting_are_captured_in_a_graph(method):
    bm, x = bounded("conv", torch.float32, DEVICE)
    lower, upper = (x - 0.05).clone(), (x + 0.05).clone()
    native = bm._native(method, pycert.options.parse(method, {"memory": "1GiB"}, ()), False, x.device)
    parameters = [t.detach() for t in bm.graph.tensors()]

    def call():
        return bm._program.bound(parameters, [(lower, upper, None, None, 0, False)], native, None)

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        lower.add_(0.1)
        upper.add_(0.1)
        graph.replay()
        expected = call()
    compare(expected[:2], captured[:2], 1e-6)


@needs_a_card
def test_running_out_of_memory_halves_the_chunks():
    """With half the memory that all rows at once take."""
    torch.manual_seed(0)
    wide = [layer for _ in range(2) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    net = nn.Sequential(nn.Linear(16, 2048), nn.ReLU(), *wide, nn.Linear(2048, 3)).to(DEVICE)
    bm, region = (
        pycert.BoundedModule(net, torch.empty(1, 16)),
        pycert.LpBall(torch.rand(4, 16).to(DEVICE), eps=0.1),
    )
    with torch.no_grad():
        bm.bound(region, method="crown")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        fixed = torch.cuda.memory_reserved()
        expected = bm.bound(region, method="crown", memory="64GiB").lower
        most = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_stats()["num_ooms"]
        total = torch.cuda.get_device_properties(0).total_memory
        try:
            torch.cuda.set_per_process_memory_fraction((fixed + (most - fixed) / 2) / total)
            found = bm.bound(region, method="crown", memory="64GiB").lower
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_stats()["num_ooms"] > before
    compare((expected,), (found,), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_power_iteration_and_ball_and_box(dtype):
    weight, rows = draw(4, 3, 3, 2, seed=1, dtype=dtype), draw(2, 4, 7, 8, seed=2, dtype=dtype) > 0
    columns, start = draw(2, 3, 9, 9, seed=3, dtype=dtype).abs(), draw(2, 3, 9, 9, seed=4, dtype=dtype)
    geometry = ([2, 3, 9, 9], [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    expected, found = on_both(OPS.masked_power, weight, rows, columns, start, 4, 5, True, *geometry)
    compare(expected[:1], found[:1], 1e-4 if dtype == torch.float32 else 1e-9)
    centres, spread = draw(6, 5, 2, 3, seed=5, dtype=dtype), draw(3, 5, 2, 3, seed=6, dtype=dtype).abs()
    reach, norm, theta = (draw(*s, seed=7, dtype=dtype).abs() for s in ((3,), (5,), (5, 2, 3)))
    compare(*on_both(OPS.ball_box_relu, centres, spread, reach, norm, theta), 0)
    lower, upper = -draw(3, 40, seed=8, dtype=dtype).abs(), draw(3, 40, seed=9, dtype=dtype).abs()
    expected, found = on_both(OPS.ball_box_maximum, draw(3, 4, 40, seed=10, dtype=dtype), lower, upper, reach)
    compare(expected[:1], found[:1], 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "count"), [(1, 24), (2, 60), (3, 60), (4, 12)])
def test_no_row_of_a_hull_is_violated(k, count, dtype):
    """In exact arithmetic, over all families of tests/hulls.py."""
    rng = np.random.default_rng(k)
    chosen = [as_dtype(limits(rng, FAMILIES[i % len(FAMILIES)], k), dtype) for i in range(count)]
    lower, upper = (torch.tensor(np.stack(t), dtype=dtype, device=DEVICE) for t in zip(*map(box_of, chosen), strict=True))  # fmt: skip
    A = -pycert.ops.octahedral_directions(k, dtype).to(DEVICE).expand(count, -1, -1)
    rows, number = pycert.ops.krelu_hull(
        lower, upper, A, torch.tensor(np.stack(chosen), dtype=dtype).to(DEVICE)
    )
    for limit, mine, n in zip(chosen, rows.cpu().double().numpy(), number.tolist(), strict=True):
        assert ExactHull(limit).violated(mine[:n]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("end", [None, 0, 1, 2], ids=["rows", "box", "ball of l1", "ball of l2"])
def test_one_pass_through_a_convolution(window, dtype, end):
    """As the activation and the transposed convolution one after another, on the processor."""
    data, pick, negative, sample, position = rows_of(window, dtype, False)
    weight, after = draw(3, 4, 3, 3, seed=18, dtype=dtype), [4, 5, 6]
    line = (*lines(dtype), draw(90, seed=15, dtype=dtype), draw(2, 90, seed=16, dtype=dtype).abs(), None)
    layout = WINDOWS[window]
    to = (
        layout
        if layout[0]
        else [0, layout[1] + 2, layout[2] + 2, layout[3], layout[4] - 1, layout[5], layout[6] - 1]
    )
    ends = (None, None, 0)
    if end is not None:
        lower, upper = boxes(2, 120, dtype=dtype)
        ends = (lower, upper if end == 0 else torch.tensor([0.5, 0.0], dtype=dtype), end)
    rows = (data, pick, negative, sample, position, layout, EXTENT, *line)
    relaxed, sums = OPS.relax_rows(*rows)
    images = relaxed.view(-1, EXTENT[0], *(EXTENT[1:] if layout[0] else layout[1:3])).double()
    through = nn.functional.conv_transpose2d(images, weight.double(), padding=1 if layout[0] else 0).to(dtype)
    arguments = (*rows, weight, [1, 1], [1, 1], [1, 1], 1, to, after, *ends)
    found, of_rows = (t.cpu() for t in OPS.relax_convolution(*[moved(a) for a in arguments]))
    tolerance, kept = 1e-4 if dtype == torch.float32 else 1e-11, (None, 2**62, sample, position, to)
    compare((sums,), (of_rows,), tolerance, 90.0)
    if end is None:  # what lies outside the image has no meaning
        compare(*[(OPS.relayout_rows(t, *kept, to, after),) for t in (through, found)], tolerance, 90.0)
    else:
        compare((OPS.concretize_rows(through, *kept, after, *ends),), (found,), tolerance, 90.0)


@needs_a_card
def test_the_check_before_the_first_use_passes():
    _cuda_check.run(torch.device("cuda"))


@needs_a_card
def test_tensors_on_two_devices_are_refused():
    bm, x = bounded("dense", torch.float32, DEVICE)
    with pytest.raises(ValueError, match="is on cuda.*the region on cpu"):
        bm.bound(pycert.LpBall(x.cpu(), eps=0.05), method="ibp")
    with pytest.raises(ValueError, match="same device"):
        pycert.ops.interval_linear(x, x, torch.ones(3, 8), None)


@needs_a_card
def test_profile_on_a_gpu():
    bm, x = bounded("conv", torch.float32, DEVICE)
    with pycert.profile("cuda") as p:
        bm.bound(pycert.LpBall(x, eps=0.05), method="crown")
    assert {"relax", "concretize"} <= {entry.kernel for entry in p.entries}
    assert "GB/s" in p.table()
