"""Branching over the signs of neurons: a bound is the least of those of the leaves, each bounded by the engine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pycert import krelu
from pycert.options import Options

if TYPE_CHECKING:
    from pycert.bounded import BoundedModule, Bounds

#: Leaves that are split at once, at most: their halves are one batch of the engine.
AT_ONCE = 32
#: How much of the larger gain counts beside the smaller one where a neuron is chosen.
SHARE_OF_LARGER = 0.5

#: Lower bounds ``[N, 1]`` of one row on each of ``N`` regions with their boxes; rows ``[N, n_out]``, samples ``[N]``.
Solve = Callable[[list[Any], Tensor, krelu.Boxes, Tensor], Tensor]


@dataclasses.dataclass
class Leaf:
    """A part of a region, where some neurons have known signs."""

    bound: float
    boxes: krelu.Boxes  # [1, n] each
    gain: tuple[float, int, int]  # of the neuron to split next: score, node, number


@dataclasses.dataclass
class Tree:
    """The leaves of one row of the specification on one sample that are not good enough."""

    sample: int
    row: Tensor  # [n_out]
    target: float
    leaves: list[Leaf]
    count: int = 1  # leaves in all
    done: float = math.inf  # the least bound of those that are good enough

    @property
    def bound(self) -> float:
        return min([self.done, *(leaf.bound for leaf in self.leaves)])

    @property
    def can_gain(self) -> bool:
        return bool(self.leaves) and min(leaf.bound for leaf in self.leaves) < self.done

    def add(self, leaf: Leaf) -> None:
        if leaf.bound > self.target or leaf.gain[0] <= 0:
            self.done = min(self.done, leaf.bound)
        else:
            self.leaves.append(leaf)

    def take(self, count: int, most: int) -> list[Leaf]:
        """The worst leaves, as many as may still be split."""
        count = min(count, most - self.count)
        self.leaves.sort(key=lambda leaf: leaf.bound, reverse=True)
        return [self.leaves.pop() for _ in range(min(count, len(self.leaves)))]


def check(parsed: Options, return_linear: bool) -> None:
    """Raises ValueError where linear functions are asked for: each would hold on a leaf alone."""
    if return_linear and parsed.leaves > 1:
        raise ValueError(f"return_linear must be False where leaves is above 1, got leaves = {parsed.leaves}")


def branched(
    bm: BoundedModule,
    regions: list[Any],
    rows: krelu.Rows | None,
    parsed: Options,
    boxes: krelu.Boxes,
    best: Bounds,
    solve: Solve,
) -> Bounds:
    """Bounds by branching for the rows that are not beyond ``parsed.threshold`` yet.

    Every neuron's range is cut at zero, and each half is bounded with the neuron's activation exact there. The neuron
    is the one whose chord costs the bound most. Values that are better than those of ``best`` have no gradient.
    """
    if parsed.leaves <= 1 or not boxes:
        return best
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "leaves > 1 needs gradients: use torch.no_grad() in place of torch.inference_mode()"
        )
    flat = {i: (lower.detach().flatten(1), upper.detach().flatten(1)) for i, (lower, upper) in boxes.items()}
    shapes = {i: lower.shape[1:] for i, (lower, _) in boxes.items()}

    def of_shapes(regions: list[Any], rows: Tensor, boxes: krelu.Boxes, samples: Tensor) -> Tensor:
        shaped = {i: (a.view(-1, *shapes[i]), b.view(-1, *shapes[i])) for i, (a, b) in boxes.items()}
        return solve(regions, rows, shaped, samples)

    with torch.no_grad():
        trees, places = _trees(bm, regions, rows, parsed, best)
        _grow(bm, regions, parsed, flat, trees, of_shapes)
    found = dataclasses.replace(best)
    for tree, (name, b, s) in zip(trees, places, strict=True):
        _improve(found, name, b, s, tree.bound)
    return found


def _improve(found: Bounds, name: str, b: int, s: int, value: float) -> None:
    """Takes ``value``, a number of the bound's own dtype, where it is better."""
    end = getattr(found, name)
    sign = 1 if name == "lower" else -1
    new = torch.tensor(sign * value, dtype=torch.float64)
    flat = end.reshape(end.shape[0], -1)
    if not math.isfinite(value) or float(new) * sign <= float(flat[b, s].detach()) * sign:
        return
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[b, s] = True
    setattr(found, name, torch.where(mask, new.to(flat.dtype), flat).view_as(end))


def _trees(
    bm: BoundedModule, regions: list[Any], rows: krelu.Rows | None, parsed: Options, best: Bounds
) -> tuple[list[Tree], list[tuple[str, int, int]]]:
    like = regions[0][0]
    outputs = bm.graph.numel(bm.graph.output)
    if rows is None:
        rows = (torch.eye(outputs, dtype=like.dtype, device=like.device), None, outputs)
        table = rows[0].expand(len(like), outputs, outputs)
    else:
        table = (rows[0] if rows[1] is None else rows[0][rows[1]]).reshape(len(like), rows[2], outputs)
    trees, places = [], []
    for name, sign in (("lower", 1), ("upper", -1)):
        end = getattr(best, name)
        if end is None:
            continue
        for b, values in enumerate(end.detach().flatten(1).tolist()):
            for s, value in enumerate(values):
                target = math.inf if parsed.threshold is None else parsed.threshold * sign
                if value * sign > target or not math.isfinite(value):
                    continue
                trees.append(Tree(b, sign * table[b, s], target, [], done=math.inf))
                trees[-1].leaves.append(Leaf(value * sign, {}, (math.inf, -1, -1)))
                places.append((name, b, s))
    return trees, places


