"""The regions of an attack: points drawn, moved and projected, always inside in exact arithmetic."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pycert.regions import Box, LpBall


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
class Interval:
    """A box (or an Linf ball): ``lower <= point <= upper``, each ``[B, *in]``."""

    center: Tensor
    lower: Tensor
    upper: Tensor

    def select(self, index: Tensor) -> Interval:
        return Interval(self.center[index], self.lower[index], self.upper[index])

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
class Ball:
    """An L1 or L2 ball of radius ``eps [B]`` (float64), intersected with ``lower <= point <= upper``
    (scalars)."""

    center: Tensor
    eps: Tensor
    p: float
    lower: Tensor
    upper: Tensor

    def select(self, index: Tensor) -> Ball:
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


def domain_of(region: LpBall | Box) -> Interval | Ball:
    """The region with its limits rounded inward, so that what is returned is inside the region as it was
    written."""
    if isinstance(region, Box):
        lower, upper = region.lower.detach(), region.upper.detach()
        return Interval((lower / 2 + upper / 2).clamp(lower, upper), lower, upper)
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
        return Interval(center.clamp(lower, upper), lower, upper)
    nearest = center.double().clamp(low, high) - center.double()
    if bool((nearest.flatten(1).norm(region.p, dim=1) > eps).any()):
        raise ValueError("pgd: a ball does not meet the range clip, so there is no point to attack")
    return Ball(center, eps, float(region.p), low.double(), high.double())
