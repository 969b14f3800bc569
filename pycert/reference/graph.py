"""Plain PyTorch execution of a traced network: what every bound is judged against.

Each operator of :mod:`pycert.graph.ir` is run as PyTorch runs it, one node after the other, in
any floating dtype and differentiably. Nothing is fused, folded or reordered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pycert.activations import activation
from pycert.graph.ir import Graph, Node

#: Batch mean and biased batch variance ``[C]`` of every ``batch_norm`` node in training mode.
Statistics = Mapping[int, tuple[Tensor, Tensor]]


def evaluate(
    graph: Graph,
    *inputs: Tensor,
    until: int | None = None,
    dtype: torch.dtype | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """The network's output, or the value of node ``until``.

    Args:
        graph: a traced network.
        inputs: one tensor ``[B, *shape]`` for every argument of the network.
        until: number of the node whose value is wanted; the output by default.
        dtype: the dtype to compute in, that of the inputs by default; parameters are cast to it.
        statistics: see :func:`values`.

    Returns:
        ``[B, *graph.nodes[until].shape]``.

    Raises:
        ValueError: the number of inputs, or the shape of one, does not fit the network.

    Soundness: none, rounds to nearest.
    """
    target = graph.output if until is None else until
    return values(graph, *inputs, until=target, dtype=dtype, statistics=statistics)[target]


def values(
    graph: Graph,
    *inputs: Tensor,
    until: int | None = None,
    dtype: torch.dtype | None = None,
    statistics: Statistics | None = None,
) -> list[Tensor]:
    """The values ``[B, *shape]`` of all nodes, or of the nodes up to and including ``until``.

    A ``batch_norm`` whose module is in training mode normalises with ``statistics[node]`` where
    given, else with the mean and the biased variance of this batch. Running statistics are
    never written. Arguments and errors as in :func:`evaluate`.
    """
    given = _checked(graph, inputs, dtype)
    slots = [slot.to(given[0].dtype) for slot in graph.tensors()]
    results: list[Tensor] = []
    for number, node in enumerate(graph.nodes[: None if until is None else until + 1]):
        if node.op == "input":
            result = given[node.attrs["index"]]
        elif node.op == "constant":
            value = slots[node.params[0]].reshape(node.shape)
            result = value.expand(given[0].shape[0], *node.shape)
        elif node.op == "batch_norm":
            clean = None if statistics is None else statistics.get(number)
            result = batch_norm(graph, node, slots, results[node.inputs[0]], clean)
        else:
            result = apply(node, slots, *(results[i] for i in node.inputs))
        results.append(result)
    return results


def clean_statistics(
    graph: Graph, *inputs: Tensor, dtype: torch.dtype | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean and biased variance ``[C]`` over the batch at every ``batch_norm`` in training mode.

    These are the statistics of the clean (unperturbed) batch ``inputs``, with gradient, that
    certified training normalises all of a region with. Nodes in evaluation mode are left out.
    """
    results = values(graph, *inputs, dtype=dtype)
    return {
        number: batch_statistics(results[node.inputs[0]])
        for number, node in enumerate(graph.nodes)
        if node.op == "batch_norm" and uses_batch_statistics(graph, node)
    }


def uses_batch_statistics(graph: Graph, node: Node) -> bool:
    """Whether this ``batch_norm`` normalises with the batch: in training, or without running statistics."""
    module = graph.batch_norms[node.attrs["module"]]
    return module.training or module.running_mean is None


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[C]`` of ``[B, C, ...]`` over all other dimensions."""
    dims = [0, *range(2, x.dim())]
    return x.mean(dims), x.var(dims, correction=0)


def parameter(node: Node, slots: list[Tensor], position: int) -> Tensor | None:
    """The node's parameter at ``position`` (see the table of :mod:`pycert.graph.ir`), or None."""
    if position >= len(node.params) or node.params[position] < 0:
        return None
    return slots[node.params[position]]


def apply(node: Node, slots: list[Tensor], *x: Tensor) -> Tensor:
    """One operator, other than ``input``, ``constant`` and ``batch_norm``, on values ``[B, *shape]``."""
    return _OPERATORS[node.op](node, slots, *x)


def _checked(graph: Graph, inputs: tuple[Tensor, ...], dtype: torch.dtype | None) -> list[Tensor]:
    if len(inputs) != len(graph.inputs):
        raise ValueError(f"evaluate: the network has {len(graph.inputs)} inputs, got {len(inputs)}")
    for index, (x, shape) in enumerate(zip(inputs, graph.inputs)):
        if tuple(x.shape[1:]) != tuple(shape):
            raise ValueError(f"evaluate: input {index} must be [B, {shape}], got {list(x.shape)}")
    return [x if dtype is None else x.to(dtype) for x in inputs]


def constant(node: Node, slots: list[Tensor]) -> Tensor | float:
    """The factor, divisor or term of a ``*_const`` node, broadcastable against ``[B, *shape]``."""
    value = parameter(node, slots, 0)
    return node.attrs["value"] if value is None else value


def batch_norm(
    graph: Graph, node: Node, slots: list[Tensor], x: Tensor, given: tuple[Tensor, Tensor] | None
) -> Tensor:
    """A ``batch_norm`` node on ``x``, in training mode with the statistics ``given`` or those of ``x``."""
    weight, bias, mean, var = (parameter(node, slots, i) for i in range(4))
    if uses_batch_statistics(graph, node):
        mean, var = batch_statistics(x) if given is None else given
    assert mean is not None and var is not None
    shape = (-1, *[1] * (x.dim() - 2))
    value = (x - mean.reshape(shape)) / (var + node.attrs["eps"]).sqrt().reshape(shape)
    if weight is not None:
        value = value * weight.reshape(shape)
    return value if bias is None else value + bias.reshape(shape)


