"""Upper bounds of the largest eigenvalue of positive semidefinite matrices, and of norms through them."""

from __future__ import annotations

import torch
from torch import Tensor

from pycert.norms.arithmetic import SMALLEST, UP, exponent_of, frobenius, gamma, scaled_back, times_power

#: Excess over the estimate that a factorisation is tried with; half of it in the norm.
EXCESSES = (2e-3, 1.5e-2, 0.12, 1.0)
GRAM_STEPS = 7


def adjoint(a: Tensor) -> Tensor:
    return a.transpose(-2, -1).conj().resolve_conj() if a.is_complex() else a.transpose(-2, -1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``; complex ones by real products, each a plain sum of twice the length."""
    if not a.is_complex():
        return a @ b
    left = torch.cat([a.real, a.imag], dim=-1)
    real = left @ torch.cat([b.real, -b.imag], dim=-2)
    imaginary = left @ torch.cat([b.imag, b.real], dim=-2)
    return torch.complex(real, imaginary)


def product_error(length: int, is_complex: bool) -> float:
    """``e`` with ``|fl(a b) - a b| <= e |a| |b|`` elementwise, for an inner length."""
    # |Re|, |Im| of an element err by gamma_{2m} sum |a||b| each, hence its modulus by sqrt 2 of that.
    return 1.5 * gamma(2 * length + 2) if is_complex else gamma(length + 2)


def lanczos(matrix: Tensor, steps: int = 30) -> Tensor:
    """Estimates (from below, but for rounding) of the largest eigenvalues; ``[b, n, n]`` to ``[b]``."""
    batch, n = matrix.shape[0], matrix.shape[-1]
    if n == 1:
        return matrix[:, 0, 0].real.clone()
    generator = torch.Generator().manual_seed(20211103)
    start = torch.randn(n, 1, dtype=torch.float64, generator=generator).to(matrix.device)
    now = (start / start.norm()).to(matrix.dtype).expand(batch, n, 1)
    before = torch.zeros_like(now)
    count = min(steps, n)
    alphas, betas = [], []
    beta = torch.zeros(batch, 1, 1, dtype=torch.float64, device=matrix.device)
    for _ in range(count):
        image = matrix @ now - beta.to(matrix.dtype) * before
        alpha = (now.conj() * image).sum((1, 2), keepdim=True).real
        image = image - alpha.to(matrix.dtype) * now
        alphas.append(alpha[:, 0, 0])
        beta = image.abs().square().sum((1, 2), keepdim=True).sqrt()
        betas.append(beta[:, 0, 0])
        before, now = now, image / beta.clamp(min=1e-300).to(matrix.dtype)
    side = torch.stack(betas[:-1], 1)
    tridiagonal = torch.diag_embed(torch.stack(alphas, 1)) + torch.diag_embed(side, -1)
    tridiagonal = tridiagonal + torch.diag_embed(side, 1)
    ok = torch.isfinite(tridiagonal).all(-1).all(-1)
    return torch.linalg.eigvalsh(torch.where(ok[:, None, None], tridiagonal, torch.zeros_like(tridiagonal)))[
        :, -1
    ]


def gram_bound(matrix: Tensor, steps: int = GRAM_STEPS) -> Tensor:
    """Gram iteration with a running error: bounds of ``||matrix||_2`` for Hermitian ones, ``[b, n, n]`` to ``[b]``.

    With ``s_t`` the scaling and ``e`` the error of a product, ``||G_t||^2`` is at most
    ``s_t^2 (||G_{t+1}|| + e ||G_t / s_t||_F^2)``; the last ``||G||`` is at most its Frobenius norm.
    Source: Delattre et al., "Efficient bound of Lipschitz constant for convolutional layers by Gram
    iteration", ICML 2023; the error is ours.
    """
    n = matrix.shape[-1]
    error = product_error(n, matrix.is_complex())
    bounds = []
    current = matrix
    for _ in range(steps):
        size = frobenius(current)
        exponent = torch.frexp(size).exponent
        current = times_power(current, -exponent[:, None, None])  # Frobenius norm in [1/2, 1)
        bounds.append((exponent, frobenius(current)))
        current = product(adjoint(current), current)
    value = frobenius(current)
    for exponent, size in reversed(bounds):
        value = ((value + error * size.square() + n * n * 2 * SMALLEST) * UP).sqrt() * UP
        value = times_power(value, exponent)
    return value


def _factorised(matrix: Tensor, level: Tensor) -> Tensor:
    """``level + ||level I - matrix - L L^*||_F``, infinite where no factor is found; ``[b, n, n], [b]`` to ``[b]``.

    ``level I - matrix = L L^* + E`` is at least ``-||E||``, so that no eigenvalue exceeds the result, whatever the
    factorisation did. What computing ``E`` loses is added.
    """
    n = matrix.shape[-1]
    shifted = -matrix
    shifted.diagonal(dim1=-2, dim2=-1).add_(level[:, None].to(matrix.dtype))
    factor, failed = torch.linalg.cholesky_ex(shifted)
    squares = frobenius(factor).square()
    rest = frobenius(shifted - product(factor, adjoint(factor)))
    error = product_error(n, matrix.is_complex()) * squares
    error = error + gamma(4) * (frobenius(shifted) + squares + n**0.5 * level) + n * n * 8 * SMALLEST
    bound = (level + (rest + error) * UP) * UP
    return torch.where((failed == 0) & torch.isfinite(bound), bound, torch.full_like(bound, torch.inf))


def eigenvalue_bound(matrix: Tensor, error: Tensor, common: bool = False) -> Tensor:
    """Upper bounds of the largest eigenvalue of Hermitian positive semidefinite matrices.

    Args:
        matrix: ``[b, n, n]``, float64 or complex128, computed.
        error: ``[b]``, how far the matrix meant is from it, in the 2-norm.
        common: only the largest bound of all is of interest; one level serves all matrices.

    Returns:
        ``[b]``, float64; about ``EXCESSES[0]`` above the eigenvalue.
    """
    largest = matrix.abs().amax((1, 2))
    exponent = exponent_of(largest)
    if common:  # one scale, so that one level makes sense
        exponent = exponent.amax().expand_as(exponent)
    scaled = times_power(matrix, -exponent[:, None, None])
    best = frobenius(scaled)
    estimate = lanczos(scaled)
    if common:
        estimate = estimate.amax().expand_as(estimate)
    open_ones = ((largest > 0) & torch.isfinite(estimate) & (estimate > 0)).nonzero().flatten()
    for excess in EXCESSES:
        if open_ones.numel() == 0:
            break
        level = (estimate[open_ones] * (1 + excess)).clamp(min=2.0**-500)
        found = _factorised(scaled[open_ones], level)
        best[open_ones] = torch.minimum(best[open_ones], found)
        open_ones = open_ones[~torch.isfinite(found)]
    if open_ones.numel() > 0:
        best[open_ones] = torch.minimum(best[open_ones], gram_bound(scaled[open_ones]))
    underflow = torch.where(largest > 0, 2 * matrix.shape[-1] ** 2 * SMALLEST, 0.0)  # of scaling
    return (times_power((best + underflow) * UP, exponent) + error) * UP


class Downdated:
    """``||D_r W D_c||_2`` for one matrix and many masks: ``W W^T`` once, less what the dead columns gave.

    Args:
        weight: ``[m, n]`` float64 of about 1, ``m <= n``.
        gram: ``weight @ weight.t()`` as computed.
    """

    def __init__(self, weight: Tensor, gram: Tensor) -> None:
        self.weight, self.gram = weight, gram
        self.row_squares = gram.diagonal() * (1 + gamma(2 * weight.shape[1] + 4))

    def bound(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """For a diagonal ``[m]`` and one ``[n]`` of zeros and a single other value; None for others, and where to start
        anew costs less or loses less."""
        dead = (columns == 0).nonzero().flatten()
        factor = columns.amax()
        if 2 * dead.numel() > columns.numel() or bool(((columns != 0) & (columns != factor)).any()):
            return None
        live = rows.nonzero().flatten()
        if live.numel() == 0:
            return self.weight.new_zeros(())
        part = self.weight[live[:, None], dead]
        squares = self.row_squares[live].sum() * (1 + gamma(live.numel()))
        # Both products err by gamma_{n+2} |.||.|^T, of norm at most the squared Frobenius norm; so do the difference
        # and the two roundings of the scaling.
        error = 2 * (product_error(columns.numel(), False) + gamma(8)) * squares * UP
        gram = self.gram[live[:, None], live] - part @ part.t()
        scale = rows[live]
        largest = scale.amax()
        gram = gram * (scale[:, None] * scale)
        error = error * largest.square() * UP + live.numel() ** 2 * columns.numel() * 8 * SMALLEST
        if not bool(error <= 1e-8 * gram.diagonal().amax()):
            return None  # the dead columns were nearly all of the matrix
        return (eigenvalue_bound(gram[None], error[None])[0] * UP).sqrt() * factor * UP * UP


def norm_bound(matrix: Tensor) -> Tensor:
    """Upper bounds of ``||matrix||_2`` for explicit ones; ``[b, m, n]``, float64 or complex128, to ``[b]``.

    A matrix of zeros gives 0.
    """
    batch, m, n = matrix.shape
    if m * n == 0:
        return torch.zeros(batch, dtype=torch.float64, device=matrix.device)
    if m > n:
        matrix = adjoint(matrix)
    exponent = exponent_of(matrix.abs().amax((1, 2)))
    matrix = times_power(matrix, -exponent[:, None, None])
    inner = max(m, n)
    gram = product(matrix, adjoint(matrix))
    size = frobenius(matrix)
    error = product_error(inner, matrix.is_complex()) * size.square() * UP
    error = torch.where(size > 0, error + m * n * 4 * SMALLEST, error)
    return scaled_back((eigenvalue_bound(gram, error) * UP).sqrt() * UP, exponent)
