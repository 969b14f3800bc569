"""Random linear operators under masks, of every kind that ``pycert.ops.masked_norm`` takes."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from pycert.norms.operator import operator_of


@dataclasses.dataclass
class Case:
    weight: Tensor
    conv: dict[str, Any] | None
    rows: Tensor | None
    columns: Tensor | None

    def matrices(self) -> Tensor:
        """The operators of all samples, written out in float64: ``[B, m, n]``."""
        matrix = operator_of(self.weight.double(), self.conv).explicit()[None]
        if self.rows is not None:
            matrix = matrix * self.rows.double().flatten(1)[:, :, None]
        if self.columns is not None:
            matrix = matrix * self.columns.double().flatten(1)[:, None, :]
        return matrix

    def norms(self) -> Tensor:
        """The exact 2-norms, by a dense SVD of the matrices scaled to 1."""
        matrices = self.matrices()
        largest = matrices.abs().amax((1, 2), keepdim=True)
        scaled = matrices / torch.where(largest > 0, largest, 1.0)
        return torch.linalg.matrix_norm(scaled, 2) * largest[:, 0, 0]

    def __str__(self) -> str:
        return f"{list(self.weight.shape)} {self.weight.dtype} {self.conv}"


def _mask(choose: random.Random, batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    kind = choose.random()
    if kind < 0.2:
        return None
    if kind < 0.6:
        return torch.rand(batch, *shape) < choose.choice([0.0, 0.1, 0.5, 0.9])
    if kind < 0.75:
        mask = torch.rand(batch, *shape) < 0.9
        mask[:, :: choose.choice([2, 3])] = False  # whole channels
        return mask
    scale = 10 ** choose.uniform(-6, 6)
    return torch.rand(batch, *shape, dtype=dtype) * scale * (torch.rand(batch, *shape) < 0.7)


def _degenerate(choose: random.Random, weight: Tensor) -> Tensor:
    kind = choose.random()
    flat = weight.flatten(1)
    if kind < 0.1:
        return (torch.randn_like(flat[:, :1]) @ torch.randn_like(flat[:1])).view_as(weight)  # rank 1
    if kind < 0.2:
        size = max(flat.shape)
        square = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
        return square[: flat.shape[0], : flat.shape[1]].to(weight.dtype).reshape(weight.shape)
    if kind < 0.25:
        return torch.zeros_like(weight)
    if kind < 0.3:
        return torch.ones_like(weight)
    if kind < 0.4:
        return weight * 10 ** (6 * torch.randn_like(weight))  # elements of very different sizes
    return weight


def random_case(seed: int, masks: bool = True) -> Case:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    dtype = choose.choice([torch.float32, torch.float64])
    conv: dict[str, Any] | None = None
    kind = choose.choice(["linear", "conv", "conv", "transposed", "conv1d", "groups"])
    if kind == "linear":
        out, inner = choose.choice([(1, 1), (3, 7), (20, 20), (40, 5), (48, 60)])
        weight = torch.randn(out, inner, dtype=dtype)
    else:
        groups = choose.choice([1, 2, 3]) if kind == "groups" else 1
        inner, out = choose.choice([1, 2, 4]) * groups, choose.choice([1, 3, 5]) * groups
        kernel = [choose.choice([1, 2, 3, 4]), choose.choice([1, 2, 3, 5])]
        stride = [choose.choice([1, 1, 2, 3]) for _ in range(2)]
        padding = [choose.choice([0, 1, 2]) for _ in range(2)]
        dilation = [choose.choice([1, 1, 2]) for _ in range(2)]
        size = (choose.choice([7, 8, 11]), choose.choice([9, 10]))
        conv = dict(
            input_shape=(inner, *size), stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        shape: tuple[int, ...] = (out, inner // groups, *kernel)
        if kind == "conv1d":
            conv = dict(input_shape=(inner, 24), stride=stride[1], padding=padding[1], dilation=dilation[1])
            shape = (out, inner, kernel[1])
        if kind == "transposed":
            extra = choose.choice([0, 1]) if max(stride[0], dilation[0]) > 1 else 0
            conv |= dict(transposed=True, output_padding=(extra, 0))
            shape = (inner, out, *kernel)
        weight = torch.randn(shape, dtype=dtype)
    weight = _degenerate(choose, weight) * 10 ** choose.uniform(-20, 15)
    try:
        operator = operator_of(weight, conv)
    except ValueError:  # a kernel larger than the image
        return random_case(seed + 100_000, masks)
    batch = choose.choice([1, 3])
    rows = _mask(choose, batch, operator.output_shape, dtype) if masks else None
    columns = _mask(choose, batch, operator.input_shape, dtype) if masks else None
    if conv is not None and weight.dim() == 3:
        rows = None if rows is None else rows.squeeze(2)
        columns = None if columns is None else columns.squeeze(2)
    return Case(weight, conv, rows, columns)
