"""k-ReLU: joint constraints on groups of neurons, and bounds that use them as nonnegative multipliers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycert.bounded import BoundedModule
from pycert.graph.ir import Constant, Graph, Node
from pycert.ops.krelu import DEFAULT_ROWS, krelu_hull, octahedral_directions
from pycert.regions import Region


class Octahedra(NamedTuple):
    """``lower <= z <= upper`` and ``b + A z >= 0`` for the pre-activations ``z`` of every group."""

    lower: Tensor  # [B, G, k]
    upper: Tensor  # [B, G, k]
    A: Tensor  # [B, G, 3 ** k - 1, k]
    b: Tensor  # [B, G, 3 ** k - 1]


def octahedral_bounds(
    bm: BoundedModule, region: Region, layer: str, groups: Tensor, method: str = "crown", **options: Any
) -> Octahedra:
    """Bounds on every octahedral direction of every group, in one back-substitution.

    Directions that several groups share, and the two ends of a direction, are bounded once.

    Args:
        bm: the network.
        region: a batch of ``B``.
        layer: the layer whose outputs are the neurons: a key of :meth:`BoundedModule.layer_bounds`.
        groups: ``[G, k]`` int64, neurons of each group by flat number, ``k`` from 1 to 4.
        method, options: as in :meth:`BoundedModule.bound`, without ``spec`` and ``side``.

    Returns:
        ``Octahedra(lower, upper, A, b)``, arguments of :func:`pycert.ops.krelu_hull` once the first two
        dimensions are flattened; in the units of the pre-activations.

    Raises:
        ValueError: there is no such layer; a neuron does not exist; ``k`` is not 1, 2, 3 or 4.

    Soundness: as in ``bound``.
    Source: Singh et al., "Beyond the Single Neuron Convex Barrier for Neural Network Certification", NeurIPS
    2019, section 4.
    """
    node = _node_of(bm, layer)
    width = bm.graph.numel(node)
    if groups.dim() != 2 or groups.dtype != torch.int64:
        raise ValueError(f"groups must be [G, k] of int64, got {list(groups.shape)} of {groups.dtype}")
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < width:
        raise ValueError(f"groups must hold neurons 0 to {width - 1} of {layer!r}")
    k = groups.shape[1]
    like = region.lower
    directions = octahedral_directions(k, like.dtype)
    half = directions[len(directions) // 2 :]  # the others are the negatives, in reverse order
    rows: dict[tuple[tuple[int, float], ...], int] = {}
    numbers = torch.tensor(
        [
            [
                rows.setdefault(
                    tuple(sorted((n, s) for n, s in zip(group, c, strict=True) if s != 0)), len(rows)
                )
                for c in half.tolist()
            ]
            for group in groups.tolist()
        ],
        dtype=torch.int64,
    ).reshape(len(groups), len(half))
    spec = torch.zeros(max(len(rows), 1), width, dtype=like.dtype)
    for key, number in rows.items():
        for neuron, sign in key:
            spec[number, neuron] += sign
    found = _truncated(bm, node).bound(region, method, spec=spec.to(like.device), **options)
    assert found.lower is not None and found.upper is not None
    up, down = found.upper.detach()[:, numbers], found.lower.detach()[:, numbers]  # [B, G, half]
    b = torch.cat([-down.flip(-1), up], dim=-1)
    unit = torch.eye(k, dtype=like.dtype)
    at = [int((half == e).all(1).nonzero()) for e in unit]
    A = (-directions).to(b.device).expand(*b.shape, k)
    return Octahedra(down[..., at], up[..., at], A, b)


def select_groups(
    lower: Tensor, upper: Tensor, k: int = 3, ns: int = 100, s: int = 1, least: float = 0.0
) -> Tensor:
    """Groups of unstable neurons: a sliding window over those of largest area.

    Args:
        lower, upper: ``[n]``, bounds of the pre-activations of one sample.
        k: neurons in a group.
        ns: how many neurons are grouped, those with the largest ``-lower * upper``.
        s: neurons that neighbouring windows share, less than ``k``.
        least: neurons of smaller area are left alone.

    Returns:
        ``[G, k]`` int64; empty where fewer than ``k`` neurons are unstable.

    Raises:
        ValueError: ``k`` or ``s`` out of range.

    Source: the area rule of Singh et al. 2019; the window of Ma et al. (WraLU), POPL 2024.
    """
    if k not in DEFAULT_ROWS or not 0 <= s < k:
        raise ValueError(f"select_groups: k must be 1 to 4 and s from 0 to k - 1, got k = {k}, s = {s}")
    area = torch.where((lower < 0) & (upper > 0), -lower * upper, lower.new_zeros(()))
    order = area.argsort(descending=True, stable=True)
    order = order[area[order] > least][:ns]
    if len(order) < k:
        return order.new_empty(0, k)
    starts = torch.arange(0, len(order) - k + 1, k - s)
    return order[starts[:, None] + torch.arange(k)]


@dataclasses.dataclass
class Cuts:
    """Rows ``P_c + P_x z + P_y relu(z) >= 0`` at one layer of one sample; ``[R]`` and ``[R, n]``, float64."""

    layer: str
    P_x: Tensor
    P_y: Tensor
    P_c: Tensor
    largest: Tensor  # [n]: of |z|


def hull_cuts(
    bm: BoundedModule,
    region: Region,
    *,
    k: int = 3,
    ns: int = 100,
    s: int = 1,
    max_rows: int = 16,
    layers: tuple[str, ...] | None = None,
    **options: Any,
) -> list[Cuts]:
    """The hulls of groups of neurons before every ReLU, as rows over whole layers.

    Args:
        bm: the network.
        region: a batch of 1.
        k, ns, s: as in :func:`select_groups`.
        max_rows: as in :func:`pycert.ops.krelu_hull`, for each group.
        layers: the layers to take; all in front of a ReLU unless given.
        options: of ``method="crown"``, whose bounds the octahedra are.

    Returns:
        One ``Cuts`` for each layer that has groups.

    Raises:
        ValueError: the batch is not 1; as in ``octahedral_bounds``.

    Soundness: that of the bounds; the rows themselves are outward rounded.
    """
    if region.batch != 1:
        raise ValueError(f"hull_cuts: the region must be a batch of 1, got {region.batch}")
    bounds = bm.layer_bounds(region, method="crown", **options)
    known = {_name(bm.graph, n.inputs[0]) for n in bm.graph.nodes if n.op == "relu"}
    cuts = []
    for layer in known & set(bounds) if layers is None else layers:
        lower, upper = (t.detach().flatten() for t in (bounds[layer].lower, bounds[layer].upper))  # type: ignore[union-attr]
        groups = select_groups(lower, upper, k, ns, s)
        if len(groups) == 0:
            continue
        octahedra = octahedral_bounds(bm, region, layer, groups, **options)
        rows, count = krelu_hull(*(t[0].contiguous() for t in octahedra), max_rows=max_rows)
        kept = torch.arange(rows.shape[1])[None, :] < count[:, None]
        chosen = rows[kept].double()
        members = groups[:, None, :].expand(-1, rows.shape[1], -1)[kept]
        wide = torch.zeros(len(chosen), len(lower), dtype=torch.float64)
        P_x = wide.scatter(1, members, chosen[:, 1 : 1 + k])
        P_y = wide.scatter(1, members, chosen[:, 1 + k :])
        largest = torch.maximum(-lower, upper).double()
        cuts.append(Cuts(layer, P_x, P_y, chosen[:, 0], largest))
    return sorted(cuts, key=lambda c: _node_of(bm, c.layer))


class CutModule:
    """A network whose outputs are ``spec @ f(x)`` less nonnegative combinations of cuts.

    A cut is nonnegative on every execution, so a lower bound of the difference is one of ``spec @ f(x)``, whatever the
    multipliers are. The engine bounds the difference as it bounds any network, and so accounts for its rounding.
    """

    def __init__(self, bm: BoundedModule, spec: Tensor) -> None:
        graph = bm.graph
        self.spec = spec
        self.nodes = list(graph.nodes)
        self.slots = list(graph.slots)
        self.cuts: list[Cuts] = []
        self.weights: list[tuple[Constant, Constant, Constant]] = []
        self.bm, self.output = bm, self._linear(graph.output, Constant(spec, "spec"), None)

    def _linear(self, node: int, weight: Constant, bias: Constant | None) -> int:
        shape = self.nodes[node].shape
        if len(shape) != 1:
            self.nodes.append(Node("reshape", (node,), (math.prod(shape),)))
            node = len(self.nodes) - 1
        self.slots += [weight] if bias is None else [weight, bias]
        first = len(self.slots) - (1 if bias is None else 2)
        params = (first, -1 if bias is None else first + 1)
        self.nodes.append(Node("linear", (node,), (len(self.spec),), params))
        return len(self.nodes) - 1

    def _add(self, a: int, b: int) -> int:
        self.nodes.append(Node("add", (a, b), (len(self.spec),), attrs={"sign": 1}))
        return len(self.nodes) - 1

    def add_cuts(self, layer: str, P_y: Tensor, P_x: Tensor, P_c: Tensor, largest: Tensor) -> None:
        """Adds rows ``P_c + P_x z + P_y relu(z) >= 0`` over the outputs ``z`` of a layer with ``|z| <= largest``.

        Args:
            layer: a key of :meth:`BoundedModule.layer_bounds` in front of a ReLU.
            P_y, P_x: ``[R, n]`` float64. P_c: ``[R]`` float64.
            largest: ``[n]`` float64.

        Raises:
            ValueError: no ReLU reads the layer.
        """
        before = _node_of(self.bm, layer)
        after = [i for i, n in enumerate(self.bm.graph.nodes) if n.op == "relu" and n.inputs[0] == before]
        if not after:
            raise ValueError(f"add_cuts: no ReLU reads {layer!r}")
        weights = tuple(Constant(self.spec, f"cuts of {layer}") for _ in range(3))
        term = self._linear(before, weights[0], weights[2])
        self.output = self._add(self._add(self.output, term), self._linear(after[0], weights[1], None))
        self.cuts.append(Cuts(layer, P_x, P_y, P_c, largest))
        self.weights.append(weights)  # type: ignore[arg-type]

    def module(self) -> BoundedModule:
        return _over(
            self.bm,
            dataclasses.replace(self.bm.graph, nodes=self.nodes, slots=self.slots, output=self.output),
        )

    def set_multipliers(self, multipliers: list[Tensor]) -> None:
        """Takes multipliers ``[S, R]``, float64 and nonnegative, one tensor for each call of ``add_cuts``.

        The combination is rounded to the network's dtype; what that moves it by over the box, and what the
        sums err (R + 8 roundings), is added to its constant.
        """
        dtype = self.spec.dtype
        for rho, cut, (P_x, P_y, P_c) in zip(multipliers, self.cuts, self.weights, strict=True):
            unit = 2.0**-52 * (rho.shape[1] + 8)
            constant = rho @ cut.P_c
            with torch.no_grad():
                slack = unit * (rho @ cut.P_c.abs())
            for given, slot in ((cut.P_x, P_x), (cut.P_y, P_y)):
                combined = rho @ given
                slot.tensor = -combined.to(dtype)
                with torch.no_grad():
                    moved = (combined + slot.tensor.double()).abs() + unit * (rho @ given.abs())
                    slack = slack + moved @ cut.largest
            with torch.no_grad():
                slack = slack * (1 + 1e-9) + torch.finfo(dtype).eps * (constant.abs() + slack) + 1e-300
            P_c.tensor = -(constant + slack).to(dtype)


def lower_bound(
    bm: BoundedModule,
    region: Region,
    spec: Tensor,
    cuts: list[Cuts],
    *,
    steps: int = 30,
    learning_rate: float = 0.05,
    soundness: str = "deployed",
    threshold: float = math.inf,
    **options: Any,
) -> Tensor:
    """Lower bounds of ``spec @ f(x)`` with multipliers for the cuts, by projected Adam.

    Args:
        bm: the network. region: a batch of 1.
        spec: ``[S, n_out]``.
        cuts: as :func:`hull_cuts` finds them.
        steps: of Adam on the multipliers; the lower slopes are optimised anew in each, by two steps of alpha-crown.
        learning_rate: of the first step; falls to a tenth.
        soundness: of the result; the steps themselves are in plain arithmetic.
        threshold: stops once all bounds are above it.
        options: of ``method="alpha-crown"``, for the final bounds.

    Returns:
        ``[S]``, never below the bounds of alpha-crown.

    Soundness: as ``soundness`` says. Gradient: none.
    Source: the dual of Mueller et al. (PRIMA), POPL 2022, as in Ferrari et al. (MN-BaB), ICLR 2022.
    """
    spec = spec.detach()
    final = {"side": "lower", "soundness": soundness, **options}
    plain = bm.bound(region, "alpha-crown", spec=spec, **final).lower
    assert plain is not None
    best = plain[0].detach()
    if not cuts or steps == 0 or bool((best > threshold).all()):
        return best
    augmented = CutModule(bm, spec)
    for cut in cuts:
        augmented.add_cuts(cut.layer, cut.P_y, cut.P_x, cut.P_c, cut.largest)
    rho = [torch.zeros(len(spec), len(c.P_c), dtype=torch.float64, requires_grad=True) for c in cuts]
    module = augmented.module()
    optimiser = torch.optim.Adam(rho, lr=learning_rate)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.1 ** (1 / steps))
    kept, found = [r.detach().clone() for r in rho], torch.full_like(best, -math.inf)
    for _ in range(steps):
        augmented.set_multipliers(rho)
        value = module.bound(region, "alpha-crown", iterations=2, side="lower", soundness="none").lower
        assert value is not None
        better = value[0].detach() > found
        found = torch.where(better, value[0].detach(), found)
        for keep, r in zip(kept, rho, strict=True):
            keep[better] = r.detach()[better]
        if bool((torch.maximum(found, best) > threshold).all()):
            break
        optimiser.zero_grad()
        (-value.sum()).backward()
        optimiser.step()
        decay.step()
        with torch.no_grad():
            for r in rho:
                r.clamp_(min=0)
    with torch.no_grad():
        augmented.set_multipliers(kept)
    proved = augmented.module().bound(region, "alpha-crown", **final).lower
    assert proved is not None
    return torch.maximum(best, proved[0].detach())


# ---- the graph of the network -----------------------------------------------------------------


def _name(graph: Graph, node: int) -> str:
    return graph.nodes[node].path or f"node{node}"


def _node_of(bm: BoundedModule, layer: str) -> int:
    read = {n.inputs[0] for n in bm.graph.nodes if n.op == "relu"}
    found = {_name(bm.graph, i): i for i in sorted(read)}
    if layer not in found:
        raise ValueError(f"layer must be one that a ReLU reads ({', '.join(found)}), got {layer!r}")
    return found[layer]


def _over(bm: BoundedModule, graph: Graph) -> BoundedModule:
    """The same network with another graph over it."""
    other = BoundedModule.__new__(BoundedModule)
    nn.Module.__init__(other)
    other.net, other.graph = bm.net, graph
    other._prepare()
    return other


def _truncated(bm: BoundedModule, node: int) -> BoundedModule:
    return _over(bm, dataclasses.replace(bm.graph, nodes=bm.graph.nodes[: node + 1], output=node))
