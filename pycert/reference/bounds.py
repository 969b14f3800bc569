"""Bounds of a traced network in plain PyTorch: interval, CROWN, CROWN-IBP, Fast-Lin, forward.

Written to be read, not to be fast: every affine operator is transposed by autograd, so that a
linear function ``A x`` of any node is a dense tensor ``[B, S, *shape]``. The arithmetic rounds
to nearest and carries no error terms; everything is differentiable with respect to the
parameters, the centre and eps.

Sources: Zhang et al., NeurIPS 2018 (CROWN) and ICLR 2020 (CROWN-IBP); Weng et al., ICML 2018
(Fast-Lin); Gowal et al., 2018 (interval bound propagation in centre and radius).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycert.graph.ir import ACTIVATIONS, AFFINE, BILINEAR, Graph, Node
from pycert.reference import bilinear, pooling
from pycert.reference import graph as execution
from pycert.reference.activations import interval_image, lines, unstable

METHODS = ("ibp", "fastlin", "crown-ibp", "crown", "forward")


class Interval(NamedTuple):
    """``lower <= value <= upper``, each ``[B, *shape]``."""

    lower: Tensor
    upper: Tensor


class Linear(NamedTuple):
    """``A_lower x + c_lower <= value <= A_upper x + c_upper``; A ``[B, S, *in]``, c ``[B, S]``."""

    A_lower: Tensor
    c_lower: Tensor
    A_upper: Tensor
    c_upper: Tensor


def bound(
    graph: Graph,
    region: Any,
    method: str,
    spec: Tensor | None = None,
    slope: str = "adaptive",
    intersect: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Bounds ``[B, *out]`` of the output over ``region``, or ``[B, S]`` of ``spec @ output``.

    Args:
        graph: a traced network with one input.
        region: an ``LpBall`` (``x, eps, p, clip``) or a ``Box`` (``lower, upper``).
        method: one of :data:`METHODS`.
        spec: ``[S, n_out]`` or ``[B, S, n_out]``; None for the output itself.
        slope: lower slope of unstable ReLUs: ``adaptive``, ``parallel``, ``zero`` or ``one``;
            ``fastlin`` is ``crown`` with ``parallel``.
        intersect: intersect refined intermediate bounds, and the result, with interval bounds.
        dtype: what to compute in.

    Soundness: in exact arithmetic only.
    """
    walk = Walk(graph, region, method, slope, intersect, dtype)
    if spec is None:
        return walk.output()
    return walk.rows(spec.to(dtype).expand(walk.batch, *spec.shape[-2:]))


class Region:
    """A region of inputs with its box (``lower``, ``upper``) and its concretisation."""

    def __init__(self, region: Any, dtype: torch.dtype) -> None:
        self.p, self.ball = float("inf"), hasattr(region, "eps")
        if not self.ball:
            self.lower, self.upper = region.lower.to(dtype), region.upper.to(dtype)
            self.center = self.lower / 2 + self.upper / 2
            return
        self.p, self.clip, self.center = float(region.p), region.clip, region.x.to(dtype)
        eps = torch.as_tensor(region.eps, dtype=dtype).reshape(-1).expand(len(self.center))
        self.eps = eps.reshape(-1, *[1] * (self.center.dim() - 1))
        self.lower, self.upper = self.center - self.eps, self.center + self.eps
        if self.clip is not None:
            low, high = (torch.tensor(end, dtype=dtype) for end in self.clip)
            self.lower, self.upper = self.lower.maximum(low), self.upper.minimum(high)

    def minimum(self, A: Tensor, c: Tensor) -> Tensor:
        """The least value ``[B, S]`` of ``A x + c`` over the region.

        For p = 1 and 2 with clip: the tighter, per row, of the ball and the box.
        """
        flat = A.flatten(2)
        middle, radius = (
            (self.lower / 2 + self.upper / 2).flatten(1),
            (self.upper / 2 - self.lower / 2).flatten(1),
        )
        box = (flat @ middle[..., None] - flat.abs() @ radius[..., None]).squeeze(-1)
        if self.p == float("inf"):
            return box + c
        dual = 2.0 if self.p == 2 else float("inf")
        norm = torch.linalg.vector_norm(flat, dual, dim=2)
        ball = (flat @ self.center.flatten(1)[..., None]).squeeze(-1) - self.eps.reshape(-1, 1) * norm
        return (ball if self.clip is None else ball.maximum(box)) + c

    def concretize(self, linear: Linear) -> Interval:
        lower = self.minimum(linear.A_lower, linear.c_lower)
        return Interval(lower, -self.minimum(-linear.A_upper, -linear.c_upper))


