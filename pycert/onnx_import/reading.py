"""An ONNX file as a checked ``onnx.ModelProto``: nothing is run, and nothing outside its folder is read."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, checker, helper

#: Protocol buffers cannot be larger.
LARGEST = 2 << 30
#: Operators took other attributes before it (Add with ``axis`` and ``broadcast``).
OLDEST_OPSET = 7


def read(path: Path, max_bytes: int) -> tuple[Any, str]:
    """The model with its external data in place, and the SHA-256 of the file.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is not ONNX, contradicts itself, is larger than ``max_bytes`` with its external data,
            or names external data outside of its folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"load_onnx: {path} is a folder, expected an ONNX file")
    if not path.is_file():
        raise FileNotFoundError(f"load_onnx: there is no file {path}")
    content = _bytes_of(path, 0, None, max_bytes, f"{path}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # google.protobuf's DecodeError; protobuf is no requirement of our own
        raise ValueError(f"load_onnx: {path} is not an ONNX file ({error})") from error
    if not model.ir_version or not model.graph.node or not model.opset_import:
        raise ValueError(f"load_onnx: {path} is not an ONNX file (no IR version, opset or nodes)")
    _check_names(model.graph, path)
    for function in model.functions:
        if function.domain in ("", "ai.onnx"):
            raise ValueError(
                f"load_onnx: {path} gives the operator {function.name!r} a meaning of its own; "
                "export it without functions"
            )
    _inline_external_data(model, path, max_bytes - len(content))
    return model, hashlib.sha256(content).hexdigest()


def opset(model: Any, path: Path) -> int:
    """Version of the default operator set.

    Raises:
        ValueError: it is missing or older than :data:`OLDEST_OPSET`.
    """
    found = [item.version for item in model.opset_import if item.domain in ("", "ai.onnx")]
    if not found or found[0] < OLDEST_OPSET:
        stated = f"opset {found[0]}" if found else "no opset of the domain ai.onnx"
        raise ValueError(
            f"load_onnx: {path} has {stated}, supported are {OLDEST_OPSET} and newer; "
            "onnx.version_converter.convert_version(model, 13) makes a newer one of it"
        )
    return int(found[0])


def check(model: Any, path: Path) -> None:
    """Raises ValueError where the model is not valid ONNX (a value used before it is made, a wrong attribute)."""
    if not model.graph.name:
        model.graph.name = "graph"  # asked for by the checker, of no use to anyone
    outputs = [item.type.tensor_type for item in model.graph.output]
    bare = [kind for kind in outputs if not kind.HasField("shape")]  # likewise: shapes of outputs follow
    for kind in bare:
        kind.shape.SetInParent()
    try:
        checker.check_model(model)
    except (checker.ValidationError, ValueError, RuntimeError) as error:
        raise ValueError(f"load_onnx: {path} is not valid ONNX: {_first_line(error)}") from error
    finally:
        for kind in bare:
            kind.ClearField("shape")


def _check_names(graph: Any, path: Path) -> None:
    """Raises ValueError where a name is not text: protocol buffers then give bytes in its place."""
    values = [*graph.input, *graph.output]
    symbols = [dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim]
    names = [item.name for item in (*values, *graph.initializer, *graph.node)]
    of_nodes = [
        name for item in graph.node for name in (item.op_type, item.domain, *item.input, *item.output)
    ]
    if not all(isinstance(name, str) for name in (*symbols, *names, *of_nodes)):
        raise ValueError(f"load_onnx: {path} is not valid ONNX: a name in it is not UTF-8")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor of a graph; those of inner graphs too, so that none is left with external data."""
    waiting = [graph]
    while waiting:
        graph = waiting.pop()
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
                waiting.extend((attribute.g, *attribute.graphs))


def _inline_external_data(model: Any, path: Path, budget: int) -> None:
    """Reads external data from regular files inside the model's folder; ``budget``: bytes in all."""
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL and not tensor.external_data:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = _inside(path, entries.get("location", ""), tensor.name)
        size = _number(entries, "length", tensor.name)
        start = _number(entries, "offset", tensor.name) or 0
        label = f"external data {entries['location']!r} of tensor {tensor.name!r}"
        content = _bytes_of(file, start, size, budget, label)
        budget -= len(content)
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT
        tensor.raw_data = content


def _inside(path: Path, location: str, name: str) -> Path:
    """The file that ``location`` names, if it lies in the model's folder whichever links are followed."""
    folder = path.parent.resolve()
    refused = f"load_onnx: {path}: external data of tensor {name!r}: location {location!r}"
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or os.path.isabs(location) or ":" in parts[0] or ".." in parts:
        raise ValueError(f"{refused} must be a relative path without '..'")
    found = (folder / location).resolve()
    if not found.is_relative_to(folder):
        raise ValueError(f"{refused} leads out of the model's folder through a link")
    if not found.is_file():
        raise FileNotFoundError(f"{refused}: there is no such file beside the model")
    return found


def _number(entries: dict[str, str], key: str, name: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"load_onnx: external data of tensor {name!r}: {key} must be a number, got {text!r}")
    return int(text)


def _bytes_of(file: Path, start: int, size: int | None, budget: int, label: str) -> bytes:
    """``size`` bytes of a file (None: all that follow), refused before reading where they exceed the budget."""
    whole = file.stat().st_size
    size = max(whole - start, 0) if size is None else size
    if start + size > whole:
        raise ValueError(f"load_onnx: {label}: {size} bytes from {start} on are wanted, the file has {whole}")
    if size > budget:
        raise ValueError(
            f"load_onnx: {label} is larger than max_size allows ({size} bytes, {max(budget, 0)} left); "
            "give a larger max_size if you trust it"
        )
    with open(file, "rb") as opened:
        opened.seek(start)
        return opened.read(size)


def array(tensor: Any) -> Any:
    """A tensor of the file as a numpy array of its own memory.

    Raises:
        ValueError: its data does not fit its shape.
    """
    try:
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.raw_data and len(tensor.raw_data) != math.prod(tensor.dims) * kind.itemsize:
            raise ValueError(f"{len(tensor.raw_data)} bytes for shape {list(tensor.dims)} of {kind}")
        return onnx.numpy_helper.to_array(tensor).copy()
    except Exception as error:
        raise ValueError(f"load_onnx: tensor {tensor.name!r} cannot be read: {_first_line(error)}") from error
