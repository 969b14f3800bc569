"""From a checked ONNX graph to an :class:`OnnxNetwork`: one walk over the nodes.

The file is read for inputs of batch size one. A value that depends on the input has in the file a
shape ``[1, *sample]`` with the batch in front, or a shape without it (after Squeeze, or where the input has
none); in the module it is ``[B, *sample]`` either way. Each operator is translated so that every sample comes out
as from the file alone. Hence a batch size that the file has written into a Reshape does not matter,
and nothing can mix samples. Whatever does not depend on the input is computed here.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from pycert.errors import UnsupportedOperator
from pycert.onnx_import import folding, reading, steps
from pycert.onnx_import.network import INPUT, OnnxNetwork

#: A value of more elements than this per sample is refused: a small file can ask for any size.
MAX_ELEMENTS = 1 << 28
#: Floating point types of a network.
DTYPES = {TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64}

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


class Converter:
    """The walk; converters of operators use its methods to add modules to the network."""

    def __init__(
        self, graph: Any, opset: int, net: OnnxNetwork, input_shape: Shape, dtype: torch.dtype
    ) -> None:
        self.graph, self.opset, self.net, self.dtype = graph, opset, net, dtype
        self.values: dict[str, Value] = {item.name: reading.array(item) for item in graph.initializer}
        self.values[net.input_name] = Live(input_shape, Raw(INPUT, sample_of(input_shape)))
        self.readers = collections.Counter(name for node in graph.node for name in node.input)
        self.readers.update(item.name for item in graph.output)
        self._parameters: dict[tuple[int, str], tuple[Array, nn.Parameter]] = {}
        self._names: set[str] = set()

    def run(self, output: str) -> None:
        """Converts every node and ends the network at ``output``."""
        for number, proto in enumerate(self.graph.node):
            self._convert(proto, number)
        found = self.values.get(output)
        if not isinstance(found, Live):
            raise ValueError(f"load_onnx: the output {output!r} does not depend on the input")
        self.net.finish(found.raw.number, output, found.raw.sample)

    def _convert(self, proto: Any, number: int) -> None:
        inputs = [self.values[name] if name else None for name in proto.input]
        node = Node(proto, number, self.opset, inputs)
        try:
            results = self._results(node, proto)
        except UnsupportedOperator:
            raise
        except Exception as error:
            raise ValueError(f"load_onnx: {node.op} at {node.name!r} cannot be converted: {error}") from error
        for name, value in zip(proto.output, results):
            if name:
                self.values[name] = value

    def _results(self, node: Node, proto: Any) -> list[Value]:
        if not any(isinstance(value, Live) for value in node.inputs):
            return list(folding.fold(node, proto, self.opset))
        if node.op in ("Shape", "Size"):
            shape = node.live().shape
            part = shape[slice(node.attribute("start", 0), node.attribute("end"))]
            return [np.array(math.prod(shape) if node.op == "Size" else part, dtype=np.int64)]
        if node.op not in HANDLERS:
            node.refuse("of a value that depends on the input", HINTS.get(node.op, GENERAL_HINT))
        result = HANDLERS[node.op](self, node)
        return result if isinstance(result, list) else [result]

    # ---- what converters build with -----------------------------------------------------------

    def emit(self, node: Node, module: nn.Module, inputs: list[Raw], what: str = "") -> tuple[Raw, str]:
        """Adds a module; its result and its name. ``what`` names a helper beside the node's own module."""
        module.eval()
        sample = self._sample_after(module, inputs)
        layer = self._layer_name(f"{node.name}_{what}" if what else node.name)
        number = self.net.add_step(layer, module, tuple(item.number for item in inputs))
        return Raw(number, sample), layer

    def apply(self, node: Node, module: nn.Module, inputs: list[Raw], shape: Shape) -> Live:
        """Adds a module whose result has ``shape`` in the file."""
        raw, layer = self.emit(node, module, inputs)
        reshaped = self.reshaped(node, raw, sample_of(shape))
        return Live(shape, reshaped, layer if reshaped == raw else "")

    def reshaped(self, node: Node, raw: Raw, sample: Shape) -> Raw:
        """A value in another shape per sample; nothing is added where it has that."""
        if raw.sample == sample:
            return raw
        if math.prod(raw.sample) != math.prod(sample):
            raise ValueError(f"{list(raw.sample)} has not as many elements as {list(sample)}")
        return self.emit(node, steps.Reshape(sample), [raw], "reshape")[0]

    def reshape(self, node: Node, value: Live, shape: Shape) -> Live:
        """A value in another shape of the file."""
        if math.prod(value.shape) != math.prod(shape):
            raise ValueError(f"{list(value.shape)} has not as many elements as {list(shape)}")
        return Live(shape, self.reshaped(node, value.raw, sample_of(shape)))

    def whole(self, node: Node, value: Live, dims: int = 0) -> Raw:
        """``[B, *shape]`` with all dimensions of the file behind the batch, with 1 in front up to ``dims``."""
        return self.reshaped(node, value.raw, (1,) * (dims - len(value.shape)) + value.shape)

    def along(self, node: Node, value: Live, axes: list[int]) -> tuple[Raw, int]:
        """A value of which dimension ``axis`` of the file is dimension ``axis + offset`` in the module."""
        if has_batch(value.shape) and 0 not in axes:
            return value.raw, 0
        return self.whole(node, value), 1

    def back(self, raw: Raw, offset: int) -> Shape:
        """The file's shape of what has been made of the result of :meth:`along`."""
        return raw.sample if offset else (1, *raw.sample)

    def finish(self, node: Node, raw: Raw, offset: int) -> Live:
        shape = self.back(raw, offset)
        return Live(shape, self.reshaped(node, raw, sample_of(shape)))

    def tensor(self, array: Array) -> Tensor:
        """A floating point constant in the network's dtype."""
        tensor = torch.from_numpy(np.array(array, order="C"))
        if tensor.dtype != self.dtype:
            raise ValueError(f"a constant is {tensor.dtype}, the network {self.dtype}")
        return tensor

    def parameter(self, array: Array, form: str = "") -> nn.Parameter:
        """A trainable tensor; one that the file uses twice in the same form is the same parameter.

        ``form``: "transposed", or "flat" for a vector.
        """
        key = (id(array), form)  # the array is kept beside the parameter, so that its id stays its own
        if key not in self._parameters:
            moved = array.T if form == "transposed" else array.reshape(-1) if form == "flat" else array
            self._parameters[key] = (array, nn.Parameter(self.tensor(moved)))
        return self._parameters[key][1]

    def once(self, value: str) -> bool:
        """Whether a value of the file has one reader."""
        return self.readers[value] == 1

    def layer(self, name: str) -> nn.Module:
        """A module by the name that :meth:`emit` gave it."""
        return self.net.get_submodule(name)

    def _sample_after(self, module: nn.Module, inputs: list[Raw]) -> Shape:
        """The shape that a module gives, found on meta tensors, so that nothing is computed or allocated."""
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        forms = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        stand_ins = tuple(torch.empty(2, *item.sample, dtype=self.dtype, device="meta") for item in inputs)
        with torch.no_grad():
            result = torch.func.functional_call(module, forms, stand_ins)
        if result.dim() == 0 or result.shape[0] != 2 or result.dtype != self.dtype:
            raise ValueError(
                f"its result {list(result.shape)}, {result.dtype} has lost the batch or the dtype"
            )
        sample = tuple(result.shape[1:])
        if math.prod(sample) > MAX_ELEMENTS:
            raise ValueError(f"its result {list(sample)} has more than {MAX_ELEMENTS} elements")
        return sample

    def _layer_name(self, name: str) -> str:
        """A name for a child: letters, digits and underscores, unlike any attribute and any other child."""
        plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[:100] or "node"
        plain = f"node_{plain}" if plain[0].isdigit() or hasattr(self.net, plain) else plain
        unique, count = plain, 1
        while unique in self._names or hasattr(self.net, unique):
            count += 1
            unique = f"{plain}_{count}"
        self._names.add(unique)
        return unique


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
        ("Resize Upsample GridSample AffineGrid", "use ConvTranspose, or Expand and Reshape"),
        ("Round Floor Ceil Sign Mod", "steps cannot be bounded; leave them out"),
        ("ThresholdedRelu Shrink", "use Relu, LeakyRelu or Clip"),
    )
    for name in names.split()
}  # fmt: skip


