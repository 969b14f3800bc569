"""What bounds are judged with: float64 values with their error, and float32 executions in any order."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nets import box_of
from pycert.graph.ir import ACTIVATIONS, AFFINE, BILINEAR, Graph, Node
from pycert.reference import curves
from pycert.reference import graph as execution
from pycert.reference.bounds import Interval, Walk

ROUNDOFF = 2.0**-53


class Judge:
    """Real-arithmetic values of a network over a region, as float64 values with a rigorous error.

    ``error[n]`` bounds, for every point of the region, the distance between the float64 value of
    node ``n`` and its real value: a running error analysis with the float64 interval bounds as
    magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3), charged generously.
    It is 2^-29 of what float32 bounds are charged, so that it hides no missing term.
    """

    def __init__(self, graph: Graph, where) -> None:
        self.graph = graph
        self.error: list[Tensor] = []
        with torch.no_grad():
            self.walk = Walk(graph, Interval(*box_of(where)), "ibp", "adaptive", False, torch.float64)
            for number in range(graph.output + 1):
                self.error.append(self._error(number))

    def _error(self, number: int) -> Tensor:
        node, walk = self.graph.nodes[number], self.walk
        magnitude = [walk.bounds[i].lower.abs().maximum(walk.bounds[i].upper.abs()) for i in node.inputs]
        errors = [self.error[i] for i in node.inputs]
        if node.op in ("input", "constant"):
            found = walk.bounds[number]
            return 8 * ROUNDOFF * found.lower.abs().maximum(found.upper.abs())
        if node.op in AFFINE:
            zeros = (torch.zeros_like(m) for m in magnitude)
            terms = walk._absolute(number, *magnitude) + walk._affine(number, *zeros).abs()
            if node.op == "batch_norm":  # (x - mean) and the scale cancel; charge their parts
                terms = terms + self._batch_norm_terms(number, magnitude[0])
            count = sum(self.graph.numel(i) for i in node.inputs) + 32
            return walk._absolute(number, *errors) + 2 * count * ROUNDOFF * terms
        if node.op in ACTIVATIONS:
            steepest = 1.0
            if node.op == "leaky_relu":
                steepest = max(1.0, abs(node.attrs["slope"]))
            if node.op == "prelu":
                steepest = max(1.0, float(walk.slots[node.params[0]].detach().abs().max()))
            if node.op in curves.DERIVATIVES:
                return self._curved_error(node, walk.bounds[node.inputs[0]], errors[0])
            if node.op == "custom":  # SiLU is the only one in nets.py
                return 1.1 * errors[0] + 32 * ROUNDOFF * (1 + magnitude[0])
            return steepest * errors[0] + 32 * ROUNDOFF * (1 + magnitude[0].minimum(torch.ones(())))
        if node.op == "max_pool":
            return execution.apply(node, walk.slots, errors[0])
        if node.op in BILINEAR:
            (x, y), (dx, dy) = magnitude, errors
            product = {"product": torch.mul, "matmul": torch.matmul}[node.op]
            terms = self.graph.nodes[node.inputs[0]].shape[-1] if node.op == "matmul" else 1
            grown = product(dx, y + dy) + product(x, dy)
            return torch.nan_to_num(grown, nan=math.inf) + 2 * (terms + 8) * ROUNDOFF * product(x, y)
        if node.op == "limit":
            return errors[0]
        return errors[0].maximum(errors[1])

    def _curved_error(self, node: Node, box: Interval, error: Tensor) -> Tensor:
        """|f'| is greatest at an end, or at most 1.2 where it is not monotone; it may grow by the error itself."""
        ends = torch.stack([box.lower - error, box.upper + error])
        slopes = curves.DERIVATIVES[node.op](ends, node.attrs).abs().nan_to_num(nan=math.inf)
        values = curves.FUNCTIONS[node.op](ends, node.attrs).abs().nan_to_num(nan=math.inf)
        steepest = slopes.amax(0).clamp(min=1.2)
        jump = 0.0
        if node.op == "softplus":  # which side of the jump a value lies on is within its error
            threshold = torch.tensor(node.attrs["threshold"], dtype=torch.float64)
            near = (ends[0] <= threshold) & (ends[1] >= threshold) & (error > 0)
            jump = near * torch.log1p(torch.exp(-threshold))
        product = torch.where(error > 0, steepest * error, 0.0)
        return product + jump + 64 * ROUNDOFF * (1 + values.amax(0))

    def _batch_norm_terms(self, number: int, magnitude: Tensor) -> Tensor:
        node = self.graph.nodes[number]
        parameters = [execution.parameter(node, self.walk.slots, i) for i in range(4)]
        mean, var = self.walk.statistics.get(number, parameters[2:])
        scale = (torch.ones_like(mean) if parameters[0] is None else parameters[0]).abs()
        scale = scale / (var + node.attrs["eps"]).sqrt()
        shape = (-1, *[1] * (magnitude.dim() - 2))
        return (scale * mean.abs()).reshape(shape) + scale.reshape(shape) * magnitude

    def value(self, x: Tensor) -> Tensor:
        """Float64 outputs ``[B, *out]`` at ``x [B, *in]``, differentiable."""
        return execution.evaluate(self.graph, x, dtype=torch.float64, statistics=self.walk.statistics)

    def values(self, points: Tensor) -> Tensor:
        """Float64 outputs ``[count, B, *out]`` at ``points [count, B, *in]``."""
        with torch.no_grad():
            return torch.stack([self.value(x) for x in points])

    @property
    def margin(self) -> Tensor:
        """Error of the float64 outputs, ``[B, *out]``."""
        return self.error[self.graph.output].detach()

    def spec_margin(self, spec: Tensor) -> Tensor:
        """Error of ``spec @ output`` in float64, ``[B, S]``."""
        found = self.walk.bounds[self.graph.output]
        magnitude = found.lower.abs().maximum(found.upper.abs()).flatten(1).detach()
        each = self.margin.flatten(1) + 4 * (magnitude.shape[1] + 4) * ROUNDOFF * magnitude
        return (spec.double().abs() @ each[..., None]).squeeze(-1)


