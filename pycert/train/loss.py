"""The loss of certified training: cross entropy of the worst logits that the bounds allow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import pycert


def worst_case_loss(margins: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of the logits ``[0, -margins]`` for class 0.

    Since ``margins`` are lower bounds of ``f_y - f_j``, this is an upper bound of the cross entropy at every
    point of the region.

    Args:
        margins: ``[B, K - 1]`` as from :func:`pycert.margins`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A number, or ``[B]`` without reduction, in nats and the dtype of ``margins``.

    Raises:
        ValueError: another reduction.

    Soundness: none of its own rounding errors. Gradient: with respect to ``margins``.
    Source: Wong and Kolter, "Provable Defenses against Adversarial Examples via the Convex Outer Adversarial
    Polytope", ICML 2018, theorem 2.
    """
    logits = functional.pad(-margins, (1, 0))
    return functional.cross_entropy(
        logits, logits.new_zeros(len(logits), dtype=torch.long), reduction=reduction
    )


def mixed_margins(bm: Any, region: Any, y: Tensor, method: str = "crown-ibp", beta: float = 1.0) -> Tensor:
    """``beta * margins(method) + (1 - beta) * margins("ibp")``; a term with weight 0 is not computed.

    Bounds are those for training: not intersected and without rounding charges, which autograd does not see.

    Args:
        bm, region, y, method: as in :func:`pycert.margins`.
        beta: weight of ``method``, in [0, 1].

    Returns:
        ``[B, K - 1]`` lower bounds of ``f_y - f_j``, differentiable. A mean of two lower bounds is one as
        well.

    Raises:
        ValueError: ``beta`` outside [0, 1]; as in :func:`pycert.margins`.

    Soundness: none of its own rounding errors (``soundness="none"``).
    Source: Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks"
    (CROWN-IBP), ICLR 2020.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"mixed_margins: beta must lie in [0, 1], got {beta}")
    options: dict[str, Any] = {"intersect": False, "soundness": "none"}
    parts = []
    if beta > 0 and method != "ibp":
        parts.append(beta * pycert.margins(bm, region, y, method=method, **options))
    if not parts or beta < 1:
        share = 1.0 if method == "ibp" else 1 - beta
        parts.append(share * pycert.margins(bm, region, y, method="ibp", **options))
    return parts[0] + parts[1] if len(parts) == 2 else parts[0]


def certified_loss(
    bm: Any, region: Any, y: Tensor, method: str = "ibp", *, beta: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """An upper bound of the cross entropy anywhere in the region, to be minimised.

    Args:
        bm: :class:`pycert.BoundedModule`; gradients reach the parameters of its network.
        region: :class:`pycert.LpBall` or :class:`pycert.Box` of B samples.
        y: ``[B]`` int64 classes.
        method: a bound method, say ``"ibp"`` or ``"crown-ibp"``.
        beta: share of ``method``; the rest is interval bounds (see :func:`mixed_margins`).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A number, or ``[B]`` without reduction, in nats; differentiable.

    Raises:
        ValueError: ``beta`` outside [0, 1], another reduction; as in :func:`pycert.margins`.

    Soundness: none of its own rounding errors (``soundness="none"``): a loss to train with, not a certificate.

    Example:
        >>> loss = pycert.train.certified_loss(bm, pycert.LpBall(x, 0.1, clip=(0, 1)), y, "crown-ibp")
        >>> loss.backward()
    """
    return worst_case_loss(mixed_margins(bm, region, y, method, beta), reduction)


#: Methods of :func:`fused_loss`: those with one walk from the output over bounds found before.
FUSED = ("crown-ibp", "fastlin", "crown")


def fused_loss(bm: Any, region: Any, y: Tensor, method: str = "crown-ibp", reduction: str = "mean") -> Tensor:
    """An upper bound of the cross entropy in the region by one linear bound a sample, for many classes.

    Where :func:`certified_loss` bounds every margin, this replaces each exponential of the loss by its chord
    over the margin's interval and bounds the weighted sum of the margins: one row of back-substitution in
    place of K - 1. Which of the two is tighter depends on the network.

    Args:
        bm: :class:`pycert.BoundedModule`; gradients reach the parameters of its network.
        region: :class:`pycert.LpBall` or :class:`pycert.Box` of B samples.
        y: ``[B]`` int64 classes.
        method: ``"crown-ibp"``, ``"fastlin"`` or ``"crown"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``[B]``), in nats.

    Raises:
        ValueError: another method or reduction; as in :meth:`pycert.BoundedModule.bound`.

    Soundness: none of its own rounding errors (``soundness="none"``): a loss to train with, not a certificate.
    Source: Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond", NeurIPS
    2020, section 3.3 (loss fusion).
    """
    if method not in FUSED:
        raise ValueError(f"fused_loss: method must be one of {', '.join(map(repr, FUSED))}, got {method!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"fused_loss: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    loss: Tensor = bm._loss_bound(region, y, method)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


@torch.no_grad()
def initialize_for_ibp(net: nn.Module, seed: int = 0) -> None:
    """Draw the weights of every Linear and Conv layer so that interval bounds neither grow nor vanish with
    depth.

    Weights become ``N(0, sqrt(2 pi) / fan_in)`` (standard deviation), biases 0: the width of an interval then
    keeps its size through an affine layer and a ReLU on average. The last such layer keeps the weights it
    has.

    Args:
        net: changed in place; what is no Linear, Conv1d or Conv2d stays as it is.
        seed: of the weights.

    Source: Shi et al., "Fast Certified Robust Training with Short Warmup", NeurIPS 2021, section 3.2.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    for layer in layers[:-1]:
        noise = torch.randn(layer.weight.shape, generator=generator)
        fan_in = layer.weight[0].numel()
        layer.weight.copy_(noise * (math.sqrt(2 * math.pi) / fan_in))
        if layer.bias is not None:
            layer.bias.zero_()
