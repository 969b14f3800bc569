"""Layers that certified networks use and torch.nn lacks."""

from __future__ import annotations

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
