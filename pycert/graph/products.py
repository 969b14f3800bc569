"""Lowering of matrix products with parameters and constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycert.graph.elementwise import add, mul
from pycert.graph.parts import indices
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
    """``x @ W`` and ``W @ x`` with one matrix ``W`` that does not depend on the input."""
    if isinstance(input, Traced) and isinstance(other, Traced):
        tracer.refuse(
            "a matrix product of two values that depend on the input", "one factor must be a parameter"
        )
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