ORDERS = ("forward", "backward", "shuffled", "rising", "falling", "positive first", "fused", "folded")


def ordered_sums(products: np.ndarray, order: str, seed: int = 0) -> np.ndarray:
    """Sums over the last axis, one float32 addition after the other, in the order named."""
    count = products.shape[-1]
    if order == "backward":
        products = products[..., ::-1]
    elif order == "shuffled":
        products = products[..., np.random.default_rng(seed).permutation(count)]
    elif order in ("rising", "falling", "positive first"):
        key = -products if order == "positive first" else np.abs(products)
        index = np.argsort(key, axis=-1, kind="stable")
        products = np.take_along_axis(products, index[..., ::-1] if order == "falling" else index, axis=-1)
    return np.add.accumulate(products, axis=-1, dtype=np.float32)[..., -1]


def ordered_product(weight: np.ndarray, x: np.ndarray, bias: np.ndarray | None, order: str) -> np.ndarray:
    """``x [B, in] @ weight.T + bias`` in float32: every product formed once, summed in ``order``."""
    if order == "fused":  # float64 holds a float32 product exactly; one rounding per multiply-add
        total = np.zeros((len(x), len(weight)), np.float32)
        if bias is not None:
            total = total + bias
        for column in range(weight.shape[1]):
            exact = x[:, column, None].astype(np.float64) * weight[:, column].astype(np.float64)
            total = (total.astype(np.float64) + exact).astype(np.float32)
        return total
    products = (x[:, None, :] * weight[None]).astype(np.float32)
    if bias is not None:
        terms = np.broadcast_to(bias[None, :, None], (*products.shape[:2], 1))
        ends = (terms, products) if order in ("forward", "rising") else (products, terms)
        products = np.concatenate(ends, axis=-1).astype(np.float32)
    return ordered_sums(products, order)


