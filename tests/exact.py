"""Exact rational execution of a traced network, on points and on boxes, for small networks.

Weights, inputs and constants are the rational numbers that their floats are. What is not dyadic
(reciprocals, square roots, exponentials) is computed to 60 digits and rounded at 2^-200 relative, so that
values and boxes are exact to about 10^-50, far below any rounding of float64. All numbers then
have powers of two for denominators, and products run in integers over a common one.
"""

from __future__ import annotations

import decimal
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from pycert.graph.ir import Graph, Node
from pycert.reference import graph as execution
from pycert.reference.bounds import Interval, Walk
from pycert.reference.pooling import windows

decimal.getcontext().prec = 60


def rational(tensor: Tensor | float) -> np.ndarray:
    """The tensor's values as fractions, in an object array of the same shape."""
    values = torch.as_tensor(tensor, dtype=torch.float64).detach().numpy()
    return np.vectorize(Fraction, otypes=[object])(values)


def to_decimal(x: Fraction) -> decimal.Decimal:
    return decimal.Decimal(x.numerator) / decimal.Decimal(x.denominator)


def dyadic(x: Fraction) -> Fraction:
    """``x`` rounded at 2^-200 relative to a multiple of a power of two."""
    if x.denominator & (x.denominator - 1) == 0:
        return x
    shift = 200 + max(0, x.denominator.bit_length() - abs(x.numerator).bit_length())
    return Fraction(round(x * 2**shift), 2**shift)


def sigmoid(x: Fraction) -> Fraction:
    e = Fraction(to_decimal(-abs(x)).exp()) if abs(x) < 800 else Fraction(0)  # below every float64
    return dyadic((1 if x >= 0 else e) / (1 + e))


def tanh(x: Fraction) -> Fraction:
    return 2 * sigmoid(2 * x) - 1


