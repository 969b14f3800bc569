"""Masked convolutions, tightly: Gram matrices over live outputs, or inputs, are block tridiagonal in image rows.

Outputs of image rows ``i`` and ``i'`` share inputs only where ``|i - i'| stride < reach``. Rows in groups of
``(reach - 1) / stride`` make ``A A^T`` block tridiagonal, and ``level I - A A^T`` is factored block by block; as in
:mod:`pycert.norms.dense`, the residual of the factorisation is what counts, not how it was found. Inputs of image
rows ``j`` and ``j'`` are read by one output only where ``|j - j'| < reach``: the same for ``A^T A`` with groups of
``reach - 1``, which is smaller where there are fewer inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pycert.norms.arithmetic import SMALLEST, UP, exponent_of, frobenius, gamma, scaled_back, times_power
from pycert.norms.dense import EXCESSES, product_error
from pycert.norms.operator import Geometry, Operator


@dataclasses.dataclass
class _Blocks:
    """A block tridiagonal symmetric matrix; ``below[i]`` stands left of ``diagonal[i]`` (``below[0]`` is empty)."""

    diagonal: list[Tensor]
    below: list[Tensor]

    def largest_eigenvalue(self) -> float:
        """An estimate."""
        sizes = [d.shape[0] for d in self.diagonal]
        return largest_eigenvalue(
            lambda flat: torch.cat(self._times(list(flat.split(sizes)))), sum(sizes), self.diagonal[0].device
        )

    def _times(self, x: list[Tensor]) -> list[Tensor]:
        out = [d @ v for d, v in zip(self.diagonal, x)]
        for i in range(1, len(out)):
            out[i] = out[i] + self.below[i] @ x[i - 1]
            out[i - 1] = out[i - 1] + self.below[i].t() @ x[i]
        return out

    def squares(self) -> Tensor:
        parts = [frobenius(d).square() for d in self.diagonal]
        parts += [2 * frobenius(b).square() for b in self.below[1:]]
        return torch.stack(parts).sum() * (1 + gamma(len(parts) + 4))


def largest_eigenvalue(
    times: Callable[[Tensor], Tensor], count: int, device: torch.device, steps: int = 40
) -> float:
    """Lanczos estimate, from below but for rounding, for a symmetric matrix given by its products with vectors."""
    generator = torch.Generator().manual_seed(20211103)
    flat = torch.randn(count, dtype=torch.float64, generator=generator).to(device)
    now, before, beta = flat / flat.norm(), torch.zeros_like(flat), 0.0
    alphas, betas = [], []
    for _ in range(min(steps, flat.numel())):
        image = times(now) - beta * before
        alpha = float(image @ now)
        image = image - alpha * now
        beta = float(image.norm())
        alphas.append(alpha)
        betas.append(beta)
        if not beta > 1e-12 * abs(alpha):
            break
        before, now = now, image / beta
    side = torch.tensor(betas[:-1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    tridiagonal += torch.diag(side, 1) + torch.diag(side, -1)
    return float(torch.linalg.eigvalsh(tridiagonal)[-1])


def _factorised(matrix: _Blocks, level: float) -> Tensor | None:
    """``level + ||level I - matrix - L L^T||_F`` with all errors; None where no factor is found."""
    factors: list[Tensor] = []
    residual = squares = shifted_squares = torch.zeros((), dtype=torch.float64)
    longest = 1
    for i, diagonal in enumerate(matrix.diagonal):
        shifted = -diagonal
        shifted.diagonal().add_(level)
        shifted_squares = shifted_squares + frobenius(shifted).square()
        schur = shifted
        if i > 0 and matrix.below[i].numel() > 0:
            wanted = -matrix.below[i]
            left = torch.linalg.solve_triangular(factors[-1], wanted.t(), upper=False).t()
            residual = residual + 2 * frobenius(wanted - left @ factors[-1].t()).square()
            squares = squares + frobenius(left).square()
            shifted_squares = shifted_squares + 2 * frobenius(wanted).square()
            schur = shifted - left @ left.t()
            longest = max(longest, left.shape[1])
        factor, failed = torch.linalg.cholesky_ex(schur)
        if int(failed) != 0 or not bool(torch.isfinite(factor).all()):
            return None
        residual = residual + frobenius(schur - factor @ factor.t()).square()
        squares = squares + frobenius(factor).square()
        longest = max(longest, factor.shape[0])
        factors.append(factor)
    count = sum(d.shape[0] for d in matrix.diagonal)
    # Every element of the residual is a difference of at most two products and one rounded diagonal element.
    error = product_error(2 * longest + 2, False) * squares + gamma(4) * (shifted_squares.sqrt() + squares)
    error = error + gamma(4) * count**0.5 * level + count * longest * 8 * SMALLEST
    bound = (level + (residual.sqrt() + error) * UP) * UP
    return bound if bool(torch.isfinite(bound)) else None


class Band:
    """One plain ungrouped convolution, prepared for :meth:`bound` under any masks.

    ``inputs``: the Gram matrix is that over inputs, else that over outputs. Below, *own* is that side's mask
    ``[channels, height, width]``, *other* that of the side summed over.
    """

    def __init__(self, operator: Operator, inputs: bool = False) -> None:
        geometry = operator.geometry
        assert geometry is not None and not geometry.transposed and geometry.groups == 1
        self.operator, self.geometry, self.inputs = operator, geometry, inputs
        self.reach = geometry.reach(operator.weight)[0]
        self.group = max(1, (self.reach - 1) // (1 if inputs else geometry.stride[0]))
        channels, _, width = geometry.input_shape
        strip = Geometry(
            (channels, self.reach, width),
            (1, geometry.stride[1]),
            (0, geometry.padding[1]),
            geometry.dilation,
        )
        self._strip = Operator(operator.weight, strip)
        self._matrix: Tensor | None = None

    def strip(self) -> Tensor:
        """``[O W', reach, C W]``: one image row of outputs from the input rows that it reads."""
        if self._matrix is None:
            channels, _, width = self.geometry.input_shape
            matrix = self._strip.explicit().reshape(-1, channels, self.reach, width)
            self._matrix = matrix.transpose(1, 2).reshape(-1, self.reach, channels * width).contiguous()
        return self._matrix

    def cost(self, rows: Tensor, columns: Tensor) -> float:
        """Floating-point operations of :meth:`bound` for one sample, ``[O, H', W']`` and ``[C, H, W]``."""
        own, other = (columns, rows) if self.inputs else (rows, columns)
        live, others = ((mask != 0).sum((0, 2)).double() for mask in (own, other))
        sizes = [float(part.sum()) for part in live.split(self.group)]
        stride = self.geometry.stride[0]
        reached = (
            (self.group + self.reach) // stride if self.inputs else (self.group - 1) * stride + self.reach
        )
        width = float(others.mean()) * min(len(others), reached)
        return sum(14 * n**3 + 4 * n * n * width for n in sizes)

    def _window(self, first: int, last: int, count: int) -> tuple[int, int]:
        """From and before which of ``count`` image rows of the other side rows ``first..last - 1`` have weights."""
        stride, padding = self.geometry.stride[0], self.geometry.padding[0]
        if self.inputs:
            low, high = -(-(first + padding - self.reach + 1) // stride), (last - 1 + padding) // stride + 1
        else:
            low, high = first * stride - padding, (last - 1) * stride - padding + self.reach
        low = min(count, max(0, low))
        return low, max(low, min(count, high))

    def _rows(self, first: int, last: int, own: Tensor, other: Tensor) -> tuple[Tensor, int]:
        """Live elements of image rows ``first..last - 1`` by those of the other side that they have weights with, and
        the first row of these."""
        stride, padding = self.geometry.stride[0], self.geometry.padding[0]
        low, high = self._window(first, last, other.shape[1])
        parts = []
        strip = self.strip()
        for i in range(first, last):
            scale = own[:, i, :].reshape(-1)
            live = scale.nonzero().flatten()
            block = scale.new_zeros(live.numel(), high - low, other.shape[0] * other.shape[2])
            for j in range(low, high) if live.numel() > 0 else ():
                tap = i - (j * stride - padding) if self.inputs else j - (i * stride - padding)
                if 0 <= tap < self.reach:
                    weights = strip[:, tap].t() if self.inputs else strip[:, tap]
                    block[:, j - low] = weights[live] * scale[live, None]
            parts.append(block)
        others = other[:, low:high, :].transpose(0, 1).reshape(high - low, other.shape[0] * other.shape[2])
        return torch.cat(parts) * others, low

    def bound(self, rows: Tensor, columns: Tensor) -> Tensor:
        """An upper bound of ``||D_rows W D_columns||_2`` for one sample; a float64 number."""
        blocks, squares, longest = self._gram(*((columns, rows) if self.inputs else (rows, columns)))
        largest = torch.stack([d.abs().amax() for d in blocks.diagonal]).amax() if blocks.diagonal else None
        if largest is None or float(largest) == 0:
            # Nothing live, or squares too small for float64; the sum of the latter is at most their count.
            count = rows.numel() * float(columns.numel())
            zero = torch.zeros((), dtype=torch.float64, device=rows.device)
            return zero if float(squares) == 0 else zero + (count * 8 * SMALLEST) ** 0.5 + squares.sqrt() * UP
        exponent = exponent_of(largest)
        scaled = _Blocks(
            [times_power(d, -exponent) for d in blocks.diagonal],
            [times_power(b, -exponent) for b in blocks.below],
        )
        estimate = scaled.largest_eigenvalue()
        best = scaled.squares().sqrt() * UP
        for excess in EXCESSES:
            found = _factorised(scaled, max(estimate, 1e-300) * (1 + excess))
            if found is not None:
                best = torch.minimum(best, found)
                break
        count = sum(d.shape[0] for d in blocks.diagonal)
        best = (best + 2 * count * count * SMALLEST) * UP
        square = (scaled_back(best, exponent) + product_error(longest, False) * squares) * UP
        square = square + count * count * longest * SMALLEST
        # Elements of A are rounded twice.
        return (square.sqrt() + gamma(4) * squares.sqrt()) * UP * UP

    def _gram(self, own: Tensor, other: Tensor) -> tuple[_Blocks, Tensor, int]:
        """``A A^T`` (``A^T A``) over live elements, a bound of ``||A||_F^2``, and the length of its sums."""
        blocks = _Blocks([], [])
        squares = torch.zeros((), dtype=torch.float64, device=own.device)
        longest, before, before_low = 1, None, 0
        for first in range(0, own.shape[1], self.group):
            part, low = self._rows(first, min(first + self.group, own.shape[1]), own, other)
            squares = squares + frobenius(part.flatten(1)).square() * UP
            flat = part.flatten(1)
            longest = max(longest, flat.shape[1])
            blocks.diagonal.append(flat @ flat.t())
            below = flat.new_zeros(flat.shape[0], 0)
            if before is not None:
                a, b = max(low, before_low), min(low + part.shape[1], before_low + before.shape[1])
                left = part[:, max(0, a - low) : max(0, b - low)].flatten(1)
                right = before[:, max(0, a - before_low) : max(0, b - before_low)].flatten(1)
                below = left @ right.t() if left.shape[1] > 0 else flat.new_zeros(len(part), len(before))
            blocks.below.append(below)
            before, before_low = part, low
        return _drop_empty(blocks), squares * UP, longest


def _drop_empty(blocks: _Blocks) -> _Blocks:
    """The same matrix without blocks of no rows, which part what stands on either side."""
    kept = _Blocks([], [])
    parted = True
    for diagonal, below in zip(blocks.diagonal, blocks.below):
        if diagonal.shape[0] == 0:
            parted = True
            continue
        if parted and kept.diagonal:
            below = diagonal.new_zeros(diagonal.shape[0], kept.diagonal[-1].shape[0])
        kept.diagonal.append(diagonal)
        kept.below.append(below)
        parted = False
    return kept
