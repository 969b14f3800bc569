"""Rows ``M`` of linear functions of values, pulled back through linear operators: ``M -> M W``, in float64.

What computing ``M`` lost is carried as a number per row, a bound of the 1-norm of its error, which bounds every
p-norm of it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pycert.graph.ir import ACTIVATIONS, Node
from pycert.lipschitz.slopes import hypotenuse_range, slope_range
from pycert.lipschitz.walk import UnsupportedBound, Walk
from pycert.norms.arithmetic import UP, exact_double, gamma
from pycert.norms.bounds import cached, largest_sum

#: Operators that :func:`pull` passes.
LINEAR = frozenset(
    "linear conv batch_norm mul_const div_const add_const add sum reshape gather concat".split()
)


@dataclasses.dataclass
class Rows:
    """``matrix [B, S, numel]`` float64, and ``error [B, S]``: the 1-norm of what it may be off by, at most."""

    matrix: Tensor
    error: Tensor

    def plus(self, other: Rows) -> Rows:
        total = self.matrix + other.matrix
        return Rows(total, (self.error + other.error + gamma(2) * total.abs().sum(-1)) * UP)

    def scaled(self, factor: Tensor, exact: bool = False) -> Rows:
        """Columns times a diagonal ``[B or 1, numel]``; ``exact`` where its elements are as they are meant."""
        product = self.matrix * factor[:, None, :]
        largest = factor.abs().amax(-1)[:, None]
        lost = (gamma(2) if exact else 2.0**-44) * product.abs().sum(-1)
        return Rows(product, (self.error * largest + lost) * UP + 1e-290)


def pull(walk: Walk, i: int, given: Rows, absolute: bool = False) -> list[tuple[int, Rows]]:
    """The rows as functions of the inputs of linear node ``i``, one entry per input that varies.

    ``absolute`` takes magnitudes of the operator's elements: for rows that are radii.
    """
    node = walk.graph.nodes[i]
    if node.op in ("linear", "conv"):
        found = [(node.inputs[0], _affine(walk, i, given, absolute))]
    elif node.op in ("batch_norm", "mul_const", "div_const", "add_const"):
        factor = signed_factor(walk, i).reshape(1, -1)
        found = [(node.inputs[0], given.scaled(factor.abs() if absolute else factor))]
    elif node.op == "add":
        sign = 1.0 if absolute else float(node.attrs.get("sign", 1))
        found = [(node.inputs[0], given), (node.inputs[1], Rows(given.matrix * sign, given.error))]
    elif node.op == "sum":
        count = walk.graph.nodes[node.inputs[0]].shape[-1]
        spread = given.matrix.repeat_interleave(count, dim=-1)
        share = 1 / float(node.attrs.get("divisor", 1))
        share = abs(share) if absolute else share
        rows = Rows(spread, given.error * count * UP)
        found = [(node.inputs[0], rows.scaled(spread.new_full((1, spread.shape[-1]), share)))]
    elif node.op == "reshape":
        found = [(node.inputs[0], given)]
    elif node.op == "gather":
        found = [(node.inputs[0], _gathered(walk, node, given))]
    else:
        assert node.op == "concat", node.op
        sizes = [walk.graph.numel(j) for j in node.inputs]
        parts = given.matrix.split(sizes, dim=-1)
        found = [(j, Rows(part, given.error)) for j, part in zip(node.inputs, parts)]
    return [(j, rows) for j, rows in found if walk.varies(j)]


def _affine(walk: Walk, i: int, given: Rows, absolute: bool) -> Rows:
    """``M W``: sums of ``terms`` products; ``|M| |W|`` has 1-norms of at most ``||M||_1 ||W||_inf``."""
    node = walk.graph.nodes[i]
    operator = walk._operator(i)
    weight = exact_double(operator.weight)
    wide = operator.with_weight(weight.abs() if absolute else weight)
    batch, count = given.matrix.shape[:2]
    if node.op == "linear":
        positions = given.matrix.view(batch, count, -1, node.shape[-1])
        matrix = (positions @ wide.weight).reshape(batch, count, -1)
    else:
        image = given.matrix.reshape(batch * count, *node.shape)
        matrix = wide.apply_adjoint(image).reshape(batch, count, -1)
    growth = cached(
        walk._param(i, 0),
        ("row sums", operator.geometry),
        lambda: largest_sum(wide, None, None, 1, torch.inf),
    )
    lost = gamma(operator.terms() + 4) * given.matrix.abs().sum(-1) * UP
    return Rows(matrix, (given.error + lost) * growth * UP + 1e-290)


def _gathered(walk: Walk, node: Node, given: Rows) -> Rows:
    index = node.attrs["index"].flatten().to(torch.int64)
    source = walk.graph.numel(node.inputs[0])
    kept = (index >= 0).nonzero().flatten()
    matrix = given.matrix.new_zeros(*given.matrix.shape[:2], source)
    matrix.index_add_(2, index[kept], given.matrix[..., kept])
    copies = float(torch.bincount(index[kept], minlength=1).max()) if kept.numel() else 0.0
    return Rows(matrix, (given.error + gamma(copies + 2) * given.matrix.abs().sum(-1)) * UP)


def push(walk: Walk, i: int, given: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Linear node ``i`` without its bias, on values ``[..., numel]`` of some of its inputs (the others are 0).

    Returns:
        The value, and per sample ``[...]`` a bound of the 1-norm of what computing it lost.
    """
    node = walk.graph.nodes[i]
    some = next(iter(given.values()))
    lead, source = some.shape[:-1], node.inputs[0]
    size = torch.stack([value.abs().sum(-1) for value in given.values()]).sum(0)
    if node.op in ("linear", "conv"):
        operator = walk._operator(i)
        wide = operator.with_weight(exact_double(operator.weight))
        shape = walk.graph.nodes[source].shape if node.op == "linear" else operator.input_shape
        result = wide.apply(given[source].reshape(-1, *shape)).reshape(*lead, -1)
        growth = cached(
            walk._param(i, 0), ("column sums", operator.geometry), lambda: largest_sum(wide, None, None, 1, 1)
        )
        return result, (gamma(operator.terms() + 4) * size * growth) * UP + 1e-290
    if node.op in ("batch_norm", "mul_const", "div_const", "add_const"):
        result = given[source] * signed_factor(walk, i).reshape(-1)
        return result, 2.0**-44 * result.abs().sum(-1) + 1e-290
    if node.op == "add":
        sign = float(node.attrs.get("sign", 1))
        parts = [given[j] * s for j, s in zip(node.inputs, (1.0, sign)) if j in given]
        return (parts[0] if len(parts) == 1 else parts[0] + parts[1]), gamma(4) * size
    if node.op == "sum":
        count = walk.graph.nodes[source].shape[-1]
        result = given[source].reshape(*lead, -1, count).sum(-1) / float(node.attrs.get("divisor", 1))
        return result, gamma(count + 8) * size / abs(float(node.attrs.get("divisor", 1))) + 1e-290
    if node.op == "gather":
        index = node.attrs["index"].flatten().to(torch.int64)
        return given[source][..., index.clamp(min=0)] * (index >= 0), torch.zeros_like(size)
    if node.op == "concat":
        parts = [given[j] if j in given else some.new_zeros(*lead, walk.graph.numel(j)) for j in node.inputs]
        return torch.cat(parts, -1), torch.zeros_like(size)
    assert node.op == "reshape", node.op
    return given[source], torch.zeros_like(size)


