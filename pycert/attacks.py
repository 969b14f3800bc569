"""Projected gradient descent: the attack that every certified accuracy is compared with.

An attack gives the other side of a certificate: a sample that is neither certified nor attacked is undecided.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycert.regions import Box, LpBall

#: A quantity per sample, ``(outputs [B, ...]) -> [B]``, that the attack makes as small as it can; it succeeds
#: below 0.
Objective = Callable[[Tensor], Tensor]


class AttackResult(NamedTuple):
    """What :func:`pgd` found, one entry per sample.

    Attributes:
        inputs: ``[B, *in]``, the worst point found; always inside the region (exactly, compared in float64).
        success: ``[B]`` bool, the network errs there: ``margin < 0``.
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
    domain = _domain(region)
    objective, descend = _objectives(loss, y, domain.center.shape[0])
    if generator is None:
        generator = torch.Generator().manual_seed(seed)

    with _frozen(model):
        best = domain.project(domain.center)
        margin = objective(model(best), slice(None))
        for _ in range(restarts):
            noise = domain.random(generator) if random_start else best.clone()
            index = torch.arange(best.shape[0], device=best.device)
            if early_stop:
                index = index[margin >= 0]
            walk, point = domain.select(index), noise[index]
            for step in range(steps + 1):
                if index.numel() == 0:
                    break
                value, gradient = _evaluate(model, point, index, objective, descend, wanted=step < steps)
                better = value < margin[index]
                best[index[better]], margin[index[better]] = point[better], value[better]
                if gradient is None:
                    break
                if early_stop and bool((value < 0).any()):
                    open_ = value >= 0
                    index, point, gradient, walk = (
                        index[open_],
                        point[open_],
                        gradient[open_],
                        walk.select(open_),
                    )
                size = None if step_size is None else float(step_size)
                point = walk.project(walk.move(point, gradient, size, 2.5 / steps))
    return AttackResult(best, margin < 0, margin)


def class_margin(outputs: Tensor, y: Tensor) -> Tensor:
    """``f_y - max_(j != y) f_j`` of ``outputs [B, K]`` for the classes ``y [B]``: ``[B]``."""
    true = outputs.gather(1, y.view(-1, 1)).squeeze(1)
    others = outputs.scatter(1, y.view(-1, 1), float("-inf"))
    return true - others.amax(1)


def _objectives(loss: str | Objective, y: Tensor | None, batch: int) -> tuple[Any, Any]:
    """Two functions of (outputs, index of the samples): what decides, and what the gradient is taken of."""
    if callable(loss):
        return (lambda out, index: loss(out),) * 2
    if loss not in ("margin", "cross-entropy"):
        raise ValueError(f"pgd: loss must be 'margin', 'cross-entropy' or a callable, got {loss!r}")
    if y is None or y.shape != (batch,):
        raise ValueError(f"pgd: y must have shape [{batch}], got {None if y is None else list(y.shape)}")
    labels = y.long()

    def margin(out: Tensor, index: Any) -> Tensor:
        return class_margin(out, labels[index])

    def entropy(out: Tensor, index: Any) -> Tensor:
        return -functional.cross_entropy(out, labels[index], reduction="none")

    return margin, margin if loss == "margin" else entropy


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


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """``[B]`` (or a scalar) shaped to broadcast against ``like [B, ...]``."""
    return value.reshape(-1, *[1] * (like.dim() - 1)) if value.dim() else value


def _inward(value: Tensor, dtype: torch.dtype, toward: float) -> Tensor:
    """A float64 value in ``dtype``, rounded towards ``toward`` (an infinity), so that a bound stays a
    bound."""
    rounded = value.to(dtype)
    outside = rounded.double() < value if toward > 0 else rounded.double() > value
    return torch.where(outside, torch.nextafter(rounded, torch.full_like(rounded, toward)), rounded)


@dataclasses.dataclass
class _Interval:
    """A box (or an Linf ball): ``lower <= point <= upper``, each ``[B, *in]``."""

    center: Tensor
    lower: Tensor
    upper: Tensor

    def select(self, index: Tensor) -> _Interval:
        return _Interval(self.center[index], self.lower[index], self.upper[index])

    def random(self, generator: torch.Generator) -> Tensor:
        noise = torch.rand(self.center.shape, generator=generator, dtype=self.center.dtype).to(
            self.center.device
        )
        return self.project(self.lower + noise * (self.upper - self.lower))

    def move(self, point: Tensor, gradient: Tensor, size: float | None, relative: float) -> Tensor:
        step = size if size is not None else relative * (self.upper - self.lower) / 2
        return point - step * gradient.sign()

    def project(self, point: Tensor) -> Tensor:
        return point.clamp(self.lower, self.upper)


