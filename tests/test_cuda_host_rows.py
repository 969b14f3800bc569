"""The CUDA kernels on the host: rows through an activation and its linear layer in one pass, and rows that kernels leave
out because nobody waited to hear how many there are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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


#: Stride, padding, dilation, groups and channels of the layer's input; many channels take the wide tile.
GEOMETRIES = {
    "narrow": ([1, 1], [1, 1], [1, 1], 1, 4),
    "wide, strided": ([2, 1], [1, 0], [1, 1], 1, 35),
    "grouped, dilated": ([1, 2], [0, 1], [2, 1], 3, 6),
}


@pytest.mark.parametrize("source", [False, True], ids=["own", "source"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_one_pass_through_a_convolution_gives_what_two_give(name, window, dtype, source):
    """Rows over three channels of 5x6, with one left out, through an activation and the convolution before it."""
    stride, padding, dilation, groups, channels = GEOMETRIES[name]
    layout, kernel = WINDOWS[window], (3, 2)
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    after = [channels, *((EXTENT[i + 1] - 1) * stride[i] - 2 * padding[i] + reach[i] for i in (0, 1))]
    size = EXTENT if layout[0] else [3, *layout[1:3]]
    data = draw(4 if source else 7, *size, seed=8, dtype=dtype)
    pick = torch.arange(7) * 3 % 4 if source else None
    sample, marked = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, -1, 1, 1, 1, 1])
    position = None if layout[0] else torch.stack([torch.arange(7) % 4, torch.arange(7) % 3], 1)
    negative = 5 if source else 2**62
    line = (*lines(dtype), draw(90, seed=15, dtype=dtype), draw(2, 90, seed=16, dtype=dtype).abs(), None)
    weight = draw(3, channels // groups, *kernel, seed=17, dtype=dtype)
    to = WINDOWS["dense"]
    if not layout[0]:
        moved = [(layout[i] - 1) * stride[i - 1] + reach[i - 1] for i in (1, 2)]
        to = [0, *moved, layout[3] * stride[0], layout[4] * stride[0] - padding[0], layout[5] * stride[1], layout[6] * stride[1] - padding[1]]  # fmt: skip
    relaxed, sums = OPS.relax_rows(data, pick, negative, sample, position, layout, EXTENT, *line)
    images = relaxed.view(7, *size).double()
    around = padding if layout[0] else 0
    plain = F.conv_transpose2d(
        images, weight.double(), stride=stride, padding=around, dilation=dilation, groups=groups
    )
    before = (data, pick, negative, marked, position, layout, EXTENT, *line, weight)
    kept = (None, 2**62, sample, position, to)
    here = OPS.relayout_rows(plain.to(dtype), *kept, to, after)  # without what lies outside the image
    lower, upper = boxes(2, math.prod(after), dtype=dtype)
    eps = torch.tensor([0.5, 0.0], dtype=dtype)
    wanted = marked >= 0
    terms = weight.numel() // channels * groups
    for end in (None, (lower, upper, 0), (lower, eps, 1), (lower, eps, 2)):
        with host_kernels.replaced():
            found, found_sums = OPS.relax_convolution(*before, stride, padding, dilation, groups, to, after, *(end or (None, None, 0)))  # fmt: skip
        compare((sums[:, wanted],), (found_sums[:, wanted],), 1e-12, 90.0)
        assert (found_sums[:, ~wanted] == 0).all()
        if end is None:
            mine = OPS.relayout_rows(found, *kept, to, after)
            compare((here[wanted],), (mine[wanted],), rounding(dtype, terms), 10.0)
            continue
        expected = OPS.concretize_rows(here, *kept, after, *end)
        compare((expected[:, wanted],), (found[:, wanted],), 1e-10 if dtype == torch.float64 else 1e-3, 90.0)


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


def deep_net(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Six layers whose later neurons are often decided on the way."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 20, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(320, 12), nn.ReLU(), nn.Linear(12, 3)]  # fmt: skip
    return nn.Sequential(*layers), torch.rand(2, 2, 8, 8)


def test_convolutions_are_passed_at_once_and_can_be_chosen_against():
    net, x = deep_net()
    bm = pycert.BoundedModule(net, x[:1])

    def kernels() -> tuple[set[str], list[Tensor]]:
        with torch.no_grad(), host_kernels.replaced(), pycert.profile() as p:
            found = bm.bound(pycert.LpBall(x, eps=0.01), method="crown")
        return {entry.kernel for entry in p.entries if entry.phase == "back-substitution"}, list(found)

    fused, expected = kernels()
    assert "relax_convolution" in fused and not fused & {"relax", "concretize"}
    try:
        _C.set_choices("cpu", [("relax_convolution", False, (4, 54, 1000), 2.0, 1.0)])
        named, found = kernels()
        assert {"relax", "concretize"} <= named and "relax_convolution" not in named
        compare(expected, found, 1e-5)
    finally:
        _C.set_choices("cuda", [])


class LeftOut(TorchDispatchMode):
    """How many rows every pass over an activation leaves out, of how many, in order, and whether they stand last."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int, bool]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name in ("pycert::relax_rows", "pycert::relax_product", "pycert::relax_convolution"):
            left = args[3] < 0
            self.calls.append((int(left.sum()), len(left), not (left[:-1] & ~left[1:]).any()))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("soundness", ["deployed", "none"])
