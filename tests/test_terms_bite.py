"""Every term of the error analysis is needed: taken out, some network escapes its bounds.

Each example is a network and a region made so that the rounding that one term pays for is large and
one-sided. With all terms in place the example must hold, with the term taken out it must fail.
Roundings are provoked by "one and dust": ``1 + t + t + ...`` with ``t`` just under half a unit in the
last place of 1 loses every ``t`` when it is summed from the left, an error of about ``n u``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pycert
from exact import ExactNetwork, rational
from judging import ordered_product
from nets import Apply
from pycert import _C
from pycert.graph import trace

DUST = 0.99 * 2.0**-24


@pytest.fixture(autouse=True)
def all_terms() -> Iterator[None]:
    yield
    _C.testing_enable_all()


EXAMPLES: dict[str, tuple[Callable[[], bool], tuple[str, ...]]] = {}


def example(term: str, idle: tuple[str, ...] = ()):
    """Registers an example that returns whether some value escapes its bounds.

    ``idle`` are other terms that have nothing to pay for in this example but whose slack would
    hide the one looked at: they are out in both runs.
    """

    def register(escapes: Callable[[], bool]) -> Callable[[], bool]:
        EXAMPLES[f"{term}: {escapes.__name__}"] = (escapes, (term, *idle))
        return escapes

    return register


def bound(net: nn.Module, where, method: str, soundness: str) -> pycert.Bounds:
    bm = pycert.BoundedModule(net, where_center(where)[:1])
    with torch.no_grad():
        return bm.bound(where, method=method, soundness=soundness, intersect=False)


def where_center(where) -> Tensor:
    return where.x if isinstance(where, pycert.LpBall) else where.lower


def exactly(net: nn.Module, x: Tensor) -> np.ndarray:
    """Outputs of the real-arithmetic network at ``x [1, *in]``, flat fractions."""
    graph = trace(net, x)
    return ExactNetwork(graph).value(rational(x).flatten())[graph.output]


def outside(bounds: pycert.Bounds, values) -> bool:
    lower, upper = (rational(end[0]).flatten() for end in (bounds.lower, bounds.upper))
    return bool((values < lower).any() or (values > upper).any())


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def point(x: Tensor) -> pycert.Box:
    return pycert.Box(x, x.clone())


def cancelling(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weights and an input whose products nearly cancel: sums far smaller than their terms."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    x = torch.rand(1, columns, generator=generator).to(dtype) + 0.5
    weight[:, -1] = -(weight[:, :-1] @ x[0, :-1]) / x[0, -1]
    return weight, x


def one_and_dust(count: int) -> Tensor:
    x = torch.full((1, count), DUST)
    x[0, 0] = 1
    return x


@example("own_product")
def rounding_of_our_own_product() -> bool:
    weight, x = cancelling(64, 512)
    net = linear(weight)
    return outside(bound(net, point(x), "ibp", "real"), exactly(net, x))


@example("deployed")
def dust_lost_by_the_network() -> bool:
    x = one_and_dust(512)
    net = linear(torch.ones(1, 512))
    executed = ordered_product(net.weight.detach().numpy(), x.numpy(), None, "forward")
    return outside(bound(net, point(x), "ibp", "deployed"), rational(torch.from_numpy(executed)).flatten())


@example("bias")
def dust_added_to_a_large_bias() -> bool:
    x = torch.full((1, 512), DUST)
    net = linear(torch.ones(1, 512), torch.ones(1))
    executed = ordered_product(net.weight.detach().numpy(), x.numpy(), np.ones(1, np.float32), "forward")
    return outside(bound(net, point(x), "ibp", "deployed"), rational(torch.from_numpy(executed)).flatten())


@example("underflow")
def products_flushed_to_zero() -> bool:
    """A thousand products just under the least normal number, which a flushing processor drops."""
    x = torch.full((1, 1000), 0.9 * 2.0**-63)
    net = linear(torch.full((1, 1000), 2.0**-63))
    executed = np.array([Fraction(0)], dtype=object)
    return outside(bound(net, point(x), "ibp", "deployed"), executed)


@example("underflow")
def coefficients_lost_in_back_substitution() -> bool:
    """2^-100 times 2^-100 is nothing in float32, and 2^-100 of an input of 2^100."""
    small = torch.full((1, 1), 2.0**-100)
    net = nn.Sequential(linear(small), nn.ReLU(), linear(small))
    x = torch.full((1, 1), 2.0**100)
    return outside(bound(net, point(x), "crown-ibp", "real"), exactly(net, x))


@example("radius_product")
def dust_lost_by_the_radius() -> bool:
    """The first element of each strand is 1, all further ones are lost, whatever the strand's stride."""
    found = False
    for strands in (1, 4, 8, 16, 32, 64):
        radius = torch.full((1, 4096), DUST)
        radius[0, :strands] = 1
        net = linear(torch.ones(1, 4096))
        exact = np.array([sum(rational(radius).flatten())], dtype=object)
        found = found or outside(bound(net, pycert.Box(-radius, radius), "ibp", "real"), exact)
    return found