def input_and_output(graph: Any, output: str | None) -> tuple[Any, str]:
    """The one input and the name of the output that is wanted.

    Raises:
        ValueError, TypeError: there are several, or the input is not float32 or float64.
    """
    stored = {item.name for item in graph.initializer}
    inputs = [item for item in graph.input if item.name not in stored]
    if len(inputs) != 1:
        listed = ", ".join(f"{item.name!r} {_described(item)}" for item in inputs) or "none"
        raise ValueError(f"load_onnx reads networks of one input, this one has {len(inputs)}: {listed}")
    kind = inputs[0].type.tensor_type.elem_type
    if kind not in DTYPES:
        raise TypeError(
            f"load_onnx: the input {inputs[0].name!r} is {_described(inputs[0])}; networks of float32 or "
            "float64 inputs can be bounded"
            + ("" if kind != TensorProto.FLOAT16 else ", convert it to float32")
        )
    names = [item.name for item in graph.output]
    if output is None and len(names) != 1:
        raise ValueError(f"load_onnx: the network has {len(names)} outputs, choose one: output={names}")
    if output is not None and output not in names and not any(output in node.output for node in graph.node):
        raise ValueError(
            f"load_onnx: output={output!r} is no output of the network {names} or of a node in it"
        )
    return inputs[0], names[0] if output is None else output


