"""Lowering of sums, means and extrema over dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch

from pycert.graph.elementwise import neg
from pycert.graph.parts import indices
from pycert.graph.tracer import Traced, Tracer, lowers


@lowers("sum")
def total(
    tracer: Tracer, input: Traced, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Traced:
    return _in_dtype(tracer, "sum", reduce(tracer, "sum", input, dim, keepdim, mean=False), dtype)


@lowers("mean")
def mean(
    tracer: Tracer, input: Traced, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Traced:
    return _in_dtype(tracer, "mean", reduce(tracer, "mean", input, dim, keepdim, mean=True), dtype)


def _in_dtype(tracer: Tracer, name: str, result: Traced, dtype: Any) -> Traced:
    """A sum that torch forms in a dtype of at least the value's precision."""
    if dtype is None or dtype == result.dtype:
        return result
    if dtype != torch.float64:
        tracer.refuse(
            f"{name} with dtype={dtype} of {result.dtype}", "it rounds every value; leave dtype out"
        )
    return tracer.wrap(tracer.node(result), dtype)


def reduce(tracer: Tracer, name: str, input: Traced, dim: Any, keepdim: bool, mean: bool) -> Traced:
    """Sums over any dimensions: they are moved to the end and flattened into one."""
    node, dims, shape, kept = last(tracer, name, input, dim, keepdim)
    if not dims:
        return tracer.wrap(node, input.dtype)
    divisor = float(shape[-1]) if mean else 1.0
    result = tracer.emit("sum", (node,), shape[:-1], divisor=divisor)
    return tracer.wrap(tracer.reshape(result, kept), input.dtype)


def last(
    tracer: Tracer, name: str, input: Traced, dim: Any, keepdim: bool
) -> tuple[int, list[int], tuple[int, ...], tuple[int, ...]]:
    """The value with ``dim`` moved to one last dimension: node, dims, its shape, the shape of the result."""
    given = [dim] if isinstance(dim, int) else list(dim or [])
    dims = sorted({int(d) % input.dim() for d in given})
    if not dims or dims[0] == 0:
        tracer.refuse(
            f"{name} over the batch dimension", "name the dimensions, without 0: x.mean(dim=(2, 3))"
        )
    node = tracer.node(input)
    own = tracer.shape(node)
    reduced = [d - 1 for d in dims]
    rest = [d for d in range(len(own)) if d not in reduced]
    moved = indices(input)[0].permute(*rest, *reduced)
    shape = (*(own[d] for d in rest), math.prod(own[d] for d in reduced))
    kept = tuple(1 if d in reduced else own[d] for d in range(len(own)) if keepdim or d not in reduced)
    return tracer.gather(node, moved, shape), dims, shape, kept


@lowers("amax")
def amax(tracer: Tracer, input: Traced, dim: Any = (), keepdim: bool = False) -> Traced:
    """A maximum over dimensions is a pool whose one window holds them all."""
    node, _, shape, kept = last(tracer, "amax", input, dim, keepdim)
    rows = tracer.reshape(node, (1, math.prod(shape[:-1]), shape[-1]))
    result = tracer.emit(
        "max_pool", (rows,), (1, math.prod(shape[:-1]), 1), kernel=(1, shape[-1]), stride=(1, shape[-1]),
        padding=(0, 0), dilation=(1, 1), ceil_mode=False,
    )  # fmt: skip
    return tracer.wrap(tracer.reshape(result, kept), input.dtype)


@lowers("amin")
def amin(tracer: Tracer, input: Traced, dim: Any = (), keepdim: bool = False) -> Traced:
    return neg(tracer, amax(tracer, neg(tracer, input), dim, keepdim))
