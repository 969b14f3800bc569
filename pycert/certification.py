"""``certify``: which samples are provably classified right over a whole ball."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor

from pycert import _flags
from pycert.bounded import BoundedModule, margins
from pycert.options import TAKEN_BY, parse
from pycert.regions import LpBall

#: Cheaper methods that are tried before each method, for the samples still undecided.
CASCADES = {
    "ibp": ("ibp",),
    "crown-ibp": ("ibp", "crown-ibp"),
    "fastlin": ("ibp", "fastlin"),
    "crown": ("ibp", "crown-ibp", "crown"),
    "alpha-crown": ("ibp", "crown-ibp", "crown", "alpha-crown"),
    "forward": ("ibp", "forward"),
    "lipschitz": ("ibp", "lipschitz"),
    "krelu": ("ibp", "crown-ibp", "crown", "alpha-crown", "krelu"),
    "lp": ("ibp", "crown-ibp", "crown", "alpha-crown", "lp"),
}


@dataclasses.dataclass
class CertifyResult:
    """``certified = correct and margin > 0``.

    certified, correct: ``[B]`` bool. margin: ``[B]``, the best lower bound found of
    ``min_j f_y - f_j`` over the region (``-inf`` for samples that were not bounded because the
    network classifies them wrongly). seconds: wall time of the call. soundness: what the
    certificates are good for. radius: ``[B]``, where asked for: radii in the units of ``x`` that are certified for
    each sample, at least ``eps`` where that is; 0 where none is found.
    """

    certified: Tensor
    correct: Tensor
    margin: Tensor
    seconds: float
    soundness: str = "deployed"
    radius: Tensor | None = None

    @property
    def accuracy(self) -> float:
        """Share of the samples that are certified."""
        return self.certified.float().mean().item()


def certify(
    bm: BoundedModule,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    p: float = math.inf,
    method: str = "crown",
    clip: tuple[float, float] | None = None,
    *,
    cascade: bool = True,
    batch_size: int = 256,
    radii: bool = False,
    **options: Any,
) -> CertifyResult:
    """Certifies the classification of every sample over its ball.

    Args:
        bm: the network; its output has one score a class.
        x, eps, p, clip: the balls, as in :class:`pycert.LpBall`; ``x`` is ``[B, *in]``.
        y: ``[B]``, true classes.
        method: as in :meth:`BoundedModule.bound`.
        cascade: cheap methods first, the next only for samples still undecided; a sample that the
            network classifies wrongly is not bounded. Without it every sample is bounded once, by
            ``method``.
        batch_size: samples bounded at a time.
        radii: of ``"lipschitz"``: also look for the largest radius of every sample
            (:func:`pycert.lipschitz.certified_radius`).
        options: as in :func:`pycert.margins`.

    Returns:
        ``CertifyResult``; nothing in it carries a gradient.

    Raises:
        ValueError, TypeError: as in ``LpBall`` and ``margins``; ``batch_size`` below 1; BatchNorm in
            training mode, where a sample's class depends on the others.
    """
    started = time.perf_counter()
    soundness = parse(
        method, options, ("method", "cascade", "batch_size", "radii"), without=("side",)
    ).soundness
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if radii and method != "lipschitz":
        raise ValueError(f"radii are of method 'lipschitz', got {method!r}")
    region = LpBall(x, eps, p, clip)
    _check_network(bm, region)
    bm._class_rows(y, region.batch, x)
    margin = torch.full((region.batch,), -math.inf, dtype=x.dtype, device=x.device)
    with torch.no_grad(), _flags.no_autocast():
        scores = torch.cat([bm.net(part).flatten(1) for part in x.split(batch_size)])
        correct = scores.argmax(1) == y.to(x.device)
        stages = CASCADES[method] if cascade else (method,)
        common = {name: value for name, value in options.items() if name not in TAKEN_BY}
        open_samples = correct.nonzero().flatten() if cascade else torch.arange(region.batch, device=x.device)
        for stage in stages:
            for part in open_samples.split(batch_size):
                if part.numel() == 0:
                    continue
                ball = LpBall(x[part], region.eps[part], p, clip)
                taken = options if stage == method else common
                found = margins(bm, ball, y[part], method=stage, **taken).amin(1)
                margin[part] = torch.maximum(margin[part], found)
            open_samples = open_samples[~(margin[open_samples] > 0)]
    certified = correct & (margin > 0)
    radius = None
    if radii:
        radius = _radii(bm, region, y.to(x.device), correct, certified, batch_size, soundness)
    return CertifyResult(certified, correct, margin, time.perf_counter() - started, soundness, radius)


def _radii(
    bm: BoundedModule,
    region: LpBall,
    y: Tensor,
    correct: Tensor,
    certified: Tensor,
    batch_size: int,
    soundness: str,
) -> Tensor:
    """Certified radii of the samples that are classified right."""
    from pycert.lipschitz import certified_radius  # it needs this module's neighbours

    radius = torch.where(
        certified, region.eps.to(region.x.dtype), torch.zeros_like(region.x.flatten(1)[:, 0])
    )
    for part in correct.nonzero().flatten().split(batch_size):
        if part.numel() > 0:
            found = certified_radius(bm, region.x[part], y[part], region.p, region.clip, soundness=soundness)
            radius[part] = torch.maximum(radius[part], found)
    return radius


def _check_network(bm: BoundedModule, region: LpBall) -> None:
    """What the plain forward pass would refuse by less clear names, or not at all."""
    bm._regions(region)
    if any(norm.training for norm in bm.graph.batch_norms):
        raise ValueError("certify: the network normalises by the batch (training mode); call .eval() on it")
    found = {value.dtype for value in bm.net.parameters() if value.dtype.is_floating_point}
    if found and region.x.dtype not in found:
        names = ", ".join(sorted(map(str, found)))
        raise TypeError(f"x must have the dtype of the network's parameters ({names}), got {region.x.dtype}")