def integers(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Dyadic values as integers over one denominator."""
    flat = values.ravel()
    denominator = max((v.denominator for v in flat), default=1)
    scaled = np.array([v.numerator * (denominator // v.denominator) for v in flat], dtype=object)
    return scaled.reshape(values.shape), denominator


def product(matrix: tuple[np.ndarray, int], vector: np.ndarray) -> np.ndarray:
    """``matrix @ vector`` of an integer matrix over its denominator and dyadic values."""
    scaled, denominator = integers(vector)
    denominator *= matrix[1]
    return np.array([Fraction(v, denominator) for v in matrix[0].dot(scaled)], dtype=object)


class ExactNetwork:
    """A network whose nodes are evaluated in rational arithmetic, one sample at a time."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        zero = torch.zeros(1, *graph.inputs[0], dtype=torch.float64)
        self.walk = Walk(graph, Interval(zero, zero), "ibp", "adaptive", False, torch.float64)
        self._known: dict[int, tuple[list, np.ndarray]] = {}

    def value(self, x: np.ndarray) -> list[np.ndarray]:
        """Values of all nodes, flat, at the rational point ``x`` (flat)."""
        return [low for low, _ in self.box(x, x)]

    def box(self, lower: np.ndarray, upper: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Exact interval propagation: the least box of every node given the boxes of its inputs, flat."""
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for number, node in enumerate(self.graph.nodes[: self.graph.output + 1]):
            if node.op == "input":
                found.append((lower, upper))
            elif node.op == "constant":
                value = rational(self.walk.bounds[number].lower.flatten())
                found.append((value, value))
            elif node.op in ("max_pool", "max2", "min2"):
                found.append(self._extremum(node, [found[i] for i in node.inputs]))
            elif node.op in ("product", "matmul"):
                found.append(self._product(node, [found[i] for i in node.inputs]))
            elif node.op in _ELEMENTWISE:
                low, high = found[node.inputs[0]]
                found.append(self._images(node, low, high))
            else:
                found.append(self._affine(number, node, [found[i] for i in node.inputs]))
        return found

    def _affine(self, number: int, node: Node, inputs):
        if number not in self._known:
            matrices, constant = self.affine(number, node)
            signed = [[integers(cut(m, Fraction(0))) for cut in (np.maximum, np.minimum)] for m in matrices]
            self._known[number] = signed, constant
        signed, constant = self._known[number]
        low = high = constant
        for (positive, negative), (below, above) in zip(signed, inputs):
            low = low + product(positive, below) + product(negative, above)
            if below is not above:
                high = high + product(positive, above) + product(negative, below)
        return low, (low if all(below is above for below, above in inputs) else high)

    def affine(self, number: int, node: Node) -> tuple[list[np.ndarray], np.ndarray]:
        """Exact matrices, one per input, and the constant of an affine node."""
        size = self.graph.numel(number)
        channel = np.arange(size) // max(1, size // node.shape[0]) if node.shape else np.zeros(1, int)
        constant = np.array([Fraction(0)] * size, dtype=object)
        if node.op in ("mul_const", "div_const", "batch_norm"):
            scale, constant = self._scale(node, size, channel)
            return [np.diag(scale)], constant
        matrices = [rational(matrix) for matrix in self.walk.matrices(number)]
        if node.op in ("avg_pool", "sum"):  # entries are 1 / count or 0
            divide = Fraction(node.attrs["divisor"]) if node.op == "sum" else None
            matrices = [_reciprocals(matrix, divide) for matrix in matrices]
        elif node.op == "gather":
            fill = Fraction(node.attrs.get("fill", 0.0))
            constant = np.where(node.attrs["index"].flatten().numpy() < 0, fill, constant)
        elif node.op == "add_const":
            constant = node.attrs.get("sign", 1) * self._constant(node)
        elif node.op == "linear" and self._parameter(node, 1) is not None:
            bias = self._parameter(node, 1)
            constant = bias[np.arange(size) % len(bias)]
        elif node.op == "conv" and self._parameter(node, 1) is not None:
            constant = self._parameter(node, 1)[channel]
        return matrices, constant

    def _scale(self, node: Node, size: int, channel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if node.op == "mul_const":
            return self._constant(node), np.array([Fraction(0)] * size, dtype=object)
        if node.op == "div_const":
            return np.array([dyadic(1 / v) for v in self._constant(node)], dtype=object), np.array(
                [Fraction(0)] * size, dtype=object
            )
        weight, bias, mean, var = (self._parameter(node, i) for i in range(4))
        roots = [Fraction(to_decimal(v + Fraction(node.attrs["eps"])).sqrt()) for v in var]
        scale = np.array([dyadic(1 / root) for root in roots], dtype=object)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return scale[channel], shift[channel]

    def _parameter(self, node: Node, position: int) -> np.ndarray | None:
        value = execution.parameter(node, self.walk.slots, position)
        return None if value is None else rational(value).flatten()

    def _constant(self, node: Node) -> np.ndarray:
        value = torch.as_tensor(execution.constant(node, self.walk.slots), dtype=torch.float64)
        return rational(value.expand(node.shape)).flatten()

    def _images(self, node: Node, low: np.ndarray, high: np.ndarray):
        functions = [_ELEMENTWISE[node.op](self, node, i) for i in range(len(low))]
        at_low = np.array([f(x) for f, x in zip(functions, low)], dtype=object)
        if low is high:
            return at_low, at_low
        at_high = np.array([f(x) for f, x in zip(functions, high)], dtype=object)
        least, most = np.minimum(at_low, at_high), np.maximum(at_low, at_high)
        if node.op in ("abs", "leaky_relu", "prelu"):
            crosses = (low < 0) & (high > 0)
            least = np.where(crosses, np.minimum(least, Fraction(0)), least)
            most = np.where(crosses, np.maximum(most, Fraction(0)), most)
        return least, most

    def _product(self, node: Node, inputs):
        shapes = [self.graph.nodes[i].shape for i in node.inputs]
        ends = [[end.reshape(shape) for end in box] for box, shape in zip(inputs, shapes)]
        if node.op == "matmul":  # [..., I, 1, K] and [..., 1, J, K]
            left, right = ends
            ends = [[e[..., :, None, :] for e in left], [e.swapaxes(-1, -2)[..., None, :, :] for e in right]]
        corners = [x * y for x in ends[0] for y in ends[1]]
        low, high = (f.reduce(np.broadcast_arrays(*corners)) for f in (np.minimum, np.maximum))
        if node.op == "matmul":
            low, high = low.sum(-1), high.sum(-1)
        low, high = low.flatten(), high.flatten()
        return (low, low) if all(box[0] is box[1] for box in inputs) else (low, high)

    def _extremum(self, node: Node, inputs):
        if node.op != "max_pool":
            choose = np.maximum if node.op == "max2" else np.minimum
            low, high = (choose(a, b) for a, b in zip(*inputs[:2]))
            return (
                (low, low) if inputs[0][0] is inputs[0][1] and inputs[1][0] is inputs[1][1] else (low, high)
            )
        index = windows(node, self.graph.nodes[node.inputs[0]].shape).numpy()
        low, high = inputs[0]
        ends = {id(end): end for end in (low, high)}
        best = {
            key: np.array([max(end[i] for i in row if i >= 0) for row in index], dtype=object)
            for key, end in ends.items()
        }
        return best[id(low)], best[id(high)]


def _reciprocals(matrix: np.ndarray, divisor: Fraction | None) -> np.ndarray:
    def exact(entry: Fraction) -> Fraction:
        return Fraction(0) if entry == 0 else dyadic(1 / (divisor or Fraction(round(1 / entry))))

    return np.vectorize(exact, otypes=[object])(matrix)


def _slope(network: ExactNetwork, node: Node, index: int):
    if node.op == "leaky_relu":
        slope = Fraction(node.attrs["slope"])
    else:
        slopes = network._parameter(node, 0)
        per_channel = max(1, int(np.prod(node.shape)) // len(slopes))
        slope = slopes[index // per_channel] if len(slopes) > 1 else slopes[0]
    return lambda x: x if x >= 0 else slope * x


def _clamp(network: ExactNetwork, node: Node, index: int):
    low, high = node.attrs["min"], node.attrs["max"]
    return lambda x: Fraction(low) if x < low else Fraction(high) if x > high else x


_ELEMENTWISE = {
    "relu": lambda network, node, index: lambda x: max(x, Fraction(0)),
    "abs": lambda network, node, index: abs,
    "sigmoid": lambda network, node, index: sigmoid,
    "tanh": lambda network, node, index: tanh,
    "leaky_relu": _slope,
    "prelu": _slope,
    "clamp": _clamp,
}
