"""Sets of inputs, as scripts name them, and the regions of pycert that they are.

Star imports of this module are common, and scripts rely on the modules that come with them.
"""

from __future__ import annotations

import json  # noqa: F401 - scripts import * from here
import math
import os  # noqa: F401
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycert.compat.auto_LiRPA.bounded_tensor import plain
from pycert.compat.auto_LiRPA.linear_bound import LinearBound
from pycert.regions import Box, LpBall, Region


class Perturbation:
    """A set of inputs around a clean one.

    A subclass of one's own gives :meth:`init` (an enclosing box) and :meth:`concretize` (the extreme
    value of a linear function). Intermediate bounds then hold for the box, and the linear functions of
    the last layer are concretised by it; the result is never looser than over the box.
    """

    #: Whether :meth:`concretize` gives more than the region does.
    concretizes = True

    def set_eps(self, eps: Any) -> None:
        self.eps = eps

    def concretize(self, x: Tensor, A: Tensor, sign: int = -1, aux: Any = None) -> Tensor | None:
        """The least (``sign`` -1) or greatest (+1) value of ``A x``.

        Args:
            x: clean input ``[B, *in]``.
            A: ``[B, S, n]``, with the input flattened.

        Returns:
            ``[B, S]``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define concretize(x, A, sign, aux)")

    def init(self, x: Tensor, aux: Any = None, forward: bool = False) -> Any:
        """``(bounds, center, aux)``, ``bounds`` a ``LinearBound`` with the ends of an enclosing box."""
        raise NotImplementedError(f"{type(self).__name__} must define init(x, aux, forward)")

    def region(self, x: Tensor, aux: Any = None, outward: bool = True) -> Region:
        """The region of pycert that encloses the set; ``outward``: also in floating point."""
        bounds = self.init(x, aux=aux)[0]
        return Box(bounds.lower, bounds.upper)


class PerturbationLpNorm(Perturbation):
    """A ball in the l_p norm, or a box.

    Args:
        eps: radius: a number, or a tensor that is one radius, one a sample (``[B]`` or ``[B, 1, ...]``)
            or, for ``norm=inf``, of the shape of the input.
        norm: p, at least 1. For 1, 2 and ``inf`` the region is exact; for others it is enclosed by a
            box (p > 2) or by the l_2 ball, and linear functions are concretised by the dual norm.
        x_L, x_U: ends of the box for ``norm=inf``; they have priority over ``eps``. As in auto_LiRPA,
            other norms do not use them.
        eps_min, rearrange_constraints, no_return_inf, timer: without meaning here.
        constraints: linear constraints on the input; not supported.

    Raises:
        ValueError: ``norm`` is below 1.
        NotImplementedError: ``constraints`` are given.
    """

    def __init__(
        self,
        eps: Any = 0,
        norm: float = np.inf,
        x_L: Tensor | None = None,
        x_U: Tensor | None = None,
        eps_min: float = 0,
        constraints: Any = None,
        rearrange_constraints: bool = False,
        no_return_inf: bool = False,
        timer: Any = None,
    ) -> None:
        self.norm = float(norm)
        if not self.norm >= 1:
            raise ValueError(f"PerturbationLpNorm: norm must be at least 1, got {norm}")
        if constraints is not None:
            raise NotImplementedError(
                "PerturbationLpNorm: constraints on the input are not supported; "
                "without them the bounds hold for a superset"
            )
        self.eps, self.eps_min = eps, eps_min
        self.x_L, self.x_U = x_L, x_U
        if self.norm == np.inf and x_L is not None and x_U is not None:
            self.eps = (x_U - x_L) / 2
        self.dual_norm = 1.0 if self.norm == np.inf else np.inf if self.norm == 1 else 1 / (1 - 1 / self.norm)

    @property
    def concretizes(self) -> bool:  # type: ignore[override]
        return self.norm not in (1, 2, np.inf)

    def _eps_of(self, x: Tensor, outward: bool = False) -> Any:
        """``eps`` as pycert takes it (a float or ``[B]``), or of the input's shape; ``outward``: not rounded down."""
        eps = self.eps
        if not isinstance(eps, Tensor):
            return eps
        eps = _rounded(eps, x.dtype, 1).to(x.device) if outward else eps.to(x)
        if eps.numel() == 1:
            return eps.reshape(1)
        per_sample = eps.shape[0] == x.shape[0] and eps.numel() == x.shape[0]
        if per_sample and eps.dim() == 1 and x.dim() == 2 and x.shape[0] == x.shape[1]:
            raise ValueError(
                f"eps of shape {list(eps.shape)} is one value a sample or one an element of x {list(x.shape)}: "
                "give it as [B, 1] or [1, n]"
            )
        if per_sample and eps.dim() in (1, x.dim()):
            return eps.reshape(-1)
        return eps.expand(x.shape)

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the smallest box around the set, ``[B, *in]`` each."""
        if self.norm == np.inf and self.x_L is not None and self.x_U is not None:
            return self.x_L.to(x).expand(x.shape), self.x_U.to(x).expand(x.shape)
        eps = self._eps_of(x)
        if isinstance(eps, Tensor) and eps.dim() == 1:
            eps = eps.view(-1, *[1] * (x.dim() - 1))
        lower = x - eps if self.x_L is None or self.norm != np.inf else self.x_L.to(x).expand(x.shape)
        upper = x + eps if self.x_U is None or self.norm != np.inf else self.x_U.to(x).expand(x.shape)
        return lower, upper

    def _outward_box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, every rounding outward; gradients are those of ``box``."""
        with torch.no_grad():
            eps = torch.as_tensor(self._eps_of(x.double()), dtype=torch.float64, device=x.device)
            eps = eps.view(-1, *[1] * (x.dim() - 1)) if eps.dim() == 1 else eps
        ends = []
        for sign, given, end in zip((-1, 1), (self.x_L, self.x_U), self.box(x)):
            with torch.no_grad():
                if given is None:
                    exact = x.double() + sign * eps
                    exact = torch.nextafter(exact, torch.full_like(exact, sign * math.inf))
                else:
                    exact = given.to(x.device).double().expand(x.shape)
                value = _rounded(exact, x.dtype, sign)
            ends.append(value + (end - end.detach()))
        return ends[0], ends[1]

    def region(self, x: Tensor, aux: Any = None, outward: bool = True) -> Region:
        """An :class:`pycert.LpBall` or :class:`pycert.Box`; ``x -+ eps`` is rounded outward if asked for."""
        x = plain(x)
        eps = self._eps_of(x, outward)
        per_element = isinstance(eps, Tensor) and eps.dim() > 1
        if self.norm == np.inf:
            return Box(*(self._outward_box(x) if outward else self.box(x)))
        if per_element:
            raise ValueError(
                f"eps must be a number or have one value a sample ([{x.shape[0]}]) for norm {self.norm:g}, "
                f"got shape {list(self.eps.shape)}"
            )
        return LpBall(x, eps, p=self.norm if not self.concretizes else 2.0 if self.norm < 2 else math.inf)

    def concretize(self, x: Tensor, A: Tensor, sign: int = -1, aux: Any = None) -> Tensor:
        flat, A = plain(x).flatten(1), A.flatten(2)
        if self.norm == np.inf:
            lower, upper = (end.flatten(1) for end in self.box(plain(x)))
            center, radius = (lower + upper) / 2, (upper - lower) / 2
            deviation = (A.abs() @ radius.unsqueeze(-1)).squeeze(-1)
            return (A @ center.unsqueeze(-1)).squeeze(-1) + sign * deviation
        eps = self._eps_of(plain(x))
        eps = eps.view(-1, 1) if isinstance(eps, Tensor) else eps
        return (A @ flat.unsqueeze(-1)).squeeze(-1) + sign * eps * A.norm(self.dual_norm, dim=-1)

    def init(self, x: Tensor, aux: Any = None, forward: bool = False) -> Any:
        lower, upper = self.box(plain(x))
        return _ends(lower, upper), plain(x), aux

    def __repr__(self) -> str:
        if self.norm == np.inf and self.x_L is not None and self.x_U is not None:
            return f"PerturbationLpNorm(norm=inf, eps={self.eps}, x_L={self.x_L}, x_U={self.x_U})"
        return f"PerturbationLpNorm(norm={self.norm:g}, eps={self.eps})"


