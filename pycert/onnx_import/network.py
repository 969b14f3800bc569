"""The module that an ONNX file becomes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

#: What the network is given; steps count on from it.
INPUT = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """``values[output] = layer(values[inputs])``; ``release``: values that no later step reads."""

    layer: str
    inputs: tuple[int, ...]
    output: int
    release: tuple[int, ...] = ()


class OnnxNetwork(nn.Module):
    """A network read from an ONNX file; made by :func:`pycert.load_onnx`.

    ``forward`` takes ``[B, *sample_shape]`` and gives ``[B, *output_shape]``, each sample as the file maps an
    input of batch size one. The children are named after the nodes of the file.

    Attributes:
        input_name, output_name: names of the input and the output in the file.
        file_shape: shape of the input as the file has it, text where a dimension is symbolic.
        sample_shape: shape of one input, without the batch; the file's leading 1 or symbol is the batch, and
            a shape without such a dimension is one sample as a whole.
        output_shape: shape of one output, without the batch.
        sha256: hash of the file.
        checked: the program that gave the same outputs when the file was loaded, "onnx.reference" or "onnxruntime";
            None where there was no comparison.
    """

    def __init__(
        self,
        input_name: str,
        file_shape: tuple[int | str, ...],
        sample_shape: tuple[int, ...],
        dtype: torch.dtype,
        sha256: str,
    ) -> None:
        super().__init__()
        self.input_name, self.file_shape, self.sample_shape = input_name, file_shape, sample_shape
        self.sha256 = sha256
        self.checked: str | None = None
        self.output_name = ""
        self.output_shape: tuple[int, ...] = ()
        self._dtype = dtype
        self._steps: list[Step] = []
        self._output = INPUT

    def forward(self, x: Tensor) -> Tensor:
        """``[B, *sample_shape]`` to ``[B, *output_shape]``.

        Raises:
            ValueError: ``x`` has another shape.
        """
        if tuple(x.shape[1:]) != self.sample_shape or x.dim() == 0:
            wanted = ", ".join(["batch", *map(str, self.sample_shape)])
            raise ValueError(
                f"the ONNX network takes {self.input_name!r} of shape [{wanted}], got {list(x.shape)}"
            )
        values: dict[int, Any] = {INPUT: x}
        for step in self._steps:
            values[step.output] = getattr(self, step.layer)(*(values[number] for number in step.inputs))
            for number in step.release:
                del values[number]
        return values[self._output]

    def example_input(self, batch: int = 1) -> Tensor:
        """Zeros ``[batch, *sample_shape]`` in the dtype and on the device of the network, to trace it with."""
        tensor = next((t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()), None)
        dtype, device = (self._dtype, None) if tensor is None else (tensor.dtype, tensor.device)
        return torch.zeros(batch, *self.sample_shape, dtype=dtype, device=device)

    def extra_repr(self) -> str:
        """Input, output and the hash of the file, so that the text tells two files apart."""
        shape = "[" + ", ".join(map(str, self.file_shape)) + "]"
        return f"{self.input_name!r} {shape} -> {self.output_name!r}, sha256={self.sha256}"

    def finish(self, output: int, output_name: str, output_shape: tuple[int, ...]) -> None:
        """Notes the output, drops steps it does not need, and after which step a value is not needed."""
        needed, kept = {output}, []
        for step in reversed(self._steps):
            if step.output not in needed:
                continue
            last = tuple(sorted(set(step.inputs) - needed))
            needed.update(step.inputs)
            kept.append(dataclasses.replace(step, release=last))
        self._steps = kept[::-1]
        used = {step.layer for step in self._steps}
        for name in [name for name in self._modules if name not in used]:
            del self._modules[name]
        self._output, self.output_name, self.output_shape = output, output_name, output_shape

    def add_step(self, layer: str, module: nn.Module, inputs: tuple[int, ...]) -> int:
        """Appends a module; returns the number of its result."""
        self.add_module(layer, module)
        self._steps.append(Step(layer, inputs, len(self._steps) + 1))
        return len(self._steps)