def signed_factor(walk: Walk, i: int) -> Tensor:
    """The factor of a node that scales and shifts, with its sign, to 40 roundings; ``[*shape]``."""
    node = walk.graph.nodes[i]
    factor, _, _ = walk._factor(i)
    factor = factor.expand(1, *node.shape)[0]
    given = walk._optional_param(i, 0)
    if node.op == "add_const" or (node.op == "batch_norm" and given is None):
        return factor
    sign = given if given is not None else torch.tensor(float(node.attrs["value"]), dtype=torch.float64)
    if node.op == "batch_norm":
        sign = sign.view(-1, *[1] * (len(node.shape) - 1))
    return factor * torch.sign(sign)


# ---- elementwise functions by ranges of their slopes ---------------------------------------------------


def is_activation(walk: Walk, i: int) -> bool:
    """Whether node ``i`` is an elementwise function of one value that varies, and not linear."""
    node = walk.graph.nodes[i]
    if node.op in ("max2", "min2"):
        return walk.varies(node.inputs[0]) != walk.varies(node.inputs[1])
    return node.op in ACTIVATIONS and walk.varies(node.inputs[0])


def composite(walk: Walk, i: int) -> tuple[int, Tensor, Tensor]:
    """A chain of elementwise functions that ends in node ``i``: the value it reads, and its slopes ``[B, numel]``."""
    node = walk.graph.nodes[i]
    source = node.inputs[0]
    if node.op in ("max2", "min2"):
        source = source if walk.varies(source) else node.inputs[1]
        least, most = selection_range(walk, i, source)
    elif (leg := hypotenuse(walk, i)) is not None:
        box = walk.boxes[leg[0]]
        assert box is not None
        ends = hypotenuse_range(*box, leg[1])
        least, most = (part.expand(walk.batch, *node.shape).flatten(1) for part in ends)
        return leg[0], least, most
    else:
        attrs = dict(node.attrs)
        if node.op == "prelu":
            slope = exact_double(walk._param(i, 0))
            attrs["slope"] = slope.view(-1, *[1] * (len(node.shape) - 1)) if slope.numel() > 1 else slope
        box = walk.boxes[source]
        assert box is not None
        found = slope_range(node.op, *box, attrs)
        if found is None:
            raise UnsupportedBound(f"method 'lipschitz' has no slopes for '{node.op}' at '{node.path}'")
        least, most = (part.expand(walk.batch, *node.shape).flatten(1) for part in found)
    if not is_activation(walk, source):
        return source, least, most
    root, before_least, before_most = composite(walk, source)
    return root, *interval_product(least, most, before_least, before_most)


