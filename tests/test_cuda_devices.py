"""The engine on another device, without one: tensors that have a device, a shape and no values.

Such tensors refuse every operation between two devices, every read of a value on the host, and every access to memory,
so that a bound that goes through has no hidden processor in it and never waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pycert
from test_cuda_host import NETS

#: Methods that never wait for the device. `crown` waits once a layer: for how many neurons are unstable.
WITHOUT_WAITING = ["ibp", "crown-ibp", "forward"]


def run(net, shape, p, method, gradient, **options):
    bm = pycert.BoundedModule(net, torch.empty(1, *shape))
    with FakeTensorMode(allow_non_fake_inputs=True):
        lower = torch.empty(2, *shape, device="cuda", requires_grad=gradient)
        eps = torch.empty(2, device="cuda")
        region = (lower, lower + 1, lower, eps, p, False) if p else (lower, lower + 1, None, None, 0, False)
        native = bm._native(
            method, pycert.options.parse(method, options | {"memory": "1GiB"}, ()), False, torch.device("cpu")
        )
        parameters = [
            torch.empty(t.shape, dtype=t.dtype, device="cuda", requires_grad=gradient)
            for t in bm.graph.tensors()
        ]
        found = bm._program.bound(parameters, [region], native, None)
        if gradient:
            (found[0].sum() + found[1].sum()).backward()
        return found[:2]


@pytest.mark.parametrize("p", [0, 1, 2])
@pytest.mark.parametrize("method", WITHOUT_WAITING)
@pytest.mark.parametrize("name", NETS)
def test_bounds_stay_on_the_device_and_never_wait(name, method, p):
    net, x = NETS[name]()
    with torch.no_grad():
        for bound in run(net, x.shape[1:], p, method, gradient=False):
            assert bound.device.type == "cuda" and bound.shape[0] == 2


def test_crown_waits_for_the_number_of_rows():
    """The one place: were it gone, the list above should hold crown as well."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    net, x = NETS["dense"]()
    with torch.no_grad(), pytest.raises(DynamicOutputShapeException, match="nonzero"):
        run(net, x.shape[1:], 0, "crown", gradient=False, soundness="none")


def test_parameters_on_another_device_are_named():
    net, x = NETS["dense"]()
    bm = pycert.BoundedModule(net, torch.empty(1, 8))
    native = bm._native("ibp", pycert.options.parse("ibp", {}, ()), False, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        lower = torch.empty(2, 8, device="cuda")
        with pytest.raises(ValueError, match="'0' is on cpu, the region on cuda"):
            bm._program.bound(bm.graph.tensors(), [(lower, lower, None, None, 0, False)], native, None)
