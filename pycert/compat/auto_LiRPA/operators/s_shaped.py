"""Derivatives of tanh and the sigmoid as functions of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from pycert.compat.auto_LiRPA.operators import CLASSES

BoundSigmoid, BoundTanh = CLASSES["BoundSigmoid"], CLASSES["BoundTanh"]
BoundTanhGrad, BoundSigmoidGrad = CLASSES["BoundTanhGrad"], CLASSES["BoundSigmoidGrad"]


class TanhGradOp(Function):
    """``1 - tanh(x)^2``."""

    @staticmethod
    def symbolic(graph: Any, x: Any) -> Any:
        return graph.op("grad::Tanh", x).setType(x.type())

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 1 - torch.tanh(x) ** 2


class SigmoidGradOp(Function):
    """``s (1 - s)`` with ``s`` the sigmoid of x."""

    @staticmethod
    def symbolic(graph: Any, x: Any) -> Any:
        return graph.op("grad::Sigmoid", x).setType(x.type())

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # 1/4 - (s - 1/2)^2: one square of one value, where s (1 - s) would be a product of two
        return 0.25 - (torch.sigmoid(x) - 0.5) ** 2