class Walk:
    """All bounds of one network over one region; ``self.bounds`` holds the interval of every node."""

    def __init__(
        self, graph: Graph, region: Any, method: str, slope: str, intersect: bool, dtype: torch.dtype
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"bound: method must be one of {METHODS}, got {method!r}")
        if len(graph.inputs) != 1:
            raise ValueError(f"bound: the reference takes networks with one input, got {len(graph.inputs)}")
        self.graph, self.method, self.intersect, self.dtype = graph, method, intersect, dtype
        self.slope = "parallel" if method == "fastlin" else slope
        self.input = next(i for i, node in enumerate(graph.nodes) if node.op == "input")
        self.region = Region(region, dtype)
        self.batch = len(self.region.lower)
        self.slots = [slot.to(dtype) for slot in graph.tensors()]
        self.statistics = execution.clean_statistics(graph, self.region.center, dtype=dtype)
        self.first = self._first_affine()
        self.refined = frozenset() if method in ("ibp", "crown-ibp") else self._pre_activations()
        self.bounds: list[Interval] = []
        self.linear: list[Linear] = []
        for number in range(graph.output + 1):
            self._visit(number)

    def output(self) -> Interval:
        """Bounds ``[B, *out]`` of the network's output."""
        found = self.bounds[self.graph.output]
        if self.method == "ibp":
            return found
        size, shape = self.graph.numel(self.graph.output), found.lower.shape
        eye = torch.eye(size, dtype=self.dtype).expand(self.batch, size, size)
        if self.method != "forward":
            refined = self.region.concretize(self.back_substitute(self.graph.output, eye))
            refined = Interval(*(end.reshape(shape) for end in refined))
        else:
            refined = self._forward_interval(self.graph.output)
        return _intersection(refined, found) if self.intersect else refined

    def rows(self, spec: Tensor) -> Interval:
        """Bounds ``[B, S]`` of ``spec @ output``, ``spec`` ``[B, S, n_out]``."""
        if self.method == "ibp":
            return self._interval_rows(spec)
        refined = self.region.concretize(self.linear_rows(spec))
        return _intersection(refined, self._interval_rows(spec)) if self.intersect else refined

    def linear_rows(self, spec: Tensor) -> Linear:
        """Linear bounds of ``spec @ output`` in the input."""
        if self.method == "forward":
            return _combine(spec, self.linear[self.graph.output])
        return self.back_substitute(self.graph.output, spec)

    # Intervals, forward.

    def _visit(self, number: int) -> None:
        node = self.graph.nodes[number]
        self.bounds.append(self._interval(number, node))
        if self.method == "forward":
            self.linear.append(self._forward(number, node))
            if number in self.refined:
                found, interval = self._forward_interval(number), self.bounds[number]
                known = self.intersect or node.op == "limit"
                self.bounds[number] = _intersection(found, interval) if known else found
        elif number in self.first and self.region.p != float("inf"):
            everywhere = torch.ones_like(self.bounds[number].lower, dtype=torch.bool)
            self.bounds[number] = self._refine(number, everywhere, intersect=True)
        elif number in self.refined:
            found = self.bounds[number]
            intersect = self.intersect or node.op == "limit"
            self.bounds[number] = self._refine(number, self._unstable(number, found), intersect)

    def _interval(self, number: int, node: Node) -> Interval:
        inputs = [self.bounds[i] for i in node.inputs]
        if node.op == "input":
            return Interval(self.region.lower, self.region.upper)
        if node.op == "constant":
            value = self.slots[node.params[0]].reshape(node.shape).expand(self.batch, *node.shape)
            return Interval(value, value)
        if node.op in AFFINE:
            middle = self._affine(number, *(b.lower / 2 + b.upper / 2 for b in inputs))
            radius = self._absolute(number, *(b.upper / 2 - b.lower / 2 for b in inputs))
            return Interval(middle - radius, middle + radius)
        if node.op in ACTIVATIONS:
            return Interval(*interval_image(node, self.slots, *inputs[0]))
        if node.op in BILINEAR:
            return Interval(*bilinear.interval(node, *inputs))
        if node.op == "limit":
            low, high = node.attrs.get("min", -math.inf), node.attrs.get("max", math.inf)
            return Interval(*(_between(end, low, high) for end in inputs[0]))
        ends = zip(*inputs)  # max_pool, max2 and min2 are monotone in every operand
        return Interval(*(execution.apply(node, self.slots, *end) for end in ends))

    def _affine(self, number: int, *x: Tensor) -> Tensor:
        """An affine node on values; batch_norm with the statistics of the clean batch."""
        node = self.graph.nodes[number]
        if node.op != "batch_norm":
            return execution.apply(node, self.slots, *x)
        given = self.statistics.get(number)
        return execution.batch_norm(self.graph, node, self.slots, x[0], given)

    def _absolute(self, number: int, *radii: Tensor) -> Tensor:
        """The affine node's linear part with every coefficient replaced by its absolute value."""
        total: Tensor | float = 0.0
        for matrix, radius in zip(self.matrices(number), radii):
            total = total + radius.reshape(len(radius), -1) @ matrix.abs().T
        assert isinstance(total, Tensor)
        return total.reshape(-1, *self.graph.nodes[number].shape)

    def matrices(self, number: int) -> list[Tensor]:
        """The dense matrix ``[numel(node), numel(input)]`` of an affine node, for each of its inputs."""
        size = self.graph.numel(number)
        eye = torch.eye(size, dtype=self.dtype).reshape(1, size, *self.graph.nodes[number].shape)
        return [matrix[0].reshape(size, -1) for matrix in self._transpose(number, eye)]

    def _interval_rows(self, spec: Tensor) -> Interval:
        """Interval bounds of ``spec @ output``: all affine layers after the last activations are merged with it."""
        A = spec.reshape(*spec.shape[:2], *self.graph.nodes[self.graph.output].shape)
        pending = {self.graph.output: A}
        lower = upper = torch.zeros(spec.shape[:2], dtype=self.dtype)
        for number in range(self.graph.output, -1, -1):
            if number not in pending:
                continue
            A, node = pending.pop(number), self.graph.nodes[number]
            if node.op in AFFINE:
                constant = self._step(number, A, pending)
                lower, upper = lower + constant, upper + constant
                continue
            ends = Region(self.bounds[number], self.dtype) if number != self.input else self.region
            found = ends.concretize(Linear(A, lower, A, upper))
            lower, upper = found.lower, found.upper
        return Interval(lower, upper)

    # Back-substitution.

    def back_substitute(self, start: int, rows: Tensor) -> Linear:
        """Linear bounds in the input of ``rows @ value(start)``, ``rows`` ``[B, S, numel(start)]``."""
        rows = rows.reshape(*rows.shape[:2], *self.graph.nodes[start].shape)
        zero = torch.zeros(rows.shape[:2], dtype=self.dtype)
        sides = []
        for sign in (1, -1):  # the upper bound is minus the lower bound of minus the rows
            pending: dict[int, Tensor] = {start: sign * rows}
            c = zero
            for number in range(start, -1, -1):
                if number in pending and number != self.input:
                    c = c + self._step(number, pending.pop(number), pending)
            A = pending.get(self.input)
            if A is None:
                A = torch.zeros(*rows.shape[:2], *self.graph.inputs[0], dtype=self.dtype)
            sides += [sign * A, sign * c]
        return Linear(*sides)

    def _step(self, number: int, A: Tensor, pending: dict[int, Tensor]) -> Tensor:
        """Replaces ``A value(number)`` by a lower bound in the node's inputs; returns its constant ``[B, S]``."""
        node = self.graph.nodes[number]
        if node.op == "constant":
            return _dot(A, self.bounds[number].lower)
        if node.op in AFFINE:
            for i, part in zip(node.inputs, self._transpose(number, A)):
                _add(pending, i, part)
            return self._constant(number, A)
        if node.op == "max_pool":
            return self._pool_step(number, A, pending)
        if node.op == "limit":
            _add(pending, node.inputs[0], A)
            return torch.zeros(A.shape[:2], dtype=self.dtype)
        if node.op in BILINEAR:
            planes = bilinear.planes(node, *(self.bounds[i] for i in node.inputs))
            for i, part in zip(node.inputs, bilinear.step(node, A, planes)):
                _add(pending, i, part)
            return _dot(A.clamp(min=0), planes.lower) + _dot(A.clamp(max=0), planes.upper)
        if node.op in ACTIVATIONS:
            source = node.inputs[0]
            around = lines(node, self.slots, *self.bounds[source], self.slope)
        else:  # max(a, b) = b + relu(a - b), min(a, b) = a - relu(a - b)
            a, b, source = node.inputs
            _add(pending, b if node.op == "max2" else a, A)
            A = A if node.op == "max2" else -A
            relu = Node("relu", (source,), node.shape)
            around = lines(relu, self.slots, *self.bounds[source], self.slope)
        positive, negative = A.clamp(min=0), A.clamp(max=0)
        _add(
            pending,
            source,
            positive * around.lower_slope[:, None] + negative * around.upper_slope[:, None],
        )
        return _dot(positive, around.lower_intercept) + _dot(negative, around.upper_intercept)

    def _pool_step(self, number: int, A: Tensor, pending: dict[int, Tensor]) -> Tensor:
        node = self.graph.nodes[number]
        source = node.inputs[0]
        lower_A, lower_c, upper_A, upper_c = pooling.max_pool_lines(node, *self.bounds[source])
        positive, negative = A.flatten(2).clamp(min=0), A.flatten(2).clamp(max=0)
        back = positive @ lower_A + negative @ upper_A
        _add(pending, source, back.reshape(*A.shape[:2], *self.graph.nodes[source].shape))
        return _dot(positive, lower_c) + _dot(negative, upper_c)

    def _transpose(self, number: int, A: Tensor) -> list[Tensor]:
        """``A [B, S, *shape]`` through the linear part of an affine node: one tensor per input."""
        node, rows = self.graph.nodes[number], A.flatten(0, 1)
        inputs = [
            torch.zeros(len(rows), *self.graph.nodes[i].shape, dtype=self.dtype, requires_grad=True)
            for i in node.inputs
        ]
        with torch.enable_grad():
            value = self._affine(number, *inputs)
            found = torch.autograd.grad(value, inputs, rows, create_graph=True, materialize_grads=True)
        return [part.reshape(*A.shape[:2], *part.shape[1:]) for part in found]

    def _constant(self, number: int, A: Tensor) -> Tensor:
        """``A`` times the value of an affine node at zero, ``[B, S]``."""
        node = self.graph.nodes[number]
        zeros = (torch.zeros(1, *self.graph.nodes[i].shape, dtype=self.dtype) for i in node.inputs)
        return _dot(A, self._affine(number, *zeros).expand(len(A), *node.shape))

    def _refine(self, number: int, mask: Tensor, intersect: bool) -> Interval:
        """Back-substituted bounds where ``mask [B, *shape]`` is set, the interval bound elsewhere."""
        found, size = self.bounds[number], self.graph.numel(number)
        if not mask.any():
            return found
        eye = torch.eye(size, dtype=self.dtype).expand(self.batch, size, size)
        refined = self.region.concretize(self.back_substitute(number, eye))
        refined = Interval(*(end.reshape(found.lower.shape) for end in refined))
        if intersect:
            refined = _intersection(refined, found)
        return Interval(*(torch.where(mask, new, old) for new, old in zip(refined, found)))

    def _unstable(self, number: int, found: Interval) -> Tensor:
        """Neurons whose relaxation in some consumer depends on their bounds."""
        mask = torch.zeros_like(found.lower, dtype=torch.bool)
        for node in self.graph.nodes:
            if node.op in ("max2", "min2") and node.inputs[2] == number:
                mask = mask | ((found.lower < 0) & (found.upper > 0))
            elif number in node.inputs and node.op == "max_pool":
                mask = torch.ones_like(mask)
            elif number in node.inputs and node.op in BILINEAR:
                mask = mask | (found.lower < found.upper)
            elif number in node.inputs and node.op in ACTIVATIONS:
                mask = mask | unstable(node, self.slots, *found)
        return mask

    def _pre_activations(self) -> frozenset[int]:
        """Nodes that some activation or pooling reads, the inputs of the network left out."""
        found = set()
        for node in self.graph.nodes[: self.graph.output + 1]:
            if node.op in ACTIVATIONS or node.op == "max_pool":
                found.add(node.inputs[0])
            elif node.op in ("max2", "min2"):
                found.add(node.inputs[2])
            elif node.op in BILINEAR:
                found.update(node.inputs)
        return frozenset(i for i in found if self.graph.nodes[i].op not in ("input", "constant"))

    def _first_affine(self) -> frozenset[int]:
        """Linear and conv nodes that no layer stands before which mixes the input's elements or is not affine.

        Under p = 1 and 2 their bounds are those of the dual norm: interval arithmetic would take
        the box around the ball.
        """
        unmixed: set[int] = set()
        found: set[int] = set()
        for number, node in enumerate(self.graph.nodes):
            if node.op not in AFFINE | {"input", "constant"} or not unmixed.issuperset(node.inputs):
                continue
            if node.op in ("linear", "conv"):
                found.add(number)
            elif node.op not in ("sum", "avg_pool", "add") and not self._repeats(node):
                unmixed.add(number)
        return frozenset(found)

    def _repeats(self, node: Node) -> bool:
        """Whether a gather takes some element twice."""
        index = node.attrs["index"] if node.op == "gather" else torch.zeros(0, dtype=torch.int64)
        inside = index[index >= 0]
        return inside.numel() > inside.unique().numel()

    # Linear bounds, forward.

    def _forward(self, number: int, node: Node) -> Linear:
        """Linear bounds in the input of every neuron of the node, ``A [B, numel, *in]``."""
        size, shape = self.graph.numel(number), self.graph.inputs[0]
        nothing = torch.zeros(self.batch, size, *shape, dtype=self.dtype)
        if node.op == "input":
            A = torch.eye(size, dtype=self.dtype).reshape(1, size, *shape).expand_as(nothing)
            zero = torch.zeros(self.batch, size, dtype=self.dtype)
            return Linear(A, zero, A, zero)
        if node.op == "constant":
            value = self.bounds[number].lower.flatten(1)
            return Linear(nothing, value, nothing, value)
        if node.op in AFFINE:
            constant = self._constant(number, _eye_rows(self.graph, number, self.batch, self.dtype))
            parts = [
                _combine(matrix.expand(self.batch, *matrix.shape), self.linear[i])
                for matrix, i in zip(self.matrices(number), node.inputs)
            ]
            return _sum(Linear(nothing, constant, nothing, constant), *parts)
        if node.op == "max_pool":
            source = node.inputs[0]
            lower_A, lower_c, upper_A, upper_c = pooling.max_pool_lines(node, *self.bounds[source])
            low, high = _combine(lower_A, self.linear[source]), _combine(upper_A, self.linear[source])
            return Linear(low.A_lower, low.c_lower + lower_c, high.A_upper, high.c_upper + upper_c)
        if node.op in ACTIVATIONS:
            return self._forward_lines(node, node.inputs[0])
        if node.op == "limit":
            return self.linear[node.inputs[0]]
        if node.op in BILINEAR:
            return self._forward_planes(node)
        a, b, d = node.inputs
        relu = self._forward_lines(Node("relu", (d,), node.shape), d)
        if node.op == "max2":
            return _sum(self.linear[b], relu)
        return _sum(self.linear[a], Linear(-relu.A_upper, -relu.c_upper, -relu.A_lower, -relu.c_lower))

    def _forward_lines(self, node: Node, source: int) -> Linear:
        around = lines(node, self.slots, *self.bounds[source], self.slope)
        low = _combine(torch.diag_embed(around.lower_slope.flatten(1)), self.linear[source])
        high = _combine(torch.diag_embed(around.upper_slope.flatten(1)), self.linear[source])
        return Linear(
            low.A_lower,
            low.c_lower + around.lower_intercept.flatten(1),
            high.A_upper,
            high.c_upper + around.upper_intercept.flatten(1),
        )

    def _forward_planes(self, node: Node) -> Linear:
        planes = bilinear.planes(node, *(self.bounds[i] for i in node.inputs))
        size = planes.lower[0].numel()
        rows = torch.eye(size, dtype=self.dtype).expand(self.batch, size, size)
        rows = rows.reshape(self.batch, size, *node.shape)
        low = [_combine(m.flatten(2), self.linear[i])
               for m, i in zip(bilinear.step(node, rows, planes), node.inputs)]  # fmt: skip
        high = [_combine(m.flatten(2), self.linear[i])
                for m, i in zip(bilinear.step(node, -rows, planes), node.inputs)]  # fmt: skip
        return Linear(
            low[0].A_lower + low[1].A_lower,
            low[0].c_lower + low[1].c_lower + planes.lower.flatten(1),
            -high[0].A_lower - high[1].A_lower,
            -high[0].c_lower - high[1].c_lower + planes.upper.flatten(1),
        )

    def _forward_interval(self, number: int) -> Interval:
        shape = (self.batch, *self.graph.nodes[number].shape)
        return Interval(*(end.reshape(shape) for end in self.region.concretize(self.linear[number])))


