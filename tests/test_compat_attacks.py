"""Calls of the interface of auto_LiRPA that gave bounds of something else once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pycert.compat.auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm


class ByHand(nn.Module):
    """Products and sums that exporter and engine cut into different nodes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.W, self.V = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4, 5))
        self.c, self.last, self.first = nn.Parameter(5 + torch.rand(5)), nn.Linear(5, 2), nn.Linear(4, 5)

    def hidden(self, x: Tensor) -> dict[str, Tensor]:
        """Values by the operator that gives them, in the exporter's order."""
        if self.kind == "matmul and add":
            return {"MatMul": x @ self.W, "Add": x @ self.W + self.c}
        if self.kind == "addmm":
            return {"Gemm": torch.addmm(self.c, x, self.W)}
        if self.kind == "neutral":
            lin = self.first(x)
            return {"Gemm": lin, "Add": lin + 0.0, "Sub": (lin + 0.0) - 3.0}
        both = {"MatMul": x @ self.W, "MatMul 2": x @ self.V}
        return both | {"Add": both["MatMul"] + self.c}

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "crosswise":
            y1, y2 = x @ self.W, x @ self.V
            z = y1 + self.c
            return self.last(torch.relu(z) + torch.relu(y2))
        if self.kind == "matmul and add":
            return self.last(torch.relu(x @ self.W + self.c))
        if self.kind == "addmm":
            return self.last(torch.relu(torch.addmm(self.c, x, self.W)))
        return self.last(torch.relu((self.first(x) + 0.0) - 3.0))


@pytest.mark.parametrize("kind", ["matmul and add", "addmm", "neutral", "crosswise"])
def test_bounds_by_name_are_those_of_the_node_or_none(kind):
    net, x = ByHand(kind), torch.randn(3, 4)
    bm = BoundedModule(net, x)
    lower, upper = bm.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(eps=0.05)),), method="CROWN")
    with torch.no_grad():
        assert (lower <= net(x)).all() and (net(x) <= upper).all()
        expected = net.hidden(x)
    seen: dict[str, int] = {}
    for node in bm.nodes():
        name = node.kind.rpartition("::")[2]
        seen[name] = seen.get(name, 0) + 1
        value = expected.get(name if seen[name] == 1 else f"{name} {seen[name]}")
        if value is None or node.is_final_node or node.lower is None or value.shape != node.lower.shape:
            continue
        assert (node.lower <= value + 1e-5).all() and (value - 1e-5 <= node.upper).all(), name
    boxes = bm.save_intermediate()
    for method in ("IBP", "CROWN", "CROWN-IBP"):
        lower, upper = bm.compute_bounds(interm_bounds=boxes, method=method)
        with torch.no_grad():
            assert (lower <= net(x) + 1e-5).all() and (net(x) - 1e-5 <= upper).all()


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_radius_of_every_channel_is_no_radius_of_every_sample(batch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    x, eps = torch.rand(batch, 3, 3, 3), torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1)
    perturbed = BoundedTensor(x, PerturbationLpNorm(eps=eps))
    lower, upper = BoundedModule(net, x).compute_bounds(x=(perturbed,), method="IBP")
    with torch.no_grad():
        for signs in torch.randn(200, *x.shape).sign():
            y = net(x + signs * eps)
            assert (lower <= y + 1e-5).all() and (y - 1e-5 <= upper).all()


def test_a_radius_that_may_mean_two_things_is_refused():
    x = torch.rand(4, 4)
    for eps, fits in ((torch.rand(4), False), (torch.rand(4, 1), True), (torch.rand(1, 4), True)):
        bm, perturbed = BoundedModule(nn.Linear(4, 2), x), BoundedTensor(x, PerturbationLpNorm(eps=eps))
        if fits:
            bm.compute_bounds(x=(perturbed,), method="IBP")
            continue
        with pytest.raises(ValueError, match=r"one value a sample or one an element"):
            bm.compute_bounds(x=(perturbed,), method="IBP")


def test_a_replaced_layer_is_noticed_in_hidden_nodes_too():
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(2, 4)
    bm = BoundedModule(net, x)
    perturbed = BoundedTensor(x, PerturbationLpNorm(eps=0.05))
    hidden = next(node.name for node in bm.nodes() if node.kind.endswith("::Gemm"))
    bm.compute_bounds(x=(perturbed,), method="IBP", final_node_name=hidden)
    net[0] = nn.Linear(4, 5)
    with pytest.raises(RuntimeError, match="make a new BoundedModule"):
        bm.compute_bounds(x=(perturbed,), method="IBP", final_node_name=hidden)


def test_what_is_reused_belongs_to_the_same_question():
    net, x = nn.Linear(4, 3), torch.randn(2, 4)
    bm = BoundedModule(net, x)

    def around(x: Tensor) -> BoundedTensor:
        return BoundedTensor(x, PerturbationLpNorm(eps=0.05))

    bm.compute_bounds(x=(around(x),), IBP=True, method=None)
    moved = bm.compute_bounds(x=(around(x + 1),), IBP=True, method=None, reuse_ibp=True)
    with torch.no_grad():
        assert (moved[0] <= net(x + 1)).all() and (net(x + 1) <= moved[1]).all()
    rows = torch.ones(2, 1, 3)
    assert bm.compute_bounds(C=rows, IBP=True, method=None, reuse_ibp=True)[0].shape == (2, 1)
    with pytest.raises(TypeError, match="C must be a tensor"):
        bm.compute_bounds(C=np.ones((2, 1, 3)), method="IBP")


def test_boxes_looked_up_later_belong_to_one_network_and_region():
    net, x = (
        nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)),
        torch.randn(2, 4),
    )
    bm = BoundedModule(net, x)
    perturbation = PerturbationLpNorm(eps=0.05)
    bm.compute_bounds(x=(BoundedTensor(x, perturbation),), method="IBP")
    first, second = [node for node in bm.nodes() if node.kind.endswith("::Gemm")][:2]
    assert first.lower is not None
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(-2).add_(1)
        value = net[2](torch.relu(net[0](x)))
    assert (second.lower <= value + 1e-5).all() and (value - 1e-5 <= second.upper).all()
    perturbation.eps = 0.5
    lower, upper = bm.compute_bounds(method="IBP")
    narrow = bm.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(eps=0.05)),), method="IBP")
    assert ((upper - lower) > (narrow[1] - narrow[0])).all()


@pytest.mark.parametrize("soundness", ["real", "deployed"])
@pytest.mark.parametrize(
    "given",
    [
        dict(eps=0.7),
        dict(eps=torch.tensor(0.7, dtype=torch.float64)),
        dict(eps=torch.tensor([0.7], dtype=torch.float64), norm=2),
        dict(eps=0.7, norm=2),
        dict(
            x_L=torch.tensor([[-1.2e-8]], dtype=torch.float64), x_U=torch.tensor([[1.4]], dtype=torch.float64)
        ),
    ],
)
def test_regions_are_rounded_outward(given, soundness):
    """-1.19e-8 is within 0.7, as a float64 number, of 0.7 as a float32 one."""
    point = torch.tensor([[-1.1920928e-08]])
    x = torch.tensor([[0.7]])
    assert abs(x.double() - point.double()).item() <= 0.7
    bm = BoundedModule(nn.Hardtanh(), x, bound_opts={"soundness": soundness})
    perturbed = BoundedTensor(x, PerturbationLpNorm(**given))
    for method in ("IBP", "CROWN"):
        assert bm.compute_bounds(x=(perturbed,), method=method)[0].item() <= point.item()
    assert math.isfinite(bm.compute_bounds(method="IBP")[1].item())
