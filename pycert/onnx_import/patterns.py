"""Activations that exporters write out as several operators: as one, their lines are tighter and cheaper."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from pycert.onnx_import.converter import Converter
from pycert.onnx_import.nodes import Live, Node, Value


def activation_of_product(conv: Converter, node: Node) -> tuple[nn.Module, Live] | None:
    """The activation that ends in this ``Mul``, and its argument; None if it is a product like any other."""
    if len(node.inputs) != 2:
        return None
    for position in (0, 1):
        value, name = node.inputs[1 - position], node.input_names[position]
        made = conv.made.get(name)
        if made is None or value is None:
            continue
        if not isinstance(value, Live):
            argument = _gelu(conv, made) if _is(value, 0.5) else None
            if argument is not None:
                return nn.GELU(), argument
        elif made.inputs[0] is value and made.op == "Sigmoid":
            return nn.SiLU(), value
        elif made.inputs[0] is value and made.op == "HardSigmoid" and _hard(made):
            return nn.Hardswish(), value
        elif made.op == "Tanh" and _argument(conv, made, "Softplus") is value:
            return nn.Mish(), value
    return None


def _gelu(conv: Converter, product: Node) -> Live | None:
    """``x`` where ``product`` is ``x (1 + erf(x / sqrt 2))``."""
    if product.op != "Mul":
        return None
    for position in (0, 1):
        value, added = product.inputs[1 - position], conv.made.get(product.input_names[position])
        if not isinstance(value, Live) or added is None or added.op != "Add":
            continue
        for place in (0, 1):
            erf = conv.made.get(added.input_names[place])
            if erf is None or erf.op != "Erf" or not _is(added.inputs[1 - place], 1.0):
                continue
            scaled = conv.made.get(erf.input_names[0])
            if scaled is not None and scaled.inputs[0] is value and _scales(scaled):
                return value
    return None


def _scales(node: Node) -> bool:
    """Whether a node divides by the root of two."""
    divides = node.op == "Div" and _is(node.inputs[1], math.sqrt(2))
    return divides or (node.op == "Mul" and _is(node.inputs[1], math.sqrt(0.5)))


def _hard(node: Node) -> bool:
    alpha, beta = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    return np.float32(alpha) == np.float32(1 / 6) and beta == 0.5


def _argument(conv: Converter, node: Node, op: str) -> Value | None:
    """What the operator ``op`` is applied to, if the node is applied to that."""
    inner = conv.made.get(node.input_names[0])
    return inner.inputs[0] if inner is not None and inner.op == op else None


def _is(value: Value | None, number: float) -> bool:
    """Whether a constant is a number, as closely as float32 holds it."""
    if value is None or isinstance(value, Live) or value.size != 1:
        return False
    return bool(np.float32(value.reshape(-1)[0]) == np.float32(number))