class Executor:
    """Runs a network in float32 with the sums of its linear and conv nodes in a chosen order."""

    def __init__(self, graph: Graph, walk: Walk) -> None:
        self.graph = graph
        self.slots = [slot.detach().float() for slot in graph.tensors()]
        # Entries of these matrices are single weights, so float32 holds them exactly.
        self.matrices = {
            number: walk.matrices(number)[0].detach().float().numpy()
            for number, node in enumerate(graph.nodes[: graph.output + 1])
            if node.op in ("linear", "conv")
        }
        readers = [i for node in graph.nodes for i in node.inputs]
        self.folded = {  # linear or conv node -> the batch_norm that alone reads it
            node.inputs[0]: number
            for number, node in enumerate(graph.nodes[: graph.output + 1])
            if node.op == "batch_norm"
            and node.inputs[0] in self.matrices
            and readers.count(node.inputs[0]) == 1
        }

    def run(self, x: Tensor, order: str) -> Tensor:
        """Outputs ``[B, *out]`` at ``x [B, *in]``."""
        results: list[Tensor] = []
        for number, node in enumerate(self.graph.nodes[: self.graph.output + 1]):
            inputs = [results[i] for i in node.inputs]
            if node.op == "input":
                results.append(x)
            elif node.op == "constant":
                value = self.slots[node.params[0]].reshape(node.shape)
                results.append(value.expand(len(x), *node.shape))
            elif number in self.matrices:
                results.append(self._product(number, inputs[0], order))
            elif node.op == "matmul":
                left, right = (part.numpy() for part in inputs)
                products = left[..., :, None, :] * np.swapaxes(right, -1, -2)[..., None, :, :]
                results.append(
                    torch.from_numpy(ordered_sums(products, "forward" if order == "fused" else order))
                )
            elif order == "folded" and number in self.folded.values():
                results.append(inputs[0])
            elif node.op == "batch_norm":
                results.append(_batch_norm(node, self.slots, inputs[0], order))
            else:
                results.append(execution.apply(node, self.slots, *inputs))
        return results[self.graph.output]

    def _product(self, number: int, x: Tensor, order: str) -> Tensor:
        node = self.graph.nodes[number]
        bias = execution.parameter(node, self.slots, 1)
        if bias is not None:
            each = bias.reshape(-1, *[1] * (len(node.shape) - 1)) if node.op == "conv" else bias
            bias = each.expand(node.shape).flatten().numpy()
        matrix = self.matrices[number]
        if order == "folded" and number in self.folded:
            scale, shift = (t.numpy() for t in self._fold(self.folded[number]))
            matrix = matrix * scale[:, None]
            bias = shift if bias is None else bias * scale + shift
        value = ordered_product(matrix, x.flatten(1).numpy(), bias, order)
        return torch.from_numpy(value).reshape(-1, *node.shape)

    def _fold(self, number: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of a batch_norm for every element of its value."""
        node = self.graph.nodes[number]
        zero = torch.zeros(1, *node.shape)
        shift = _batch_norm(node, self.slots, zero, "forward")
        weight, _, _, var = (execution.parameter(node, self.slots, i) for i in range(4))
        scale = 1 / (var + node.attrs["eps"]).sqrt() * (1 if weight is None else weight)
        each = scale.reshape(-1, *[1] * (len(node.shape) - 1)).expand(node.shape)
        return each.flatten(), shift.flatten()


def _batch_norm(node: Node, slots: list[Tensor], x: Tensor, order: str) -> Tensor:
    """Evaluation mode, as one scale and shift in some orders and step by step in the others."""
    weight, bias, mean, var = (execution.parameter(node, slots, i) for i in range(4))
    shape = (-1, *[1] * (x.dim() - 2))
    scale = 1 / (var + node.attrs["eps"]).sqrt()
    weight = torch.ones_like(scale) if weight is None else weight
    bias = torch.zeros_like(scale) if bias is None else bias
    if order in ("forward", "shuffled", "falling"):
        scale = scale * weight
        return x * scale.reshape(shape) + (bias - mean * scale).reshape(shape)
    return (x - mean.reshape(shape)) * scale.reshape(shape) * weight.reshape(shape) + bias.reshape(shape)


def deployed_runs(module: nn.Module, executor: Executor, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Float32 executions of the network on ``x [B, *in]``, named."""
    with torch.no_grad():
        yield "as it is", module(x)
        yield "one by one", torch.cat([module(row[None]) for row in x])
        yield "batch of 64", module(x.repeat(64 // len(x) + 1, *[1] * (x.dim() - 1)))[: len(x)]
        if x.dim() == 4:
            yield "channels last", module(x.contiguous(memory_format=torch.channels_last))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3 - min(threads, 2))
            yield "other thread count", module(x)
        finally:
            torch.set_num_threads(threads)
        for order in ORDERS:
            yield order, executor.run(x, order)
