"""The cross-entropy loss as the last layer of a network, for loss fusion."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _fused(scores: Tensor, labels: Tensor) -> Tensor:
    differences = scores - torch.gather(scores, dim=-1, index=labels.unsqueeze(-1))
    return torch.exp(differences).sum(dim=-1, keepdim=True)


class CrossEntropyWrapper(nn.Module):
    """``forward(x, labels) -> [B, 1]``: ``sum_j exp(f_j - f_y)``, whose logarithm is the cross entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return _fused(self.model(x), labels)


class CrossEntropyWrapperMultiInput(nn.Module):
    """The same for networks of several inputs: ``forward(labels, *x)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, *x: Tensor) -> Tensor:
        return _fused(self.model(*x), labels)


class FusedLoss(nn.Module):
    """What is bounded in place of the wrappers: ``forward(one_hot, shift, *x)``.

    Labels come as one-hot rows ``[B, classes]``, whose products with the scores are bounded exactly, and
    the exponents are lowered by ``shift [B, 1]`` so that they do not overflow.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, one_hot: Tensor, shift: Tensor, *x: Tensor) -> Tensor:
        scores = self.model(*x)
        own = (scores * one_hot).sum(dim=-1, keepdim=True)
        return torch.exp(scores - own - shift).sum(dim=-1, keepdim=True)
