"""Linear bounds of max pooling in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pycert.graph.ir import Node


def windows(node: Node, shape: tuple[int, ...]) -> Tensor:
    """``[numel(node), taps]``: flat input indices of every window, -1 for padding."""
    at = node.attrs
    (kernel_h, kernel_w), (pad_h, pad_w) = at["kernel"], at["padding"]
    channels, height, width = shape
    _, out_h, out_w = node.shape
    rows = _positions(out_h, kernel_h, at["stride"][0], pad_h, at["dilation"][0])
    columns = _positions(out_w, kernel_w, at["stride"][1], pad_w, at["dilation"][1])
    row, column = rows[:, None, :, None], columns[None, :, None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    plane = torch.where(inside, row * width + column, -1).reshape(out_h * out_w, -1)
    offset = torch.arange(channels)[:, None, None] * height * width
    return torch.where(plane < 0, -1, plane + offset).reshape(math.prod(node.shape), -1)


def _positions(count: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    return torch.arange(count)[:, None] * stride - padding + torch.arange(kernel) * dilation


def max_pool_lines(node: Node, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear bounds of max pooling over the box ``[lower, upper]``, each ``[B, C, H, W]``.

    Lower: ``x_j`` with the greatest lower end. Upper: ``x_j`` where it dominates its window; else
    the one with the smaller value at the box's centre of the constant ``max(upper)`` and
    ``L + sum_i relu(x_i - L)``, ``L = max(lower)``, every ReLU under its chord.

    Returns:
        ``(A_lower, c_lower, A_upper, c_upper)``: matrices ``[B, numel(node), C*H*W]``, constants
        ``[B, numel(node)]``.
    """
    index = windows(node, tuple(lower.shape[1:]))
    absent, picked = index < 0, index.clamp(min=0)
    low = lower.flatten(1)[:, picked].masked_fill(absent, -math.inf)  # [B, out, taps]
    high = upper.flatten(1)[:, picked].masked_fill(absent, -math.inf)
    floor, first = low.max(-1, keepdim=True)
    chosen = F.one_hot(first.squeeze(-1), index.shape[1]).to(lower)
    dominates = floor >= high.masked_fill(chosen > 0, -math.inf).amax(-1, keepdim=True)

    live = (high > floor) & (chosen == 0)
    width = torch.where(live, high - low, torch.ones_like(low))
    slopes = torch.where(live, (high - floor) / width, chosen)
    # The chosen operand is at least L: its ReLU is x_j - L itself and cancels L.
    start = torch.where(live, low, torch.zeros_like(low))
    constant = -(slopes * start).sum(-1, keepdim=True)
    center = torch.where(absent, 0.0, low / 2 + high / 2)
    at_center = (slopes * center).sum(-1, keepdim=True) + constant
    flat = high.amax(-1, keepdim=True)
    use_flat = ~dominates & (flat <= at_center)
    upper_rows = torch.where(dominates, chosen, torch.where(use_flat, 0.0, slopes))
    upper_constant = torch.where(dominates, 0.0, torch.where(use_flat, flat, constant)).squeeze(-1)

    def scatter(rows: Tensor) -> Tensor:
        matrix = torch.zeros(*rows.shape[:2], lower[0].numel(), dtype=rows.dtype)
        return matrix.scatter_add(2, picked.expand_as(rows), rows.masked_fill(absent, 0.0))

    return scatter(chosen), torch.zeros_like(upper_constant), scatter(upper_rows), upper_constant