@dataclasses.dataclass
class _Ball:
    """An L1 or L2 ball of radius ``eps [B]`` (float64), intersected with ``lower <= point <= upper``
    (scalars)."""

    center: Tensor
    eps: Tensor
    p: float
    lower: Tensor
    upper: Tensor

    def select(self, index: Tensor) -> _Ball:
        return dataclasses.replace(self, center=self.center[index], eps=self.eps[index])

    def random(self, generator: torch.Generator) -> Tensor:
        """Uniform in the ball (before the box): a direction on the sphere times U^(1/n)."""
        flat = self.center.flatten(1)
        if self.p == 2:
            noise = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
        else:
            noise = torch.empty(flat.shape, dtype=torch.float64).exponential_(generator=generator)
            noise = noise * (torch.rand(flat.shape, generator=generator) - 0.5).sign()
        length = torch.rand(flat.shape[0], 1, generator=generator, dtype=torch.float64) ** (
            1 / max(1, flat.shape[1])
        )
        noise = (noise * length / noise.norm(self.p, dim=1, keepdim=True)).to(flat.device)
        return self.project(self.center.double() + (noise * self.eps.view(-1, 1)).view_as(self.center))

    def move(self, point: Tensor, gradient: Tensor, size: float | None, relative: float) -> Tensor:
        step = self.eps * relative if size is None else torch.full_like(self.eps, size)
        flat, at = gradient.double().flatten(1), point.double().flatten(1)
        if self.p == 2:
            direction = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)
        else:  # spread over the 5 % largest coordinates that the box lets move
            free = torch.where(flat > 0, at > self.lower, at < self.upper)
            count = max(1, flat.shape[1] // 20)
            chosen = torch.where(free, flat.abs(), 0).topk(count, dim=1).indices
            direction = torch.zeros_like(flat).scatter(1, chosen, flat.sign().gather(1, chosen) / count)
        return (at - step.view(-1, 1) * direction).view_as(point)

    def project(self, point: Tensor) -> Tensor:
        """The nearest point, found in float64; rounding goes towards the centre, so the result is inside."""
        center, radius = self.center.double().flatten(1), self.eps.view(-1, 1) * (1 - 2.0**-40)
        shift = point.double().flatten(1) - center
        shift = (center + shift).clamp(self.lower, self.upper) - center if self._boxed() else shift
        far = (shift.norm(self.p, dim=1) > radius[:, 0]).nonzero()[:, 0]
        if far.numel():
            wanted = point.double().flatten(1)[far] - center[far]
            shift[far] = self._pull(center[far], wanted, radius[far])
        exact = center + shift
        rounded = exact.to(self.center.dtype)
        beyond = (rounded.double() - center).abs() > shift.abs()
        rounded = torch.where(beyond, torch.nextafter(rounded, self.center.flatten(1)), rounded)
        limits = self.lower.to(rounded.dtype), self.upper.to(rounded.dtype)
        return rounded.clamp(*limits).view_as(self.center)

    def _boxed(self) -> bool:
        return bool(torch.isfinite(self.lower) | torch.isfinite(self.upper))

    def _pull(self, center: Tensor, shift: Tensor, radius: Tensor) -> Tensor:
        """Projection of ``center + shift`` (outside the ball) minus ``center``, each ``[b, n]``.

        The Karush-Kuhn-Tucker conditions leave one unknown per sample, with a norm monotone in it: the factor
        t of ``clip(center + t * shift)`` for p = 2, the threshold t of ``clip(center + soft(shift, t))`` for
        p = 1. Without a box it is known in closed form (p = 1: by sorting); with one it is bisected to 2^-60.
        """
        if not self._boxed():
            if self.p == 2:
                return shift * (radius / shift.norm(dim=1, keepdim=True))
            return _soft(shift, _simplex_threshold(shift.abs(), radius))

        def candidate(t: Tensor) -> Tensor:
            moved = shift * (1 - t) if self.p == 2 else _soft(shift, t * shift.abs().amax(1, keepdim=True))
            return (center + moved).clamp(self.lower, self.upper) - center

        outside, inside = torch.zeros_like(radius), torch.ones_like(radius)
        for _ in range(60):
            middle = (outside + inside) / 2
            fits = candidate(middle).norm(self.p, dim=1, keepdim=True) <= radius
            outside, inside = torch.where(fits, outside, middle), torch.where(fits, middle, inside)
        return candidate(inside)


def _soft(value: Tensor, threshold: Tensor) -> Tensor:
    return value.sign() * (value.abs() - threshold).clamp(min=0)


def _simplex_threshold(size: Tensor, radius: Tensor) -> Tensor:
    """t with ``sum max(size - t, 0) = radius`` for ``size [b, n] >= 0`` (Duchi et al., ICML 2008, fig. 1):
    ``[b, 1]``."""
    ordered = size.sort(dim=1, descending=True).values
    excess = (ordered.cumsum(1) - radius) / torch.arange(1, size.shape[1] + 1, device=size.device)
    last = (ordered > excess).sum(1, keepdim=True).clamp(min=1) - 1
    return excess.gather(1, last)


def _domain(region: LpBall | Box) -> _Interval | _Ball:
    """The region with its limits rounded inward, so that what is returned is inside the region as it was
    written."""
    if isinstance(region, Box):
        lower, upper = region.lower.detach(), region.upper.detach()
        return _Interval((lower / 2 + upper / 2).clamp(lower, upper), lower, upper)
    center = region.x.detach()
    eps = region.eps.detach().double()
    infinity = torch.tensor(float("inf"), dtype=torch.float64, device=center.device)
    low, high = region.clip if region.clip is not None else (-infinity, infinity)
    low, high = (torch.as_tensor(end, dtype=torch.float64, device=center.device) for end in (low, high))
    low, high = _inward(low, center.dtype, float("inf")), _inward(high, center.dtype, -float("inf"))
    if region.p == float("inf"):
        wide, radius = center.double(), _rows(eps, center)
        below, above = torch.nextafter(wide - radius, infinity), torch.nextafter(wide + radius, -infinity)
        lower = torch.minimum(_inward(below, center.dtype, float("inf")), center).clamp(min=low)
        upper = torch.maximum(_inward(above, center.dtype, -float("inf")), center).clamp(max=high)
        return _Interval(center.clamp(lower, upper), lower, upper)
    nearest = center.double().clamp(low, high) - center.double()
    if bool((nearest.flatten(1).norm(region.p, dim=1) > eps).any()):
        raise ValueError("pgd: a ball does not meet the range clip, so there is no point to attack")
    return _Ball(center, eps, float(region.p), low.double(), high.double())
