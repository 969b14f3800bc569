"""Boxes through affine layers: the ``interval`` family."""

from __future__ import annotations

import torch
from torch import Tensor

from pycert.ops.relaxation import _out_of_autocast

SOUNDNESS = ("none", "real", "deployed")

_Pair = int | tuple[int, int]


def _pair(name: str, value: _Pair) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or not all(isinstance(one, int) for one in pair):
        raise ValueError(f"{name} must be an integer or two, got {value!r}")
    return pair


def _soundness(value: str) -> int:
    if value not in SOUNDNESS:
        raise ValueError(f"soundness must be one of {', '.join(SOUNDNESS)}, got {value!r}")
    return SOUNDNESS.index(value)


def _operands(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    for name, value in (("lower", lower), ("upper", upper), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    lower, upper, weight = _out_of_autocast(lower), _out_of_autocast(upper), _out_of_autocast(weight)
    return lower, upper, weight, None if bias is None else _out_of_autocast(bias)


def interval_linear(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None = None, *, soundness: str = "deployed"
) -> tuple[Tensor, Tensor]:
    """The box of ``W x + b`` over every box ``[lower, upper]``.

    Args:
        lower: ``[B, ..., in]``, float32 or float64.
        upper: like ``lower``, with ``lower <= upper`` (not checked).
        weight: ``[out, in]``. bias: ``[out]``.
        soundness: ``"deployed"``, ``"real"`` or ``"none"``; see docs/soundness.md.

    Returns:
        lower and upper ends, each ``[B, ..., out]``; infinite where the arithmetic overflows.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; half precision is refused,
            except under autocast, where it is cast to float32.

    Soundness: outward rounded, as ``soundness`` says. Gradient: with respect to all four arguments.
    Source: midpoint-radius arithmetic, Rump 1999 ("Fast and parallel interval arithmetic"); Gowal et
    al. 2018, Eq. (6).
    """
    lower, upper, weight, bias = _operands(lower, upper, weight, bias)
    return torch.ops.pycert.interval_linear(lower, upper, weight, bias, _soundness(soundness), 0)


def interval_conv2d(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    groups: int = 1,
    *,
    soundness: str = "deployed",
) -> tuple[Tensor, Tensor]:
    """The box of a 2-d convolution over every box ``[lower, upper]``.

    Args:
        lower: ``[B, C, H, W]``, float32 or float64. upper: like ``lower``.
        weight: ``[O, C / groups, kh, kw]``. bias: ``[O]``.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        soundness: as in :func:`interval_linear`.

    Returns, raises, soundness, gradient, source: as in :func:`interval_linear`; ``[B, O, H', W']``.
    """
    lower, upper, weight, bias = _operands(lower, upper, weight, bias)
    return torch.ops.pycert.interval_conv2d(
        lower,
        upper,
        weight,
        bias,
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        False,
        [0, 0],
        groups,
        _soundness(soundness),
        0,
    )


def _gradients(lower, upper, weight, out, needed):  # type: ignore[no-untyped-def]
    box = [torch.empty_like(lower), torch.empty_like(upper)] if needed[0] else [None, None]
    return (
        *box,
        torch.empty_like(weight) if needed[1] else None,
        weight.new_empty(out) if needed[2] else None,
    )


@torch.library.register_fake("pycert::interval_linear")
def _(lower, upper, weight, bias, soundness, extra_terms, relu=False):  # type: ignore[no-untyped-def]
    shape = (*lower.shape[:-1], weight.shape[0])
    return lower.new_empty(shape), lower.new_empty(shape)


@torch.library.register_fake("pycert::interval_linear_backward")
def _(grad_lower, grad_upper, lower, upper, weight, needed):  # type: ignore[no-untyped-def]
    return _gradients(lower, upper, weight, weight.shape[0], needed)


def _conv_shape(x, weight, stride, padding, dilation, transposed, output_padding, groups):  # type: ignore[no-untyped-def]
    sizes = []
    for axis in (0, 1):
        size, k = x.shape[2 + axis], dilation[axis] * (weight.shape[2 + axis] - 1)
        if transposed:
            sizes.append((size - 1) * stride[axis] - 2 * padding[axis] + k + output_padding[axis] + 1)
        else:
            sizes.append((size + 2 * padding[axis] - k - 1) // stride[axis] + 1)
    return (x.shape[0], weight.shape[1] * groups if transposed else weight.shape[0], *sizes)


@torch.library.register_fake("pycert::interval_conv2d")
def _(  # type: ignore[no-untyped-def]
    lower,
    upper,
    weight,
    bias,
    stride,
    padding,
    dilation,
    transposed,
    output_padding,
    groups,
    soundness,
    extra,
    relu=False,
):
    shape = _conv_shape(lower, weight, stride, padding, dilation, transposed, output_padding, groups)
    return lower.new_empty(shape), lower.new_empty(shape)


@torch.library.register_fake("pycert::interval_conv2d_backward")
def _(gl, gu, lower, upper, weight, stride, padding, dilation, transposed, output_padding, groups, needed):  # type: ignore[no-untyped-def]
    return _gradients(lower, upper, weight, gl.shape[1], needed)
