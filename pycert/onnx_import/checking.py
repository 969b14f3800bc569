"""Comparison of a converted network with other programs that read the same file, and with itself sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycert.onnx_import.network import OnnxNetwork
from pycert.onnx_import.nodes import sample_of

_SAMPLES = 3
#: Of the largest output; float32 sums in another order differ by far less, a wrong operator by far more.
_TOLERANCE = 1e-3
#: ONNX's evaluator is written in Python: networks of more values than this are left to onnxruntime.
_MAX_VALUES = 1 << 20

#: One input as the file has it -> the output.
Evaluator = Callable[[Tensor], Tensor]


def check(
    net: OnnxNetwork, model: Any, output: str, shape: tuple[int, ...], values: int, thorough: bool
) -> str | None:
    """The name of the program that gives the same outputs on random inputs; None where there is none.

    Args:
        model: the file with its external data in place, so that no program reads another file.
        shape: of the input in the file, at batch size one.
        values: how many numbers the network computes for one sample.
        thorough: by onnxruntime. It is a parser of its own in C++, and can be brought to abort by a file made for that:
            for files that are trusted. Otherwise by ONNX's evaluator in Python, for small networks.

    Raises:
        ValueError: the outputs differ, or those of a batch from those of its samples.
        ImportError, RuntimeError: ``thorough``, and onnxruntime is missing or cannot run the file.
    """
    if not thorough and (values > _MAX_VALUES or _mistaken(model)):
        return None
    inputs = _inputs(net)
    try:
        with torch.no_grad():
            alone = torch.cat([net(x) for x in inputs.split(1)])
            together = net(inputs)
    except RuntimeError as error:
        raise ValueError(f"load_onnx: the network cannot be run: {error}") from error
    _compare(together, alone, "a batch of three and its samples one by one")
    if output not in {item.name for item in model.graph.output}:
        model.graph.output.add(name=output)
    name = "onnxruntime" if thorough else "onnx.reference"
    try:
        run = _onnxruntime(model, output) if thorough else _reference(model, output)
        results = [run(x.reshape(shape)) for x in inputs.split(1)]
    except ImportError:
        raise
    except Exception as error:  # neither has a class of its own for what a file may cause
        if thorough:
            raise RuntimeError(f"load_onnx: onnxruntime cannot run the file: {error}") from error
        return None
    if sample_of(tuple(results[0].shape)) != net.output_shape:
        raise ValueError(
            f"load_onnx: the output is {list(net.output_shape)}, {name} gives {list(results[0].shape)}"
        )
    found = torch.cat([result.flatten() for result in results])
    other = "" if thorough else " (check=True asks onnxruntime)"
    _compare(together, found, f"the converted network and {name}{other}")
    if net.file_shape and isinstance(net.file_shape[0], str):
        _check_batch(run, inputs, together, name)
    return name


def _check_batch(run: Evaluator, inputs: Tensor, together: Tensor, name: str) -> None:
    """A file that takes any batch size must keep samples apart."""
    try:
        found = run(inputs)
    except Exception:  # a batch size of one is written into the file, which says otherwise of its input
        return
    _compare(together, found, f"samples one by one and a batch of three in {name} (the file mixes samples)")


def _mistaken(model: Any) -> bool:
    """Whether ONNX's evaluator may be wrong.

    It mixes statistics of the batch into BatchNormalization before opset 14, and up to onnx 1.20 it gets Conv with
    auto_pad="VALID", MaxPool with auto_pad="SAME_LOWER" or "SAME_UPPER" and AveragePool with ceil_mode wrong.
    """
    old = any(item.domain in ("", "ai.onnx") and item.version < 14 for item in model.opset_import)
    return any(
        (node.op_type == "BatchNormalization" and old)
        or (node.op_type == "Conv" and any(item.s == b"VALID" for item in node.attribute))
        or (node.op_type == "MaxPool" and any(item.s.startswith(b"SAME_") for item in node.attribute))
        or (
            node.op_type == "AveragePool"
            and any(item.name == "ceil_mode" and item.i for item in node.attribute)
        )
        for node in model.graph.node
    )


def _inputs(net: OnnxNetwork) -> Tensor:
    """Numbers around zero and in [0, 1], the usual ranges of inputs."""
    generator = torch.Generator().manual_seed(0)
    example = net.example_input(_SAMPLES)
    drawn = torch.rand(example.shape, generator=generator, dtype=example.dtype)
    drawn[0] = 2 * drawn[0] - 1
    return drawn


def _onnxruntime(model: Any, output: str) -> Evaluator:
    """The file as it stands, without optimisations."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("load_onnx: check=True needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name: Any = next(item.name for item in session.get_inputs())
    return lambda x: torch.from_numpy(session.run([output], {name: x.numpy()})[0])


def _reference(model: Any, output: str) -> Evaluator:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model)
    stored = {item.name for item in model.graph.initializer}
    name: Any = next(item.name for item in model.graph.input if item.name not in stored)

    def run(x: Tensor) -> Tensor:
        with np.errstate(all="ignore"):  # infinite outputs are compared like any others
            found: Any = evaluator.run([output], {name: x.numpy()})
        return torch.from_numpy(found[0])

    return run


def _compare(first: Tensor, second: Tensor, what: str) -> None:
    if first.numel() != second.numel():
        raise ValueError(f"load_onnx: {what} give {first.numel()} and {second.numel()} numbers")
    second = second.reshape(first.shape)
    finite = first.isfinite() & second.isfinite()
    largest = second.where(finite, 0).abs().amax().item() if second.numel() else 0.0
    close = (first - second).abs() <= _TOLERANCE * largest + 1e-6
    same = (first == second) | (first.isnan() & second.isnan())
    if not bool((close | same).all()):
        worst = (first - second).abs().nan_to_num(math.inf).amax().item()
        raise ValueError(f"load_onnx: {what} differ by {worst:.2g}, outputs being up to {largest:.2g}")
