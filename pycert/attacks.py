"""Projected gradient descent: the attack that every certified accuracy is compared with.

An attack gives the other side of a certificate: a sample that is neither certified nor attacked is undecided.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycert._domains import domain_of
from pycert.regions import Box, LpBall

#: A quantity per sample, ``(outputs [B, ...]) -> [B]``, that the attack makes as small as it can; it succeeds
#: below 0.
Objective = Callable[[Tensor], Tensor]


class AttackResult(NamedTuple):
    """What :func:`pgd` found, one entry per sample.

    Attributes:
        inputs: ``[B, *in]``, the worst point found; always inside the region (exactly, compared in float64).
        success: ``[B]`` bool, the network errs there: ``margin < 0``. An output that is NaN counts as one.
        margin: ``[B]``, ``f_y - max_(j != y) f_j`` at ``inputs``, or the value of the callable given as
            ``loss``.
    """

    inputs: Tensor
    success: Tensor
    margin: Tensor


def pgd(
    model: nn.Module | Callable[[Tensor], Tensor],
    region: LpBall | Box,
    y: Tensor | None,
    *,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str | Objective = "margin",
    random_start: bool = True,
    early_stop: bool = True,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """The worst inputs that projected gradient descent finds in a region.

    The centre is tried first, then every restart walks ``steps`` steps: along the sign of the gradient for a
    box or an Linf ball, along the normalised gradient for L2, along the 5 % largest coordinates for L1. The
    point with the smallest margin is kept per sample. The network runs in evaluation mode and is left as it
    was: training flags, ``requires_grad`` and ``.grad`` do not change.

    Args:
        model: the network, or a :class:`pycert.BoundedModule` of it.
        region: :class:`pycert.LpBall` (p = 1, 2, inf, with or without ``clip``) or :class:`pycert.Box`, of B
            samples.
        y: ``[B]`` int64 class of every sample; None only with a callable ``loss``.
        steps: gradient steps per restart.
        step_size: in the units of the input, measured in the ball's own norm; default ``2.5 * eps / steps``
            (Madry et al. 2018), for a box ``2.5 * radius / steps`` in every coordinate.
        restarts: number of walks, each from a new random point.
        loss: ``"margin"`` or ``"cross-entropy"`` (what the gradient is taken of; the margin decides in both
            cases), or a callable ``outputs -> [B]`` that is made small and means success below 0.
        random_start: start from a uniform point of the region instead of its centre.
        early_stop: leave a sample alone once the attack succeeded on it; False goes on to the smallest
            margin.
        seed: of the starting points; the same seed gives the same result.
        generator: a CPU generator used in place of ``seed``.

    Returns:
        ``AttackResult(inputs, success, margin)``, detached, in the region's dtype and device.

    Raises:
        ValueError: a negative count or step, an unknown loss, shapes that do not fit, a ball that lies
            outside ``clip``.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018; the
    sparse L1 step is that of Tramer and Boneh, "Adversarial Training and Robustness for Multiple
    Perturbations", NeurIPS 2019.
    """
    if steps < 0 or restarts < 1:
        raise ValueError(f"pgd: steps must be >= 0 and restarts >= 1, got {steps} and {restarts}")
    if step_size is not None and not step_size > 0:
        raise ValueError(f"pgd: step_size must be > 0, got {step_size}")
    domain = domain_of(region)
    objective, descend = _objectives(loss, y, domain.center.shape[0])
    if generator is None:
        generator = torch.Generator().manual_seed(seed)

    with _frozen(model):
        best = domain.project(domain.center)
        margin = objective(model(best), slice(None))
        for _ in range(restarts):
            point = domain.random(generator) if random_start else best.clone()
            index = torch.arange(len(best), device=best.device)
            walk = domain
            for step in range(steps + 1):
                if early_stop:
                    open_ = margin[index] >= 0
                    index, point, walk = index[open_], point[open_], walk.select(open_)
                if index.numel() == 0:
                    break
                value, gradient = _evaluate(model, point, index, objective, descend, wanted=step < steps)
                better = value < margin[index]
                best[index[better]], margin[index[better]] = point[better], value[better]
                if gradient is not None:
                    point = walk.project(walk.move(point, gradient, step_size, 2.5 / steps))
    return AttackResult(best, margin < 0, margin)


def class_margin(outputs: Tensor, y: Tensor) -> Tensor:
    """``f_y - max_(j != y) f_j`` of ``outputs [B, K]`` for the classes ``y [B]``: ``[B]``."""
    true = outputs.gather(1, y.view(-1, 1)).squeeze(1)
    others = outputs.scatter(1, y.view(-1, 1), float("-inf"))
    return true - others.amax(1)


def _objectives(loss: str | Objective, y: Tensor | None, batch: int) -> tuple[Any, Any]:
    """Two functions of (outputs, index of the samples): what decides, and what the gradient is taken of."""
    if callable(loss):
        return (lambda out, index: _nan_is_failure(loss(out)),) * 2
    if loss not in ("margin", "cross-entropy"):
        raise ValueError(f"pgd: loss must be 'margin', 'cross-entropy' or a callable, got {loss!r}")
    if y is None or y.shape != (batch,):
        raise ValueError(f"pgd: y must have shape [{batch}], got {None if y is None else list(y.shape)}")
    labels = y.long()

    def margin(out: Tensor, index: Any) -> Tensor:
        return _nan_is_failure(class_margin(out, labels[index]))

    def entropy(out: Tensor, index: Any) -> Tensor:
        return -functional.cross_entropy(out, labels[index], reduction="none")

    return margin, margin if loss == "margin" else entropy


def _nan_is_failure(value: Tensor) -> Tensor:
    return value.masked_fill(torch.isnan(value), -float("inf"))


def _evaluate(
    model: Callable[[Tensor], Tensor],
    point: Tensor,
    index: Tensor,
    objective: Any,
    descend: Any,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """The deciding value ``[b]`` at ``point`` and, where wanted, the gradient to walk against."""
    if not wanted:
        with torch.no_grad():
            return objective(model(point), index), None
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        outputs = model(point)
        (gradient,) = torch.autograd.grad(descend(outputs, index).sum(), point)
    return objective(outputs.detach(), index), torch.nan_to_num(gradient)


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradient recording of ours; the flags of every module are put back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
