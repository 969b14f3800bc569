"""Error bounds of float64 sums, exact conversion and scaling, rounding upward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycert import _C

UNIT_ROUNDOFF = 2.0**-53
#: A result that lost its tail to underflow is off by at most this, whether or not subnormals are flushed.
SMALLEST = 2.0**-1022
#: Multiplies a nonnegative scalar result: covers some forty roundings of the steps that led to it.
UP = 1 + 2.0**-46


def gamma(terms: float) -> float:
    """``n u / (1 - n u)``: relative error of a float64 sum of ``terms`` products in any order (Higham 2002, ch. 3).

    Raises:
        ValueError: ``n u >= 1/2``.
    """
    if not _C.testing_enabled("norm"):
        return 0.0
    share = terms * UNIT_ROUNDOFF
    if not share < 0.5:
        raise ValueError(f"a sum of {terms:g} terms is too long for a rounding error bound in float64")
    return share / (1 - share) * UP


def exact_double(value: Tensor) -> Tensor:
    """The value in float64, exactly, also where the processor reads subnormal float32 as zero; with its gradient."""
    if torch.is_grad_enabled() and value.requires_grad:
        return with_gradient(exact_double(value.detach()), value.double())
    value = value.detach()
    if value.dtype != torch.float32:
        return value.double()
    wide = value.double()
    bits = value.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    subnormal = (magnitude > 0) & (magnitude < 0x00800000)
    if bool(subnormal.any()):
        tiny = magnitude.double() * 2.0**-149 * torch.where(bits < 0, -1.0, 1.0).double()
        wide = torch.where(subnormal, tiny, wide)
    return wide


def bits_of(value: Tensor) -> Tensor:
    """Floating-point numbers as integers: subnormal ones differ even where the processor takes them for zeros."""
    if value.dtype in (torch.float32, torch.float64):
        return value.detach().view(torch.int32 if value.dtype == torch.float32 else torch.int64)
    return value.detach()


def is_nonzero(value: Tensor) -> Tensor:
    """Whether elements are neither 0 nor -0."""
    bits = bits_of(value)
    if value.is_floating_point() and bits.dtype in (torch.int32, torch.int64):
        return (bits & torch.iinfo(bits.dtype).max) != 0
    return bits != 0


def with_gradient(value: Tensor, plain: Tensor) -> Tensor:
    """``value``, a rounded form of ``plain``, with the gradient of ``plain``."""
    if not (torch.is_grad_enabled() and plain.requires_grad):
        return value
    change = plain - plain.detach()  # 0, or NaN where plain is not finite
    return value.detach() + torch.where(torch.isfinite(plain), change, torch.zeros_like(change))


def root(value: Tensor) -> Tensor:
    """Square roots whose gradient at 0 is 0, not infinite."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return value.sqrt()
    positive = value > 0
    return torch.where(
        positive, torch.where(positive, value, torch.ones_like(value)).sqrt(), value.detach().sqrt()
    )


def exponent_of(largest: Tensor) -> Tensor:
    """Integers ``e`` with ``2^(e-1) <= largest < 2^e``; 0 for zero and for what is not finite."""
    e = torch.frexp(largest).exponent
    return torch.where(torch.isfinite(largest) & (largest > 0), e, torch.zeros_like(e))


def times_power(value: Tensor, exponent: Tensor) -> Tensor:
    """``value * 2^exponent`` in two steps, since one factor alone may overflow; exact but for underflow."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return value * _power_of_two(half) * _power_of_two(exponent - half)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Exact, -1022 to 1023, by its bits: library functions need not be exact, nor float64."""
    return (exponent.to(torch.int64).clamp(-1022, 1023) + 1023).bitwise_left_shift(52).view(torch.float64)


def round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 number that is itself an upper bound, as ``dtype``, not below it; +0 stays."""
    if dtype == torch.float64:
        return value
    # Subnormal results may read as zero to who flushes them: never below the smallest normal number.
    value = torch.where((value > 0) & (value < 2.0**-126), torch.full_like(value, 2.0**-126), value)
    rounded = value.to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, math.inf))
    return torch.where(rounded.double() < value, above, rounded)


def scaled_back(value: Tensor, exponent: Tensor) -> Tensor:
    """``value * 2^exponent``, not below it where that underflows."""
    result = times_power(value, exponent)
    return torch.where((value > 0) & (result < 2.0**-1000), result + SMALLEST, result)


def frobenius(value: Tensor) -> Tensor:
    """At least the Frobenius norm over the last two dimensions; ``[..., m, n]`` to ``[...]``."""
    parts = torch.view_as_real(value).flatten(-2) if value.is_complex() else value
    total = parts.square().sum((-2, -1))
    count = parts.shape[-1] * parts.shape[-2]
    bound = (total * (1 + gamma(count + 8)) + count * SMALLEST).sqrt() * UP
    return torch.where((parts == 0).all(-1).all(-1), torch.zeros_like(bound), bound)


def dual_norm(rows: Tensor, p: float) -> Tensor:
    """At least the norm dual to the p-norm over the last dimension."""
    count = rows.shape[-1]
    if p == 1:
        return rows.abs().amax(-1)
    if p == math.inf:
        return rows.abs().sum(-1) * ((1 + gamma(count + 2)) * UP)
    largest = rows.abs().amax(-1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
    return root(scaled.square().sum(-1)) * largest[..., 0] * ((1 + gamma(count + 8)) * UP)
