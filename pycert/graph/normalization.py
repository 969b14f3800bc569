"""Lowering of batch normalisation and dropout, and of modules that are lowered as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycert.graph import names
from pycert.graph.attention import multi_head
from pycert.graph.elementwise import activation, add, div, mul, sub
from pycert.graph.tracer import GENERIC, Traced, Tracer, lowers

_BATCH_NORM_FORWARD = nn.modules.batchnorm._BatchNorm.forward


def module_lowering(tracer: Tracer, module: nn.Module) -> Callable[..., Any] | None:
    """The lowering of a module that is lowered as a whole, not by the functions in its forward."""
    registered = names.registered_activation(module)
    if registered is not None:
        return functools.partial(_custom, tracer, registered)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).forward is _BATCH_NORM_FORWARD:
        return functools.partial(_batch_norm_module, tracer, module)
    if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
        return functools.partial(multi_head, tracer, module)
    return None


def _custom(tracer: Tracer, name: str, input: Traced) -> Traced:
    return activation(tracer, "custom", input, name=name)


def _batch_norm_module(tracer: Tracer, module: Any, input: Traced) -> Traced:
    """BatchNorm as one node: whether it normalises with the batch is asked at each call."""
    if not isinstance(input, Traced):
        tracer.refuse("BatchNorm of a constant", "apply it to values of the network")
    module._check_input_dim(input)
    if module.running_mean is None:
        tracer.refuse(
            "track_running_stats=False", "use track_running_stats=True: bounds need fixed statistics"
        )
    node = tracer.node(input)
    shape = tracer.shape(node)
    if not shape or shape[0] != module.num_features:
        found = shape[0] if shape else "no"
        raise ValueError(f"{tracer.path}: BatchNorm of {module.num_features} channels got {found}")
    params = tuple(
        -1 if getattr(module, name) is None else tracer.slot(getattr(module, name))
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    if module not in tracer.batch_norms:
        tracer.batch_norms.append(module)
    number = tracer.batch_norms.index(module)
    result = tracer.emit("batch_norm", (node,), shape, params, eps=float(module.eps), module=number)
    return tracer.wrap(result, input.dtype)


@lowers("batch_norm", table=GENERIC)
def batch_norm(tracer: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """F.batch_norm and torch.batch_norm, which take their arguments in different orders."""
    return (functional if func is F.batch_norm else _native)(tracer, *args, **kwargs)


def _native(tracer: Tracer, input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool,
            momentum: float, eps: float, cudnn_enabled: bool) -> Traced:  # fmt: skip
    return functional(tracer, input, running_mean, running_var, weight, bias, training, momentum, eps)


def functional(
    tracer: Tracer,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Traced:
    """Running statistics only, written out as products and sums with live tensors."""
    if training or running_mean is None or running_var is None:
        tracer.refuse(
            "batch_norm with the statistics of the batch", "use the module BatchNorm1d or BatchNorm2d"
        )
    tracer.needs_eval()
    shape = (-1, *[1] * (input.dim() - 2))

    def of_channels(value: Tensor) -> Tensor:
        return tracer.compute(torch.Tensor.reshape, value, shape)

    deviation = tracer.compute(torch.sqrt, tracer.compute(torch.add, running_var, eps))
    result = sub(tracer, input, of_channels(running_mean))
    result = div(tracer, result, of_channels(deviation))
    if weight is not None:
        result = mul(tracer, result, of_channels(weight))
    return result if bias is None else add(tracer, result, of_channels(bias))


@lowers(*names.DROPOUT)
def dropout(
    tracer: Tracer, input: Traced, p: float = 0.5, training: bool = True, train: bool = True
) -> Traced:
    """Nothing in evaluation mode; refused where it would be random."""
    if float(p) == 0.0:
        return input
    if training and train:
        tracer.refuse("dropout in training mode", "bounds of a random network mean nothing; call .eval()")
    tracer.needs_eval()
    return input
