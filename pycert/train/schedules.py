"""Schedules of certified training: how eps, the clean share and the share of CROWN move from start to end."""

from __future__ import annotations

import dataclasses


def linear(progress: float) -> float:
    """``progress`` itself, held within [0, 1]."""
    return min(max(progress, 0.0), 1.0)


def smooth(progress: float, middle: float = 0.25) -> float:
    """A ramp from 0 to 1 that starts flat: a fourth power up to ``middle``, then the line that meets it
    smoothly.

    A slow start matters, since the first bounds are very loose.

    Source: the schedule of Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and
    Beyond", NeurIPS 2020, with the fourth power.
    """
    progress = linear(progress)
    scale = 1 / ((1 - middle) * 4 * middle**3 + middle**4)
    if progress < middle:
        return scale * progress**4
    return scale * (middle**4 + 4 * middle**3 * (progress - middle))


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A value that goes from ``initial`` to ``final`` between two steps and is constant outside.

    Args:
        start, end: steps (any unit, say batches) where the change begins and where it is complete.
        initial, final: the values there.
        kind: ``"linear"`` or ``"smooth"`` (see :func:`smooth`).

    Example:
        >>> Ramp(start=10, end=20, initial=0.0, final=0.1, kind="linear")(15)
        0.05
    """

    start: float
    end: float
    initial: float
    final: float
    kind: str = "linear"

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "smooth"):
            raise ValueError(f"Ramp: kind must be 'linear' or 'smooth', got {self.kind!r}")
        if self.end < self.start:
            raise ValueError(f"Ramp: end must not lie before start, got {self.start} and {self.end}")

    def __call__(self, step: float) -> float:
        if step >= self.end:
            return self.final
        progress = (step - self.start) / (self.end - self.start) if step > self.start else 0.0
        share = smooth(progress) if self.kind == "smooth" else linear(progress)
        return self.initial + (self.final - self.initial) * share