def _described(item: Any) -> str:
    kind = item.type.WhichOneof("value")
    if kind != "tensor_type":
        return f"({kind or 'no type'})"
    number = item.type.tensor_type.elem_type
    known = number in onnx.TensorProto.DataType.values()
    name = onnx.TensorProto.DataType.Name(number).lower() if known else f"type {number}"
    return f"{name} {list(file_shape(item))}"


def file_shape(item: Any) -> tuple[int | str, ...]:
    """The shape that the file declares; text where a dimension is symbolic, "?" where it is not given."""
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in item.type.tensor_type.shape.dim
    )


def fixed_shape(item: Any, input_shape: Any) -> Shape:
    """The shape of the input at batch size one.

    Raises:
        ValueError: a dimension beside the first is symbolic, and ``input_shape`` (the whole of the file's shape
            or all but its first dimension) does not settle it.
    """
    declared = file_shape(item)
    if not item.type.tensor_type.HasField("shape"):
        if input_shape is None:
            raise ValueError(f"load_onnx: the file gives {item.name!r} no shape; say input_shape=(1, ...)")
        declared = ("?",) * len(tuple(input_shape))
    symbolic = [size for size in declared[1:] if not isinstance(size, int) or size <= 0]
    if input_shape is None:
        if symbolic or (isinstance(declared[0] if declared else 1, int) and declared and declared[0] == 0):
            raise ValueError(
                f"load_onnx: the input {item.name!r} has shape {list(declared)}; say which one to bound it for, "
                f"as input_shape=(1{', ...' if len(declared) > 1 else ''})"
            )
        first = declared[:1] if declared and isinstance(declared[0], int) else (1,) * len(declared[:1])
        return tuple(int(size) for size in (*first, *declared[1:]))
    wanted = tuple(int(size) for size in input_shape)
    wanted = (1, *wanted) if len(wanted) == len(declared) - 1 else wanted
    fits = len(wanted) == len(declared) and all(
        size > 0 and (size == own or not isinstance(own, int)) for size, own in zip(wanted, declared)
    )
    if not fits or (wanted and wanted[0] != 1 and not isinstance(declared[0], int)):
        raise ValueError(
            f"load_onnx: input_shape={tuple(input_shape)} does not fit {item.name!r} of shape {list(declared)} "
            "(batch size 1, or left out)"
        )
    return wanted
