"""Activations without a kernel of their own: arctan, integer powers and sign, against samples and brute force."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import pycert
from pycert.activation_kinds import power_name
from pycert.activations import activation, custom_interval, custom_lines

NAMES = ["pycert.arctan", "pycert.sign", *(power_name(exponent) for exponent in (3, 4, 7, 8))]
SMOOTH = [name for name in NAMES if name != "pycert.sign"]


def boxes(seed: int, dtype: torch.dtype, reach: float) -> tuple[Tensor, Tensor]:
    """Intervals of every width around points near 0 and far out, some of them ending at 0, some points."""
    generator = torch.Generator().manual_seed(seed)
    centre = reach * (2 * torch.rand(120, generator=generator, dtype=torch.float64) - 1)
    width = 10 ** (7 * torch.rand(120, generator=generator, dtype=torch.float64) - 6)
    lower, upper = (centre - width).to(dtype), (centre + 0.7 * width).to(dtype)
    lower[::20] = upper[::20]
    lower[1::20], upper[1::20] = 0.0, upper[1::20].abs()
    lower[2::20], upper[2::20] = -upper[2::20].abs(), 0.0
    return lower, upper


def samples(lower: Tensor, upper: Tensor, count: int = 301) -> Tensor:
    low, high = lower.double(), upper.double()
    t = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    x = (low * (1 - t) + high * t).maximum(low).minimum(high)
    near = torch.tensor([-1e-30, 0.0, 1e-30], dtype=torch.float64)[:, None].maximum(low).minimum(high)
    return torch.cat([x, near])


@pytest.mark.parametrize(("dtype", "reach"), [(torch.float32, 3.0), (torch.float64, 600.0)], ids=str)
@pytest.mark.parametrize("rule", ["adaptive", "parallel"])
@pytest.mark.parametrize("name", NAMES)
def test_lines_and_intervals_contain_every_sample(name, rule, dtype, reach):
    lower, upper = boxes(0, dtype, reach)
    x = samples(lower, upper)
    y = activation(name).f(x)
    lines = [t.double() for t in custom_lines(name, lower, upper, rule)]
    rounding = 2.0**-51 * ((lines[0] * x).abs() + (lines[2] * x).abs() + 2 * y.abs() + lines[1].abs())
    assert (lines[0] * x + lines[1] - rounding <= y).all()
    assert (y <= lines[2] * x + lines[3] + rounding + 2.0**-51 * lines[3].abs()).all()
    low, high = (t.double() for t in custom_interval(name, lower, upper))
    unit = 2.0**-22 if dtype == torch.float32 else 2.0**-45
    assert (low <= y).all() and (y <= high).all()
    assert (y.amin(0) - low <= unit * (1 + y.abs().amax(0))).all()  # the samples hold both ends and 0
    assert (high - y.amax(0) <= unit * (1 + y.abs().amax(0))).all()


@pytest.mark.parametrize("name", NAMES)
def test_deployed_lines_contain_float32_executions(name):
    lower, upper = boxes(1, torch.float32, 3.0)
    x = samples(lower, upper).float().maximum(lower).minimum(upper)
    y = activation(name).f(x).double()
    lines = [t.double() for t in custom_lines(name, lower, upper, deployed=True)]
    assert (lines[0] * x.double() + lines[1] <= y).all() and (y <= lines[2] * x.double() + lines[3]).all()
    low, high = custom_interval(name, lower, upper, deployed=True)
    assert (low.double() <= y).all() and (y <= high.double()).all()
    if name in SMOOTH:
        real = [t.double() for t in custom_lines(name, lower, upper)]
        assert (y > real[2] * x.double() + real[3]).any()  # the charge is needed


def test_a_flushed_subnormal_number_is_zero():
    lower = torch.tensor([1e-40, -1e-40, 0.0, -1.0], dtype=torch.float32)
    upper = torch.tensor([1e-39, -1e-41, 1e-40, -1e-41], dtype=torch.float32)
    assert [end.tolist() for end in custom_interval("pycert.sign", lower, upper, deployed=True)] == [
        [0.0, -1.0, 0.0, -1.0],
        [1.0, 0.0, 1.0, 0.0],
    ]
    lines = custom_lines("pycert.sign", lower, upper, deployed=True)
    assert not lines.lower_slope.any() and not lines.upper_slope.any()


@pytest.mark.parametrize("name", SMOOTH)
def test_no_slope_gives_less_area_by_brute_force(name):
    lower, upper = (t[::6] for t in boxes(3, torch.float64, 2.0))
    lower, upper = lower.clamp(-2, 2), upper.clamp(-2, 2)
    x = samples(lower, upper, 301)
    y = activation(name).f(x)
    middle = (lower + upper) / 2
    steepest = activation(name).df(x).abs().amax(0)
    slopes = torch.linspace(-1.01, 1.01, 501, dtype=torch.float64)[:, None] * steepest
    best_upper = torch.stack([(y - k * x).amax(0) + k * middle for k in slopes]).amin(0)
    best_lower = torch.stack([(y - k * x).amin(0) + k * middle for k in slopes]).amax(0)
    lines = custom_lines(name, lower, upper)
    tolerance = steepest * (6e-3 * (upper - lower) + (upper - lower).square() / 300) + 1e-9  # of both grids
    assert (lines[2] * middle + lines[3] <= best_upper + tolerance).all()
    assert (lines[0] * middle + lines[1] >= best_lower - tolerance).all()


@pytest.mark.parametrize(
    ("name", "rule"),
    [("pycert.arctan", "adaptive"), ("pycert.power_3", "adaptive"), ("pycert.power_4", "parallel")],
)
def test_gradcheck(name, rule):
    lower = torch.tensor([-3.0, -1.0, 0.5, -0.2], dtype=torch.float64, requires_grad=True)
    upper = torch.tensor([1.0, 2.3, 3.0, 0.9], dtype=torch.float64, requires_grad=True)
    lines = lambda a, b: tuple(custom_lines(name, a, b, rule))  # noqa: E731
    assert torch.autograd.gradcheck(lines, (lower, upper), rtol=1e-3, atol=1e-4)
    assert torch.autograd.gradcheck(lambda a, b: custom_interval(name, a, b), (lower, upper), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_ends_that_are_not_finite(name):
    lower = torch.tensor([-math.inf, math.nan, 1.0, -1.0])
    upper = torch.tensor([1.0, 1.0, math.inf, math.nan])
    low, high = custom_interval(name, lower, upper)
    lines = custom_lines(name, lower, upper)
    infinite = torch.isinf(lines.lower_intercept)
    assert infinite[[1, 3]].all() and torch.isinf(low[[1, 3]]).all() and torch.isinf(high[[1, 3]]).all()
    assert not lines.lower_slope[[1, 3]].any()
    for end in (2.0**20, 2.0**60, 2.0**120):
        x = torch.tensor([-end, 1.0, end])
        y = activation(name).f(x)
        for row in (0, 2):
            inside = (x >= lower[row]) & (x <= upper[row])
            assert (low[row] <= y[inside]).all() and (y[inside] <= high[row]).all()


class Between(nn.Module):
    """A linear layer, a function, a linear layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(4, 7), function, nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def eighth(x: Tensor) -> Tensor:
    return x**8