@example("residual")
def one_addition() -> bool:
    net = Apply(lambda self, x: x + x.flip(1))
    x = torch.tensor([[1.0, DUST]])
    return outside(bound(net, point(x), "ibp", "real"), exactly(net, x))


@example("residual")
def one_multiplication() -> bool:
    net = Apply(lambda self, x: x * 0.3)
    x = torch.linspace(0.1, 1.0, 50)[None]
    return outside(bound(net, point(x), "ibp", "real"), exactly(net, x))


def batch_norm_of_points() -> tuple[nn.Module, Tensor]:
    net = nn.BatchNorm1d(64).eval()
    generator = torch.Generator().manual_seed(2)
    net.running_mean.copy_(100 * torch.randn(64, generator=generator))
    net.running_var.copy_(torch.rand(64, generator=generator) + 0.1)
    net.weight.data.copy_(torch.randn(64, generator=generator))
    return net, net.running_mean[None] + 1e-3 * torch.randn(1, 64, generator=generator)


@example("batch_norm")
def rounding_of_batch_norm() -> bool:
    net, x = batch_norm_of_points()
    return outside(bound(net, point(x), "ibp", "real"), exactly(net, x))


@example("backsub_own")
def rounding_of_back_substitution() -> bool:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(400, 20, generator=generator)
    weight, _ = cancelling(64, 400)
    net = nn.Sequential(linear(hidden), nn.ReLU(), linear(weight))
    x = torch.rand(1, 20, generator=generator) + 0.5
    return outside(bound(net, point(x), "crown-ibp", "real"), exactly(net, x))


@example("backsub_deployed")
def dust_lost_under_back_substitution() -> bool:
    x = one_and_dust(512)
    net = nn.Sequential(linear(torch.ones(1, 512)), nn.ReLU(), linear(torch.ones(1, 1)))
    executed = ordered_product(net[0].weight.detach().numpy(), x.numpy(), None, "forward")
    return outside(
        bound(net, point(x), "crown-ibp", "deployed"), rational(torch.from_numpy(executed)).flatten()
    )


def dust_in_a_convolution(method: str) -> bool:
    x = one_and_dust(512).reshape(1, 512, 1, 1)
    net = nn.Conv2d(512, 1, 1, bias=False)
    net.weight.data.fill_(1)
    executed = ordered_product(np.ones((1, 512), np.float32), x.flatten(1).numpy(), None, "forward")
    return outside(bound(net, point(x), method, "deployed"), rational(torch.from_numpy(executed)).flatten())


@example("deployed", idle=("own_product",))  # the sum over channels is charged to our own product as well
def dust_lost_by_a_convolution() -> bool:
    return dust_in_a_convolution("ibp")


@example("backsub_deployed", idle=("backsub_own",))
def dust_lost_by_a_convolution_under_back_substitution() -> bool:
    return dust_in_a_convolution("crown")


@example("backsub_deployed", idle=("backsub_own",))
def dust_added_to_a_large_bias_under_back_substitution() -> bool:
    x = torch.full((1, 512), DUST)
    net = linear(torch.ones(1, 512), torch.ones(1))
    executed = ordered_product(np.ones((1, 512), np.float32), x.numpy(), np.ones(1, np.float32), "forward")
    return outside(bound(net, point(x), "crown", "deployed"), rational(torch.from_numpy(executed)).flatten())