def _grow(
    bm: BoundedModule,
    regions: list[Any],
    parsed: Options,
    boxes: krelu.Boxes,
    trees: list[Tree],
    solve: Solve,
) -> None:
    """Splits leaves until all are good enough or a limit is reached."""
    limit = math.inf if parsed.time_limit is None else parsed.time_limit * len(regions[0][0])
    until = time.monotonic() + limit
    for begin in range(0, len(trees), AT_ONCE):  # which neuron to split first
        group = trees[begin : begin + AT_ONCE]
        roots = [tree.leaves.pop() for tree in group]
        for tree, leaf in zip(group, roots, strict=True):
            own = slice(tree.sample, tree.sample + 1)
            leaf.boxes = {i: (lower[own], upper[own]) for i, (lower, upper) in boxes.items()}
        _bound_leaves(bm, regions, parsed, group, roots, solve)
    while time.monotonic() < until:
        growing = [tree for tree in trees if tree.count < parsed.leaves and tree.can_gain]
        if not growing:
            return
        chosen: list[tuple[Tree, Leaf]] = []
        for tree in growing[:AT_ONCE]:
            chosen += [(tree, leaf) for leaf in tree.take(max(1, AT_ONCE // len(growing)), parsed.leaves)]
        halves = [(tree, half) for tree, leaf in chosen for half in _halves(leaf)]
        for tree, _ in chosen:
            tree.count += 1
        owners, leaves = [tree for tree, _ in halves], [half for _, half in halves]
        _bound_leaves(bm, regions, parsed, owners, leaves, solve)


def _halves(leaf: Leaf) -> list[Leaf]:
    _, node, number = leaf.gain
    found = []
    for end in (0, 1):
        box = [t.clone() for t in leaf.boxes[node]]
        box[end][0, number] = 0
        found.append(Leaf(leaf.bound, {**leaf.boxes, node: (box[0], box[1])}, leaf.gain))
    return found


def _of_samples(regions: list[Any], samples: Tensor) -> list[Any]:
    return [tuple(t[samples] if isinstance(t, Tensor) else t for t in region) for region in regions]


def _stacked(leaves: list[Leaf]) -> krelu.Boxes:
    def end(i: int, e: int) -> Tensor:
        return torch.cat([leaf.boxes[i][e] for leaf in leaves])

    return {i: (end(i, 0), end(i, 1)) for i in leaves[0].boxes}


def _samples(regions: list[Any], trees: list[Tree]) -> Tensor:
    return torch.tensor([tree.sample for tree in trees], device=regions[0][0].device)


def _bound_leaves(
    bm: BoundedModule,
    regions: list[Any],
    parsed: Options,
    trees: list[Tree],
    leaves: list[Leaf],
    solve: Solve,
) -> None:
    """Bounds the leaves, finds which neuron each splits next, and gives them to their trees."""
    samples = _samples(regions, trees)
    own, rows = _of_samples(regions, samples), torch.stack([tree.row for tree in trees])
    with torch.enable_grad():
        boxes = {
            i: (lower.requires_grad_(), upper.requires_grad_())
            for i, (lower, upper) in _stacked(leaves).items()
        }
        lower = solve(own, rows, boxes, samples)[:, 0]
        ends = [t for box in boxes.values() for t in box]
        grads = torch.autograd.grad(lower.sum(), ends, allow_unused=True)
    scores = _gains(boxes, grads)
    for n, (tree, leaf) in enumerate(zip(trees, leaves, strict=True)):
        leaf.bound = max(leaf.bound, float(lower[n].detach()))
        leaf.gain = max(
            (float(of_node[n].max()), i, int(of_node[n].argmax())) for i, of_node in scores.items()
        )
        tree.add(leaf)


def _gains(boxes: krelu.Boxes, grads: tuple[Tensor | None, ...]) -> dict[int, Tensor]:
    """How much either half of a neuron's range may gain, to first order in its ends; positive where it is open."""
    found = {}
    for number, (i, box) in enumerate(boxes.items()):
        lower, upper = (t.detach() for t in box)
        up, down = (torch.zeros_like(lower) if g is None else g for g in grads[2 * number : 2 * number + 2])
        one, other = (-lower * up).clamp_min(0), (-upper * down).clamp_min(0)
        score = (torch.minimum(one, other) + SHARE_OF_LARGER * torch.maximum(one, other)).nan_to_num(0)
        is_open = (lower < 0) & (upper > 0)
        area = -lower * upper * torch.finfo(lower.dtype).tiny ** 0.5  # where no gradient tells, the largest
        found[i] = torch.where(is_open, score + area.clamp_min(torch.finfo(lower.dtype).tiny), 0)
    return found
