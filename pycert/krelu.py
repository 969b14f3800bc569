"""k-ReLU: joint constraints on groups of neurons, and bounds that use them as nonnegative multipliers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pycert._groups import select_groups, sparse_cover
from pycert.graph.ir import ACTIVATIONS, Graph
from pycert.ops.krelu import krelu_hull, octahedral_directions
from pycert.options import Options, parse
from pycert.regions import Region

if TYPE_CHECKING:
    from pycert.bounded import BoundedModule, Bounds

#: Bounds by node number.
Boxes = dict[int, tuple[Tensor, Tensor]]
#: Rows to bound: a table, the table's row of every (sample, spec) or None, and how many a sample has.
Rows = tuple[Tensor, Tensor | None, int]
#: Steps of ascent for a leaf of a branching, at most.
LEAF_STEPS = 20
_TABLE_BYTES = 1 << 26  # of directions that are bounded at once


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
        groups: ``[G, k]`` or ``[B, G, k]`` int64, neurons of each group by flat number, ``k`` from 1 to 4.
        method, options: as in :meth:`BoundedModule.bound`, without ``spec`` and ``side``.

    Returns:
        ``Octahedra(lower, upper, A, b)``, arguments of :func:`pycert.ops.krelu_hull` once the first two
        dimensions are flattened; in the units of the pre-activations.

    Raises:
        ValueError: there is no such layer; no groups; a neuron does not exist; ``k`` is not 1, 2, 3 or 4.

    Soundness: as in ``bound``.
    Source: Singh et al., "Beyond the Single Neuron Convex Barrier for Neural Network Certification", NeurIPS
    2019, section 4.
    """
    node = _node_of(bm.graph, layer)
    width = bm.graph.numel(node)
    if groups.dim() not in (2, 3) or groups.dtype != torch.int64:
        raise ValueError(
            f"groups must be [G, k] or [B, G, k] of int64, got {list(groups.shape)} of {groups.dtype}"
        )
    if groups.shape[-2] == 0:
        raise ValueError(f"groups must hold at least one group, got {list(groups.shape)}")
    if groups.dim() == 3 and len(groups) != region.batch:
        raise ValueError(f"groups must have the region's batch of {region.batch}, got {list(groups.shape)}")
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < width:
        raise ValueError(f"groups must hold neurons 0 to {width - 1} of {layer!r}")
    parsed = parse(method, options, ("method",), without=("side",))
    regions, _ = bm._regions(region)
    return _octahedra(
        bm, regions, node, groups.expand(region.batch, *groups.shape[-2:]), method, parsed, None
    )