class Sum(nn.Module):
    """The sum of two layers of one input, the second of which is zero, in either order; then what follows."""

    def __init__(self, layer: nn.Module, zero: nn.Module, first: bool, then: nn.Module) -> None:
        super().__init__()
        nn.init.zeros_(zero.weight)
        self.layers, self.first, self.then = nn.ModuleList([layer, zero]), first, then

    def forward(self, x: Tensor) -> Tensor:
        one, other = (layer(x) for layer in self.layers)
        return self.then(one + other if self.first else other + one)


@example("backsub_deployed", idle=("backsub_own",))
def dust_lost_by_a_layer_that_an_addition_reads() -> bool:
    """Such a layer is charged together with the addition and the activation behind it."""
    x = one_and_dust(512)
    ones = linear(torch.ones(1, 512))
    executed = ordered_product(ones.weight.detach().numpy(), x.numpy(), None, "forward")
    value = rational(torch.from_numpy(executed)).flatten()
    behind = (nn.Identity(), nn.Sequential(nn.ReLU(), linear(torch.ones(1, 1))))
    found = {
        outside(
            bound(Sum(ones, linear(torch.ones(1, 512)), first, then), point(x), "crown", "deployed"), value
        )
        for first in (True, False)
        for then in behind
    }
    assert len(found) == 1, "some of them escape"
    return found.pop()


@example("backsub_own")
def rounding_of_back_substitution_through_convolutions() -> bool:
    generator = torch.Generator().manual_seed(6)
    net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 16, 1))
    net[0].weight.data = torch.rand(net[0].weight.shape, generator=generator)
    weight = torch.randn(16, 64, 1, 1, generator=generator)
    net[2].weight.data = weight - weight.mean(1, keepdim=True)
    x = torch.rand(1, 1, 5, 5, generator=generator)
    return outside(bound(net, point(x), "crown-ibp", "real"), exactly(net, x))


@example("backsub_constant", idle=("backsub_own", "backsub_deployed"))
def rounding_of_the_concretisation() -> bool:
    """From identity rows the coefficients are the weights themselves: only the last sums round."""
    weight, x = cancelling(64, 300, torch.float64)
    net = linear(weight)
    return outside(bound(net, point(x), "crown", "real"), exactly(net, x))


@example("backsub_constant", idle=("backsub_own", "backsub_deployed"))
def rounding_of_the_constant() -> bool:
    """Coefficients are 1 and the input is 0: the bound is 1 plus forty biases that are lost one by one."""
    one = torch.ones(1, 1, dtype=torch.float64)
    dust = [linear(one, torch.full((1,), 0.99 * 2.0**-53, dtype=torch.float64)) for _ in range(40)]
    for layers in ([linear(one, one[0]), *dust], [*dust, linear(one, one[0])]):
        net, x = nn.Sequential(*layers), torch.zeros(1, 1, dtype=torch.float64)
        if outside(bound(net, point(x), "crown", "real"), exactly(net, x)):
            return True
    return False


@example("norm")
def largest_sum_of_a_long_row() -> bool:
    """The largest row sum in float64: terms of 0.45 u beside ones are lost, a million of them together are not."""
    row = torch.full((1, 2**20), 0.9 * 2.0**-54, dtype=torch.float64)
    row[0, :64] = 1
    return pycert.ops.masked_norm(row, p=math.inf).item() < math.fsum(row[0].tolist())


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_example_holds_with_every_term(name):
    escapes, (_, *idle) = EXAMPLES[name]
    assert not escapes()
    for other in idle:
        _C.testing_disable(other)
    assert not escapes(), "the idle terms are not idle"


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_example_fails_without_the_term(name):
    escapes, terms = EXAMPLES[name]
    for term in terms:
        _C.testing_disable(term)
    assert escapes()


def test_every_term_has_an_example():
    assert {name.split(":")[0] for name in EXAMPLES} == set(_C.terms())


def test_unknown_terms_are_refused():
    with pytest.raises(ValueError, match="own_product"):
        _C.testing_disable("no such term")


def test_dust_is_lost_by_sequential_float32_sums():
    """The adversary does what it says: the sum stays 1 although the terms add up to 1 + 506 u."""
    x = one_and_dust(512)
    assert ordered_product(np.ones((1, 512), np.float32), x.numpy(), None, "forward") == 1
    assert math.fsum(x[0].tolist()) > 1 + 500 * 2.0**-24
