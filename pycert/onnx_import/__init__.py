"""Networks from ONNX files; ``import pycert`` does not need the package onnx, reading a file does."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

from pycert.onnx_import.network import OnnxNetwork
from pycert.options import memory_bytes

__all__ = ["OnnxNetwork", "load_onnx"]

#: Each registers converters of operators.
_CONVERTERS = ("elementwise", "layers", "movement", "pooling", "resizing")


def load_onnx(
    path: str | os.PathLike[str],
    *,
    input_shape: Sequence[int] | None = None,
    output: str | None = None,
    check: bool | None = None,
    max_size: int | str = "1GiB",
) -> OnnxNetwork:
    """The network in an ONNX file, as a module that can be bounded, run and trained.

    Takes ``[B, *sample_shape]`` and gives ``[B, *output_shape]`` for any batch size, whatever the file says: each
    sample comes out as the file maps a batch of one. A first dimension of 1 or with a name is the batch;
    a file whose input has none, as ``[784]``, gets one. Weights, biases, slopes of PRelu and scales of
    BatchNormalization are parameters, under one name for each node of the file; other constants (normalisation, masks)
    are buffers. The module is in evaluation mode, in the dtype of the file (float32 or float64).

    The file may come from anywhere: nothing in it is executed, there is no pickle, and no file outside
    its folder is read.

    Args:
        path: the file. Its external data must lie in its folder.
        input_shape: for files that leave the size of an image open: the sizes to bound it for, with or without the
            batch, as ``(3, 32, 32)``.
        output: name of a value of the file to end the network at; needed where it has several outputs.
        check: compare the module with another program on three random inputs. True: with onnxruntime, for files
            that you trust, since it reads the file with a parser of its own. None: with the evaluator in Python
            that comes with onnx, where that can run the network and it is small (a million values). False: not.
        max_size: limit for the file with its external data, bytes or text as ``"2GiB"`` (the most there is).

    Returns:
        :class:`OnnxNetwork`. ``net.sample_shape`` and ``net.output_shape`` say what it takes and gives,
        ``net.example_input()`` is an input to trace it with, ``net.checked`` which program has confirmed it.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is not valid ONNX, too large, has several inputs (named in the message) or outputs, or an
            open shape; its external data lies elsewhere; or the other program disagrees.
        TypeError: the input is not float32 or float64.
        pycert.UnsupportedOperator: an operator has no translation; names it, its node and the nearest form that has.
        ImportError: the package onnx is missing, or with ``check=True`` onnxruntime.
        RuntimeError: ``check=True``, and onnxruntime cannot run the file.

    Soundness: bounds hold for the module that is returned. It computes what the file's operators say in real
    arithmetic; roundings are those of torch, not of another runtime.

    Example:
        >>> net = pycert.load_onnx("mnist-net_256x2.onnx")
        >>> bm = pycert.BoundedModule(net, net.example_input())
        >>> bounds = bm.bound(pycert.LpBall(x, eps=0.03, clip=(0, 1)), method="crown")
    """
    file = Path(path)
    try:
        limit = memory_bytes(max_size)
    except (ValueError, TypeError) as error:
        raise type(error)(f"load_onnx: max_size must be bytes or text as '1GiB', got {max_size!r}") from error
    try:
        importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError("load_onnx needs the package onnx: pip install 'pycert[onnx]'") from error
    from pycert.onnx_import import checking, converter, nodes, reading, signature

    for name in _CONVERTERS:
        importlib.import_module(f"pycert.onnx_import.{name}")
    model, sha256 = reading.read(file, min(limit, reading.LARGEST))
    opset = reading.opset(model, file)
    refused = nodes.unsupported(model.graph)
    if refused is not None:
        raise refused
    reading.check(model, file)
    item, output = signature.input_and_output(model.graph, output)
    shape = signature.fixed_shape(item, input_shape)
    dtype = signature.DTYPES[item.type.tensor_type.elem_type]
    sample = nodes.sample_of(shape)
    if math.prod(sample) > converter.MAX_ELEMENTS:
        raise ValueError(f"load_onnx: the input {item.name!r} {list(shape)} is too large to be bounded")
    net = OnnxNetwork(item.name, signature.file_shape(item), sample, dtype, sha256)
    walk = converter.Converter(model.graph, opset, net, shape, dtype)
    walk.run(output)
    net.eval()
    if check is not False:
        net.checked = checking.check(net, model, output, shape, walk.elements, check is True)
    return net
