"""Layers that certified networks use and torch.nn lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """``(x - mean) / std`` for every channel: the input normalisation, as a part of the network.

    With it inside of the network, regions and eps are in the units of the raw input.

    Args:
        mean: one value per channel, in the units of the input.
        std: likewise, positive.

    Shape: ``[B, C, ...]`` to the same, with ``C`` the number of values (or 1 value for any ``C``).

    Raises:
        ValueError: ``mean`` and ``std`` differ in length, or hold values that are not finite, or
            ``std`` holds one that is not positive.

    Example:
        >>> Normalize(mean=[0.5], std=[0.25])(torch.ones(1, 1, 1, 1)).item()
        2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", _channels("mean", mean))
        self.register_buffer("std", _channels("std", std))
        if self.mean.shape != self.std.shape:
            raise ValueError(f"Normalize: mean has {len(self.mean)} channels and std {len(self.std)}")
        if not bool((self.std > 0).all()):
            raise ValueError(f"Normalize: std must be positive, got {self.std.tolist()}")

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or (len(self.mean) != 1 and x.shape[1] != len(self.mean)):
            raise ValueError(f"Normalize: input must be [B, {len(self.mean)}, ...], got {list(x.shape)}")
        shape = (-1, *[1] * (x.dim() - 2))
        return (x - self.mean.reshape(shape)) / self.std.reshape(shape)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


