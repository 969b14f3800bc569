"""Norms of masked linear operators: the ``norm`` family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycert.norms.bounds import upper_norm
from pycert.norms.operator import Geometry, Operator, operator_of
from pycert.ops.relaxation import _out_of_autocast

METHODS = ("gram", "power")
EFFORTS = ("normal", "high")


class PowerNorm(NamedTuple):
    """``value`` ``[B]``, an estimate from below; ``vector`` ``[B, *in_shape]``, where to start the next time."""

    value: Tensor
    vector: Tensor


def _mask(name: str, mask: Tensor | None, shape: tuple[int, ...], weight: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, torch.float64):
        raise TypeError(f"{name} must be bool, float32 or float64, got {mask.dtype}")
    if mask.device != weight.device:
        raise ValueError(f"{name} must be on the device of weight ({weight.device}), got {mask.device}")
    if mask.dim() < 1 or mask.shape[0] == 0 or mask[0].numel() != math.prod(shape):
        raise ValueError(f"{name} must have shape [B, {', '.join(map(str, shape))}], got {list(mask.shape)}")
    return mask.detach().reshape(mask.shape[0], *shape)


def _arguments(
    weight: Tensor, row_mask: Tensor | None, col_mask: Tensor | None, conv: Mapping[str, Any] | None
) -> tuple[Operator, Tensor | None, Tensor | None, int]:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    weight = _out_of_autocast(weight)
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weight must be float32 or float64, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, got {list(weight.shape)}")
    operator = operator_of(weight, conv)
    rows = _mask("row_mask", row_mask, operator.output_shape, weight)
    columns = _mask("col_mask", col_mask, operator.input_shape, weight)
    sizes = {mask.shape[0] for mask in (rows, columns) if mask is not None}
    if len(sizes) > 1:
        raise ValueError(f"row_mask and col_mask must have the same batch, got {sorted(sizes)}")
    return operator, rows, columns, sizes.pop() if sizes else 1


def masked_norm(
    weight: Tensor,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    p: float = 2,
    method: str = "gram",
    effort: str = "normal",
    conv: Mapping[str, Any] | None = None,
    *,
    steps: int = 100,
) -> Tensor:
    """Norms ``||D_out W D_in||_p`` of a linear operator under nonnegative diagonals, one pair per sample.

    Args:
        weight: ``[out, in]``, or the kernel of a convolution, ``[O, C / groups, kh, kw]`` (transposed:
            ``[C, O / groups, kh, kw]``; one dimension less in one dimension), float32 or float64.
        row_mask: ``[B, *out_shape]``, the diagonal of ``D_out``: bool, or nonnegative reals (of
            others the magnitude counts); None for the identity.
        col_mask: ``[B, *in_shape]``, that of ``D_in``.
        p: 1, 2 or ``inf``: the operator norm from and to the l_p norm.
        method: ``"gram"``, guaranteed from above, or ``"power"``, an estimate from below (p = 2).
        effort: of ``"gram"``: ``"high"`` spends up to a hundred times more on masked convolutions.
        conv: None for a matrix, else a dict with ``input_shape`` (C, H, W) and as for
            ``torch.nn.functional.conv2d`` and ``conv_transpose2d`` ``stride``, ``padding``,
            ``dilation``, ``groups``, ``transposed``, ``output_padding``.
        steps: of ``"power"``: iterations from a random start.

    Returns:
        ``[B]`` (``[1]`` without masks), without unit, in the dtype of the weight. NaN where a weight or
        the sample's masks are not finite; exactly 0 where no weight is left.

    Raises:
        ValueError, TypeError: names what does not fit.

    Soundness: ``"gram"``: outward rounded; docs/lipschitz.md derives it. p = 1 and infinity are exact up to
    that rounding. ``"power"``: none; never above the norm but for rounding.
    Gradient: with respect to the weight, ``<v u^T, dW>`` of the singular vectors (p = 2) or that of the
    largest sum; masks count as constants.
    Source: Huang et al., "Training Certifiably Robust Neural Networks with Efficient Local Lipschitz Bounds",
    NeurIPS 2021 (``"power"``); Delattre et al. 2023, Rump 2006 and docs/lipschitz.md (``"gram"``).

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> pycert.ops.masked_norm(weight, row_mask=torch.tensor([[True, False], [True, True]]), p=1)
        tensor([3., 4.])
    """
    if p not in (1, 2, math.inf):
        raise ValueError(f"p must be 1, 2 or inf, got {p!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of 'gram', 'power', got {method!r}")
    if effort not in EFFORTS:
        raise ValueError(f"effort must be one of 'normal', 'high', got {effort!r}")
    if method == "power" and p != 2:
        raise ValueError(f"method 'power' is for p = 2; p = {p} is exact with method 'gram'")
    if method == "power":
        return power_norm(weight, row_mask, col_mask, steps=steps, conv=conv).value
    operator, rows, columns, batch = _arguments(weight, row_mask, col_mask, conv)
    with torch.no_grad():
        value = upper_norm(operator, rows, columns, p, effort)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return value
    if p == 2:
        plain = _power(operator, rows, columns, batch, None, 30)[0]
    else:
        plain = _largest_sum(operator, rows, columns, p)
    return plain + (value - plain.detach())


def _largest_sum(operator: Operator, rows: Tensor | None, columns: Tensor | None, p: float) -> Tensor:
    """p = 1 and infinity in plain arithmetic, for the gradient."""
    dtype = operator.weight.dtype
    absolute = operator.with_weight(operator.weight.abs())
    inner, outer = (rows, columns) if p == 1 else (columns, rows)
    shape = operator.output_shape if p == 1 else operator.input_shape
    ones = operator.weight.new_ones(1, *shape) if inner is None else inner.to(dtype)
    sums = absolute.apply_adjoint(ones) if p == 1 else absolute.apply(ones)
    return (sums if outer is None else sums * outer.to(dtype)).flatten(1).amax(1)


def _power(
    operator: Operator,
    rows: Tensor | None,
    columns: Tensor | None,
    batch: int,
    start: Tensor | None,
    steps: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    geometry = operator.geometry
    seed = int(torch.randint(2**62, (), generator=generator))
    conv = (
        ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        if geometry is None
        else (
            list(geometry.stride),
            list(geometry.padding),
            list(geometry.dilation),
            geometry.transposed,
            list(geometry.output_padding),
            geometry.groups,
        )
    )
    found = torch.ops.pycert.masked_power(
        operator.weight,
        rows,
        columns,
        start,
        steps,
        seed,
        geometry is not None,
        [batch, *operator.input_shape],
        *conv,
    )
    return found[0], found[1]


def power_norm(
    weight: Tensor,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    start: Tensor | None = None,
    steps: int = 5,
    conv: Mapping[str, Any] | None = None,
    *,
    batch: int | None = None,
    generator: torch.Generator | None = None,
) -> PowerNorm:
    """Estimates of ``||D_out W D_in||_2`` from below by power iteration, with a warm start: for training.

    Args:
        weight, row_mask, col_mask, conv: as in :func:`masked_norm`.
        start: ``[B, *in_shape]``, what an earlier call returned as ``vector``; None for a random one. It
            is mixed with a fresh random direction, so that neither zeros nor parts of the operator that
            earlier masks cut off stay unseen.
        steps: iterations.
        batch: number of samples where neither masks nor start tell it.
        generator: of the random directions; torch's default one otherwise.

    Returns:
        ``PowerNorm(value, vector)``; ``value`` has a gradient.

    Raises:
        ValueError, TypeError: names what does not fit.

    Soundness: none, an estimate. Gradient: ``<v u^T, dW>``; saved for it are one vector per sample on either
    side, whatever ``steps``.
    Source: Huang et al. 2021, section 3; its gradient differs in that it does not run through the steps.
    """
    operator, rows, columns, count = _arguments(weight, row_mask, col_mask, conv)
    if rows is None and columns is None:
        count = batch if batch is not None else count if start is None else start.shape[0]
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer of at least 0, got {steps!r}")
    if start is not None:
        if start.shape[0] != count or start[0].numel() != math.prod(operator.input_shape):
            shape = [count, *operator.input_shape]
            raise ValueError(f"start must have shape {shape}, got {list(start.shape)}")
        start = start.detach().to(operator.weight.dtype).reshape(count, *operator.input_shape)
    value, vector = _power(operator, rows, columns, count, start, steps, generator)
    return PowerNorm(value, vector)


@torch.library.register_fake("pycert::masked_power")
def _(  # type: ignore[no-untyped-def]
    weight,
    row_mask,
    column_mask,
    start,
    steps,
    seed,
    conv,
    input,
    stride,
    padding,
    dilation,
    transposed,
    output_padding,
    groups,
):
    if conv:
        geometry = Geometry(
            (input[1], input[2], input[3]),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            groups,
            transposed,
            tuple(output_padding),
        )
        shape: tuple[int, ...] = geometry.output_shape(weight)
    else:
        shape = (weight.shape[0],)
    real = column_mask is not None and column_mask.dtype not in (torch.bool, torch.uint8)
    return (
        weight.new_empty(input[0]),
        weight.new_empty(input),
        weight.new_empty((input[0], *shape)),
        weight.new_empty(input if real else (0,)),
        weight.new_empty(input[0], dtype=torch.float64),
    )
