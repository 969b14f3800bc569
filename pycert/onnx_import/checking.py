"""Comparison of a converted network with onnxruntime, and with itself sample by sample."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 3
#: Of the largest output; float32 sums in another order differ by far less, a wrong operator by far more.
_TOLERANCE = 1e-3


def check(net: nn.Module, model: Any, output: str, shape: tuple[int, ...], required: bool) -> bool:
    """Whether onnxruntime has confirmed the network on random inputs.

    Args:
        model: the file with its external data in place, so that onnxruntime reads no other file.
        shape: of the input in the file, at batch size one.
        required: an onnxruntime that is missing or cannot run the file is an error; otherwise it is skipped, with a
            warning in the second case.

    Raises:
        ValueError: the outputs differ, or those of a batch from those of its samples.
        ImportError, RuntimeError: see ``required``.
    """
    inputs = _inputs(net, shape)
    try:
        with torch.no_grad():
            alone = torch.cat([net(x) for x in inputs.split(1)])
            together = net(inputs)
    except RuntimeError as error:
        raise ValueError(f"load_onnx: the network cannot be run: {error}") from error
    _compare(together, alone, "a batch of three and its samples one by one")
    if importlib.util.find_spec("onnxruntime") is None:
        if required:
            raise ImportError("load_onnx: check=True needs onnxruntime: pip install onnxruntime")
        return False
    try:
        found = _run(model, output, inputs.reshape(_SAMPLES, *shape))
    except Exception as error:  # onnxruntime's errors have no common class of their own
        text = (
            f"load_onnx: onnxruntime cannot run the file, so it is not checked: {str(error).splitlines()[0]}"
        )
        if required:
            raise RuntimeError(text) from error
        warnings.warn(text, stacklevel=3)
        return False
    if found[0].numel() != together[0].numel():
        raise ValueError(
            f"load_onnx: outputs of shape {list(together.shape[1:])}, onnxruntime's have {list(found.shape[1:])}"
        )
    _compare(together, found.reshape(together.shape), "the converted network and onnxruntime")
    return True


def _inputs(net: Any, shape: tuple[int, ...]) -> Tensor:
    """Numbers around zero and in [0, 1], the usual ranges of inputs."""
    generator = torch.Generator().manual_seed(0)
    example = net.example_input(_SAMPLES)
    drawn = torch.rand(example.shape, generator=generator, dtype=example.dtype)
    drawn[0] = 2 * drawn[0] - 1
    return drawn


def _run(model: Any, output: str, inputs: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = next(item.name for item in session.get_inputs())
    results = [session.run([output], {name: x.numpy()})[0] for x in inputs]
    return torch.stack([torch.from_numpy(result) for result in results])


def _compare(first: Tensor, second: Tensor, what: str) -> None:
    finite = first.isfinite() & second.isfinite()
    largest = second[finite].abs().max().item() if bool(finite.any()) else 0.0
    close = (first - second).abs() <= _TOLERANCE * largest + 1e-6
    same = (first == second) | (first.isnan() & second.isnan())
    if not bool((close | same).all()):
        worst = (first - second)[finite].abs().max().item() if bool(finite.any()) else float("nan")
        raise ValueError(f"load_onnx: {what} differ by {worst:.2g}, outputs being up to {largest:.2g}")
