"""Regions of inputs: l_p balls and boxes, checked once when they are built."""

from __future__ import annotations

import math
from typing import SupportsFloat

import numpy as np
import torch
from torch import Tensor

from pycert import _C, _flags  # noqa: F401 - _C registers torch.ops.pycert


def _check_values(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
    if value.dim() < 1 or value.shape[0] == 0:
        raise ValueError(f"{name} must have a batch of at least 1, got shape {tuple(value.shape)}")
    values = value.detach()
    if not math.isfinite(values.sum().item()):  # cheap; large finite values may overflow it
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            raise ValueError(f"{name} must be finite, got {values[bad][0].item()} among its values")


class LpBall:
    """All inputs within ``eps`` of ``x`` in the l_p norm, cut to the range ``clip``.

    Args:
        x: centres, ``[B, *in]``, float32 or float64, in raw input units.
        eps: radius in the units of ``x``, at least 0: a float or a tensor ``[B]``. A float is rounded
            up to the dtype of ``x``.
        p: 1, 2 or ``inf``.
        clip: ``(low, high)``, the range every coordinate of an input keeps to; ``None`` for no range.
            The region is the intersection of ball and range, whatever ``p``.

    Raises:
        TypeError: ``x`` or ``eps`` is no floating tensor, or they differ in dtype or device; ``clip`` is
            not a pair of numbers.
        ValueError: a value is NaN or infinite, ``eps`` is negative, ``p`` is another number, the batch
            is empty, ``clip`` is not an interval, or a ball lies outside it.
    """

    @_flags.subnormals_kept
    def __init__(
        self,
        x: Tensor,
        eps: float | Tensor,
        p: float = math.inf,
        clip: tuple[float, float] | None = None,
    ) -> None:
        _check_values("x", x)
        if p not in (1, 2, math.inf):
            raise ValueError(f"p must be 1, 2 or inf, got {p!r}")
        self.x, self.p, self.clip = x, float(p), clip
        self.eps = self._eps_tensor(eps)
        low, high = self._check_clip(clip)
        self.lower, self.upper = torch.ops.pycert.linf_ball(x, self.eps, low, high)
        if clip is not None and bool((self.lower > self.upper).any()):
            raise ValueError(f"clip: the ball around x does not meet the range {clip} in some coordinate")

    def _eps_tensor(self, eps: float | Tensor) -> Tensor:
        x = self.x
        if isinstance(eps, Tensor):
            if eps.dtype != x.dtype or eps.device != x.device:
                raise TypeError(
                    f"eps must have the dtype and device of x ({x.dtype}, {x.device}), got {eps.dtype}, {eps.device}"
                )
            if eps.dim() > 1 or (eps.dim() == 1 and eps.shape[0] not in (1, x.shape[0])):
                raise ValueError(f"eps must be a number or have shape [{x.shape[0]}], got {tuple(eps.shape)}")
            value = eps.expand(x.shape[0])
            bad = ~(torch.isfinite(eps.detach()) & (eps.detach() >= 0))
            if bool(bad.any()):
                raise ValueError(
                    f"eps must be finite and at least 0, got {eps.detach()[bad].flatten()[0].item()}"
                )
            return value
        if not isinstance(eps, SupportsFloat):
            raise TypeError(f"eps must be a number or a tensor, got {type(eps).__name__}")
        if not (math.isfinite(eps) and float(eps) >= 0):
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        radius = float(eps)
        if x.dtype == torch.float32 and float(np.float32(radius)) < radius:
            radius = float(np.nextafter(np.float32(radius), np.float32(math.inf)))
        return x.new_full((x.shape[0],), radius)

    @staticmethod
    def _check_clip(clip: tuple[float, float] | None) -> tuple[float, float]:
        if clip is None:
            return -math.inf, math.inf
        try:
            low, high = (float(end) for end in clip)
        except (TypeError, ValueError):
            raise TypeError(f"clip must be two numbers (low, high), got {clip!r}") from None
        if not low <= high:
            raise ValueError(f"clip must be (low, high) with low <= high, got {clip}")
        return low, high

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    def __repr__(self) -> str:
        return f"LpBall(x={tuple(self.x.shape)}, eps={self.eps.tolist()[:3]}, p={self.p}, clip={self.clip})"

    def _for_engine(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, bool]:
        if self.p == math.inf:
            return self.lower, self.upper, self.x, None, 0, False
        return self.lower, self.upper, self.x, self.eps, int(self.p), self.clip is not None


class Box:
    """All inputs between ``lower`` and ``upper``, coordinate by coordinate.

    Args:
        lower, upper: ``[B, *in]`` each, float32 or float64, ``lower <= upper``; equal where a
            coordinate is fixed.

    Raises:
        TypeError: no floating tensors, or of different dtype or device.
        ValueError: NaN or infinite values, different shapes, an empty batch, ``lower > upper``.
    """

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        _check_values("lower", lower)
        _check_values("upper", upper)
        if lower.dtype != upper.dtype or lower.device != upper.device:
            raise TypeError(
                f"lower and upper must have the same dtype and device, got {lower.dtype}, {lower.device} "
                f"and {upper.dtype}, {upper.device}"
            )
        if lower.shape != upper.shape:
            raise ValueError(
                f"lower and upper must have the same shape, got {tuple(lower.shape)} and {tuple(upper.shape)}"
            )
        with torch.no_grad():
            crossed = lower > upper
            if bool(crossed.any()):
                where = tuple(int(i) for i in crossed.nonzero()[0])
                raise ValueError(f"lower must not exceed upper, but it does at {where}")
        self.lower, self.upper = lower, upper

    @property
    def batch(self) -> int:
        return self.lower.shape[0]

    def __repr__(self) -> str:
        return f"Box(lower={tuple(self.lower.shape)})"

    def _for_engine(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, bool]:
        return self.lower, self.upper, None, None, 0, False


Region = LpBall | Box