def conv_weight(weight: Tensor) -> Tensor:
    """A convolution's weight in four dimensions: ``[O, I, k]`` counts as ``[O, I, 1, k]``."""
    return weight.unsqueeze(2) if weight.dim() == 3 else weight


def _conv(node: Node, slots: list[Tensor], x: Tensor) -> Tensor:
    at = node.attrs
    weight = parameter(node, slots, 0)
    assert weight is not None
    weight, bias = conv_weight(weight), parameter(node, slots, 1)
    stride, padding, dilation = tuple(at["stride"]), tuple(at["padding"]), tuple(at["dilation"])
    if at["transposed"]:
        extra = tuple(at["output_padding"])
        return F.conv_transpose2d(x, weight, bias, stride, padding, extra, at["groups"], dilation)
    return F.conv2d(x, weight, bias, stride, padding, dilation, at["groups"])


def _avg_pool(node: Node, slots: list[Tensor], x: Tensor) -> Tensor:
    at = node.attrs
    shape = (tuple(at["kernel"]), tuple(at["stride"]), tuple(at["padding"]))
    return F.avg_pool2d(x, *shape, at["ceil_mode"], at["count_include_pad"], at["divisor"] or None)


def _max_pool(node: Node, slots: list[Tensor], x: Tensor) -> Tensor:
    at = node.attrs
    kernel, stride, padding, dilation = (
        tuple(at[name]) for name in ("kernel", "stride", "padding", "dilation")
    )
    return F.max_pool2d(x, kernel, stride, padding, dilation, at["ceil_mode"])


def _gather(node: Node, slots: list[Tensor], x: Tensor) -> Tensor:
    index = node.attrs["index"].reshape(-1)
    flat = x.reshape(len(x), -1)
    picked = flat[:, index.clamp(min=0)] if flat.shape[1] else x.new_zeros(len(x), len(index))
    picked = torch.where(index < 0, torch.full_like(picked, node.attrs.get("fill", 0.0)), picked)
    return picked.reshape(len(x), *node.shape)


def _prelu(node: Node, slots: list[Tensor], x: Tensor) -> Tensor:
    slope = parameter(node, slots, 0)
    assert slope is not None
    if slope.numel() > 1:
        slope = slope.reshape(-1, *[1] * (len(node.shape) - 1))
    return torch.where(x >= 0, x, slope * x)


def _linear(node: Node, slots: list[Tensor], x: Tensor) -> Tensor:
    weight = parameter(node, slots, 0)
    assert weight is not None
    return F.linear(x, weight, parameter(node, slots, 1))


def _custom(node: Node, slots: list[Tensor], x: Tensor) -> Tensor:
    return activation(node.attrs["name"]).f(x)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    "conv": _conv,
    "mul_const": lambda node, slots, x: x * constant(node, slots),
    "div_const": lambda node, slots, x: x / constant(node, slots),
    "add_const": lambda node, slots, x: x + node.attrs.get("sign", 1) * constant(node, slots),
    "add": lambda node, slots, a, b: a + b if node.attrs.get("sign", 1) > 0 else a - b,
    "sum": lambda node, slots, x: x.sum(-1) / node.attrs["divisor"],
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "max2": lambda node, slots, a, b, d: torch.maximum(a, b),
    "min2": lambda node, slots, a, b, d: torch.minimum(a, b),
    "product": lambda node, slots, a, b: a * b,
    "matmul": lambda node, slots, a, b: a @ b,
    "limit": lambda node, slots, x, *others: x,
    "reshape": lambda node, slots, x: x.reshape(len(x), *node.shape),
    "gather": _gather,
    "concat": lambda node, slots, *x: torch.cat([v.reshape(len(v), -1) for v in x], 1).reshape(
        len(x[0]), *node.shape
    ),
    "relu": lambda node, slots, x: x.relu(),
    "abs": lambda node, slots, x: x.abs(),
    "sigmoid": lambda node, slots, x: x.sigmoid(),
    "tanh": lambda node, slots, x: x.tanh(),
    "leaky_relu": lambda node, slots, x: F.leaky_relu(x, node.attrs["slope"]),
    "prelu": _prelu,
    "clamp": lambda node, slots, x: x.clamp(node.attrs["min"], node.attrs["max"]),
    "elu": lambda node, slots, x: F.elu(x, node.attrs["alpha"]),
    "softplus": lambda node, slots, x: F.softplus(x, 1.0, node.attrs["threshold"]),
    "silu": lambda node, slots, x: F.silu(x),
    "mish": lambda node, slots, x: F.mish(x),
    "gelu": lambda node, slots, x: F.gelu(x),
    "gelu_tanh": lambda node, slots, x: F.gelu(x, approximate="tanh"),
    "hardswish": lambda node, slots, x: F.hardswish(x),
    "softsign": lambda node, slots, x: F.softsign(x),
    "exp": lambda node, slots, x: x.exp(),
    "log": lambda node, slots, x: x.log(),
    "sqrt": lambda node, slots, x: x.sqrt(),
    "reciprocal": lambda node, slots, x: x.reciprocal(),
    "square": lambda node, slots, x: x.square(),
    "sin": lambda node, slots, x: x.sin(),
    "cos": lambda node, slots, x: x.cos(),
    "custom": _custom,
}
