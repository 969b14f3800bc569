"""Lowering of softmax and log-softmax: sums of exponentials of differences."""

from __future__ import annotations

import math
from typing import Any

import torch

from pycert.graph.elementwise import activation, add, neg
from pycert.graph.reduction import last
from pycert.graph.tracer import Traced, Tracer, lowers


@lowers("softmax")
def softmax(tracer: Tracer, input: Traced, dim: Any = None, dtype: Any = None) -> Traced:
    """``softmax(x)_i = 1 / (1 + sum_{j != i} exp(x_j - x_i))``.

    Differences are capped where the exponential would overflow: that moves values below exp(-cap), to values
    below exp(-cap). Elements that a mask has set to -inf are left out.
    """
    _check(tracer, "softmax", input, dim, dtype)
    total, masked, place, shape = _sums(tracer, input, dim, capped=True)
    node = tracer.node(activation(tracer, "reciprocal", total))
    # products by a rounded 1 / sum, and what exp loses: at most one smallest normal number for each term
    lost = float(shape[-1] + 4)
    limited = tracer.emit(
        "limit",
        (node,),
        shape,
        min=0.0,
        max=1.0,
        roundings=8.0,
        lost=lost,
        eps=math.exp(-_cap(input)),
        helper=True,
    )
    place = torch.where(masked.flatten()[place], -1, place)
    return tracer.wrap(tracer.gather(limited, place, tuple(place.shape), helper=False), input.dtype)


@lowers("log_softmax")
def log_softmax(tracer: Tracer, input: Traced, dim: Any = None, dtype: Any = None) -> Traced:
    """``-log(1 + sum_{j != i} exp(x_j - x_i))``, never above 0; without lower bound where the sum overflows."""
    _check(tracer, "log_softmax", input, dim, dtype)
    total, masked, place, shape = _sums(tracer, input, dim, capped=False)
    if bool(masked.any()):
        tracer.refuse("log_softmax of elements masked by -inf", "mask by a large negative number, as -1e4")
    node = tracer.node(neg(tracer, activation(tracer, "log", total)))
    limited = tracer.emit("limit", (node,), shape, max=0.0, roundings=8.0, lost=4.0, helper=True)
    return tracer.wrap(tracer.gather(limited, place, tuple(place.shape), helper=False), input.dtype)


@lowers("softmin")
def softmin(tracer: Tracer, input: Traced, dim: Any = None, dtype: Any = None) -> Traced:
    return softmax(tracer, neg(tracer, input), dim, dtype)


def _cap(input: Traced) -> float:
    """The largest difference whose exponential is taken."""
    return 80.0 if input.dtype == torch.float32 else 700.0


def _check(tracer: Tracer, name: str, input: Traced, dim: Any, dtype: Any) -> None:
    if dtype not in (None, False, input.dtype):  # torch._softmax has a flag in its place
        tracer.refuse(f"{name} with dtype={dtype} of {input.dtype}", "leave dtype out")
    if dim is None:
        tracer.refuse(f"{name} without dim", "name the dimension")


def _sums(
    tracer: Tracer, input: Traced, dim: int, capped: bool
) -> tuple[Traced, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """``1 + sum_{j != i} exp(x_j - x_i)`` for every element, ``[R, n]`` with ``dim`` last.

    Also which elements are masked ``[R, n]``, the position of every element of the result in ``[R, n]``, and
    that shape.

    An execution subtracts the maximum m first. x_j - m and x_i - m are off by u |x_j - m| and u |x_i - m|, their
    exponentials' ratio by exp(x_j - x_i) (|x_j - m| + |x_i - m|) u. Beside 2 u |x_j - x_i|, which the difference is
    charged, that is at most 1.2 u of the largest term for each of the n: 2 n more roundings of the sum cover it.
    Rescaled block by block, as fused attention does, a sum takes a few more.
    """
    node, _, shape, _ = last(tracer, "softmax", input, dim, True)
    count = shape[-1]
    rows = math.prod(shape[:-1])
    source, index, masked = _unmasked(tracer, node, rows, count)
    wide = (rows, count, max(1, count - 1))
    if count == 1:  # no other: a sum of nothing
        terms = tracer.gather(source, torch.full(wide, -1), wide)
    else:
        terms = _terms(tracer, input, source, index, masked, capped)
    total = tracer.emit("sum", (terms,), wide[:-1], divisor=1.0, roundings=2.0 * count + 32, helper=True)
    whole = tracer.node(add(tracer, tracer.wrap(total, input.dtype), 1.0))
    limited = tracer.emit("limit", (whole,), wide[:-1], min=1.0, roundings=4.0, lost=0.0, helper=True)
    numbers = torch.arange(rows * count, device="cpu").reshape(shape)
    place = numbers.movedim(-1, dim % input.dim() - 1)
    return tracer.wrap(limited, input.dtype), masked, place, wide[:-1]


def _terms(
    tracer: Tracer, input: Traced, source: int, index: torch.Tensor, masked: torch.Tensor, capped: bool
) -> int:
    """``exp(x_j - x_i)`` of every other element, 0 where that is masked, ``[R, n, n - 1]``."""
    rows, count = index.shape
    others = torch.tensor([[j for j in range(count) if j != i] for i in range(count)], dtype=torch.int64)
    wide = (rows, count, count - 1)
    left = index[:, others]
    right = index[:, :, None].expand(wide)
    pair = (tracer.gather(source, left, wide), tracer.gather(source, right, wide))
    difference = tracer.wrap(tracer.emit("add", pair, wide, sign=-1, helper=True), input.dtype)
    if capped:
        difference = activation(tracer, "clamp", difference, min=-math.inf, max=_cap(input))
    terms = tracer.node(activation(tracer, "exp", difference))
    hidden = masked[:, others]
    if bool(hidden.any()):
        kept = torch.arange(math.prod(wide), device="cpu").reshape(wide)
        terms = tracer.gather(terms, torch.where(hidden, -1, kept), wide)
    return terms


def _unmasked(tracer: Tracer, node: int, rows: int, count: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """A node without -inf, where the elements ``[R, n]`` stand in it, and which of them are -inf."""
    index = torch.arange(rows * count, device="cpu")
    source = tracer.builder.behind_reshape(node)
    inner = tracer.builder.nodes[source]
    masked = torch.zeros(rows * count, dtype=torch.bool, device="cpu")
    if inner.op == "gather" and inner.attrs["fill"] == -math.inf:
        index = inner.attrs["index"].reshape(-1)
        masked = index < 0
        source, index = inner.inputs[0], index.clamp(min=0)
        if bool(masked.reshape(rows, count).all(1).any()):
            tracer.refuse("softmax of elements that are all -inf", "leave one of them unmasked")
    return source, index.reshape(rows, count), masked.reshape(rows, count)
