"""Helpers that auto_LiRPA's examples import."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("auto_LiRPA")
if not logger.handlers:
    _handler = logging.StreamHandler(sys.stdout)
    _handler.setFormatter(logging.Formatter("%(levelname)-8s %(asctime)-12s %(message)s", "%H:%M:%S"))
    logger.addHandler(_handler)
    logger.propagate = False
    logger.setLevel(logging.DEBUG if os.environ.get("AUTOLIRPA_DEBUG") else logging.INFO)

user_data_dir = os.path.join(
    os.environ.get("XDG_DATA_HOME", os.path.expanduser("~/.local/share")), "auto_LiRPA"
)


class MultiAverageMeter:
    """Running averages of several metrics."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sum_meter: dict[str, float] = defaultdict(float)
        self.lasts: dict[str, float] = defaultdict(float)
        self.counts_meter: dict[str, int] = defaultdict(int)
        self.batch_size = 1

    def set_batch_size(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def update(self, key: str, val: Any, n: int | None = None) -> None:
        """Adds a value that is the average of ``n`` samples; None is left out."""
        if val is None:
            return
        value = val.item() if isinstance(val, Tensor) else val
        count = self.batch_size if n is None else n
        self.lasts[key] = value
        self.sum_meter[key] += value * count
        self.counts_meter[key] += count

    def last(self, key: str) -> float:
        return self.lasts[key]

    def avg(self, key: str) -> float:
        count = self.counts_meter[key]
        return self.sum_meter[key] / count if count else 0.0

    def __repr__(self) -> str:
        return " ".join(f"{key}={self.avg(key):.4f}" for key in self.sum_meter)


class MultiTimer:
    """Seconds spent in each of several named parts."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.timer_starts: dict[str, float] = {}
        self.timer_total: dict[str, float] = defaultdict(float)

    def start(self, key: str) -> None:
        if key in self.timer_starts:
            raise RuntimeError(f"MultiTimer: {key!r} has been started already")
        self.timer_starts[key] = time.time()

    def stop(self, key: str) -> None:
        if key not in self.timer_starts:
            raise RuntimeError(f"MultiTimer: {key!r} has not been started")
        self.timer_total[key] += time.time() - self.timer_starts.pop(key)

    def total(self, key: str) -> float:
        return self.timer_total[key]

    def __repr__(self) -> str:
        return " ".join(f"{key}_time={total:.3f}" for key, total in self.timer_total.items())


class Flatten(nn.Flatten):
    """``nn.Flatten`` under its older name."""


class Unflatten(nn.Module):
    """``[B, n]`` to ``[B, C, wh, wh]``."""

    def __init__(self, wh: int) -> None:
        super().__init__()
        self.wh = wh

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1, self.wh, self.wh)


class Max(nn.Module):
    """Elementwise maximum of two values."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.max(x, y)


class Min(nn.Module):
    """Elementwise minimum of two values."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.min(x, y)


def scale_gradients(
    optimizer: torch.optim.Optimizer, gradient_accumulation_steps: int, grad_clip: float | None = None
) -> Tensor | None:
    """Divides gradients by the number of accumulated steps, and clips their norm."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    for value in parameters:
        if value.grad is not None:
            value.grad.div_(gradient_accumulation_steps)
    return None if grad_clip is None else torch.nn.utils.clip_grad_norm_(parameters, grad_clip)


def unpack_inputs(inputs: Any, device: Any = None) -> list[Any]:
    """Nested tuples, lists and dictionaries of inputs as one list, in order."""
    if isinstance(inputs, dict):
        inputs = list(inputs.values())
    if isinstance(inputs, (tuple, list)):
        return [item for value in inputs for item in unpack_inputs(value, device)]
    return [inputs if device is None else inputs.to(device)]


def isnan(x: Tensor) -> Tensor:
    """Whether any element is not a number."""
    return torch.isnan(x).any()


def prod(x: Any) -> Any:
    """The product of numbers, 1 for none."""
    return math.prod(x)


def get_spec_matrix(X: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Rows ``f_y - f_j`` for every other class: ``[B, num_classes - 1, num_classes]``, in X's dtype."""
    eye = torch.eye(num_classes, dtype=X.dtype, device=X.device)
    others = torch.arange(num_classes, device=y.device).unsqueeze(0) != y.unsqueeze(1)
    rows = eye[y.to(X.device)].unsqueeze(1) - eye.unsqueeze(0)
    return rows[others.to(X.device)].view(y.shape[0], num_classes - 1, num_classes)


def transfer(tensor: Any, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> Any:
    """A tensor elsewhere or in another dtype."""
    return None if tensor is None else tensor.to(device=device, dtype=dtype, non_blocking=non_blocking)


def sync_params(model_ori: nn.Module, model: Any, loss_fusion: bool = False) -> dict[str, Tensor]:
    """Writes a bounded module's parameters into a network; returns that network's state."""
    state = model_ori.state_dict()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        own = name.removeprefix("model.") if loss_fusion else name
        if own in state:
            state[own] = value.detach()
    model_ori.load_state_dict(state)
    return state


def reduction_sum(x: Tensor) -> Tensor:
    return x.sum(dim=tuple(range(1, x.dim())), keepdim=True)


def reduction_mean(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(1, x.dim())), keepdim=True)


def reduction_max(x: Tensor) -> Tensor:
    return x.amax(dim=tuple(range(1, x.dim())), keepdim=True)


def reduction_min(x: Tensor) -> Tensor:
    return x.amin(dim=tuple(range(1, x.dim())), keepdim=True)


_REDUCTIONS = {"sum": reduction_sum, "mean": reduction_mean, "max": reduction_max, "min": reduction_min}


def reduction_str2func(reduction_func: Any) -> Callable[[Tensor], Tensor]:
    """A reduction by its name; functions pass."""
    if isinstance(reduction_func, str):
        if reduction_func not in _REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction_func!r}; known are {', '.join(_REDUCTIONS)}")
        return _REDUCTIONS[reduction_func]
    return reduction_func


def stop_criterion_min(threshold: Any = 0) -> Callable[[Tensor], Tensor]:
    """Every row is above the threshold."""
    return lambda x: x.min(1, keepdim=True).values > threshold


def stop_criterion_all(threshold: Any = 0) -> Callable[[Tensor], Tensor]:
    """Every row is above its threshold."""
    return lambda x: (x > threshold).all(dim=1, keepdim=True)


def stop_criterion_max(threshold: Any = 0) -> Callable[[Tensor], Tensor]:
    """Some row is above the threshold."""
    return lambda x: x.max(1, keepdim=True).values > threshold


def stop_criterion_batch(threshold: Any = 0) -> Callable[[Tensor], Tensor]:
    """Row by row."""
    return lambda x: x > threshold


def stop_criterion_batch_any(threshold: Any = 0) -> Callable[[Tensor], Tensor]:
    """Some row is above its threshold."""
    return lambda x: (x > threshold).any(dim=1)


def multi_spec_keep_func_all(x: Tensor) -> Tensor:
    """Whether all rows hold."""
    return torch.all(x, dim=-1)


__all__ = [name for name in dir() if not name.startswith("_") and name != "annotations"]