def _octahedra(
    bm: BoundedModule,
    regions: list[Any],
    node: int,
    groups: Tensor,
    method: str,
    parsed: Options,
    boxes: Boxes | None,
) -> Octahedra:
    """``octahedral_bounds`` of groups ``[B, G, k]``, with boxes that are known already."""
    batch, count, k = groups.shape
    like = regions[0][0]
    directions = octahedral_directions(k, like.dtype).to(like.device)
    half = directions[len(directions) // 2 :]  # the others are the negatives, in reverse order
    table, number = _shared_rows(groups, half.long())  # [B, S, k] codes, [B, G, half]
    size = table.shape[1]
    width = bm.graph.numel(node)
    up, down = like.new_empty(batch, size), like.new_empty(batch, size)
    part = _truncated(bm, node)
    chosen = dataclasses.replace(parsed, side="both")
    step = max(1, _TABLE_BYTES // (batch * (width + 1) * like.element_size()))
    for begin in range(0, size, step):
        codes = table[:, begin : begin + step].reshape(-1, k)
        spec = like.new_zeros(len(codes), width + 1)  # the last column takes what stands for nothing
        sign = torch.where(codes > 0, 1.0, -1.0).to(like.dtype)
        spec.scatter_add_(1, torch.where(codes == 0, width, codes.abs() - 1), sign)
        rows = (spec[:, :width].contiguous(), None, len(codes) // batch)
        given: tuple[Boxes, Boxes] | None = None if boxes is None else (_before(boxes, node), {})
        found = part._bound(regions, rows, method, chosen, boxes=given)
        assert found.lower is not None and found.upper is not None
        up[:, begin : begin + step] = found.upper.detach()
        down[:, begin : begin + step] = found.lower.detach()
    flat = number.reshape(batch, -1)
    up, down = (t.gather(1, flat).view(batch, count, -1) for t in (up, down))
    b = torch.cat([-down.flip(-1), up], dim=-1)
    at = [int((half == e).all(1).nonzero()) for e in torch.eye(k, dtype=like.dtype, device=like.device)]
    A = (-directions).expand(*b.shape, k)
    return Octahedra(down[..., at], up[..., at], A, b)


def _shared_rows(groups: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Every direction of every group once.

    Args:
        groups: ``[B, G, k]``. half: ``[H, k]``, directions of which none is another's negative.

    Returns:
        ``[B, S, k]``, the directions of each sample: ``neuron + 1`` with the sign, 0 for none; and
        ``[B, G, H]``, which of them a group's direction is. A sample's spare directions are of zeros.
    """
    batch, count, k = groups.shape
    codes = (groups.unsqueeze(2) + 1) * half  # [B, G, H, k]
    order = codes.abs().argsort(dim=-1)
    codes = codes.gather(-1, order).reshape(batch, -1, k)
    tables, numbers = [], []
    for of_sample in codes:
        table, number = torch.unique(of_sample, dim=0, return_inverse=True)
        tables.append(table)
        numbers.append(number)
    size = max(len(t) for t in tables)
    padded = torch.stack([torch.cat([t, t.new_zeros(size - len(t), k)]) for t in tables])
    return padded, torch.stack(numbers).view(batch, count, len(half))


@dataclasses.dataclass
class Cuts:
    """Rows ``P_c + P_x z[index] + P_y relu(z)[index] >= 0`` over one layer's outputs ``z``.

    ``index``, ``P_x`` and ``P_y`` are ``[B, R, k]``, ``P_c`` is ``[B, R]``; spare rows are zero.
    """

    layer: str
    index: Tensor
    P_x: Tensor
    P_y: Tensor
    P_c: Tensor

    def rows_of(self, sample: int) -> Cuts:
        """Those of one sample, without spare rows."""
        used = (self.P_x[sample] != 0).any(1) | (self.P_y[sample] != 0).any(1)
        return Cuts(self.layer, *(t[sample][used][None] for t in (self.index, self.P_x, self.P_y, self.P_c)))


class CutSet:
    """Linear constraints on a network's layers, for ``method="krelu"`` and ``"lp"``.

    Whatever holds for every execution over the region may be added: rows of hulls of groups, general
    cutting planes, the two halves of a split neuron (the bound then holds for that half).
    """

    def __init__(self, bm: BoundedModule) -> None:
        self.bm = bm
        self.cuts: dict[int, Cuts] = {}  # by number of the activation

    def add_cuts(
        self, layer: str, P_y: Tensor, P_x: Tensor, P_c: Tensor, index: Tensor | None = None
    ) -> None:
        """Adds rows ``P_c + P_x z + P_y activation(z) >= 0`` over the outputs ``z`` of a layer.

        Args:
            layer: a key of :meth:`BoundedModule.layer_bounds` in front of an elementwise activation.
            P_y, P_x: ``[R, n]`` or ``[B, R, n]`` over the flattened layer; with ``index`` ``[R, k]`` or
                ``[B, R, k]``, over k neurons of each row. Stored by their nonzero elements.
            P_c: ``[R]`` or ``[B, R]``.
            index: like ``P_y``, int64: which neurons.

        Raises:
            ValueError: no activation reads the layer, or several that differ; shapes do not fit; NaN or infinite
                numbers; an index out of range.
            TypeError: the dtypes differ; not a tensor.

        Soundness: the caller vouches for the rows; whatever multipliers they get, the bounds then hold.
        Source: the dual of Mueller et al. (PRIMA), POPL 2022; for cutting planes in general Zhang et al.
        (GCP-CROWN), NeurIPS 2022.
        """
        for name, t in (
            ("P_y", P_y),
            ("P_x", P_x),
            ("P_c", P_c),
            *([] if index is None else [("index", index)]),
        ):
            if not isinstance(t, Tensor):
                raise TypeError(f"add_cuts: {name} must be a tensor, got {type(t).__name__}")
        activation, value = _activation_of(self.bm.graph, layer)
        width = self.bm.graph.numel(value)
        if P_y.dim() not in (2, 3) or P_x.shape != P_y.shape or P_c.shape != P_y.shape[:-1]:
            shapes = ", ".join(str(list(t.shape)) for t in (P_y, P_x, P_c))
            raise ValueError(f"add_cuts: P_y, P_x, P_c must be [R, n], [R, n], [R], got {shapes}")
        if not P_y.dtype == P_x.dtype == P_c.dtype or not P_y.dtype.is_floating_point:
            raise TypeError(f"add_cuts: dtypes must be equal, got {P_y.dtype}, {P_x.dtype}, {P_c.dtype}")
        if not all(bool(torch.isfinite(t).all()) for t in (P_y, P_x, P_c)):
            raise ValueError("add_cuts: rows must be finite, got NaN or infinite numbers")
        if index is None:
            if P_y.shape[-1] != width:
                raise ValueError(f"add_cuts: {layer!r} has {width} neurons, got rows of {P_y.shape[-1]}")
            P_y, P_x, index = _nonzero(P_y.detach(), P_x.detach())
        elif index.shape != P_y.shape or index.dtype != torch.int64:
            raise ValueError(f"add_cuts: index must be {list(P_y.shape)} of int64, got {list(index.shape)}")
        elif index.numel() and not 0 <= int(index.min()) <= int(index.max()) < width:
            raise ValueError(f"add_cuts: index must hold neurons 0 to {width - 1} of {layer!r}")
        parts = [
            t.detach() if t.dim() == d else t.detach()[None]
            for t, d in ((index, 3), (P_x, 3), (P_y, 3), (P_c, 2))
        ]
        new = Cuts(layer, *parts)
        known = self.cuts.get(activation)
        if known is not None and len(known.P_c) != len(new.P_c) and 1 not in (len(known.P_c), len(new.P_c)):
            raise ValueError(
                f"add_cuts: rows of batches of {len(known.P_c)} and {len(new.P_c)} do not go together"
            )
        self.cuts[activation] = _joined(self.cuts[activation], new) if activation in self.cuts else new

    @property
    def count(self) -> int:
        """Rows in all, spare ones included."""
        return sum(cuts.P_c.shape[1] for cuts in self.cuts.values())

    def _for_engine(self, batch: int, like: Tensor) -> dict[int, tuple[Tensor, ...]]:
        found = {}
        for activation, cuts in self.cuts.items():
            if cuts.P_c.shape[0] not in (1, batch):
                raise ValueError(f"cuts: rows are of a batch of {cuts.P_c.shape[0]}, the region's is {batch}")
            if cuts.P_c.dtype != like.dtype or cuts.P_c.device != like.device:
                raise TypeError(
                    f"cuts must have the dtype and device of the region ({like.dtype}, {like.device}), got "
                    f"{cuts.P_c.dtype}, {cuts.P_c.device}"
                )
            found[activation] = tuple(
                t.expand(batch, *t.shape[1:]).contiguous() for t in (cuts.index, cuts.P_x, cuts.P_y, cuts.P_c)
            )
        return found

    def _with(self, other: CutSet) -> CutSet:
        if other.bm is not self.bm:  # numbers of its neurons mean nothing here
            raise ValueError("cuts are of another BoundedModule; add them to a CutSet of this one")
        both = CutSet(self.bm)
        both.cuts = dict(self.cuts)
        for activation, cuts in other.cuts.items():
            both.cuts[activation] = _joined(both.cuts[activation], cuts) if activation in both.cuts else cuts
        return both

    def _of_samples(self, samples: Tensor) -> CutSet:
        found = CutSet(self.bm)
        for a, c in self.cuts.items():
            at = samples if len(c.P_c) > 1 else torch.zeros_like(samples)
            found.cuts[a] = Cuts(c.layer, c.index[at], c.P_x[at], c.P_y[at], c.P_c[at])
        return found


def _nonzero(P_y: Tensor, P_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense rows by their nonzero elements: ``P_y``, ``P_x`` and ``index``, each ``[..., R, k]``."""
    used = (P_y != 0) | (P_x != 0)
    k = max(1, int(used.sum(-1).max())) if used.numel() else 1
    index = used.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :k].contiguous()
    return P_y.gather(-1, index), P_x.gather(-1, index), index


def _joined(a: Cuts, b: Cuts) -> Cuts:
    """Rows of both, filled up to the same width and batch."""
    batch, k = max(len(a.index), len(b.index)), max(a.index.shape[2], b.index.shape[2])

    def fill(t: Tensor) -> Tensor:
        if t.dim() == 3:
            t = torch.nn.functional.pad(t, (0, k - t.shape[2]))
        return t.expand(batch, *t.shape[1:])

    pairs = ((getattr(a, name), getattr(b, name)) for name in ("index", "P_x", "P_y", "P_c"))
    return Cuts(a.layer, *(torch.cat([fill(x), fill(y)], dim=1) for x, y in pairs))


def hull_cuts(bm: BoundedModule, region: Region, **options: Any) -> CutSet:
    """The hulls of groups of neurons before every ReLU, as rows over these neurons.

    Args:
        bm: the network.
        region: a batch of ``B``.
        options: of ``method="krelu"``: ``k, ns, s, cover, least, rows`` choose the groups and how many rows a
            group has at most, ``intermediate`` the bounds that they rest on.

    Returns:
        ``CutSet`` with rows of every layer that has groups.

    Raises:
        ValueError: as in :meth:`BoundedModule.bound`.

    Soundness: that of the bounds; the rows themselves are outward rounded.
    """
    parsed = parse("krelu", options, ("method",), without=("side",))
    regions, _ = bm._regions(region)
    _, cuts = known_boxes(bm, regions, parsed)
    return cuts


def box_rows(bm: BoundedModule, boxes: Boxes) -> CutSet:
    """``z >= lower`` of every neuron of every ReLU layer, then ``z <= upper``; infinite ends give rows of zeros."""
    found = CutSet(bm)
    for i, node in enumerate(bm.graph.nodes):
        if node.op != "relu" or i > bm.graph.output:
            continue
        lower, upper = (t.detach().flatten(1) for t in boxes[node.inputs[0]])
        batch, n = lower.shape
        ends = torch.cat([-lower, upper], dim=1)
        sign = torch.cat([torch.ones_like(lower), -torch.ones_like(upper)], dim=1)
        known = torch.isfinite(ends)
        index = torch.arange(n, device=lower.device).repeat(2).expand(batch, 2 * n).unsqueeze(2)
        P_x = torch.where(known, sign, 0).unsqueeze(2)
        name = _name(bm.graph, node.inputs[0])
        found.cuts[i] = Cuts(name, index, P_x, torch.zeros_like(P_x), torch.where(known, ends, 0))
    return found


def _layer_cuts(
    bm: BoundedModule, regions: list[Any], node: int, boxes: Boxes, parsed: Options
) -> Cuts | None:
    """Rows of the hulls of groups at one layer, None where no sample has groups."""
    if parsed.rows == 0:
        return None
    lower, upper = (t.detach().flatten(1) for t in boxes[node])
    batch = len(lower)
    chosen = [
        select_groups(lo, up, parsed.k, parsed.ns, parsed.s, parsed.least, parsed.cover)
        for lo, up in zip(lower, upper, strict=True)
    ]
    size = max(len(g) for g in chosen)
    if size == 0:
        return None
    device = lower.device
    real = torch.arange(size, device=device) < torch.tensor([len(g) for g in chosen], device=device)[:, None]
    groups = torch.zeros(batch, size, parsed.k, dtype=torch.int64, device=device)
    groups[real] = torch.cat(chosen).sort(dim=1).values
    plain = _bare(parsed)
    method = "crown"
    if parsed.directions > 0 and len(boxes) > 1:
        method, plain = "alpha-crown", dataclasses.replace(plain, iterations=parsed.directions)
    octahedra = _octahedra(bm, regions, node, groups, method, plain, boxes)
    flat = [t[real].contiguous() for t in octahedra]
    lo, up = (t.gather(1, groups.flatten(1)).view(groups.shape)[real] for t in (lower, upper))
    flat[0], flat[1] = torch.maximum(flat[0], lo), torch.minimum(flat[1], up)
    found, _ = _hulls(flat[0], flat[1], flat[2], flat[3], parsed.rows)
    k = parsed.k
    a, c = found[..., 1 : 1 + k], found[..., 1 + k :]
    joint = (c != 0).any(-1) & (((a != 0) | (c != 0)).sum(-1) > 1)
    found = found * joint.unsqueeze(-1)
    order = joint.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    found = found.gather(1, order.unsqueeze(-1).expand_as(found))[:, : max(1, int(joint.sum(1).max()))]
    rows = found.new_zeros(batch, size, *found.shape[1:])
    rows[real] = found
    index = groups.unsqueeze(2).expand(batch, size, rows.shape[2], k).reshape(batch, -1, k)
    rows = rows.flatten(1, 2)
    keep = (rows != 0).any(-1).any(0)
    parts = (index, rows[..., 1 : 1 + k], rows[..., 1 + k :], rows[..., 0])
    return Cuts(_name(bm.graph, node), *(t[:, keep].contiguous() for t in parts))


def _hulls(lower: Tensor, upper: Tensor, A: Tensor, b: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """``krelu_hull``, on the processor where the device has no kernel for it."""
    on_cpu = lower.is_cuda and not torch._C._dispatch_has_kernel_for_dispatch_key(
        "pycert::krelu_hull", "CUDA"
    )
    if on_cpu:
        found, count = krelu_hull(lower.cpu(), upper.cpu(), A.cpu(), b.cpu(), max_rows=rows)
        return found.to(lower.device), count.to(lower.device)
    return krelu_hull(lower, upper, A, b, max_rows=rows)


def _bare(parsed: Options) -> Options:
    """What a helping call of ``crown`` takes over."""
    names = ("slope", "intersect", "soundness", "precision", "memory", "pooling")
    return Options(**{name: getattr(parsed, name) for name in names})


# ---- intermediate bounds ----------------------------------------------------------------------


def known_boxes(bm: BoundedModule, regions: list[Any], parsed: Options) -> tuple[Boxes, CutSet]:
    """Bounds of all pre-activations, by node number, and the rows of the hulls there.

    With ``intermediate="krelu"`` the rows of earlier layers tighten the bounds of later ones.
    """
    relus: dict[int, int] = {}  # the first ReLU that reads a value: another activation may read it, too
    for i, n in enumerate(bm.graph.nodes):
        if n.op == "relu":
            relus.setdefault(n.inputs[0], i)
    tighten = parsed.intermediate == "krelu"
    base = "crown" if tighten else parsed.intermediate
    plain = dataclasses.replace(_bare(parsed), iterations=20, learning_rate=parsed.learning_rate)
    boxes = bm._layer_boxes(regions, base, dataclasses.replace(plain, intermediate=base))
    cuts = CutSet(bm)
    given: Boxes = {}
    for node in sorted(boxes):
        if tighten and given:
            boxes[node] = _tightened(bm, regions, node, boxes[node], given, cuts, parsed)
        given[node] = boxes[node]
        if node in relus:
            with torch.no_grad():
                found = _layer_cuts(bm, regions, node, given, parsed)
            if found is not None:
                cuts.cuts[relus[node]] = found
    return given, cuts


def _tightened(
    bm: BoundedModule,
    regions: list[Any],
    node: int,
    box: tuple[Tensor, Tensor],
    given: Boxes,
    cuts: CutSet,
    parsed: Options,
) -> tuple[Tensor, Tensor]:
    """Bounds of the neurons of one layer whose sign is open, with slopes and multipliers optimised for each."""
    lower, upper = box[0].flatten(1), box[1].flatten(1)
    part, table = _truncated(bm, node), torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    crown = part._bound(regions, None, "crown", _bare(parsed), boxes=(given, {}))
    assert crown.lower is not None and crown.upper is not None
    lower = torch.maximum(lower, crown.lower.flatten(1))
    upper = torch.minimum(upper, crown.upper.flatten(1))
    open_ones = ((lower < 0) & (upper > 0)).any(0).nonzero().flatten()
    if len(open_ones) > 0:
        rows = (
            table[open_ones],
            torch.arange(len(open_ones), device=lower.device).repeat(len(lower)),
            len(open_ones),
        )
        options = dataclasses.replace(parsed, side="both", threshold=0.0, intermediate="crown")
        found = part._bound(regions, rows, "alpha-crown", options, boxes=(given, {}), cuts=cuts)
        assert found.lower is not None and found.upper is not None
        lower = lower.index_copy(1, open_ones, torch.maximum(lower[:, open_ones], found.lower))
        upper = upper.index_copy(1, open_ones, torch.minimum(upper[:, open_ones], found.upper))
    return lower.view_as(box[0]), upper.view_as(box[1])


# ---- the method -------------------------------------------------------------------------------


def bound_rows(
    bm: BoundedModule, regions: list[Any], rows: Rows | None, parsed: Options, return_linear: bool
) -> Bounds:
    """``method="krelu"`` of :meth:`BoundedModule.bound`."""
    from pycert import _branch  # it needs this module

    _branch.check(parsed, return_linear)
    boxes, cuts = known_boxes(bm, regions, parsed)
    if parsed.cuts is not None:
        cuts = cuts._with(parsed.cuts)
    given = dataclasses.replace(parsed, intermediate="crown")  # these bounds are given
    best = ascended(bm, regions, rows, given, boxes, cuts, return_linear)
    solve = leaf_solver(bm, parsed, CutSet(bm) if parsed.cuts is None else parsed.cuts)
    return _branch.branched(bm, regions, rows, parsed, boxes, best, solve)


def leaf_solver(bm: BoundedModule, parsed: Options, cuts: CutSet) -> Any:
    """Bounds of leaves of a branching by ascent, with rows ``cuts`` and the ends of all boxes as rows."""
    steps = min(parsed.iterations, LEAF_STEPS)
    options = dataclasses.replace(
        parsed, intermediate="crown", side="lower", iterations=steps, threshold=None
    )

    def solve(regions: list[Any], spec: Tensor, boxes: Boxes, samples: Tensor) -> Tensor:
        rows = (spec, torch.arange(len(spec), device=spec.device), 1)
        every = cuts._of_samples(samples)._with(box_rows(bm, boxes))
        found = bm._bound(regions, rows, "alpha-crown", options, boxes=(boxes, {}), cuts=every).lower
        assert found is not None
        return found

    return solve


def ascended(
    bm: BoundedModule,
    regions: list[Any],
    rows: Rows | None,
    parsed: Options,
    boxes: Boxes,
    cuts: CutSet,
    return_linear: bool,
) -> Bounds:
    """The better of alpha-crown and of an ascent of slopes and multipliers together, for every row."""
    single = dataclasses.replace(parsed, iterations=min(parsed.iterations, 20))
    best = bm._bound(regions, rows, "alpha-crown", single, return_linear, boxes=(boxes, {}))
    if parsed.iterations == 0 or not cuts.cuts or _all_beyond(best, parsed.threshold):
        return best
    joint = bm._bound(regions, rows, "alpha-crown", parsed, return_linear, boxes=(boxes, {}), cuts=cuts)
    return _better(best, joint)


def _all_beyond(bounds: Bounds, threshold: float | None) -> bool:
    """Whether every bound is good enough."""
    if threshold is None:
        return False
    ends = ((bounds.lower, 1), (bounds.upper, -1))
    return all(bool((t * sign > threshold * sign).all()) for t, sign in ends if t is not None)


def _better(a: Bounds, b: Bounds) -> Bounds:
    """The tighter end of every row, with its linear function."""
    result = dataclasses.replace(a)
    for end, sign in (("lower", 1), ("upper", -1)):
        one, other = getattr(a, end), getattr(b, end)
        if one is None:
            continue
        setattr(result, end, torch.maximum(one, other) if sign > 0 else torch.minimum(one, other))
        if a.linear is None or b.linear is None:
            continue
        takes = ((other - one) * sign > 0).detach().flatten(1)
        for name in ("A_" + end, "c_" + end):
            setattr(result.linear, name, _chosen(takes, getattr(a.linear, name), getattr(b.linear, name)))
    return result


def _chosen(takes: Tensor, one: Any, other: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(_chosen(takes, x, y) for x, y in zip(one, other, strict=True))
    if one is None or other is None:
        return one
    return torch.where(takes.view(*takes.shape, *(1,) * (one.dim() - 2)), other, one)


# ---- the graph of the network -----------------------------------------------------------------


def _name(graph: Graph, node: int) -> str:
    return graph.nodes[node].path or f"node{node}"


def _node_of(graph: Graph, layer: str) -> int:
    read = {n.inputs[0] for n in graph.nodes if n.op == "relu"}
    found = {_name(graph, i): i for i in sorted(read)}
    if layer not in found:
        raise ValueError(f"layer must be one that a ReLU reads ({', '.join(found)}), got {layer!r}")
    return found[layer]


def _activation_of(graph: Graph, layer: str) -> tuple[int, int]:
    """Numbers of the first activation that reads a layer, and of the layer; several have to be the same function."""
    found: dict[str, tuple[int, int]] = {}
    for i, n in enumerate(graph.nodes):
        if n.op not in ACTIVATIONS:
            continue
        name = _name(graph, n.inputs[0])
        first = graph.nodes[found.setdefault(name, (i, n.inputs[0]))[0]]
        if name == layer and (first.op, first.params, first.attrs) != (n.op, n.params, n.attrs):
            raise ValueError(
                f"layer {layer!r} is read by {first.op} and {n.op}: rows cannot tell which one they mean"
            )
    if layer not in found:
        raise ValueError(f"layer must be one that an activation reads ({', '.join(found)}), got {layer!r}")
    return found[layer]


def _before(boxes: Boxes, node: int) -> Boxes:
    return {i: box for i, box in boxes.items() if i < node}


def _truncated(bm: BoundedModule, node: int) -> BoundedModule:
    graph = dataclasses.replace(bm.graph, nodes=bm.graph.nodes[: node + 1], output=node)
    return bm._part(graph)


__all__ = [
    "CutSet",
    "Cuts",
    "Octahedra",
    "hull_cuts",
    "octahedral_bounds",
    "select_groups",
    "sparse_cover",
]