def _channels(name: str, values: Sequence[float] | Tensor) -> Tensor:
    tensor = values.detach().clone() if isinstance(values, Tensor) else torch.tensor(values)
    tensor = tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
    if tensor.dim() > 1 or tensor.numel() == 0:
        raise ValueError(f"Normalize: {name} must hold one value per channel, got shape {list(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"Normalize: {name} must be finite, got {tensor.tolist()}")
    return tensor.reshape(-1)


class MaxMin(nn.Module):
    """Maxima of the two halves of the channels, then their minima.

    Channel ``i`` is paired with channel ``i + C/2``. Norm-preserving, 1-Lipschitz in every p-norm.

    Shape: ``[B, C, ...]`` to the same, ``C`` even.

    Raises:
        ValueError: the number of channels is odd.

    Source: Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation", ICML 2019
    (section 4.2), with halves as pairs.

    Example:
        >>> MaxMin()(torch.tensor([[1.0, 5.0, 4.0, 2.0]])).tolist()
        [[4.0, 5.0, 1.0, 2.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        _even("MaxMin", x)
        first, second = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], dim=1)


class ReLUTheta(nn.Module):
    """``min(relu(x), theta)`` with a learnable threshold per neuron; 1-Lipschitz, constant on both sides.

    Args:
        shape: of one sample, ``theta``'s shape (broadcasting 1s are allowed).
        theta: start value, nonnegative.

    Shape: ``[B, *shape]`` to the same.

    Raises:
        ValueError: ``theta`` is negative.

    Source: Huang et al., "Training Certifiably Robust Neural Networks with Efficient Local Lipschitz Bounds",
    NeurIPS 2021, section 4. Their thresholds are kept nonnegative after each step
    (:func:`pycert.train.losses.project_thresholds`).

    Example:
        >>> ReLUTheta((3,), theta=2.0)(torch.tensor([[-1.0, 1.0, 5.0]])).tolist()
        [[0.0, 1.0, 2.0]]
    """

    def __init__(self, shape: Sequence[int], theta: float = 2.0) -> None:
        super().__init__()
        if not theta >= 0:
            raise ValueError(f"ReLUTheta: theta must be nonnegative, got {theta}")
        self.theta = nn.Parameter(torch.full(tuple(shape), float(theta)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), self.theta)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.theta.shape)}"


class ClippedMaxMin(nn.Module):
    """MaxMin whose maxima are cut off above and whose minima below, by learnable thresholds per neuron.

    Args:
        shape: of one sample, ``(C, ...)``, ``C`` even; the thresholds have half as many channels.
        low, high: start values, ``low <= high``.

    Shape: ``[B, *shape]`` to the same: ``min(max(a, b), high)``, then ``max(min(a, b), low)``.

    Raises:
        ValueError: an odd number of channels, ``low > high``.

    Source: Huang et al. 2021, section 4.
    """

    def __init__(self, shape: Sequence[int], low: float = -1.2, high: float = 1.2) -> None:
        super().__init__()
        if len(shape) < 1 or shape[0] % 2:
            raise ValueError(f"ClippedMaxMin: shape must have an even number of channels, got {tuple(shape)}")
        if not low <= high:
            raise ValueError(f"ClippedMaxMin: low must not exceed high, got {low} and {high}")
        half = (shape[0] // 2, *shape[1:])
        self.low = nn.Parameter(torch.full(half, float(low)))
        self.high = nn.Parameter(torch.full(half, float(high)))

    def forward(self, x: Tensor) -> Tensor:
        _even("ClippedMaxMin", x)
        first, second = x.chunk(2, dim=1)
        top = torch.minimum(torch.maximum(first, second), self.high)
        return torch.cat([top, torch.maximum(torch.minimum(first, second), self.low)], dim=1)

    def varying(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Where outputs in ``[lower, upper]`` are not certainly at their threshold, bool."""
        half = lower.shape[1] // 2
        return torch.cat([lower[:, :half] < self.high, upper[:, half:] > self.low], dim=1)


class SmoothMaxMin(nn.Module):
    """``(a + b + s) / 2`` and ``(a + b - s) / 2`` with ``s = sqrt((a - b)^2 + width^2)``: MaxMin without its kink.

    The Jacobian ``(1 + c, 1 - c; 1 - c, 1 + c) / 2`` with ``c = (a - b) / s`` in (-1, 1) has the singular values 1 and
    ``|c|``: 1-Lipschitz in the l2 norm (and in l1 and the maximum norm), with level sets that curve.

    Args:
        width: where the corner is rounded, positive, in the units of the input.

    Shape: ``[B, C, ...]`` to the same, ``C`` even; channel ``i`` is paired with ``i + C/2``.

    Raises:
        ValueError: ``width`` is not positive; the number of channels is odd.
    """

    def __init__(self, width: float = 0.1) -> None:
        super().__init__()
        if not 0 < width < math.inf:
            raise ValueError(f"SmoothMaxMin: width must be positive and finite, got {width}")
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        _even("SmoothMaxMin", x)
        first, second = x.chunk(2, dim=1)
        middle = (first + second) / 2
        half = torch.sqrt((first - second).square() + self.width**2) / 2
        return torch.cat([middle + half, middle - half], dim=1)

    def extra_repr(self) -> str:
        return f"width={self.width}"


class SmoothRamp(nn.Module):
    """A smooth ReLU with slopes in (0, 1) (``"softplus"``) or scaled to at most 1 in magnitude (``"gelu"``).

    ``"softplus"``: ``width softplus(x / width)``, its slope is ``sigmoid(x / width)``. ``"gelu"``:
    ``width gelu(x / width) / 1.13``, where 1.13 is above the largest slope of GELU, 1.1289...

    Args:
        kind: ``"softplus"`` or ``"gelu"``.
        width: over which the corner is rounded, positive, in the units of the input.

    Shape: any, elementwise.

    Raises:
        ValueError: unknown ``kind``; ``width`` is not positive.
    """

    def __init__(self, kind: str = "softplus", width: float = 0.1) -> None:
        super().__init__()
        if kind not in ("softplus", "gelu"):
            raise ValueError(f"SmoothRamp: kind must be one of 'softplus', 'gelu', got {kind!r}")
        if not 0 < width < math.inf:
            raise ValueError(f"SmoothRamp: width must be positive and finite, got {width}")
        self.kind, self.width = kind, width

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "softplus":
            # torch cuts softplus off at a threshold, where it jumps: beyond 80 the jump is far below any rounding
            return nn.functional.softplus(x / self.width, threshold=80.0) * self.width
        return nn.functional.gelu(x / self.width) * (self.width / 1.13)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, width={self.width}"


class Householder(nn.Module):
    """Pairs of channels reflected where they lie on one side of a learnable line through 0.

    With ``v = (cos t, sin t)`` a pair ``z`` with ``v . z > 0`` stays, another becomes ``z - 2 (v . z) v``: continuous,
    norm-preserving, 1-Lipschitz in the l2 norm.

    Args:
        channels: even; one angle ``t`` for each pair ``(i, i + channels / 2)``.
        angle: start value; ``3 pi / 4`` makes it MaxMin up to the order of outputs.

    Shape: ``[B, channels, ...]`` to the same.

    Raises:
        ValueError: ``channels`` is odd, or the input has another number.

    Source: Singla, Singla and Feizi, "Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100", ICLR 2022.
    """

    def __init__(self, channels: int, angle: float = 0.75 * math.pi) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"Householder: channels must be even and positive, got {channels}")
        self.channels = channels
        self.angle = nn.Parameter(torch.full((channels // 2,), float(angle)))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"Householder: input must be [B, {self.channels}, ...], got {list(x.shape)}")
        first, second = x.chunk(2, dim=1)
        shape = (-1, *[1] * (x.dim() - 2))
        cosine, sine = torch.cos(self.angle).view(shape), torch.sin(self.angle).view(shape)
        # z - 2 min(v.z, 0) v, so that one ReLU does the choice
        back = 2 * torch.relu(-(cosine * first + sine * second))
        return torch.cat([first + back * cosine, second + back * sine], dim=1)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


class GroupSort(nn.Module):
    """Channels sorted in ascending order within groups of two neighbours: ``(0, 1), (2, 3), ...``.

    Args:
        group_size: 2, the only size supported.

    Shape: ``[B, C, ...]`` to the same, ``C`` even.

    Raises:
        ValueError: ``group_size`` is not 2, or the number of channels is odd.

    Source: Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation", ICML 2019.

    Example:
        >>> GroupSort()(torch.tensor([[5.0, 1.0, 2.0, 4.0]])).tolist()
        [[1.0, 5.0, 2.0, 4.0]]
    """

    def __init__(self, group_size: int = 2) -> None:
        super().__init__()
        if group_size != 2:
            raise ValueError(f"GroupSort: group_size must be 2, got {group_size}")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        _even("GroupSort", x)
        first, second = x[:, 0::2], x[:, 1::2]
        return torch.stack([torch.minimum(first, second), torch.maximum(first, second)], dim=2).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"


def _even(name: str, x: Tensor) -> None:
    if x.dim() < 2 or x.shape[1] % 2:
        raise ValueError(
            f"{name}: input must be [B, C, ...] with an even number of channels, got {list(x.shape)}"
        )
