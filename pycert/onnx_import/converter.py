"""From a checked ONNX graph to an :class:`OnnxNetwork`: one walk over the nodes.

The file is read for inputs of batch size one. A value that depends on the input has in the file a
shape ``[1, *sample]`` with the batch in front, or a shape without it (after Squeeze, or where the input has
none); in the module it is ``[B, *sample]`` either way. Each operator is translated so that every sample comes out
as from the file alone. Hence a batch size that the file has written into a Reshape does not matter,
and nothing can mix samples. Whatever does not depend on the input is computed here.
"""

from __future__ import annotations

import collections
import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pycert.errors import UnsupportedOperator
from pycert.onnx_import import folding, reading, steps
from pycert.onnx_import.network import INPUT, OnnxNetwork
from pycert.onnx_import.nodes import (
    GENERAL_HINT,
    HANDLERS,
    HINTS,
    Array,
    Live,
    Node,
    Raw,
    Shape,
    Value,
    has_batch,
    sample_of,
)  # fmt: skip

#: A value of more elements than this per sample is refused: a small file can ask for any size.
MAX_ELEMENTS = 1 << 26


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
        self.elements = 0  # of all values, per sample
        self._names: set[str] = set()
        self.made: dict[str, Node] = {}  # by output, the nodes whose inputs depend on the network's

    def run(self, output: str) -> None:
        """Converts every node and ends the network at ``output``."""
        self.readers[output] += 1  # it may be a value inside of the file
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
        self.made.update(dict.fromkeys(filter(None, node.outputs), node))
        result = HANDLERS[node.op](self, node)
        return result if isinstance(result, list) else [result]

    # ---- what converters build with -----------------------------------------------------------

    def emit(self, node: Node, module: nn.Module, inputs: list[Raw], what: str = "") -> tuple[Raw, str]:
        """Adds a module; its result and its name. ``what`` names a helper beside the node's own module."""
        module.eval()
        sample = self._sample_after(module, inputs)
        self.elements += math.prod(sample)
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

    def mixes(self, value: Live, axes: list[int]) -> bool:
        """Whether an operator over these dimensions joins samples of a file that takes several at once."""
        named = bool(self.net.file_shape) and isinstance(self.net.file_shape[0], str)
        return named and has_batch(value.shape) and 0 in axes

    def once(self, value: str) -> bool:
        """Whether a value of the file has one reader."""
        return self.readers[value] == 1

    def layer(self, name: str) -> nn.Module:
        """A module by the name that :meth:`emit` gave it."""
        return self.net.get_submodule(name)

    def _sample_after(self, module: nn.Module, inputs: list[Raw]) -> Shape:
        """The shape that a module gives, found on a batch of none: nothing is computed, and nothing imported for it."""
        with torch.no_grad():
            result = module(*(torch.empty(0, *item.sample, dtype=self.dtype) for item in inputs))
        if result.dim() == 0 or result.shape[0] != 0 or result.dtype != self.dtype:
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
