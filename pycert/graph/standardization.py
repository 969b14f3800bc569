"""Lowering of LayerNorm, GroupNorm, InstanceNorm and RMSNorm: statistics of the sample itself."""

from __future__ import annotations

import math
from typing import Any

import torch

from pycert.graph.elementwise import activation, add, mul
from pycert.graph.normalization import functional as batch_norm
from pycert.graph.parts import indices
from pycert.graph.tracer import Traced, Tracer, lowers


@lowers("layer_norm")
def layer_norm(tracer: Tracer, input: Traced, normalized_shape: Any, weight: Any = None, bias: Any = None,
               eps: float = 1e-5, cudnn_enable: bool = True) -> Traced:  # fmt: skip
    sizes = _sizes(tracer, "layer_norm", input, normalized_shape)
    result = _standardized(tracer, input, math.prod(sizes), float(eps))
    return _affine(tracer, result, weight, bias)


@lowers("rms_norm")
def rms_norm(
    tracer: Tracer, input: Traced, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Traced:
    """``x / sqrt(mean(x^2) + eps)``."""
    sizes = _sizes(tracer, "rms_norm", input, normalized_shape)
    eps = torch.finfo(input.dtype).eps if eps is None else float(eps)
    count = math.prod(sizes)
    rows = _rows(tracer, input, count)
    scaled = _divided(tracer, rows, None, eps)
    result = tracer.wrap(tracer.reshape(scaled, tuple(input.shape[1:]), helper=False), input.dtype)
    return _affine(tracer, result, weight, None)


@lowers("group_norm")
def group_norm(tracer: Tracer, input: Traced, num_groups: int, weight: Any = None, bias: Any = None,
               eps: float = 1e-5, cudnn_enabled: bool = True) -> Traced:  # fmt: skip
    """Each group of channels of a sample by its own mean and variance."""
    channels = int(input.shape[1])
    if channels % num_groups:
        raise ValueError(f"{tracer.path}: group_norm of {channels} channels in {num_groups} groups")
    result = _standardized(tracer, input, math.prod(input.shape[1:]) // num_groups, float(eps))
    shape = (-1, *[1] * (input.dim() - 2))
    each = [None if v is None else tracer.compute(torch.Tensor.reshape, v, shape) for v in (weight, bias)]
    return _affine(tracer, result, *each)


@lowers("instance_norm")
def instance_norm(tracer: Tracer, input: Traced, running_mean: Any = None, running_var: Any = None,
                  weight: Any = None, bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1,
                  eps: float = 1e-5) -> Traced:  # fmt: skip
    """Each channel of a sample by its own mean and variance, or by running ones."""
    if use_input_stats:
        return group_norm(tracer, input, int(input.shape[1]), weight, bias, eps)
    return batch_norm(tracer, input, running_mean, running_var, weight, bias, False, momentum, eps)


def _sizes(tracer: Tracer, name: str, input: Traced, normalized_shape: Any) -> tuple[int, ...]:
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    own = tuple(input.shape)
    if not 0 < len(sizes) < len(own) or own[-len(sizes) :] != sizes:
        raise ValueError(f"{tracer.path}: {name} over {list(sizes)} of a value of shape {list(own)}")
    return sizes


def _affine(tracer: Tracer, value: Traced, weight: Any, bias: Any) -> Traced:
    value = value if weight is None else mul(tracer, value, weight)
    return value if bias is None else add(tracer, value, bias)


def _rows(tracer: Tracer, input: Traced, count: int) -> int:
    """The value as rows ``[R, count]``, each of which is normalised."""
    index = indices(input)[0]
    return tracer.gather(tracer.node(input), index, (index.numel() // count, count))


def _standardized(tracer: Tracer, input: Traced, count: int, eps: float) -> Traced:
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps)`` over runs of ``count`` elements.

    Executions find the variance in one pass (Welford), whose error is at most
    2.9 gamma_n max|x| times the deviation: 4 n more roundings of the mean, which the difference and with it
    the squares carry, cover it. 4 roundings of |x| + |mean| are those of x r - mean r.
    """
    rows = _rows(tracer, input, count)
    shape = tracer.shape(rows)
    mean = tracer.emit(
        "sum", (rows,), shape[:1], divisor=float(count), roundings=4.0 * count + 16, helper=True
    )
    centred = tracer.emit(
        "add", (rows, _repeated(tracer, mean, count)), shape, sign=-1, roundings=4.0, helper=True
    )
    scaled = _divided(tracer, centred, rows, eps)
    return tracer.wrap(tracer.reshape(scaled, tuple(input.shape[1:]), helper=False), input.dtype)


def _divided(tracer: Tracer, value: int, original: int | None, eps: float) -> int:
    """Rows ``[R, n]`` over the root of their mean square plus eps; ``original``: before the mean was taken off."""
    shape = tracer.shape(value)
    count = shape[-1]
    squares = tracer.node(activation(tracer, "square", tracer.wrap(value)))
    variance = tracer.emit("sum", (squares,), shape[:1], divisor=float(count), roundings=16.0, helper=True)
    safe = tracer.node(add(tracer, tracer.wrap(variance), eps))
    safe = tracer.emit("limit", (safe,), shape[:1], min=eps, roundings=4.0, lost=0.0, helper=True)
    root = activation(tracer, "sqrt", tracer.wrap(safe))
    inverse = _repeated(tracer, tracer.node(activation(tracer, "reciprocal", root)), count)
    result = tracer.emit("product", (value, inverse), shape, helper=True)
    # |y_i| <= sqrt(n), and sqrt(n - 1) where the y_i add up to 0
    most = math.sqrt(count if original is None else count - 1) * (1 + 2.0**-50)
    inputs = (result,) if original is None else (result, original, inverse)
    return tracer.emit("limit", inputs, shape, min=-most, max=most, roundings=16.0, lost=4.0)


def _repeated(tracer: Tracer, node: int, count: int) -> int:
    """``[R]`` as ``[R, count]``."""
    (rows,) = tracer.shape(node)
    index = torch.arange(rows, device="cpu")[:, None].expand(rows, count)
    return tracer.gather(node, index, (rows, count))
