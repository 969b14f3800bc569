"""The engine on another device, without one: tensors that have a device, a shape and no values.

Such tensors refuse every operation between two devices, every read of a value on the host, and every access to memory,
so that a bound that goes through has no hidden processor in it and never waits for the device."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pycert
from test_cuda_host import NETS

#: Methods that never wait for the device; `crown` where a layer's rows are few enough to make all of them.
WITHOUT_WAITING = ["ibp", "crown-ibp", "forward", "crown"]


def run(net, shape, p, method, within=None, memory="1GiB"):
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    with FakeTensorMode(allow_non_fake_inputs=True):
        lower = torch.empty(2, *shape, device="cuda")
        eps = torch.empty(2, device="cuda")
        region = (lower, lower + 1, lower, eps, p, False) if p else (lower, lower + 1, None, None, 0, False)
        native = bm._native(
            method, pycert.options.parse(method, {"memory": memory}, ()), False, torch.device("cpu")
        )
        parameters = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in bm.graph.tensors()]
        with within or contextlib.nullcontext():
            found = bm._program.bound(parameters, [region], native, None)
        return found[:2]


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("method", WITHOUT_WAITING)
@pytest.mark.parametrize("name", NETS)
def test_bounds_stay_on_the_device_and_never_wait(name, method, p):
    net, x = NETS[name]()
    with torch.no_grad():
        for bound in run(net, x.shape[1:], p, method):
            assert bound.device.type == "cuda" and bound.shape[0] == 2


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("method", WITHOUT_WAITING)
@pytest.mark.parametrize("name", NETS)
def test_a_training_step_stays_on_the_device_and_never_waits(name, method, p):
    """Bounds and their gradients on torch's device without memory: autograd takes no CUDA tensors without CUDA."""
    net, x = NETS[name]()
    bm = pycert.BoundedModule(net, torch.empty(1, *x.shape[1:]))

    def step(memory: str) -> list[torch.Tensor]:
        lower = torch.empty(2, *x.shape[1:], device="meta", requires_grad=True)
        eps = torch.empty(2, device="meta", requires_grad=True)
        region = (lower, lower + 1, lower, eps, p, False) if p else (lower, lower + 1, None, None, 0, False)
        options = pycert.options.parse(method, {"memory": memory}, ())
        native = bm._native(method, options, False, torch.device("cpu"))
        parameters = [torch.empty(t.shape, dtype=t.dtype, device="meta", requires_grad=True) for t in bm.graph.tensors()]  # fmt: skip
        low, high, *_ = bm._program.bound(parameters, [region], native, None)
        (high - low).sum().backward()
        return [lower, *parameters, *([eps] if p else [])]

    assert all(leaf.grad.shape == leaf.shape and leaf.grad.device.type == "meta" for leaf in step("1GiB"))
    if method == "crown":  # many rows: then it asks
        with pytest.raises(NotImplementedError, match="nonzero"):
            step("1KiB")


class Waits(TorchDispatchMode):
    """Answers what only the device knows, with some number of rows, and keeps a list of what was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        answers = {
            "aten::nonzero": lambda t: torch.zeros(6, t.dim(), dtype=torch.long, device=t.device),
            "aten::_local_scalar_dense": lambda t: True if t.dtype == torch.bool else 6,
            "aten::equal": lambda a, b: False,
        }
        name = op._schema.name
        if name in answers:
            self.asked.append(name.removeprefix("aten::"))
            return answers[name](*args)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETS)
def test_crown_waits_once_a_layer_where_rows_are_many(name, p):
    """More than the memory that it may use, here: then it asks how many are unstable, and nothing else."""
    net, x = NETS[name]()
    waits = Waits()
    with torch.no_grad():
        for bound in run(net, x.shape[1:], p, "crown", within=waits, memory="1KiB"):
            assert bound.device.type == "cuda"
    # a layer whose intervals are exact has no rows; over a ball all rows of the first layer are walked
    assert waits.asked.count("nonzero") == {"dense": 1, "conv": 2, "residual": 1}[name]
    assert waits.asked.count("_local_scalar_dense") == 0


@pytest.mark.parametrize("p", [0, 2])
def test_bounds_of_the_loss_stay_on_the_device(p):
    """fused_loss: one row a sample, whose coefficients come from the margins' intervals."""
    net, x = NETS["dense"]()
    bm = pycert.BoundedModule(net, torch.empty(1, *x.shape[1:]))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        lower = torch.empty(2, 8, device="cuda")
        region = (lower, lower + 1, lower, torch.empty(2, device="cuda"), p, False) if p else (lower, lower + 1, None, None, 0, False)  # fmt: skip
        options = pycert.options.parse("crown-ibp", {"memory": "1GiB"}, ())
        native = bm._native("crown-ibp", options, False, torch.device("cpu"))
        parameters = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in bm.graph.tensors()]
        spec = (torch.empty(6, 4, device="cuda"), None, 3)
        loss = bm._program.loss_bound(parameters, [region], native, spec)
    assert loss.device.type == "cuda" and loss.shape == (2,)


def test_parameters_on_another_device_are_named():
    net, x = NETS["dense"]()
    bm = pycert.BoundedModule(net, torch.empty(1, 8))
    native = bm._native("ibp", pycert.options.parse("ibp", {}, ()), False, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        lower = torch.empty(2, 8, device="cuda")
        with pytest.raises(ValueError, match="'0' is on cpu, the region on cuda"):
            bm._program.bound(bm.graph.tensors(), [(lower, lower, None, None, 0, False)], native, None)
