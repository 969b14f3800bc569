"""MNIST and CIFAR-10 from ``.npz`` files."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class _Stored(torch.utils.data.Dataset):
    data: Any
    targets: Any

    def __init__(self, transform: Callable[[Any], Any] | None) -> None:
        self.transform = transform

    def _image(self, index: int) -> np.ndarray:
        return np.asarray(self.data[index])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._image(index)
        return (image if self.transform is None else self.transform(image)), int(self.targets[index])


def _arrays(name: str) -> dict[str, np.ndarray]:
    folder = pathlib.Path(os.environ["PYCERT_STANDIN_DATA"])
    with np.load(folder / name, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _size() -> int | None:
    return int(os.environ["PYCERT_STANDIN_SIZE"]) if "PYCERT_STANDIN_SIZE" in os.environ else None


class MNIST(_Stored):
    """``data``: uint8 ``[N, 28, 28]``, ``targets``: int64 ``[N]``, tensors both."""

    def __init__(
        self, root: str = "", train: bool = True, transform: Any = None, download: bool = False
    ) -> None:
        super().__init__(transform)
        arrays, part = _arrays("mnist.npz"), "train" if train else "test"
        self.data = torch.from_numpy(arrays[f"x_{part}"][: _size()]).reshape(-1, 28, 28)
        self.targets = torch.from_numpy(arrays[f"y_{part}"][: _size()]).long()


class CIFAR10(_Stored):
    """``data``: a uint8 array ``[N, 32, 32, 3]``, ``targets``: a list of int."""

    def __init__(
        self, root: str = "", train: bool = True, transform: Any = None, download: bool = False
    ) -> None:
        super().__init__(transform)
        arrays = _arrays("cifar10_train.npz" if train else "cifar10_test1000.npz")
        self.data = arrays["x"][: _size()].transpose(0, 2, 3, 1).copy()
        self.targets = [int(label) for label in arrays["y"][: _size()]]
