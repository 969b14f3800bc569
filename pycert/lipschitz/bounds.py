"""Lipschitz constants of whole networks, and bounds of outputs by them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from pycert import _C
from pycert.bounded import BoundedModule
from pycert.lipschitz.states import BUDGETS, ThreeState
from pycert.lipschitz.walk import LayerNorm, Settings, Walk
from pycert.norms.arithmetic import UP, dual_norm, exact_double, gamma, root, round_up
from pycert.regions import Box, LpBall, Region

METHODS = ("gram", "power")


class LipschitzBound(Tensor):
    """``[B]`` Lipschitz constants; ``sound`` says whether they are upper bounds.

    ``p`` is the norm on both sides; ``layers`` holds a :class:`LayerNorm` per affine layer where asked for.
    Arithmetic gives plain tensors.
    """

    sound: bool
    p: float
    layers: list[LayerNorm]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(value: Tensor, sound: bool, p: float, layers: list[LayerNorm]) -> LipschitzBound:
        result: LipschitzBound = value.as_subclass(LipschitzBound)
        result.sound, result.p, result.layers = sound, p, layers
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "upper bound" if self.sound else "estimate"
        return f"LipschitzBound({self.tolist()}, {kind}, p={self.p:g})"


@dataclasses.dataclass
class GlobalBound:
    """Of the whole network, over all inputs.

    value: a float, an upper bound of the Lipschitz constant (``sound``) or an estimate. margins: ``[n_out,
    n_out]``, the constants ``K_ij`` of ``f_i - f_j`` from the p-norm to the absolute value. layers: see
    :class:`LayerNorm`.
    """

    value: float
    margins: Tensor
    sound: bool
    p: float
    layers: list[LayerNorm]

    def __repr__(self) -> str:
        kind = "upper bound" if self.sound else "estimate"
        return f"GlobalBound({self.value:.6g}, {kind}, p={self.p:g})"


def _check(p: float, method: str, effort: str) -> None:
    if p not in (1, 2, math.inf):
        raise ValueError(f"p must be 1, 2 or inf, got {p!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of 'gram', 'power', got {method!r}")
    if method == "power" and p != 2:
        raise ValueError(f"method 'power' is for p = 2, got p = {p}")
    if effort not in BUDGETS:
        raise ValueError(f"effort must be one of 'normal', 'high', got {effort!r}")


def radius_of(region: Region, p: float) -> tuple[Tensor, Tensor]:
    """A point of the region and how far from it its points are in the p-norm, ``[B]`` float64, rounded up."""
    lower, upper = region.lower, region.upper
    count = lower[0].numel()
    if isinstance(region, LpBall):
        # The nearest point of the box: to project moves no point of the region away from it.
        centre = torch.minimum(torch.maximum(region.x, lower), upper)
        grown = max(0.0, (0 if p == math.inf else 1 / p) - (0 if region.p == math.inf else 1 / region.p))
        return centre, region.eps.double() * (float(count) ** grown * UP) * UP
    centre = torch.minimum(torch.maximum(lower / 2 + upper / 2, lower), upper)
    reach = torch.maximum(upper.double() - centre.double(), centre.double() - lower.double()).flatten(1) * UP
    if p == math.inf:
        return centre, reach.amax(1)
    if p == 1:
        return centre, reach.sum(1) * (1 + gamma(count + 2))
    return centre, root(reach.square().sum(1) * (1 + gamma(count + 2))) * UP


def walk_over(
    bm: BoundedModule,
    region: Region | tuple[Region, ...],
    settings: Settings,
    last: int,
    soundness: str = "deployed",
) -> Walk:
    """The pass over the network for a region, up to node ``last``."""
    native_regions, batch = bm._regions(region)
    given = region if isinstance(region, tuple) else (region,)
    found = [radius_of(one, settings.p) for one in given]
    points = [Box(centre, centre)._for_engine() for centre, _ in found]
    radii = torch.stack([radius for _, radius in found])
    if settings.p == math.inf:
        radius = radii.amax(0)
    elif settings.p == 1:
        radius = radii.sum(0) * UP
    else:
        radius = root(radii.square().sum(0)) * UP if len(found) > 1 else radii[0]
    tensors = bm._tensors()
    options = bm._interval_options(soundness, native_regions[0][0].device)
    intervals = _C.IntervalWalk(bm._program, tensors, native_regions, options)
    centre = _C.IntervalWalk(bm._program, tensors, points, options)
    walk = Walk(bm.net, bm.graph, tensors, settings, batch, radius, intervals, centre)
    walk.run(last)
    return walk


def local_bound(
    bm: BoundedModule,
    region: Region | tuple[Region, ...],
    p: float = 2,
    method: str = "gram",
    *,
    effort: str = "normal",
    layers: bool = False,
    three_state: bool = True,
) -> LipschitzBound:
    """A Lipschitz constant of the network on every sample's region.

    ``||f(x) - f(y)||_p <= K ||x - y||_p`` for all ``x``, ``y`` of the region (of the convex set that it is), with ``f``
    the network in real arithmetic with these weights.

    Args:
        bm: the network.
        region: as in :meth:`BoundedModule.bound`, of any norm; a ball of the same norm gives the smallest boxes.
        p: 1, 2 or ``inf``, the norm on both sides.
        method: ``"gram"``, guaranteed, or ``"power"``, a power-iteration estimate from below for p = 2 (over
            interval boxes alone).
        effort: ``"normal"`` or ``"high"``, of the norms; see :func:`pycert.ops.masked_norm`.
        layers: also collect the norm of every affine layer with and without its masks.
        three_state: meet the product of norms with the bound that takes neurons that are certainly on for linear
            (``"gram"`` alone).

    Returns:
        :class:`LipschitzBound` ``[B]``, output units over input units, in the dtype of the region.

    Raises:
        ValueError: unknown names; an operator without Lipschitz bound (products of values, attention); weights that
            are not finite.

    Soundness: outward rounded with ``"gram"``; none with ``"power"``. Gradient: none;
    :mod:`pycert.train.losses` has the trainable bound.
    Source: Huang et al. 2021, section 3 (rows and columns of constant activations eliminated); for the
    three states see :mod:`pycert.lipschitz.states`; docs/lipschitz.md.
    """
    _check(p, method, effort)
    settings = Settings(float(p), method, effort, False, layers)
    with torch.no_grad():
        walk = walk_over(bm, region, settings, bm.graph.output)
        value = walk.lengths(bm.graph.output).lengths[:, 0]
        if three_state and method == "gram":
            value = torch.minimum(value, ThreeState(walk).of_outputs())
        if not bool(torch.isfinite(value).all()):
            bm._diagnose(walk.tensors)
    first = region[0] if isinstance(region, tuple) else region
    sound = method == "gram"
    return LipschitzBound.of(round_up(value, first.lower.dtype), sound, float(p), walk.layers)


def global_bound(
    bm: BoundedModule, p: float = 2, *, method: str = "gram", effort: str = "normal"
) -> GlobalBound:
    """A Lipschitz constant of the network on all inputs, and of every difference of two outputs.

    Args, errors: as in :func:`local_bound`. Norms of layers are kept until the weights change.

    Returns:
        :class:`GlobalBound`.

    Soundness: as in :func:`local_bound`. Source: Leino et al., "Globally-Robust Neural Networks", ICML 2021,
    for the constants ``K_ij``.
    """
    _check(p, method, effort)
    with torch.no_grad():
        walk = Walk(bm.net, bm.graph, bm._tensors(), Settings(float(p), method, effort, False, True), 1)
        graph = bm.graph
        hidden, weight = last_layer(bm)
        value = float(walk.lengths(graph.output).lengths[0, 0])
        if not math.isfinite(value):
            bm._diagnose(walk.tensors)
        count = graph.numel(graph.output)
        rows = torch.eye(count, dtype=torch.float64) if weight is None else exact_double(weight)
        constant = walk.lengths(hidden).lengths[0, 0]
        difference = rows[:, None, :] - rows[None, :, :]
        size = dual_norm(difference, float(p)) + (gamma(2) * dual_norm(rows.abs(), float(p))).amax() * 2
        size.fill_diagonal_(0)
        return GlobalBound(value, size * constant * UP, method == "gram", float(p), walk.layers)


def last_layer(bm: BoundedModule) -> tuple[int, Tensor | None]:
    """The node that the last affine layer reads and that layer's weight; the output itself and None without one."""
    graph = bm.graph
    node = graph.nodes[graph.output]
    if node.op == "linear" and len(node.shape) == 1:
        return node.inputs[0], bm._tensors()[node.params[0]]
    return graph.output, None
