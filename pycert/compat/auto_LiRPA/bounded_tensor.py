"""Tensors that carry a perturbation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

#: Attributes of a perturbation that move with its tensor.
_MOVED = ("eps", "x_L", "x_U")


class BoundedTensor(Tensor):
    """An input together with the set of inputs it stands for.

    Args:
        x: the clean input ``[B, *in]``; memory is shared, and the result is a leaf.
        ptb: a perturbation, or None.

    What torch functions return are plain tensors; ``clone`` and ``to`` keep the perturbation.
    """

    ptb: Any

    @staticmethod
    def __new__(cls, x: Any, ptb: Any = None) -> BoundedTensor:
        value = x if isinstance(x, Tensor) else torch.as_tensor(x)
        return Tensor._make_subclass(cls, value.detach().as_subclass(Tensor), value.requires_grad)

    def __init__(self, x: Any, ptb: Any = None) -> None:
        self.ptb = ptb

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<BoundedTensor: {plain(self)!r}, {self.ptb!r}>"

    def clone(self, *args: Any, **kwargs: Any) -> BoundedTensor:
        """A copy with a copy of the perturbation."""
        return BoundedTensor(super().clone(*args, **kwargs), copy.deepcopy(self.ptb))

    def to(self, *args: Any, **kwargs: Any) -> BoundedTensor:
        """The tensor and its perturbation elsewhere, or in another dtype."""
        for name in _MOVED:
            value = getattr(self.ptb, name, None)
            if isinstance(value, Tensor):
                setattr(self.ptb, name, value.to(*args, **kwargs))
        return BoundedTensor(super().to(*args, **kwargs), self.ptb)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class BoundedParameter(nn.Parameter):
    """A parameter with a perturbation, for networks whose weights are perturbed.

    Accepted where a network is built; bounds over perturbed weights are refused by
    :class:`BoundedModule` with the name of the parameter.
    """

    ptb: Any

    @staticmethod
    def __new__(cls, data: Tensor, ptb: Any, requires_grad: bool = True) -> BoundedParameter:
        return Tensor._make_subclass(cls, data.detach().as_subclass(Tensor), requires_grad)

    def __init__(self, data: Tensor, ptb: Any, requires_grad: bool = True) -> None:
        self.ptb = ptb

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedParameter:
        if id(self) not in memo:
            memo[id(self)] = type(self)(self.data.clone(), self.ptb, self.requires_grad)
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"BoundedParameter containing:\n{self.data!r}\n{self.ptb!r}"


def plain(value: Tensor) -> Tensor:
    """The same tensor without a perturbation; gradients go through."""
    return value.as_subclass(Tensor) if isinstance(value, BoundedTensor) else value
