"""Bounds of convolutions by their Fourier transform, for zero padding, strides, groups and dilation.

A zero-padded convolution is a submatrix of the circular one on a torus large enough that nothing wraps around onto
an input that the padded one does not read there; the norm of the circular one is the largest over the frequencies.
A stride ``s`` becomes stride 1 on ``s * s`` times the channels (space to depth), exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycert.norms.arithmetic import UP, frobenius, gamma
from pycert.norms.dense import adjoint, eigenvalue_bound, product, product_error
from pycert.norms.operator import Operator

#: Elements of the transformed kernel held at a time.
_CHUNK = 2**22


def _polyphase(weight: Tensor, operator: Operator) -> Tensor:
    """``[g, O/g, I/g * s_y * s_x, ky, kx]``: the kernel of stride 1, with zeros where dilation skips."""
    geometry = operator.geometry
    assert geometry is not None
    (dy, dx), (sy, sx) = geometry.dilation, geometry.stride
    out, inner, ky, kx = weight.shape
    reach = geometry.reach(weight)
    ny, nx = -(-reach[0] // sy), -(-reach[1] // sx)
    spread = weight.new_zeros(out, inner, ny * sy, nx * sx)
    spread[:, :, : reach[0] : dy, : reach[1] : dx] = weight
    phases = spread.view(out, inner, ny, sy, nx, sx).permute(0, 1, 3, 5, 2, 4)
    groups = geometry.groups
    return phases.reshape(groups, out // groups, inner * sy * sx, ny, nx)


def _torus(size: int, outputs: int, taps: int, stride: int, padding: int) -> int:
    """Least length of a torus on which nothing wraps onto a nonzero input; see docs/lipschitz.md."""
    return max(-(-(size + padding) // stride), outputs + taps - 1 - padding // stride, 1)


def _phases(length: int, taps: int, half: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = torch.arange(length // 2 + 1 if half else length, device=device)
    turns = (frequencies[:, None] * torch.arange(taps, device=device)[None]) % length
    angle = turns.double() * (2 * math.pi / length)
    return torch.cos(angle), torch.sin(angle)


def _transform(kernel: Tensor, lengths: tuple[int, int]) -> tuple[Tensor, int]:
    """The phases of every pair of frequencies, half of them (the kernel is real): ``[F, taps]`` complex, and taps."""
    ny, nx = kernel.shape[-2:]
    cos_y, sin_y = _phases(lengths[0], ny, False, kernel.device)
    cos_x, sin_x = _phases(lengths[1], nx, True, kernel.device)
    real = (
        cos_y[:, None, :, None] * cos_x[None, :, None, :] - sin_y[:, None, :, None] * sin_x[None, :, None, :]
    )
    imag = (
        sin_y[:, None, :, None] * cos_x[None, :, None, :] + cos_y[:, None, :, None] * sin_x[None, :, None, :]
    )
    return torch.complex(real.reshape(-1, ny * nx), imag.reshape(-1, ny * nx)), ny * nx


def frequency_bound(operator: Operator, extra: int = 0) -> Tensor:
    """An upper bound of ``||W||_2`` for a plain convolution with weight scaled to about 1; a float64 number.

    ``extra`` enlarges the torus: every size is valid, and some are a little tighter than others.
    """
    geometry = operator.geometry
    assert geometry is not None and not geometry.transposed
    kernel = _polyphase(operator.weight, operator)
    _, height, width = geometry.output_shape(operator.weight)
    lengths = (
        _torus(geometry.input_shape[1], height, kernel.shape[-2], geometry.stride[0], geometry.padding[0])
        + extra,
        _torus(geometry.input_shape[2], width, kernel.shape[-1], geometry.stride[1], geometry.padding[1])
        + extra,
    )
    phases, taps = _transform(kernel, lengths)
    groups, rows, columns = kernel.shape[:3]
    flat = kernel.reshape(groups, rows * columns, taps)
    # An angle is off by 15 u, a cosine of it by 17 u, a phase by 70 u in each part; then the sum over taps. The factor
    # 2 is sqrt(2) for both parts and slack for the sums of magnitudes.
    transform_error = 2 * gamma(taps + 80) * frobenius(flat.abs().sum(-1).view(groups, rows, columns))
    step = max(1, _CHUNK // (rows * columns))
    best = operator.weight.new_zeros(())
    for group in range(groups):
        for start in range(0, phases.shape[0], step):
            part = phases[start : start + step]
            symbol = torch.complex(part.real @ flat[group].t(), part.imag @ flat[group].t())
            symbol = symbol.view(-1, rows, columns)
            symbol = symbol if rows <= columns else adjoint(symbol)
            gram = product(symbol, adjoint(symbol))
            error = product_error(max(rows, columns), True) * frobenius(symbol).square() * UP
            square = eigenvalue_bound(gram, error, common=True).amax()
            best = torch.maximum(best, (square * UP).sqrt() * UP + transform_error[group] * UP)
    return best * UP
