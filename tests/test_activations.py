"""User-defined activations: registration, lookup, and sound lines of least area for any curvature."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import pycert
from pycert.activations import RegisteredActivation, activation, custom_interval, custom_lines, lookup
from pycert.ops import activation_lines

SILU_INFLECTION = 2.399357280515468


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def silu_derivative(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def sigmoid_derivative(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def wave(x: Tensor) -> Tensor:
    return x * torch.exp(-x * x)


def wave_derivative(x: Tensor) -> Tensor:
    return (1 - 2 * x * x) * torch.exp(-x * x)


def straight(x: Tensor) -> Tensor:
    return 3 * x - 1


FUNCTIONS = {
    "silu": (silu, silu_derivative, [-SILU_INFLECTION, SILU_INFLECTION]),
    "softplus": (softplus, torch.sigmoid, []),
    "sigmoid": (sigmoid, sigmoid_derivative, [0.0]),
    "wave": (wave, wave_derivative, [-math.sqrt(1.5), 0.0, math.sqrt(1.5)]),
    "straight": (straight, lambda x: torch.full_like(x, 3.0), []),
}


@pytest.fixture(autouse=True)
def registered():
    return {
        name: pycert.register_activation(f, df, inflections, name=name)
        for name, (f, df, inflections) in FUNCTIONS.items()
    }


def boxes(seed: int, dtype: torch.dtype, reach: float = 6.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centre = reach * (2 * torch.rand(600, generator=generator, dtype=torch.float64) - 1)
    width = 10 ** (6 * torch.rand(600, generator=generator, dtype=torch.float64) - 5)
    lower, upper = (centre - width).to(dtype), (centre + width * 0.7).to(dtype)
    lower[::20] = upper[::20]
    return lower, upper


def samples(lower: Tensor, upper: Tensor, count: int = 501) -> Tensor:
    low, high = lower.double(), upper.double()
    t = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    return (low * (1 - t) + high * t).maximum(low).minimum(high)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["adaptive", "parallel", 2, 3])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_lines_and_intervals_contain_every_sample(name, rule, dtype):
    lower, upper = boxes(0, dtype)
    x = samples(lower, upper)
    y = FUNCTIONS[name][0](x)
    lower_slope, lower_intercept, upper_slope, upper_intercept = (
        t.double() for t in custom_lines(name, lower, upper, rule)
    )
    rounding = 2.0**-52 * ((upper_slope * x).abs() + (lower_slope * x).abs() + 2 * y.abs())  # of this check
    assert (lower_slope * x + lower_intercept - rounding <= y).all()
    assert (y <= upper_slope * x + upper_intercept + rounding).all()
    low, high = custom_interval(name, lower, upper)
    assert (low.double() <= y).all() and (y <= high.double()).all()
    assert (y.amin(0) - low).max() < 1e-2 and (high - y.amax(0)).max() < 1e-2  # as far as samples reach


@pytest.mark.parametrize("name", ["silu", "sigmoid", "wave"])
def test_deployed_lines_contain_float32_executions(name):
    lower, upper = boxes(1, torch.float32)
    x = samples(lower, upper).float().maximum(lower).minimum(upper)
    y = FUNCTIONS[name][0](x).double()
    lines = [t.double() for t in custom_lines(name, lower, upper, deployed=True)]
    assert (lines[0] * x.double() + lines[1] <= y).all() and (y <= lines[2] * x.double() + lines[3]).all()
    real = [t.double() for t in custom_lines(name, lower, upper, deployed=False)]
    assert (y > real[2] * x.double() + real[3]).any()  # the charge is needed
    low, high = custom_interval(name, lower, upper, deployed=True)
    assert (low.double() <= y).all() and (y <= high.double()).all()


def test_lines_equal_those_of_the_built_in_sigmoid():
    lower, upper = boxes(2, torch.float64)
    middle = (lower + upper) / 2
    for rule in ("adaptive", "parallel"):
        ours = custom_lines("sigmoid", lower, upper, rule)
        built_in = activation_lines(lower, upper, "sigmoid", slope=rule)
        for k in (0, 2):
            a, b = (lines[k] * middle + lines[k + 1] for lines in (ours, built_in))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "wave", "softplus"])
def test_no_slope_gives_less_area_by_brute_force(name):
    lower, upper = (t[::4] for t in boxes(3, torch.float64))
    x = samples(lower, upper, 301)
    y = FUNCTIONS[name][0](x)
    middle = (lower + upper) / 2
    slopes = torch.linspace(-1.2, 1.2, 1201, dtype=torch.float64)
    best_upper = torch.stack([(y - k * x).amax(0) + k * middle for k in slopes]).amin(0)
    best_lower = torch.stack([(y - k * x).amin(0) + k * middle for k in slopes]).amax(0)
    lines = custom_lines(name, lower, upper)
    tolerance = 2e-3 * (upper - lower) + (upper - lower).square() / 300**2 + 1e-9  # of both grids
    assert (lines[2] * middle + lines[3] <= best_upper + tolerance).all()
    assert (lines[0] * middle + lines[1] >= best_lower - tolerance).all()


@pytest.mark.parametrize("rule", ["adaptive", "parallel"])
@pytest.mark.parametrize("name", ["silu", "softplus", "sigmoid"])
def test_gradcheck(name, rule):
    lower = torch.tensor([-3.0, -1.0, 0.5, -5.0, 1.0, -0.2], dtype=torch.float64, requires_grad=True)
    upper = torch.tensor([1.0, 2.0, 3.0, -4.0, 8.0, 0.9], dtype=torch.float64, requires_grad=True)
    lines = lambda a, b: tuple(custom_lines(name, a, b, rule))  # noqa: E731
    assert torch.autograd.gradcheck(lines, (lower, upper), atol=1e-5)
    assert torch.autograd.gradcheck(lambda a, b: custom_interval(name, a, b), (lower, upper), atol=1e-5)


def test_ends_that_are_not_finite_give_infinite_bounds():
    lower = torch.tensor([-math.inf, math.nan, 1.0, 0.0], requires_grad=True)
    upper = torch.tensor([1.0, 1.0, math.inf, 1.0], requires_grad=True)
    lines = custom_lines("silu", lower, upper)
    assert (
        lines.upper_intercept[:3].tolist() == [math.inf] * 3 and lines.lower_intercept[:3].max() == -math.inf
    )
    assert not lines.upper_slope[:3].any()
    low, high = custom_interval("silu", lower, upper)
    assert low[:3].max() == -math.inf and high[:3].min() == math.inf
    (lines.upper_slope.sum() + high.sum()).backward()
    assert lower.grad.isfinite().all() and upper.grad.isfinite().all()


def test_the_layer_computes_f_and_survives_pickling_and_copying(registered):
    layer = registered["silu"]
    x = torch.randn(5)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), silu(x)) and other.name == "silu"
    assert not list(layer.parameters())


def test_lookup_knows_layers_functions_and_nothing_else(registered):
    assert lookup(registered["silu"]) == lookup(registered["silu"].forward) == lookup(silu) == "silu"
    assert lookup(torch.relu) is None and lookup(torch.nn.ReLU()) is None


def test_registration_errors():
    with pytest.raises(ValueError, match="a lambda needs a name"):
        pycert.register_activation(lambda x: x, torch.ones_like, [])
    with pytest.raises(ValueError, match="taken by another function"):
        pycert.register_activation(softplus, torch.sigmoid, [], name="silu")
    with pytest.raises(ValueError, match="df is not the derivative of f"):
        pycert.register_activation(silu, torch.sigmoid, [], name="wrong")
    with pytest.raises(ValueError, match="the curvature changes sign between -30 and 30"):
        pycert.register_activation(silu, silu_derivative, [], name="wrong")
    with pytest.raises(TypeError, match="f must give float64"):
        pycert.register_activation(lambda x: x.float(), torch.ones_like, [], name="wrong")
    with pytest.raises(ValueError, match="f must be finite"):
        pycert.register_activation(torch.log, torch.reciprocal, [], name="wrong")
    with pytest.raises(ValueError, match="inflections must be finite"):
        pycert.register_activation(silu, silu_derivative, [math.inf], name="wrong")
    with pytest.raises(ValueError, match="error must be positive"):
        pycert.register_activation(silu, silu_derivative, [], name="wrong", error=0)
    with pytest.raises(TypeError, match="must be callable"):
        pycert.register_activation(1.0, silu_derivative, [], name="wrong")
    with pytest.raises(ValueError, match=r"no activation named 'wrong' is registered .*silu"):
        activation("wrong")
    with pytest.raises(ValueError, match="no activation named 'wrong'"):
        RegisteredActivation("wrong")
    with pytest.raises(ValueError, match="slope_rule must be one of"):
        custom_lines("silu", torch.zeros(1), torch.ones(1), "steep")
