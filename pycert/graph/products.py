"""Lowering of matrix products with parameters and constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycert.graph.elementwise import add, mul
from pycert.graph.parts import broadcast, expand, indices
from pycert.graph.tracer import Traced, Tracer, lowers


@lowers("linear")
def linear(tracer: Tracer, input: Traced, weight: Tensor, bias: Tensor | None = None) -> Traced:
    """F.linear with a weight that does not depend on the input."""
    if not isinstance(input, Traced) or isinstance(weight, Traced) or isinstance(bias, Traced):
        tracer.refuse("linear with a weight or bias that depends on the input", "weights must be parameters")
    if weight.dim() == 1:
        row = tracer.compute(torch.Tensor.reshape, weight, (1, -1))
        result = linear(tracer, input, row, bias)
        node = tracer.node(result)
        return tracer.wrap(tracer.reshape(node, tracer.shape(node)[:-1]), input.dtype)
    node = tracer.node(input)
    shape = tracer.shape(node)
    if not shape:
        tracer.refuse("linear over the batch dimension", "give the input a dimension of features")
    if shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{tracer.path or 'network'}: linear needs {weight.shape[1]} features, got {shape[-1]}"
        )
    params = (tracer.slot(weight), -1 if bias is None else tracer.slot(bias))
    result = tracer.emit("linear", (node,), (*shape[:-1], weight.shape[0]), params)
    return tracer.wrap(result, input.dtype)


@lowers("matmul", "mm", "bmm")
def matmul(tracer: Tracer, input: Any, other: Any) -> Traced:
    """Products of two values, and ``x @ W`` and ``W @ x`` with one matrix ``W`` that does not depend on the input."""
    if isinstance(input, Traced) and isinstance(other, Traced):
        return of_values(tracer, input, other)
    if isinstance(input, Traced):
        weight = _matrix(tracer, other)
        if weight.dim() == 2:
            weight = tracer.compute(torch.Tensor.t, weight)
        return linear(tracer, input, weight)
    weight = _matrix(tracer, input)
    if other.dim() < 3:
        tracer.refuse("a matrix product over the batch dimension", "use F.linear(x, W), or x @ W.t()")
    moved = indices(other)[0].transpose(-1, -2)
    node = tracer.gather(tracer.node(other), moved, tuple(moved.shape))
    result = linear(tracer, tracer.wrap(node, other.dtype), weight)
    if weight.dim() == 1:
        return result
    back = indices(result)[0].transpose(-1, -2)
    node = tracer.gather(tracer.node(result), back, tuple(back.shape))
    return tracer.wrap(node, other.dtype)


def of_values(tracer: Tracer, left: Traced, right: Traced, roundings: float = 0.0) -> Traced:
    """``left @ right`` of values ``[batch, *P, I, K]`` and ``[batch, *P, K, J]``; P broadcasts."""
    if min(left.dim(), right.dim()) < 3 or left.dim() != right.dim():
        tracer.refuse(
            f"a matrix product of values of {left.dim()} and {right.dim()} dimensions, batch included",
            "both must have as many dimensions, at least 3, the batch first",
        )
    if left.shape[-1] != right.shape[-2]:
        found = f"{list(left.shape[1:])} and {list(right.shape[1:])}"
        raise ValueError(f"{tracer.path or 'network'}: a matrix product of samples of shape {found}")
    parts = broadcast(tracer, left.shape[1:-2], right.shape[1:-2])
    a = expand(tracer, tracer.node(left), (*parts, *left.shape[-2:]))
    b = expand(tracer, tracer.node(right), (*parts, *right.shape[-2:]))
    shape = (*parts, left.shape[-2], right.shape[-1])
    return tracer.wrap(tracer.emit("matmul", (a, b), shape, roundings=roundings), left.dtype)


@lowers("einsum")
def einsum(tracer: Tracer, equation: Any, *operands: Any) -> Traced:
    """Two operands whose product is a (batched) matrix product: every label in two of the three terms."""
    operands = (
        tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    )
    simple = isinstance(equation, str) and len(operands) == 2 and "." not in equation
    hint = "of einsum, matrix products of two tensors are bounded; write it out with matmul, mul and sum"
    if not simple:
        tracer.refuse("einsum in this form", hint)
    terms, _, result = equation.replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    counted = "".join(sorted(left + right))
    result = result or "".join(label for label in dict.fromkeys(counted) if counted.count(label) == 1)
    once = [label for label in set(terms + result) - {","} if (left + right + result).count(label) < 2]
    repeated = any(len(set(term)) < len(term) for term in (left, right, result))
    values = [term for term, operand in zip((left, right), operands) if isinstance(operand, Traced)]
    batch = values[0][0]
    if once or repeated or any(term[0] != batch for term in (*values, result)):
        tracer.refuse(f"einsum with '{equation}'", hint)
    if len(values) == 1 and batch not in (left if values[0] == right else right):
        weight, value = (right, left) if isinstance(operands[0], Traced) else (left, right)
        return _einsum_with_weight(tracer, value, weight, result, *(
            operands if isinstance(operands[0], Traced) else operands[::-1]))  # fmt: skip
    if len(values) < 2:
        tracer.refuse(f"einsum with '{equation}' and a constant that has the label of the batch", hint)
    shared = [label for label in result if label in left and label in right and label != batch]
    rows = [label for label in result if label not in right]
    columns = [label for label in result if label not in left]
    summed = [label for label in left if label not in result]
    sizes = {label: int(size) for term, operand in zip((left, right), operands)
             for label, size in zip(term, operand.shape)}  # fmt: skip

    def matrix(value: Traced, term: str, first: list[str], second: list[str]) -> Traced:
        order = [term.index(label) for label in (batch, *shared, *first, *second)]
        moved = indices(value).permute(order)[0]
        shape = (
            *(sizes[s] for s in shared),
            *(math.prod(sizes[s] for s in part) for part in (first, second)),
        )
        return tracer.wrap(tracer.gather(tracer.node(value), moved, shape), value.dtype)

    product = of_values(
        tracer, matrix(operands[0], left, rows, summed), matrix(operands[1], right, summed, columns)
    )
    return _relabelled(tracer, product, [*shared, *rows, *columns], result[1:], sizes)


def _einsum_with_weight(
    tracer: Tracer, term: str, weight_term: str, result: str, value: Traced, weight: Tensor
) -> Traced:
    """A linear map: labels of the weight are summed or new, never shared with value and result."""
    summed = [label for label in weight_term if label not in result]
    created = [label for label in weight_term if label in result]
    if any(label in term for label in created):
        tracer.refuse("einsum of a weight that shares a dimension with the result", "use mul and sum")
    kept = [label for label in term[1:] if label not in summed]
    sizes = {label: int(size) for label, size in (*zip(term, value.shape), *zip(weight_term, weight.shape))}
    moved = indices(value).permute([term.index(label) for label in (term[0], *kept, *summed)])[0]
    shape = (*(sizes[label] for label in kept), math.prod(sizes[label] for label in summed))
    node = tracer.gather(tracer.node(value), moved, shape)
    order = [weight_term.index(label) for label in (*created, *summed)]
    matrix = tracer.compute(torch.Tensor.permute, weight, order)
    matrix = tracer.compute(torch.Tensor.reshape, matrix, (-1, shape[-1]))
    product = linear(tracer, tracer.wrap(node, value.dtype), matrix)
    return _relabelled(tracer, product, [*kept, *created], result[1:], sizes)


def _relabelled(
    tracer: Tracer, value: Traced, labels: list[str], wanted: str, sizes: dict[str, int]
) -> Traced:
    """A value whose elements stand in the order of ``labels``, with dimensions ``wanted``."""
    shape = tuple(sizes[label] for label in labels)
    index = torch.arange(math.prod(shape), device="cpu").reshape(shape)
    index = index.permute([labels.index(label) for label in wanted])
    return tracer.wrap(tracer.gather(tracer.node(value), index, tuple(index.shape)), value.dtype)


@lowers("rmatmul")
def rmatmul(tracer: Tracer, input: Any, other: Any) -> Traced:
    return matmul(tracer, other, input)


@lowers("addmm")
def addmm(tracer: Tracer, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Traced:
    """``beta * input + alpha * (mat1 @ mat2)``."""
    product = mul(tracer, matmul(tracer, mat1, mat2), alpha)
    if isinstance(input, Traced):
        return add(tracer, product, mul(tracer, input, beta))
    return add(tracer, product, tracer.compute(torch.mul, input, beta))


def _matrix(tracer: Tracer, weight: Tensor) -> Tensor:
    """A constant factor as a matrix or vector."""
    if weight.dim() <= 2:
        return weight
    if math.prod(weight.shape[:-2]) != 1:
        tracer.refuse(
            f"a batched matrix product with a constant of shape {list(weight.shape)}", "use one matrix"
        )
    return tracer.compute(torch.Tensor.reshape, weight, tuple(weight.shape[-2:]))