def hypotenuse(walk: Walk, i: int) -> tuple[int, Tensor] | None:
    """``x`` and the square where node ``i`` is ``sqrt(x^2 + square)``, as in SmoothMaxMin, else None."""
    nodes = walk.graph.nodes
    if nodes[i].op != "sqrt" or nodes[nodes[i].inputs[0]].op != "add_const":
        return None
    total = nodes[i].inputs[0]
    squared = nodes[total].inputs[0]
    if nodes[squared].op != "square":
        return None
    given = walk._optional_param(total, 0)
    if given is None:
        given = torch.tensor(float(nodes[total].attrs["value"]), dtype=torch.float64)
    square = given * float(nodes[total].attrs.get("sign", 1))
    return (nodes[squared].inputs[0], square) if bool((square > 0).all()) else None


def selection_range(walk: Walk, i: int, source: int) -> tuple[Tensor, Tensor]:
    """Slopes of max and min with respect to one of the two, ``[B, numel]``."""
    node = walk.graph.nodes[i]
    box = walk.boxes[node.inputs[2]]  # of a - b
    assert box is not None
    above, below = box[0].detach() > 0, box[1].detach() < 0
    first = above if node.op == "max2" else below  # the first is certainly taken
    second = below if node.op == "max2" else above
    if source != node.inputs[0]:
        first, second = second, first
    shape = (walk.batch, *node.shape)
    return first.double().expand(shape).flatten(1), 1 - second.double().expand(shape).flatten(1)


def interval_product(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """``[a, b] * [c, d]`` elementwise, outward; products with 0 and with 1 are exact."""
    parts = [_times(x, y) for x in (a, b) for y in (c, d)]
    low, high = (torch.stack(ends) for ends in zip(*parts))
    return low.amin(0), high.amax(0)


def _times(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    product = torch.where((x == 0) | (y == 0), torch.zeros_like(x * y), x * y)
    exact = (x == 0) | (y == 0) | (x.abs() == 1) | (y.abs() == 1)
    slack = torch.where(exact, torch.zeros_like(product), product.abs() * 2.0**-51 + 1e-300)
    return product - slack, product + slack
