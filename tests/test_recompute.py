"""Gradients of back-substitution whose rows do not fit the budget: coefficients are formed again, not kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import nets
import pycert

F64 = torch.float64
SMALL = "2KiB"


def network(name: str, seed: int, dtype: torch.dtype = F64) -> tuple[torch.nn.Module, Tensor]:
    net, shape = nets.make(name, seed, dtype)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return net.requires_grad_(True), x


def gradients(objective: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(objective, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for mine, other in zip(found, expected, strict=True):
        size = float(other.abs().amax()) if other.numel() else 0.0
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * (1 + size))


CASES = [(name, float("inf")) for name in sorted(set(nets.BUILDERS) - {"attention"})]  # that one takes 9 s
CASES += [("mlp_relu", 2), ("conv_plain", 2), ("residual", 1)]


@pytest.mark.parametrize(("name", "p"), CASES)
def test_gradients_do_not_depend_on_the_budget(name, p):
    net, x = network(name, 0)
    bm, center = pycert.BoundedModule(net, x[:1]), x.clone().requires_grad_()
    eps = torch.linspace(0.05, 0.1, len(x), dtype=F64).requires_grad_()
    inputs = [*net.parameters(), center, eps]
    results = []
    for memory in (SMALL, "1GiB"):
        bounds = bm.bound(pycert.LpBall(center, eps, p=p), "crown", memory=memory, soundness="none")
        objective = bounds.lower.sin().sum() + 2 * bounds.upper.sum()
        results.append(gradients(objective, inputs))
    close(*results)


@pytest.mark.parametrize("method", ["crown", "crown-ibp"])
def test_outward_roundings_are_constants(method):
    net, x = network("residual", 1, torch.float32)
    bm = pycert.BoundedModule(net, x[:1])
    results = []
    for memory, soundness in ((SMALL, "deployed"), ("1GiB", "none")):
        bounds = bm.bound(pycert.LpBall(x, 0.1), method, memory=memory, soundness=soundness, intersect=False)
        results.append(gradients((bounds.upper - bounds.lower).sum(), list(net.parameters())))
    close(*results, tolerance=1e-3)


def test_rows_with_a_gradient():
    net, x = network("conv_plain", 1)
    bm = pycert.BoundedModule(net, x[:1])
    spec = torch.randn(len(x), 4, net(x).shape[1], dtype=F64, requires_grad=True)
    results = []
    for memory in (SMALL, "1GiB"):
        bounds = bm.bound(pycert.LpBall(x, 0.1), "crown", spec=spec, memory=memory, soundness="none")
        results.append(gradients(bounds.lower.sin().sum(), [spec, *net.parameters()]))
    assert results[0][0].abs().sum() > 0
    close(*results)


def test_statistics_of_a_training_batch():
    net, x = network("batch_norm_conv", 3)
    bm = pycert.BoundedModule(net.train(), x[:1])
    results = []
    for memory in (SMALL, "1GiB"):
        bounds = bm.bound(pycert.LpBall(x, 0.05), "crown", memory=memory, soundness="none")
        results.append(gradients((bounds.upper - 2 * bounds.lower).sum(), list(net.parameters())))
    close(*results)


def deep() -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(4)
    layers = [module for _ in range(4) for module in (torch.nn.Linear(40, 40), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(40, 2)), torch.rand(3, 40)


def kept_bytes(bm: pycert.BoundedModule, x: Tensor, memory: str) -> int:
    """Bytes of the tensors kept for the gradient, each storage once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        bm.bound(pycert.LpBall(x, 0.1), "crown", memory=memory)
    return sum(storage.nbytes() for storage in storages.values())


def test_coefficients_are_not_kept():
    net, x = deep()
    bm = pycert.BoundedModule(net, x[:1])
    assert kept_bytes(bm, x, "50KiB") < 0.2 * kept_bytes(bm, x, "1GiB")


def test_what_is_kept_is_freed_with_the_bounds():
    net, x = deep()
    bounds = pycert.BoundedModule(net, x[:1]).bound(pycert.LpBall(x, 0.1), "crown", memory=SMALL)
    weight = weakref.ref(net[0].weight)
    del net
    gc.collect()
    assert weight() is not None  # the module is gone, the graph is there
    bounds.lower.sum().backward()
    assert weight().grad is not None
    unused = bounds.upper.sum()
    del bounds, unused
    gc.collect()
    assert weight() is None


def test_a_parameter_changed_before_the_gradient_is_an_error():
    net, x = deep()
    bounds = pycert.BoundedModule(net, x[:1]).bound(pycert.LpBall(x, 0.1), "crown", memory=SMALL)
    with torch.no_grad():
        net[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        bounds.lower.sum().backward()


def test_second_derivatives_are_refused():
    net, x = deep()
    bounds = pycert.BoundedModule(net, x[:1]).bound(pycert.LpBall(x, 0.1), "crown", memory=SMALL)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(bounds.lower.square().sum(), net[0].weight, create_graph=True)
