"""Nodes of a network for introspection, under the names of auto_LiRPA's operator classes.

They have names, inputs, shapes and, after a call of ``compute_bounds``, the bounds ``lower`` and
``upper``. Nothing is computed by them: the bounds come from pycert's engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Looks up the box of a node: (node) -> (lower, upper).
Lookup = Callable[["Bound"], tuple[Tensor | None, Tensor | None]]


class Bound(nn.Module):
    """One node. ``inputs`` are nodes, ``output_name`` names of consumers, ``output_shape`` with the batch."""

    #: Kinds whose pre-activation bounds a relaxation reads.
    nonlinear = False

    def __init__(self, name: str, kind: str, inputs: list[Bound], attr: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.kind, self.inputs, self.attr = name, kind, inputs, attr
        self.ori_name: str | None = None
        self.output_name: list[str] = []
        self.output_shape: torch.Size | None = None
        self.input_shape: torch.Size | None = inputs[0].output_shape if inputs else None
        self.from_input: bool = any(node.from_input for node in inputs)
        self.perturbed = self.from_input
        self.used, self.is_final_node = True, False
        self.batch_dim = 0 if self.from_input else -1
        self.perturbation: Any = None
        self.requires_input_bounds = [0] if self.nonlinear and self.from_input else []
        #: Number of the engine's node that has these values, where there is one.
        self.link: int | None = None
        self.lookup: Lookup | None = None

    @property
    def lower(self) -> Tensor | None:
        """Lower bounds from the last call, in the shape of the node; None before the first."""
        return self._box()[0]

    @property
    def upper(self) -> Tensor | None:
        """Upper bounds from the last call, in the shape of the node; None before the first."""
        return self._box()[1]

    @property
    def interval(self) -> tuple[Tensor | None, Tensor | None]:
        """Both ends."""
        return self._box()

    def _box(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.lookup is None else self.lookup(self)

    def is_input_perturbed(self, number: int = 0) -> bool:
        """Whether an input depends on the network's."""
        return number < len(self.inputs) and self.inputs[number].perturbed

    def __repr__(self) -> str:
        names = ", ".join(node.name for node in self.inputs)
        return f"{type(self).__name__}(name={self.name}, inputs=[{names}], perturbed={self.perturbed})"


class BoundActivation(Bound):
    nonlinear = True


class BoundOptimizableActivation(BoundActivation):
    pass


class BoundInput(Bound):
    """An input of the network; ``value`` is what it was last given."""

    value: Any = None


class BoundParams(BoundInput):
    """A parameter of the network, ``param``, shared and not copied."""

    param: nn.Parameter


class BoundBuffers(BoundInput):
    """A buffer of the network, ``buffer``, shared and not copied."""

    buffer: Tensor


class BoundExp(BoundOptimizableActivation):
    """The exponential; ``max_input`` is what loss fusion has subtracted from its input in the last call."""

    max_input: Any = 0


_OPTIMIZABLE = "Relu LeakyRelu Sigmoid Tanh Atan HardTanh Sign Softplus MaxPool Elu Gelu Sin Cos Tan Pow Sqr"
_ACTIVATIONS = "Log Sqrt Reciprocal Softmax Abs ReduceMax ReduceMin TanhGrad SigmoidGrad Floor Hardswish Mish"
_OTHERS = """Linear Conv ConvTranspose BatchNormalization Add Sub Mul Div Neg MatMul AveragePool
GlobalAveragePool ReduceMean ReduceSum Flatten Reshape Transpose Squeeze Unsqueeze Concat Slice Split Pad Gather
GatherElements Dropout Cast Constant ConstantOfShape PrimConstant Shape Expand Tile Identity Max Min Where Equal Not
Upsample Resize Cast CumSum Unknown LayerNormalization"""


def _classes() -> dict[str, type[Bound]]:
    made: dict[str, type[Bound]] = {}
    for names, base in (
        (_OPTIMIZABLE, BoundOptimizableActivation),
        (_ACTIVATIONS, BoundActivation),
        (_OTHERS, Bound),
    ):
        for name in names.split():
            made[f"Bound{name}"] = type(f"Bound{name}", (base,), {"__module__": __name__})
    return made


CLASSES = {**_classes(), "BoundExp": BoundExp}
globals().update(CLASSES)

#: Kinds of the exporter's nodes whose class has another name.
_RENAMED = {
    "onnx::Gemm": "BoundLinear",
    "onnx::Clip": "BoundHardTanh",
    "custom::Gelu": "BoundGelu",
    "grad::Tanh": "BoundTanhGrad",
    "grad::Sigmoid": "BoundSigmoidGrad",
    "grad::Sqr": "BoundSqr",
    "prim::Constant": "BoundPrimConstant",
}


def class_of(kind: str) -> type[Bound]:
    """The class of an exporter's node, ``BoundUnknown`` where there is none."""
    name = _RENAMED.get(kind) or "Bound" + kind.rpartition("::")[2]
    return CLASSES.get(name, CLASSES["BoundUnknown"])


class Interval(tuple):
    """A pair of ends, as scripts build it: ``Interval(lower, upper)``."""

    def __new__(cls, lower: Any = None, upper: Any = None, ptb: Any = None) -> Interval:
        made = super().__new__(cls, (lower, upper))
        made.ptb = ptb
        return made

    ptb: Any


#: Files that auto_LiRPA spreads these classes over; imports from them find this module.
_FILES = """base linear convolution pooling activation_base activations relu bivariate add_sub normalization
shape reduce softmax constant leaf logical dropout dtype trigonometric resize indexing slice_concat reshape minmax
convex_concave gelu tile solver_utils"""

try:  # the optional solver of ``build_solver_module``
    import gurobipy as grb
except ImportError:
    grb = None

for _file in _FILES.split():
    sys.modules[f"{__name__}.{_file}"] = sys.modules[__name__]
    globals()[_file] = sys.modules[__name__]