@pytest.mark.parametrize("eps", [0.003, pytest.param(0.02, marks=pytest.mark.slow)])
def test_rows_whose_sign_is_known_are_left_out_of_what_follows(eps, soundness):
    """More and more of a walk's rows; the bounds are as tight as those of whole walks, and hold."""
    net, x = deep_net()
    bm, region = pycert.BoundedModule(net, x[:1]), pycert.LpBall(x, eps=eps)
    with torch.no_grad():
        with host_kernels.replaced(), LeftOut() as whole:
            expected = tuple(bm.bound(region, method="crown", soundness=soundness))
        with host_kernels.captured(), LeftOut() as cut:
            found = tuple(bm.bound(region, method="crown", soundness=soundness))
            layers = bm.layer_bounds(region, method="crown", soundness=soundness)
    assert not any(left for left, *_ in whole.calls)
    pairs = [(a, b) for a, b in zip(cut.calls, cut.calls[1:]) if a[1] == b[1] and b[0] > a[0]]
    grown = [b[0] - a[0] for a, b in pairs]
    assert len(grown) >= 3 and sum(grown) > 20
    assert sum(after[2] for _, after in pairs) >= 3  # those of one walk; two calls may also be of two
    compare(expected, found, 1e-5 if soundness == "deployed" else 1e-6)
    points = x + (2 * torch.rand(300, *x.shape) - 1) * eps * 0.999
    outputs = net(points.flatten(0, 1)).view(300, *found[0].shape)
    assert (found[0] <= outputs).all() and (outputs <= found[1]).all()
    with torch.no_grad(), host_kernels.replaced():
        for path, bounds in bm.layer_bounds(region, method="crown", soundness=soundness).items():
            compare((bounds.lower, bounds.upper), (layers[path].lower, layers[path].upper), 1e-5)


