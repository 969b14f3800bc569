"""Lowering of functions that put values together: cat, stack, where and assignment to elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycert.graph.parts import Parts, broadcast, check_batch, constant_index, indices
from pycert.graph.tracer import Traced, Tracer, lowers


@lowers("cat")
def cat(tracer: Tracer, tensors: Any, dim: int = 0) -> Traced:
    """torch.cat along any dimension but the batch."""
    dims = max(len(part.shape) for part in tensors)
    axis = dim + dims if dim < 0 else dim
    if axis == 0:
        tracer.refuse("cat over the batch dimension", "samples must stay apart")
    for part in tensors:
        if part.dim() != dims or part.shape[0] != tracer.batch:
            tracer.refuse(
                f"cat of a tensor of shape {list(part.shape)} with values of {dims} dimensions, batch included",
                "expand it to the batch size of the input, as constant.expand(x.size(0), -1)",
            )
    parts = Parts(tracer, tensors, [tuple(part.shape) for part in tensors])
    return parts.gather(torch.cat(parts.indices, axis - 1), _dtype_of(tensors))


@lowers("stack")
def stack(tracer: Tracer, tensors: Any, dim: int = 0) -> Traced:
    """torch.stack along any dimension behind the batch."""
    axis = dim + len(tensors[0].shape) + 1 if dim < 0 else dim
    if axis == 0:
        tracer.refuse("stack before the batch dimension", "stack along dim >= 1")
    shapes = [(*part.shape[:axis], 1, *part.shape[axis:]) for part in tensors]
    parts = []
    for part, shape in zip(tensors, shapes):
        if isinstance(part, Traced):
            parts.append(tracer.wrap(tracer.reshape(tracer.node(part), shape[1:]), part.dtype))
        else:
            parts.append(tracer.compute(torch.Tensor.reshape, part, shape))
    return cat(tracer, parts, axis)


@lowers("hstack", "column_stack")
def hstack(tracer: Tracer, tensors: Any) -> Traced:
    if any(part.dim() < 2 for part in tensors):
        tracer.refuse("hstack or column_stack of one value per sample", "use torch.stack(..., dim=1)")
    return cat(tracer, tensors, 1)


@lowers("where")
def where(tracer: Tracer, condition: Tensor, input: Any = None, other: Any = None) -> Traced:
    """torch.where with a constant condition."""
    if isinstance(input, Tensor) and input.dtype == torch.bool:  # the method: x.where(condition, other)
        condition, input = input, condition
    if isinstance(condition, Traced) or input is None:
        tracer.refuse("where with a condition on values", "use relu, maximum, minimum or clamp")
    tracer.pin(condition, "a mask")
    shape = broadcast(tracer, condition.shape, *(p.shape for p in (input, other) if isinstance(p, Tensor)))
    check_batch(tracer, "where", shape)
    mask = condition.expand(shape).cpu()
    if not bool((mask == mask[:1]).all()):
        tracer.refuse("where with a mask that differs from sample to sample", "use one mask for all samples")
    parts = Parts(tracer, (input, other), [shape, shape])
    first, second = parts.indices
    return parts.gather(torch.where(mask[0], first, second), _dtype_of((input, other)))


@lowers("masked_fill")
def masked_fill(tracer: Tracer, input: Traced, mask: Tensor, value: Any) -> Traced:
    return where(tracer, mask, value, input)


@lowers("setitem")
def setitem(tracer: Tracer, input: Any, key: Any, value: Any) -> Traced:
    """``x[key] = value``: what x holds afterwards."""
    if not isinstance(input, Traced):
        tracer.refuse("assignment of a value into a constant tensor", "use torch.cat, torch.stack or F.pad")
    key = tuple(constant_index(tracer, part) for part in (key if isinstance(key, tuple) else (key,)))
    positions = indices(input)
    parts = Parts(tracer, (input, value), [tuple(input.shape), tuple(positions[key].shape)])
    positions[key] = -1 - parts.indices[1] - 1  # below 0, as sample 0 and sample 1 are given the same
    row = positions[0]
    offsets = row.numel() * torch.arange(tracer.batch, device="cpu").reshape(-1, *[1] * row.dim())
    if not torch.equal(positions, torch.where(row < 0, row, row + offsets)):
        tracer.refuse("assignment over the batch dimension", "samples must be treated alike")
    return parts.gather(torch.where(row < 0, -2 - row, row), input.dtype)


def _dtype_of(parts: Any) -> torch.dtype:
    return next(part.dtype for part in parts if isinstance(part, Traced))