class PerturbationL0Norm(Perturbation):
    """Inputs between 0 and 1 of which ``ceil(eps)`` elements may change.

    Args:
        eps: how many elements.
        x_L, x_U: without meaning, as in auto_LiRPA.
        ratio: factor of the deviation, for training schedules; the bounds hold for 1.
    """

    def __init__(
        self, eps: float, x_L: Tensor | None = None, x_U: Tensor | None = None, ratio: float = 1.0
    ) -> None:
        self.eps, self.x_L, self.x_U, self.ratio = eps, x_L, x_U, ratio

    def concretize(self, x: Tensor, A: Tensor, sign: int = -1, aux: Any = None) -> Tensor:
        flat, A = plain(x).flatten(1), A.flatten(2)
        here = A * flat.unsqueeze(1)
        best = A.clamp(min=0) if sign == 1 else A.clamp(max=0)
        gain = (sign * (best - here)).clamp(min=0)
        count = min(math.ceil(self.eps), gain.shape[-1])
        return here.sum(-1) + sign * self.ratio * gain.topk(count, dim=-1).values.sum(-1)

    def init(self, x: Tensor, aux: Any = None, forward: bool = False) -> Any:
        value = plain(x)
        return _ends(value.clamp(max=0), value.clamp(min=1)), value, aux

    def __repr__(self) -> str:
        return f"PerturbationL0Norm(eps={self.eps}, ratio={self.ratio})"