class Reads(TorchDispatchMode):
    """The operations that bring a value to the host, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::equal",
            "aten::is_nonzero",
        ):
            self.found.append(op._schema.name)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "forward", "crown"])
@pytest.mark.parametrize("name", NETS)
def test_a_training_step_never_waits(name, method):
    """Bounds and their gradients, as while a graph is recorded: nothing asks for a value."""
    bm, x = bounded(name, torch.float32)
    lower, upper = x - 0.05, x + 0.05
    options = pycert.options.parse(method, {"memory": "1GiB"}, ())
    native = bm._native(method, options, True, x.device)
    with host_kernels.captured(), Reads() as reads:
        low, high, *_ = bm._program.bound(
            bm.graph.tensors(), [(lower, upper, None, None, 0, False)], native, None
        )
        (high - low).sum().backward()
    assert reads.found == []
    assert all(p.grad is not None and p.grad.isfinite().all() for p in bm.parameters())


def mixed_net() -> tuple[nn.Module, Tensor]:
    """Steps of ATen on rows: a factor, pooling, a product, a layer over the last dimension, a transposed convolution."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.gate, self.back = nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 2, 2, stride=2)
            self.rows, self.last = nn.Linear(4, 4), nn.Linear(32, 5)
            self.out = nn.Linear(5, 2)

        def forward(self, x):
            x = torch.relu(self.norm(self.first(x)))
            x = F.max_pool2d(x * torch.sigmoid(self.gate(x)), 2)
            x = torch.relu(self.rows(torch.relu(self.back(x))))
            return self.out(torch.relu(self.last(x.flatten(1))))

    net = Mixed().eval()
    with torch.no_grad():
        net.norm.running_var.fill_(2.0)
        net.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    return net, draw(2, 2, 4, 4)


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds NaN: what kernels leave out must reach nothing."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, True  # fmt: skip
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("p", [math.inf, *(pytest.param(p, marks=pytest.mark.slow) for p in (1, 2))])
@pytest.mark.parametrize("name", ["conv", "residual", "mixed"])
def test_gradients_without_waiting_are_those_with(name, p, poisoned):
    """Rows that are not wanted add nothing, and their coefficients, which nobody has computed, do no harm."""
    if name == "mixed":
        torch.manual_seed(0)
        net, x = mixed_net()
        bm = pycert.BoundedModule(net.double(), x[:1])
    else:
        bm, x = bounded(name, torch.float64)

    def gradients(within, **options):
        leaf, eps = x.clone().requires_grad_(), torch.full((len(x),), 0.05, dtype=x.dtype, requires_grad=True)
        with within(), LeftOut() as passes:
            bounds = bm.bound(pycert.LpBall(leaf, eps=eps, p=p), method="crown", **options)
            (bounds.upper - 2 * bounds.lower).sum().backward()
        found = [
            *(t.detach() for t in bounds),
            leaf.grad,
            eps.grad,
            *(q.grad.clone() for q in bm.parameters()),
        ]
        bm.zero_grad()
        return found, sum(left for left, *_ in passes.calls)

    for options in ({}, {"memory": "64KiB"}):  # in the second, rows are walked again for the gradient
        expected, none = gradients(host_kernels.replaced, **options)
        found, left = gradients(host_kernels.captured, **options)
        assert none == 0 and left > 0
        assert all(t.isfinite().all() for t in found)
        compare(expected, found, 1e-9)


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_that_are_left_out_have_no_gradient(window):
    """They are not read, add nothing to what rows share, and get zeros; the others' gradients are as before."""
    layout = WINDOWS[window]
    size = EXTENT if layout[0] else [EXTENT[0], *layout[1:3]]
    sample = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1, 1])
    marked = torch.tensor([-1, 0, -1, 1, -1, -1, 0, -1, 1])
    kept = marked >= 0
    position = None if layout[0] else torch.stack([torch.arange(9) % 4, torch.arange(9) % 5], 1)
    data, out = draw(9, *size, seed=8), draw(9, *size, seed=17)
    sums, grad = draw(3, 9, seed=18), draw(2, 9, seed=19)
    ls, li, us, ui = lines(torch.float64)
    lower, upper = boxes(2, 90, dtype=torch.float64)
    eps = torch.tensor([0.5, 0.25], dtype=torch.float64)

    def steps(of, rows):
        at = [None if position is None else position[rows], layout, EXTENT]
        gradients = []
        for wanted in ([1, 1, 1], [1, 0, 0]):
            gradients += OPS.relax_rows_backward(out[rows], sums[:, rows], data[rows], None, 2**62, of[rows], *at, ls, li, us, ui, draw(90, seed=15), None, wanted)  # fmt: skip
        for norm, second in ((0, upper), (1, eps), (2, eps)):
            gradients += OPS.concretize_rows_backward(grad[:, rows], data[rows], of[rows], *at, lower, second, norm, True)  # fmt: skip
        return gradients

    everything = torch.ones(9, dtype=torch.bool)
    with host_kernels.replaced():
        expected = steps(sample, kept)
        out[~kept] = sums[:, ~kept] = grad[:, ~kept] = data[~kept] = math.nan
        found = steps(marked, everything)
        source = torch.arange(9) % 3
        moved = OPS.relayout_rows_backward(out, 3, source, 5, marked, *([position] if position is not None else [None]), layout, layout, EXTENT)  # fmt: skip
    assert moved.isfinite().all()
    of_rows = [t is not None and t.dim() > 1 and t.shape[0] == 9 for t in found]
    assert sum(of_rows) == 5
    for right, mine, by_row in zip(expected, found, of_rows, strict=True):
        if by_row:
            assert (mine[~kept] == 0).all()
            mine = mine[kept]
        compare((right,), (mine,), 1e-13)


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
