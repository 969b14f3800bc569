"""Nodes and values of a file as the converters of operators see them, and the table of these converters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from onnx import helper

from pycert.errors import UnsupportedOperator
from pycert.onnx_import import folding

if TYPE_CHECKING:
    from pycert.onnx_import.converter import Converter

Shape = tuple[int, ...]
Array = np.ndarray


class Raw(NamedTuple):
    """A value of the module: its number among the steps and ``[*sample]``."""

    number: int
    sample: Shape


@dataclasses.dataclass(frozen=True)
class Live:
    """A value of the file that depends on the input: its shape there, at batch size one, and in the module."""

    shape: Shape
    raw: Raw
    layer: str = ""  # the module that makes it, where an Add may still become its bias


Value = Live | Array


def sample_of(shape: Shape) -> Shape:
    """What the module has per sample for a shape of the file: a 1 in front of others is the batch."""
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape


def has_batch(shape: Shape) -> bool:
    """Whether the file's shape has the batch in front."""
    return len(shape) > 1 and shape[0] == 1


def axis_of(axis: int, dims: int) -> int:
    """A dimension counted from the front."""
    if not -dims <= axis < dims:
        raise ValueError(f"axis {axis} of a value of {dims} dimensions")
    return int(axis) % dims


class Node:
    """One node of the file as converters see it."""

    def __init__(self, proto: Any, number: int, opset: int, inputs: list[Value | None]) -> None:
        self.op, self.opset, self.inputs = proto.op_type, opset, inputs
        self.input_names, self.outputs = list(proto.input), list(proto.output)
        self.name = proto.name or f"{proto.op_type}_{number}"
        self.attributes = {item.name: helper.get_attribute_value(item) for item in proto.attribute}

    def attribute(self, name: str, default: Any = None) -> Any:
        found = self.attributes.get(name, default)
        return found.decode("utf-8", "replace") if isinstance(found, bytes) else found

    def input(self, position: int) -> Value | None:
        return self.inputs[position] if position < len(self.inputs) else None

    def live(self, position: int = 0) -> Live:
        """An input that depends on the network's input."""
        found = self.input(position)
        if not isinstance(found, Live):
            self.refuse(
                f"with a constant as input {position}", "that input must depend on the network's input"
            )
        return found

    def constant(self, position: int, what: str) -> Array | None:
        """An input that does not depend on the network's input; None where it is absent."""
        found = self.input(position)
        if isinstance(found, Live):
            self.refuse(f"whose {what} depends on the input", f"the {what} must be constant")
        return found

    def given(self, position: int, what: str) -> Array:
        """The same for one that must be there."""
        found = self.constant(position, what)
        if found is None:
            raise ValueError(f"it needs its {what}, input {position}")
        return found

    def ints(self, attribute: str, position: int) -> list[int] | None:
        """Integers that are an attribute in older operator sets and an input in newer ones."""
        if attribute in self.attributes:
            return [int(item) for item in self.attributes[attribute]]
        found = self.constant(position, attribute)
        return None if found is None else [int(item) for item in found.reshape(-1)]

    def only_output(self) -> None:
        """Refuses further outputs (indices of a pool, the mask of a dropout)."""
        if any(self.outputs[1:]):
            self.refuse(f"with a second output {self.outputs[1]!r}", "only the first output is supported")

    def refuse(self, detail: str, hint: str) -> NoReturn:
        raise UnsupportedOperator(self.name, f"ONNX operator {self.op} {detail}".rstrip(), hint)


#: By operator: ``(converter, node) -> value``, or a list of values for several outputs.
Handler = Callable[["Converter", Node], "Value | list[Value]"]
HANDLERS: dict[str, Handler] = {}


def converts(*operators: str) -> Callable[[Handler], Handler]:
    """Registers the conversion of operators of the default domain."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(operators, handler))
        return handler

    return register


def unsupported(graph: Any) -> UnsupportedOperator | None:
    """The first node that no converter and no folding knows."""
    for number, proto in enumerate(graph.node):
        known = proto.domain in ("", "ai.onnx")
        if known and (proto.op_type in HANDLERS or proto.op_type in folding.OPERATORS):
            continue
        kind = f"{proto.domain}.{proto.op_type}" if not known else proto.op_type
        name = proto.name or f"{proto.op_type}_{number}"
        return UnsupportedOperator(name, f"ONNX operator {kind}", HINTS.get(proto.op_type, GENERAL_HINT))
    return None


GENERAL_HINT = "export the network without it; docs/onnx.md lists the supported operators"
HINTS = {
    name: hint
    for names, hint in (
        ("If Loop Scan SequenceMap", "control flow cannot be bounded; export the network with fixed shapes"),
        ("ArgMax ArgMin TopK Hardmax", "end the network at the scores: load_onnx(path, output=...)"),
        ("LSTM GRU RNN", "recurrent layers are not supported; write out the affine part"),
        ("QuantizeLinear DequantizeLinear QLinearConv QLinearMatMul ConvInteger MatMulInteger "
         "DynamicQuantizeLinear", "bound the float network it was made from"),
        ("InstanceNormalization GroupNormalization LRN LpNormalization MeanVarianceNormalization",
         "use BatchNormalization"),
        ("Einsum", "write it as MatMul or Gemm"),
        ("RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial",
         "bounds of a random network mean nothing"),
        ("Equal Less LessOrEqual Greater GreaterOrEqual Not And Or", "comparisons of values cannot be bounded"),
        ("GridSample AffineGrid", "use ConvTranspose, or Expand and Reshape"),
        ("Round Floor Ceil Mod", "steps cannot be bounded; leave them out"),
        ("ThresholdedRelu Shrink", "use Relu, LeakyRelu or Clip"),
    )
    for name in names.split()
}  # fmt: skip
