"""Every method against the plain PyTorch reference, its gradients, and the orders that theory grants."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import nets
import pycert
from pycert.graph import trace
from pycert.reference import bounds as reference

METHODS = ("ibp", "fastlin", "crown-ibp", "crown", "forward")
F64 = torch.float64
# Lines around curved activations may be chosen differently; they have tests of their own.
CURVES = (
    "mlp_elu mlp_silu mlp_gelu mlp_softplus mlp_hard mlp_shrink mlp_exp_log mlp_roots mlp_waves "
    "gated softmax standardized attention fused_attention".split()
)
CURVED = {
    name
    for name in nets.BUILDERS
    if name in CURVES or any(k in name for k in ("sigmoid", "tanh", "prelu_channels", "one_dim"))
}
PIECEWISE_LINEAR = [name for name in nets.BUILDERS if name not in CURVED]


def setup(name: str, seed: int = 0, batch: int = 3):
    net, shape = nets.make(name, seed, dtype=F64)
    example = torch.zeros(1, *shape, dtype=F64)
    x = nets.centre(name, seed, shape, batch, F64)
    return net, pycert.BoundedModule(net, example), trace(net, example), x


def regions(x: torch.Tensor):
    """Regions of moderate size of every kind, by name."""
    eps = torch.linspace(0.02, 0.3, len(x), dtype=x.dtype)
    inside = x.clamp(0, 1)
    return {
        "linf": pycert.LpBall(x, eps=0.1, p=math.inf),
        "linf clipped": pycert.LpBall(inside, eps=eps, p=math.inf, clip=(0, 1)),
        "l2": pycert.LpBall(x, eps=eps, p=2),
        "l2 clipped": pycert.LpBall(inside, eps=0.5, p=2, clip=(0, 1)),
        "l1": pycert.LpBall(x, eps=0.7, p=1),
        "box": pycert.Box(x - 0.1 * (x > 0), x + 0.2),
    }


def assert_same(found, expected, scale=None) -> None:
    for name, ours, theirs in zip(("lower", "upper"), (found.lower, found.upper), expected):
        size = theirs.abs().amax() if scale is None else scale
        torch.testing.assert_close(
            ours, theirs, rtol=1e-9, atol=1e-9 * float(size), msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("intersect", [False, True], ids=["plain", "intersect"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_bounds_equal_the_reference(name, method, intersect):
    _, bm, graph, x = setup(name)
    for kind, where in regions(x).items():
        with torch.no_grad():
            found = bm.bound(where, method=method, intersect=intersect, soundness="none")
            expected = reference.bound(graph, where, method, intersect=intersect)
        try:
            assert_same(found, expected)
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from None


@pytest.mark.parametrize("intersect", [False, True], ids=["plain", "intersect"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["mlp_relu", "conv_plain", "residual", "pools", "batch_norm_linear", "affine_only"]
)
def test_spec_rows_equal_the_reference(name, method, intersect):
    _, bm, graph, x = setup(name)
    outputs = graph.numel(graph.output)
    generator = torch.Generator().manual_seed(2)
    for shape in ((4, outputs), (len(x), 2, outputs)):
        spec = torch.randn(*shape, generator=generator).double()
        for where in regions(x).values():
            with torch.no_grad():
                found = bm.bound(where, method=method, spec=spec, soundness="none", intersect=intersect)
                expected = reference.bound(graph, where, method, spec=spec, intersect=intersect)
            assert_same(found, expected)


@pytest.mark.parametrize("slope", ["adaptive", "parallel", "zero", "one"])
@pytest.mark.parametrize("name", ["mlp_relu", "conv_plain", "max_min"])
def test_slope_rules_equal_the_reference(name, slope):
    _, bm, graph, x = setup(name)
    where = regions(x)["linf"]
    with torch.no_grad():
        found = bm.bound(where, method="crown", slope=slope, soundness="none", intersect=False)
        assert_same(found, reference.bound(graph, where, "crown", slope=slope))


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_one_side_alone_is_the_same(name):
    _, bm, _, x = setup(name)
    where = regions(x)["linf"]
    for method in METHODS:
        with torch.no_grad():
            both = bm.bound(where, method=method)
            lower = bm.bound(where, method=method, side="lower")
            upper = bm.bound(where, method=method, side="upper")
        assert lower.upper is None and upper.lower is None
        torch.testing.assert_close(lower.lower, both.lower, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(upper.upper, both.upper, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", ["mlp_relu", "conv_plain", "residual", "mlp_sigmoid", "max_min"])
def test_linear_bounds_concretise_to_the_bounds(name, method):
    _, bm, _, x = setup(name)
    for where in regions(x).values():
        with torch.no_grad():
            found = bm.bound(where, method=method, return_linear=True, soundness="none", intersect=False)
        ball = reference.Region(where, F64)
        parts = (getattr(found.linear, name) for name in reference.Linear._fields)
        expected = ball.concretize(reference.Linear(*parts))
        assert_same(found, [end.reshape(found.lower.shape) for end in expected])


# Gradients.

GRADIENT_NETS = ["mlp_relu", "mlp_leaky_relu", "mlp_prelu", "conv_plain", "conv_transposed", "residual",
                 "batch_norm_conv", "batch_norm_linear", "shared_layer", "concatenated", "constants", "max_min",
                 "normalized", "pools", "mlp_hardtanh", "mlp_abs", "conv_grouped_dilated", "products", "matrix_products",
                 "conv_three_dimensional"]  # fmt: skip


def gradients(objective: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    found = torch.autograd.grad(objective, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GRADIENT_NETS)
def test_gradients_equal_the_reference(name, method):
    net, bm, graph, x = setup(name)
    net.requires_grad_(True)
    for p, clip in ((math.inf, None), (2, None), (1, None), (math.inf, (-0.3, 0.8))):
        center = (x if clip is None else x.clamp(*clip)).clone().requires_grad_(clip is None)
        eps = torch.linspace(0.05, 0.2, len(x), dtype=F64).requires_grad_()
        where = pycert.LpBall(center, eps=eps, p=p, clip=clip)
        inputs = [*net.parameters(), eps] + ([center] if clip is None else [])
        intersect = p == 2
        found = bm.bound(where, method=method, soundness="none", intersect=intersect)
        lower, upper = reference.bound(graph, where, method, intersect=intersect)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(lower.shape, generator=generator, dtype=F64) for _ in range(2)]
        ours = gradients((weights[0] * found.lower + weights[1] * found.upper).sum(), inputs)
        theirs = gradients((weights[0] * lower + weights[1] * upper).sum(), inputs)
        for mine, other in zip(ours, theirs):
            size = float(other.abs().amax()) if other.numel() else 0.0
            torch.testing.assert_close(
                mine, other, rtol=1e-7, atol=1e-8 * (1 + size), msg=lambda m, p=p: f"p={p}: {m}"
            )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name",
    [
        "mlp_relu",
        "mlp_tanh",
        "mlp_sigmoid",
        "conv_plain",
        "residual",
        "max_min",
        "gated",
        "standardized",
        "fused_attention",
    ],
)
def test_gradcheck(name, method):
    """Numerical derivatives along random directions, away from kinks."""
    net, bm, _, x = setup(name, seed=1, batch=2)
    parameters = list(net.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(4)
    directions = [torch.randn(p.shape, generator=generator, dtype=F64) for p in parameters]
    move = torch.randn(x.shape, generator=generator, dtype=F64)

    def objective(t: torch.Tensor) -> torch.Tensor:
        for parameter, origin, direction in zip(parameters, start, directions):
            parameter.data.copy_(origin + t.detach() * direction)
        center = x + t * move
        where = pycert.LpBall(center, eps=0.1 + t * 0.05 + torch.zeros(len(x), dtype=F64), p=math.inf)
        found = bm.bound(where, method=method, soundness="none", intersect=False)
        return found.lower.sin().sum() + found.upper.cos().sum()

    t = torch.zeros((), dtype=F64, requires_grad=True)
    value = objective(t)
    along = torch.autograd.grad(value, [t, *parameters], allow_unused=True)
    analytic = along[0] + sum((g * d).sum() for g, d in zip(along[1:], directions) if g is not None)
    step = 1e-6
    with torch.no_grad():
        numeric = (objective(t + step) - objective(t - step)) / (2 * step)
        objective(t)
    torch.testing.assert_close(analytic.detach(), numeric, rtol=2e-5, atol=1e-6)


def test_batch_norm_in_training_uses_the_clean_batch():
    net, bm, graph, x = setup("batch_norm_conv", batch=6)
    net.train()
    running = [buffer.clone() for buffer in net.buffers()]
    where = pycert.LpBall(x, eps=0.05, p=math.inf)
    for method in METHODS:
        found = bm.bound(where, method=method, soundness="none", intersect=False)
        lower, upper = reference.bound(graph, where, method)
        assert_same(found, (lower, upper))
        inputs = list(net.parameters())
        ours = gradients((found.lower + 2 * found.upper).sum(), inputs)
        theirs = gradients((lower + 2 * upper).sum(), inputs)
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(running, net.buffers())), (
        "bounds must not move running statistics"
    )


def test_two_inputs_are_bounded_like_their_concatenation():
    torch.manual_seed(8)
    first, second = torch.nn.Linear(5, 6, dtype=F64), torch.nn.Linear(6, 3, dtype=F64)

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return second(first(torch.cat([a, b], 1)).relu())

    x = torch.rand(4, 5, dtype=F64)
    one = pycert.BoundedModule(torch.nn.Sequential(first, torch.nn.ReLU(), second), x)
    two = pycert.BoundedModule(Two(), (x[:, :2], x[:, 2:]))
    for constant in (False, True):
        width = torch.tensor([0.1, 0.1, *([0.0] * 3 if constant else [0.1] * 3)], dtype=F64)
        parts = (
            pycert.Box(x[:, :2] - width[:2], x[:, :2] + width[:2]),
            pycert.Box(x[:, 2:] - width[2:], x[:, 2:] + width[2:]),
        )
        for method in METHODS:
            with torch.no_grad():
                whole = one.bound(pycert.Box(x - width, x + width), method=method, soundness="none")
                assert_same(two.bound(parts, method=method, soundness="none"), (whole.lower, whole.upper))


def test_strided_inputs_give_the_same_bounds():
    _, bm, _, x = setup("conv_plain")
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    for method in METHODS:
        with torch.no_grad():
            dense = bm.bound(pycert.Box(x - 0.1, x + 0.1), method=method)
            found = bm.bound(
                pycert.Box(strided - 0.1, (strided + 0.1).transpose(2, 3).clone().transpose(2, 3)),
                method=method,
            )
        assert torch.equal(found.lower, dense.lower) and torch.equal(found.upper, dense.upper)


# Orders that theory grants.


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_a_smaller_box_never_loosens_interval_bounds(name):
    _, bm, _, x = setup(name)
    with torch.no_grad():
        large = bm.bound(pycert.Box(x - 0.3, x + 0.2), method="ibp", soundness="none")
        small = bm.bound(pycert.Box(x - 0.1, x + 0.2), method="ibp", soundness="none")
    slack = 1e-12 * (1 + large.upper.abs() + large.lower.abs())
    assert (small.lower >= large.lower - slack).all()
    assert (small.upper <= large.upper + slack).all()


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", list(nets.BUILDERS))
def test_intersected_bounds_are_never_looser_than_interval_bounds(name, method):
    _, bm, _, x = setup(name, seed=1)
    for where in regions(x).values():
        with torch.no_grad():
            interval = bm.bound(where, method="ibp", soundness="none")
            refined = bm.bound(where, method=method, intersect=True, soundness="none")
        slack = 1e-12 * (1 + interval.upper.abs() + interval.lower.abs())
        assert (refined.lower >= interval.lower - slack).all()
        assert (refined.upper <= interval.upper + slack).all()


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", ["mlp_relu", "conv_plain", "residual", "pools"])
def test_unit_rows_give_the_bounds_of_the_output(name, method):
    _, bm, graph, x = setup(name)
    where = regions(x)["linf"]
    eye = torch.eye(graph.numel(graph.output), dtype=F64)
    with torch.no_grad():
        plain = bm.bound(where, method=method, soundness="none", intersect=False)
        rows = bm.bound(where, method=method, spec=eye, soundness="none", intersect=False)
    assert_same(rows, (plain.lower.flatten(1), plain.upper.flatten(1)))


@pytest.mark.parametrize("method", METHODS)
def test_margins_equal_the_rows_of_class_differences(method):
    _, bm, _, x = setup("mlp_relu", batch=3)
    labels = torch.tensor([0, 2, 1])
    where = regions(x)["linf"]
    spec = torch.zeros(3, 2, 3, dtype=F64)
    for sample, label in enumerate(labels.tolist()):
        for row, other in enumerate(j for j in range(3) if j != label):
            spec[sample, row, label], spec[sample, row, other] = 1, -1
    with torch.no_grad():
        for soundness in ("none", "real", "deployed"):
            options = dict(method=method, soundness=soundness, intersect=False)
            margins = pycert.margins(bm, where, labels, **options)
            rows = bm.bound(where, spec=spec, **options)
            torch.testing.assert_close(margins, rows.lower, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_sound_bounds_enclose_the_plain_ones_and_barely(method):
    for name in ("mlp_relu", "conv_plain", "residual"):
        _, bm, _, x = setup(name)
        where = regions(x)["linf"]
        with torch.no_grad():
            none, real, deployed = (
                bm.bound(where, method=method, soundness=s, intersect=False)
                for s in ("none", "real", "deployed")
            )
        width = (none.upper - none.lower).sum()
        assert (real.upper - real.lower).sum() - width <= 1e-9 * width
        assert (deployed.upper - deployed.lower).sum() - width <= 1e-9 * width
        slack = 1e-13 * (1 + none.lower.abs() + none.upper.abs())
        assert (real.lower <= none.lower + slack).all() and (real.upper >= none.upper - slack).all()
        assert (deployed.lower <= real.lower + slack).all() and (deployed.upper >= real.upper - slack).all()


def test_a_shuffled_batch_gives_the_same_bounds():
    _, bm, _, x = setup("conv_plain", batch=9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        with torch.no_grad():
            straight = bm.bound(pycert.LpBall(x, eps=0.1, p=math.inf), method=method)
            shuffled = bm.bound(pycert.LpBall(x[order], eps=0.1, p=math.inf), method=method)
            alone = bm.bound(pycert.LpBall(x[4:5], eps=0.1, p=math.inf), method=method)
        torch.testing.assert_close(straight.lower[order], shuffled.lower, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(straight.lower[4:5], alone.lower, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("memory", ["1KiB", "64KiB", "1GiB"])
def test_chunks_do_not_change_the_bounds(memory):
    _, bm, _, x = setup("conv_plain", batch=5)
    where = pycert.LpBall(x, eps=0.1, p=math.inf)
    with torch.no_grad():
        whole = bm.bound(where, method="crown", soundness="none")
        parts = bm.bound(where, method="crown", soundness="none", memory=memory)
    torch.testing.assert_close(whole.lower, parts.lower, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole.upper, parts.upper, rtol=1e-10, atol=1e-12)


def test_dead_neurons_are_left_out_per_sample():
    """Wide layers, where every sample's rows are multiplied with the columns of its own live neurons alone."""
    torch.manual_seed(3)
    sizes = [nn.Linear(12, 200), nn.ReLU(), nn.Linear(200, 180), nn.ReLU(), nn.Linear(180, 3)]
    net, x = nn.Sequential(*sizes).double(), torch.randn(5, 12, dtype=F64)
    bm, graph, plain = pycert.BoundedModule(net, x), trace(net, x), {"method": "crown", "soundness": "none"}
    with torch.no_grad():
        hidden, second = bm.layer_bounds(pycert.LpBall(x, eps=0.15), **plain).values()
        assert (hidden.upper < 0).double().mean() > 0.15
        assert ((second.lower < 0) & (second.upper > 0)).sum(1).min() > 50  # rows enough to pay
        whole = bm.bound(pycert.LpBall(x, eps=0.15), **plain)
        assert_same(whole, reference.bound(graph, pycert.LpBall(x, eps=0.15), "crown"))
        for memory in ("1GiB", "1MiB", "300KiB"):
            for order in ([0, 1, 2, 3, 4], [4, 2], [3], [1, 0, 3]):
                some = bm.bound(pycert.LpBall(x[order], eps=0.15), memory=memory, **plain)
                assert_same(some, (whole.lower[order], whole.upper[order]))


def test_a_batch_of_one():
    _, bm, _, x = setup("mlp_relu")
    for method in METHODS:
        with torch.no_grad():
            one = bm.bound(pycert.LpBall(x[:1], eps=0.1, p=math.inf), method=method)
        assert one.lower.shape == one.upper.shape == (1, 3)
    with pytest.raises(ValueError, match="batch"):
        pycert.LpBall(x[:0], eps=0.1, p=math.inf)


def test_unknown_options_are_refused_with_the_known_ones():
    _, bm, _, x = setup("mlp_relu")
    where = pycert.LpBall(x, eps=0.1, p=math.inf)
    with pytest.raises((TypeError, ValueError), match="intersect"):
        bm.bound(where, method="ibp", no_such_option=1)
    with pytest.raises(ValueError, match="crown-ibp"):
        bm.bound(where, method="crwn")
    with pytest.raises(ValueError, match="soundness"):
        bm.bound(where, method="ibp", soundness="perfect")