def layer_bounds(
    graph: Graph, region: Any, method: str, slope: str = "adaptive", intersect: bool = False
) -> dict[int, Interval]:
    """The bounds that ``method`` uses at every node, by node number, float64."""
    return dict(enumerate(Walk(graph, region, method, slope, intersect, torch.float64).bounds))


def _between(value: Tensor, low: float, high: float) -> Tensor:
    return value.maximum(value.new_tensor(low)).minimum(value.new_tensor(high))


def _dot(A: Tensor, value: Tensor) -> Tensor:
    """``A [B, S, ...]`` times ``value [B, ...]``, summed over all but the first two dimensions."""
    return (A.flatten(2) @ value.flatten(1)[..., None]).squeeze(-1)


def _add(pending: dict[int, Tensor], number: int, A: Tensor) -> None:
    pending[number] = pending[number] + A if number in pending else A


def _intersection(first: Interval, second: Interval) -> Interval:
    return Interval(first.lower.maximum(second.lower), first.upper.minimum(second.upper))


def _combine(matrix: Tensor, inner: Linear) -> Linear:
    """Linear bounds of ``matrix @ value``, ``matrix [B, S, N]``, from those of the value's N entries."""
    positive, negative = matrix.clamp(min=0), matrix.clamp(max=0)
    shape = inner.A_lower.shape[2:]

    def mix(first: Tensor, second: Tensor) -> Tensor:
        return positive @ first.flatten(2) + negative @ second.flatten(2)

    def unflatten(A: Tensor) -> Tensor:
        return A.reshape(*A.shape[:2], *shape)

    c_lower = mix(inner.c_lower[..., None], inner.c_upper[..., None]).squeeze(-1)
    c_upper = mix(inner.c_upper[..., None], inner.c_lower[..., None]).squeeze(-1)
    return Linear(
        unflatten(mix(inner.A_lower, inner.A_upper)),
        c_lower,
        unflatten(mix(inner.A_upper, inner.A_lower)),
        c_upper,
    )


def _sum(*terms: Linear) -> Linear:
    return Linear(*(sum(parts[1:], start=parts[0]) for parts in zip(*terms)))


def _eye_rows(graph: Graph, number: int, batch: int, dtype: torch.dtype) -> Tensor:
    size = graph.numel(number)
    eye = torch.eye(size, dtype=dtype).reshape(1, size, *graph.nodes[number].shape)
    return eye.expand(batch, *eye.shape[1:])
