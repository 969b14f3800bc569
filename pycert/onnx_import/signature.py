"""What a file takes and gives: the one input, its shape at batch size one, the output."""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnx import TensorProto

#: Floating point types of a network.
DTYPES = {TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64}


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
    """The shape that the file declares; text where a dimension is symbolic, "?" where it is not given (0, -1)."""
    return tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or "?"
        for dim in item.type.tensor_type.shape.dim
    )


def fixed_shape(item: Any, input_shape: Any) -> tuple[int, ...]:
    """The shape of the input at batch size one.

    Raises:
        ValueError: a dimension beside the first is symbolic, and ``input_shape`` (the whole of the file's shape
            or all but its first dimension) does not settle it.
    """
    declared = file_shape(item)
    unknown = not item.type.tensor_type.HasField("shape")
    if input_shape is None:
        if unknown or any(isinstance(size, str) for size in declared[1:]):
            shape = "no shape" if unknown else f"shape {list(declared)}"
            raise ValueError(
                f"load_onnx: the file gives {item.name!r} {shape}; say for which one to bound it: input_shape=(1, ...)"
            )
        return tuple(1 if isinstance(size, str) else size for size in declared)
    wanted = tuple(int(size) for size in input_shape)
    if unknown:
        declared = ("?",) * len(wanted)
    wanted = (1, *wanted) if len(wanted) == len(declared) - 1 else wanted
    open_batch = bool(declared) and isinstance(declared[0], str)
    fits = len(wanted) == len(declared) and all(
        size > 0 and (size == own or isinstance(own, str)) for size, own in zip(wanted, declared)
    )
    if not fits or (open_batch and wanted[0] != 1):
        raise ValueError(
            f"load_onnx: input_shape={tuple(input_shape)} does not fit {item.name!r} of shape {list(declared)} "
            "(batch size 1, or left out)"
        )
    return wanted
