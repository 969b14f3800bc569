"""Transforms of images, ``[H, W]`` or ``[H, W, C]`` in uint8, or of tensors ``[C, H, W]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class ToTensor:
    """float32 in [0, 1], channels first."""

    def __call__(self, image: Any) -> Tensor:
        array = np.asarray(image)
        array = array[..., None] if array.ndim == 2 else array
        return torch.from_numpy(array.transpose(2, 0, 1).copy()).float() / 255


class Normalize:
    """``(x - mean) / std`` by channel."""

    def __init__(self, mean: Any, std: Any, inplace: bool = False) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.as_tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class RandomHorizontalFlip:
    """Mirrors half of the images."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Any) -> Any:
        if torch.rand(()).item() >= self.p:
            return image
        return image.flip(-1) if isinstance(image, Tensor) else np.asarray(image)[:, ::-1].copy()


class RandomCrop:
    """A square of ``size`` from the image with ``padding`` zeros around it."""

    def __init__(self, size: int, padding: int = 0, padding_mode: str = "constant") -> None:
        self.size, self.padding, self.mode = size, padding, padding_mode

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Tensor):
            flipped = np.moveaxis(image.numpy(), 0, -1)
            return torch.from_numpy(np.moveaxis(self(flipped), -1, 0).copy())
        array = np.asarray(image)
        widths = [(self.padding, self.padding)] * 2 + [(0, 0)] * (array.ndim - 2)
        array = np.pad(array, widths, mode=self.mode)
        top, left = (int(torch.randint(0, extent - self.size + 1, ())) for extent in array.shape[:2])
        return array[top : top + self.size, left : left + self.size].copy()
