"""Certified radii."""

from __future__ import annotations

import torch
from torch import Tensor

from pycert.bounded import BoundedModule, margins
from pycert.lipschitz.bounds import global_bound
from pycert.regions import LpBall


def certified_radius(
    bm: BoundedModule,
    x: Tensor,
    y: Tensor,
    p: float = 2,
    clip: tuple[float, float] | None = None,
    *,
    steps: int = 12,
    soundness: str = "deployed",
) -> Tensor:
    """A radius around every sample within which its class provably does not change.

    The global constants give a first radius ``min_j (f_y - f_j) / K_yj``; local bounds are then tried at
    larger ones, by doubling and bisection. Every radius that is returned was certified as such, by
    ``margins`` with ``method="lipschitz"`` at that radius.

    Args:
        bm: the network, one score a class. x: ``[B, *in]``. y: ``[B]``, classes.
        p, clip: as in :class:`pycert.LpBall`.
        steps: local bounds per sample.
        soundness: as in :func:`pycert.margins`.

    Returns:
        ``[B]``, in the units of the input; 0 where nothing is certified.

    Raises: as ``margins``.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    with torch.no_grad():
        zero = x.new_zeros(x.shape[0])
        certified = zero.clone()
        lowest = margins(bm, LpBall(x, zero, p, clip), y, method="crown", soundness=soundness)
        constants = global_bound(bm, p).margins.to(x.device)
        classes = constants.shape[0]
        others = torch.arange(classes, device=x.device).expand(x.shape[0], classes)
        others = others[others != y[:, None]].view(x.shape[0], classes - 1)
        ratio = lowest.double() / constants[y[:, None], others].clamp(min=1e-300)
        trial = (ratio.amin(1).clamp(min=0, max=1e30) * 0.999).to(x.dtype)
        failed = torch.full_like(trial, torch.inf)
        open_ones = (trial > 0).nonzero().flatten()
        for _ in range(steps):
            if open_ones.numel() == 0:
                break
            ball = LpBall(x[open_ones], trial[open_ones], p, clip)
            good = margins(bm, ball, y[open_ones], method="lipschitz", soundness=soundness).amin(1) > 0
            won, lost = open_ones[good], open_ones[~good]
            certified[won] = torch.maximum(certified[won], trial[won])
            failed[lost] = torch.minimum(failed[lost], trial[lost])
            middle = (certified + torch.where(torch.isinf(failed), 3 * certified, failed)) / 2
            trial = torch.where(certified > 0, middle, trial / 2)
        return certified