FUNCTIONS = {
    "atan": torch.atan,
    "sign": torch.sign,
    "cube": lambda x: x**3,
    "eighth": eighth,
    "negative": lambda x: (x * x + 0.5) ** -3,
}


@pytest.mark.parametrize("method", ["ibp", "crown", "forward"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_networks_stay_within_their_bounds(function, method):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Between(FUNCTIONS[function])
    x = torch.randn(5, 4, generator=generator)
    bounds = pycert.BoundedModule(net, x).bound(pycert.LpBall(x, 0.4), method)
    noise = 2 * torch.rand(400, 5, 4, generator=generator) - 1
    noise[::2] = noise[::2].sign()
    out = net((x + 0.4 * noise).clamp(x - 0.4, x + 0.4))
    assert (bounds.lower <= out).all() and (out <= bounds.upper).all()
    assert bounds.lower.isfinite().all() and bounds.upper.isfinite().all()


def test_names_are_known_after_pickling_and_taken():
    module = pycert.BoundedModule(Between(eighth), torch.zeros(1, 4))
    x = torch.ones(1, 4)
    before = module.bound(pycert.LpBall(x, 0.1), "ibp")
    after = pickle.loads(pickle.dumps(module)).bound(pycert.LpBall(x, 0.1), "ibp")
    assert torch.equal(before.lower, after.lower)
    with pytest.raises(ValueError, match=r"names that begin with 'pycert\.' are pycert's own"):
        pycert.register_activation(torch.sin, torch.cos, [], name="pycert.arctan")
    with pytest.raises(ValueError, match="no activation named 'pycert.power_1'"):
        activation("pycert.power_1")
    with pytest.raises(pycert.UnsupportedOperator, match="of powers only integers"):
        pycert.BoundedModule(Between(lambda x: x**2.5), torch.zeros(1, 4))
