"""Linear bounds against regions of inputs: the ``backsub`` family."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycert.ops.relaxation import _out_of_autocast
from pycert.regions import Box, LpBall


def concretize(A: Tensor, c: Tensor, region: LpBall | Box, side: str = "lower") -> Tensor:
    """The least (or greatest) value of ``A x + c`` over every region.

    Args:
        A: ``[B, S, *in]``, float32 or float64; half precision under autocast is cast to float32.
        c: ``[B, S]``, of the same dtype.
        region: ``LpBall`` or ``Box`` with a batch of ``B``.
        side: ``"lower"`` or ``"upper"``.

    Returns:
        ``[B, S]``. For a clipped ball of p = 1 or 2 the tighter of ball and box. Infinite where the
        arithmetic overflows or a coefficient is NaN or infinite.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or another ``side``.

    Soundness: sums in float64 rounded outward by gamma_N(2^-53) of their magnitude.
    Gradient: with respect to ``A``, ``c`` and the region.
    Source: Zhang et al. 2018 (CROWN), Eq. (7): the dual norm of the rows.
    """
    if side not in ("lower", "upper"):
        raise ValueError(f"side must be 'lower' or 'upper', got {side!r}")
    if not isinstance(region, (LpBall, Box)):
        raise TypeError(f"region must be a pycert.LpBall or pycert.Box, got {type(region).__name__}")
    A, c = _out_of_autocast(A), _out_of_autocast(c)
    batch, shape = region.lower.shape[0], region.lower.shape[1:]
    if A.dim() < 2 or A.shape[0] != batch or A.shape[2:] != shape:
        raise ValueError(f"A must have shape [{batch}, S, {', '.join(map(str, shape))}], got {list(A.shape)}")
    if c.shape != A.shape[:2]:
        raise ValueError(f"c must have shape {list(A.shape[:2])}, got {list(c.shape)}")
    if A.dtype != region.lower.dtype or c.dtype != A.dtype:
        raise TypeError(
            f"A, c and region must have the same dtype, got {A.dtype}, {c.dtype}, {region.lower.dtype}"
        )
    sign = 1 if side == "lower" else -1
    count = math.prod(shape)
    rows = A.reshape(-1, count) * sign
    sample = torch.arange(batch, device=A.device).repeat_interleave(A.shape[1])
    dense, extent = [1, 0, 0, 0, 0, 0, 0], [1, 1, count]

    def least(first: Tensor, second: Tensor, norm: int) -> Tensor:
        return torch.ops.pycert.concretize_rows(
            rows, None, 2**62, sample, None, dense, extent, first, second, norm
        )

    lower, upper = region.lower.flatten(1), region.upper.flatten(1)
    if isinstance(region, LpBall) and region.p != math.inf:
        value = least(region.x.flatten(1), region.eps.contiguous(), int(region.p))
        if region.clip is not None:
            value = torch.maximum(value, least(lower, upper, 0))
    else:
        value = least(lower, upper, 0)
    constant = c.reshape(-1).double() * sign
    total = value[0] + constant
    slack = (value[1].detach() + constant.detach().abs()) * ((count + 70) * 2.0**-53 * 1.001)
    below = (total.detach() - slack).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    result = below.to(A.dtype)
    result = torch.where(
        result.double() > below, torch.nextafter(result, torch.full_like(result, -math.inf)), result
    )
    return (_Shift.apply(total.to(A.dtype), result) * sign).view(A.shape[:2])


class _Shift(torch.autograd.Function):
    """The second argument with the gradient of the first: outward rounding is a constant for autograd."""

    @staticmethod
    def forward(ctx, plain: Tensor, value: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad, None


@torch.library.register_fake("pycert::concretize_rows")
def _(rows, source, negative_from, sample, position, window, extent, first, second, norm):  # type: ignore[no-untyped-def]
    return rows.new_empty((2, sample.shape[0]), dtype=torch.float64)


@torch.library.register_fake("pycert::concretize_rows_backward")
def _(grad, rows, sample, position, window, extent, first, second, norm, of_region):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (rows, first, second))
