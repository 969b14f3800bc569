"""The container that perturbations give their bounds in."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass
class LinearBound:
    """``lw x + lb <= . <= uw x + ub``, and the ends of the box, ``lower`` and ``upper`` (``[B, *in]``)."""

    lw: Tensor | None = None
    lb: Tensor | None = None
    uw: Tensor | None = None
    ub: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