class PerturbationLinear(Perturbation):
    """Inputs between two linear functions of a variable in a box.

    ``lower_A z + lower_b <= x <= upper_A z + upper_b`` for a ``z`` with ``input_lb <= z <= input_ub``.

    Args:
        lower_A, upper_A: ``[B, *in, m]``.
        lower_b, upper_b: ``[B, *in]``.
        input_lb, input_ub: ``[B, m]``.
        x_L, x_U: ends of a box that holds ``x``; by default concretised from the functions.
    """

    def __init__(
        self,
        lower_A: Tensor,
        upper_A: Tensor,
        lower_b: Tensor,
        upper_b: Tensor,
        input_lb: Tensor,
        input_ub: Tensor,
        x_L: Tensor | None = None,
        x_U: Tensor | None = None,
    ) -> None:
        self.lower_A, self.upper_A = lower_A, upper_A
        self.lower_b, self.upper_b = lower_b, upper_b
        self.input_lb, self.input_ub = input_lb, input_ub
        batch = lower_b.shape[0]
        if x_L is None:
            x_L = self._extreme(lower_A.reshape(batch, -1, lower_A.shape[-1]), -1).view_as(lower_b) + lower_b
        if x_U is None:
            x_U = self._extreme(upper_A.reshape(batch, -1, upper_A.shape[-1]), +1).view_as(upper_b) + upper_b
        self.x_L, self.x_U = x_L, x_U

    def _extreme(self, A: Tensor, sign: int) -> Tensor:
        middle = ((self.input_lb + self.input_ub) / 2).flatten(1).unsqueeze(-1)
        radius = ((self.input_ub - self.input_lb) / 2).flatten(1).unsqueeze(-1)
        return (A @ middle + sign * (A.abs() @ radius)).squeeze(-1)

    def concretize(self, x: Tensor, A: Tensor, sign: int = -1, aux: Any = None) -> Tensor:
        A = A.flatten(2)
        batch, count = A.shape[0], A.shape[2]
        positive, negative = A.clamp(min=0), A.clamp(max=0)
        near = (self.lower_A, self.lower_b), (self.upper_A, self.upper_b)
        (below, low), (above, high) = near if sign == -1 else near[::-1]
        rows = positive @ below.reshape(batch, count, -1) + negative @ above.reshape(batch, count, -1)
        fixed = positive @ low.reshape(batch, count, 1) + negative @ high.reshape(batch, count, 1)
        return self._extreme(rows, sign) + fixed.squeeze(-1)

    def init(self, x: Tensor, aux: Any = None, forward: bool = False) -> Any:
        return _ends(self.x_L, self.x_U), plain(x), aux

    def __repr__(self) -> str:
        return f"PerturbationLinear(x_L={self.x_L}, x_U={self.x_U})"


class PerturbationSynonym(Perturbation):
    """Substitution of words; not supported, because it perturbs embeddings that depend on a language model."""

    def __init__(self, budget: int, eps: float = 1.0, use_simple: bool = False) -> None:
        raise NotImplementedError("PerturbationSynonym (substitution of words) is not supported")


def _ends(lower: Tensor, upper: Tensor) -> LinearBound:
    return LinearBound(lower=lower, upper=upper)


def _rounded(value: Tensor, dtype: torch.dtype, sign: int) -> Tensor:
    """In another dtype, upward for ``sign`` 1 and downward for -1, with the gradient of the plain conversion."""
    plain = value.to(dtype)
    if not value.is_floating_point() or torch.finfo(dtype).eps <= torch.finfo(value.dtype).eps:
        return plain
    with torch.no_grad():
        beyond = torch.nextafter(plain, torch.full_like(plain, sign * math.inf))
        found = torch.where(sign * plain.double() < sign * value.double(), beyond, plain)
    return found + (plain - plain.detach())
