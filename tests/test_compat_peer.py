"""``pycert.compat.auto_LiRPA`` beside auto_LiRPA itself, where that is installed or on the path."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pycert.compat.auto_LiRPA as ours

theirs = pytest.importorskip("auto_LiRPA", reason="auto_LiRPA is not on the path")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(),
        nn.Linear(8, 3),
    ).eval()  # fmt: skip


def images(batch: int = 4) -> torch.Tensor:
    return torch.rand(batch, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def disturbed(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.dtype.is_floating_point:
                value.add_(0.1 * torch.rand(value.shape))
    return net


def test_names_of_nodes_are_the_same():
    x = images()
    here, there = ours.BoundedModule(network(), x), theirs.BoundedModule(network(), x)
    assert [node.name for node in here.nodes()] == [node.name for node in there.nodes()]
    assert [type(node).__name__ for node in here.nodes()] == [type(node).__name__ for node in there.nodes()]
    assert here.input_name == there.input_name
    assert here.output_name == there.output_name
    assert [node.name for node in here.relus] == [node.name for node in there.relus]


def test_states_load_both_ways():
    x = images()
    here = ours.BoundedModule(disturbed(network()), x)
    there = theirs.BoundedModule(network(), x)
    assert set(here.state_dict()) == set(there.state_dict())
    there.load_state_dict(here.state_dict())
    assert torch.allclose(there(x), here(x), atol=1e-6)
    source = theirs.BoundedModule(disturbed(network()), x)
    target = ours.BoundedModule(network(), x)
    target.load_state_dict(source.state_dict())
    assert torch.allclose(target(x), source(x), atol=1e-6)


@pytest.mark.parametrize("norm", [math.inf, 2, 1], ids=str)
@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
def test_bounds_are_not_looser(method, norm):
    x = images()
    found = []
    for library in (ours, theirs):
        module = library.BoundedModule(network(), x)
        ptb = library.PerturbationLpNorm(norm=norm, eps=0.1)
        with torch.no_grad():
            found.append(module.compute_bounds(x=(library.BoundedTensor(x, ptb),), method=method))
    (low, high), (other_low, other_high) = found
    assert (low >= other_low - 1e-5).all()
    assert (high <= other_high + 1e-5).all()


@pytest.mark.parametrize("start", ["output", "hidden"])
def test_linear_functions_have_the_same_layout(start):
    x = images()
    found = []
    for library in (ours, theirs):
        module = library.BoundedModule(network(), x, bound_opts={"conv_mode": "matrix"})
        node = module.output_name[0] if start == "output" else module.relus[1].inputs[0].name
        end = module.input_name[0]
        ptb = library.PerturbationLpNorm(norm=math.inf, eps=0.1)
        needed = {node: [end], module.output_name[0]: [end]}
        options = {"return_A": True, "needed_A_dict": needed}
        with torch.no_grad():
            result = module.compute_bounds(x=(library.BoundedTensor(x, ptb),), method="CROWN", **options)
        found.append(result[2][node][end])
    assert set(found[0]) >= {"lA", "uA", "lbias", "ubias", "unstable_idx"}
    rows = found[1]["unstable_idx"]
    for name in ("lA", "uA", "lbias", "ubias"):
        here = found[0][name]
        if isinstance(rows, torch.Tensor):  # theirs are of the neurons that are not stable
            here = here[:, rows]
        assert here.shape == found[1][name].shape, name
        assert torch.allclose(here, found[1][name], atol=1e-4), name
