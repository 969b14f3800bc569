"""Losses of training by Lipschitz bounds, as plain functions; and the store of warm starts.

The bound is a plug-in: ``worst_logits(..., bound="local")`` and ``bound="global"`` feed the same losses.

    worst = worst_logits(net, x, y, eps, bound="local", starts=store.take(index))
    store.put(index, worst.starts)
    loss = bcp_loss(worst, y, kappa)        # or gloro_loss(worst, y)

None of this is a certificate: the norms are power-iteration estimates from below. ``pycert.certify`` with
``method="lipschitz"`` certifies the trained network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycert.lipschitz.training import BOUNDS, propagate, warm_start_shapes
from pycert.nn import ClippedMaxMin, ReLUTheta
from pycert.options import free_bytes


@dataclasses.dataclass
class WorstLogits:
    """clean: ``[B, K]``, the network's outputs. worst: ``[B, K]``, ``f_j`` plus the most that ``f_j - f_y``
    may grow over the ball (``f_y`` for the class itself). radius: ``[B]``, ``K eps`` for the last hidden
    value. starts: for the next call. live: share of neurons that may vary, per activation. sparsity: see
    :func:`worst_logits`, or None."""

    clean: Tensor
    worst: Tensor
    radius: Tensor
    starts: list[Tensor]
    live: list[Tensor]
    sparsity: Tensor | None = None


def worst_logits(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    bound: str = "local",
    steps: int = 5,
    starts: list[Tensor] | None = None,
    sparsity: float | None = None,
    local_layers: Sequence[int] | None = None,
) -> WorstLogits:
    """Logits against every other class, at the worst point of l2 balls as the bound sees it.

    Args:
        net: a sequence of Conv2d, Linear, ReLU, ReLUTheta, MaxMin, ClippedMaxMin and Flatten that ends in Linear.
        x: ``[B, *in]``. y: ``[B]`` classes. eps: radius, a float or ``[B]``.
        bound: ``"local"``, norms of every sample's masked layers, or ``"global"``, norms of the layers.
        steps: of the power iterations.
        starts: what an earlier call returned for these samples (for ``"global"``: for this network).
        sparsity: if given, also the penalty that makes neurons constant, with this weight for its upper part.
        local_layers: numbers of the affine layers (0 the first) whose norms ``"local"`` takes per sample, those of the
            others being global; None for all. It is for data sets whose warm starts would not fit.

    Returns:
        :class:`WorstLogits`; gradients reach weights, thresholds, ``x`` and ``eps``.

    Raises:
        ValueError: unknown names, a network that is not covered.

    Soundness: none, an estimate. Source: Huang et al., NeurIPS 2021, algorithm 1; the last layer as in Lee et al.,
    NeurIPS 2020, in closed form.
    """
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of 'local', 'global', got {bound!r}")
    radius = eps if isinstance(eps, Tensor) else x.new_full((x.shape[0],), float(eps))
    reach = propagate(net, x, radius.expand(x.shape[0]), bound, steps, starts, sparsity, local_layers)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    clean = F.linear(reach.centre, last.weight, last.bias)
    classes = last.out_features
    others = torch.arange(classes, device=y.device).expand(len(y), classes)
    others = others[others != y[:, None]].view(len(y), classes - 1)
    difference = last.weight[others] - last.weight[y].unsqueeze(1)
    low = (reach.lower - reach.centre).clamp(max=0)
    high = (reach.upper - reach.centre).clamp(min=0)
    growth, _ = torch.ops.pycert.ball_box_maximum(difference, low, high, reach.radius.contiguous())
    worst = clean.scatter_add(1, others, growth)
    return WorstLogits(clean, worst, reach.radius, reach.starts, reach.live, reach.sparsity)


def bcp_loss(worst: WorstLogits, y: Tensor, kappa: float = 0.0, reduction: str = "mean") -> Tensor:
    """``kappa CE(clean) + (1 - kappa) CE(worst)``; Lee et al. 2020, Eq. (9), as Huang et al. 2021 use it."""
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa must lie in [0, 1], got {kappa}")
    robust = F.cross_entropy(worst.worst, y, reduction=reduction)
    if kappa == 0:
        return robust
    return kappa * F.cross_entropy(worst.clean, y, reduction=reduction) + (1 - kappa) * robust


def gloro_loss(
    worst: WorstLogits, y: Tensor, kind: str = "ce", weight: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """The loss of the network with a bottom class, whose logit is the largest worst one of another class.

    Args:
        kind: ``"ce"``, cross entropy over ``K + 1`` classes, or ``"trades"``, that of the clean logits plus
            ``weight`` times the divergence of the distribution with bottom from the clean one.

    Source: Leino, Wang and Fredrikson, "Globally-Robust Neural Networks", ICML 2021, sections 3 and 4.
    """
    if kind not in ("ce", "trades"):
        raise ValueError(f"kind must be one of 'ce', 'trades', got {kind!r}")
    bottom = worst.worst.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)
    extended = torch.cat([worst.clean, bottom], 1)
    if kind == "ce":
        return F.cross_entropy(extended, y, reduction=reduction)
    clean = F.log_softmax(worst.clean, 1)
    divergence = (clean.exp() * (clean - F.log_softmax(extended, 1)[:, :-1])).sum(1)
    loss = F.nll_loss(clean, y, reduction="none") + weight * divergence
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of 'mean', 'sum', 'none', got {reduction!r}")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


@torch.no_grad()
def project_thresholds(net: nn.Module) -> None:
    """Makes every threshold of ReLUTheta nonnegative, and those of ClippedMaxMin ordered; after each optimiser step."""
    for module in net.modules():
        if isinstance(module, ReLUTheta):
            module.theta.clamp_(min=0)
        elif isinstance(module, ClippedMaxMin):
            middle = (module.low + module.high) / 2
            module.low.copy_(torch.minimum(module.low, middle))
            module.high.copy_(torch.maximum(module.high, middle))


class WarmStarts:
    """Vectors of power iterations, one per sample and layer, kept between epochs.

    Args:
        net, example: the network and an input ``[1, *in]``.
        count: samples of the training set.
        dtype: ``torch.float16`` (half the memory; the iteration mends its rounding) or ``torch.float32``.
        path: a folder; the vectors then are memory-mapped files in it instead of memory. Files of the right size that
            are there already are taken over: a run that is resumed goes on with them.
        local_layers: as in :func:`worst_logits`; a layer that is not among them has one vector for all samples.

    Raises:
        ValueError, TypeError: ``count`` below 1, another dtype.
        MemoryError: without ``path``, the vectors need more than is free.

    ``repr`` tells its size. New samples start from zeros, which :func:`pycert.ops.power_norm` replaces by random signs.

    Source: the store of Huang et al. 2021, section 3.1, here on the library's side.
    """

    def __init__(
        self,
        net: nn.Module,
        example: Tensor,
        count: int,
        dtype: torch.dtype = torch.float16,
        path: str | Path | None = None,
        local_layers: Sequence[int] | None = None,
    ) -> None:
        if dtype not in (torch.float16, torch.float32):
            raise TypeError(f"WarmStarts: dtype must be float16 or float32, got {dtype}")
        if count < 1:
            raise ValueError(f"WarmStarts: count must be at least 1, got {count}")
        self.count, self.dtype = count, dtype
        shapes = warm_start_shapes(net, example)
        self.per_sample = [local_layers is None or k in local_layers for k in range(len(shapes))]
        sizes = [(count if own else 1, *shape) for shape, own in zip(shapes, self.per_sample)]
        wanted, free = sum(map(math.prod, sizes)) * dtype.itemsize, free_bytes()
        # Zeros cost nothing until they are written: the system would be out of memory later.
        if path is None and wanted > free:
            raise MemoryError(
                f"WarmStarts: {wanted / 1e9:.1f} GB for {count} samples, {free / 1e9:.1f} GB are free; keep them in "
                "files (path=), or start every batch from the vectors of the one before"
            )
        self.tensors = [
            self._tensor(None if path is None else Path(path) / f"layer{k}.bin", size)
            for k, size in enumerate(sizes)
        ]

    def _tensor(self, path: Path | None, shape: tuple[int, ...]) -> Tensor:
        if path is None:
            return torch.zeros(shape, dtype=self.dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = np.dtype(np.float16 if self.dtype == torch.float16 else np.float32)
        size = math.prod(shape) * kind.itemsize
        mode: Literal["r+", "w+"] = "r+" if path.exists() and path.stat().st_size == size else "w+"
        return torch.from_numpy(np.memmap(path, kind, mode, shape=shape))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def take(self, index: Tensor) -> list[Tensor]:
        """The vectors of some samples, ``[B, *shape]`` float32 per layer."""
        return [
            (tensor[index] if own else tensor).float() for tensor, own in zip(self.tensors, self.per_sample)
        ]

    def put(self, index: Tensor, starts: list[Tensor]) -> None:
        """Keeps what a call returned for these samples, normalised so that half precision holds it."""
        for tensor, start, own in zip(self.tensors, starts, self.per_sample, strict=True):
            size = start.flatten(1).abs().amax(1).clamp(min=1e-30).view(-1, *[1] * (start.dim() - 1))
            tensor[index if own else slice(None)] = (start.detach() / size).to(self.dtype)

    def __repr__(self) -> str:
        kind = "float16" if self.dtype == torch.float16 else "float32"
        return f"WarmStarts({self.count} samples, {len(self.tensors)} layers, {kind}, {self.nbytes / 1e9:.3g} GB)"
