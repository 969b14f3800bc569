"""The program a network is traced into: a flat list of operators over live parameters.

A :class:`Graph` is what :func:`pycert.graph.trace` returns and what the engine
(``pycert._C.Program``) is built from. Values have a batch dimension that is never written
down: ``Node.shape`` is the shape of one sample. Nodes stand in topological order.

Operators (``params`` are slot numbers, -1 where absent; ``attrs`` as named here):

====================  =========================  ==================================================================
op                    params                     attrs and meaning
====================  =========================  ==================================================================
``input``                                        ``index``: which argument of the network
``constant``          value                      the value of a slot, the same for every sample, shape ``shape``
``linear``            weight, bias               on the last dimension; weight ``[out, in]``
``conv``              weight, bias               ``stride, padding, dilation, output_padding`` (two ints each),
                                                 ``groups``, ``transposed``; shapes ``[C, H, W]``; a 3-d weight
                                                 (conv1d) counts as ``[O, I, 1, k]``, the value as ``[C, 1, L]``
``batch_norm``        weight, bias, mean, var    ``eps``, ``module``: number in ``Graph.batch_norms``; channels first
``mul_const``         factor                     ``value`` (float) where there is no slot; factor broadcasts to shape
``div_const``         divisor                    ``value`` where there is no slot
``add_const``         term                       ``value`` where there is no slot; ``sign``: +1 or -1 times the term
``add``                                          two inputs of equal shape, ``sign``: a + sign * b; ``roundings`` of
                                                 an execution relative to |a| + |b| (float, 0 where absent)
``sum``                                          over the last dimension, divided by ``divisor`` (float, 1 for sums);
                                                 ``roundings`` of an execution beyond those of a plain sum
``product``                                      two inputs of equal shape: a * b, elementwise
``matmul``                                       two inputs ``[*P, I, K]``, ``[*P, K, J]``: their matrix product;
                                                 ``roundings`` of an execution beyond those of a plain sum
``limit``                                        a value known to lie in [``min``, ``max``] (infinite where absent).
                                                 An execution may be off by ``roundings`` of the value and ``lost``
                                                 smallest normal numbers, and leave the range by as much; what the
                                                 value stands for is at most ``eps`` from it (0 where absent); with
                                                 inputs y, x, r (one shape, normalised over the last dimension)
                                                 also by what a mean's error makes of y = (x - mean) r
``avg_pool``                                     ``kernel, stride, padding`` (two ints each), ``ceil_mode``,
                                                 ``count_include_pad``, ``divisor`` (int, 0: none); ``[C, H, W]``
``max_pool``                                     ``kernel, stride, padding, dilation``, ``ceil_mode``; ``[C, H, W]``
``max2``, ``min2``                               inputs a, b, d with d = a - b (an ``add``): elementwise max, min
``reshape``                                      same elements in the same order
``gather``                                       ``index``: int64 tensor ``[numel of shape]`` into the flattened
                                                 input, -1 gives the constant ``fill`` (float)
``concat``                                       flattened inputs one after the other
``relu abs``                                     elementwise
``sigmoid tanh``                                 elementwise
``leaky_relu``                                   ``slope`` (float)
``prelu``             slope                      slope: 1 value or one per channel (first dimension)
``clamp``                                        ``min``, ``max`` (floats, infinite where absent)
``elu``                                          ``alpha`` (float): alpha (exp(x) - 1) for x < 0
``softplus``                                     ``threshold`` (float): log(1 + exp(x)), x beyond it
``silu mish hardswish``                          elementwise
``gelu gelu_tanh``                               elementwise: with erf, and its approximation by tanh
``softsign exp log sqrt``                        elementwise
``reciprocal square sin cos``                    elementwise
``custom``                                       ``name``: of a function given to ``register_activation``
====================  =========================  ==================================================================

Everything else is lowered to these: slicing, padding, permuting, flipping and broadcasting become
``gather``; concatenation in an inner dimension ``concat`` + ``gather``; MaxMin ``add``, ``max2``,
``min2``; SELU, CELU and the beta of Softplus are products by constants around ``elu`` and ``softplus``,
Hardsigmoid a ``clamp`` between two; Tanhshrink and Softshrink subtract ``tanh`` and ``clamp`` from x;
powers are ``square``, ``sqrt`` and ``reciprocal`` in turn; means over dimensions ``gather`` + ``sum``; an
adaptive pool with unequal windows ``linear`` + ``div_const``; quotients of values a product with a
``reciprocal``; three-dimensional convolutions grouped two-dimensional ones, a group for every depth; softmax
``1 / (1 + sum_{j != i} exp(x_j - x_i))``; LayerNorm and its relatives mean, difference, ``square``, ``sum``,
``sqrt``, ``reciprocal`` and ``product``. What these return is in a known range, which a ``limit`` adds.

What a slot is read from is a :class:`Slot`, an :class:`Expression` or a :class:`Constant`. The value
of a factor, divisor or term has at most as many dimensions as the node's shape (never a batch
dimension) and broadcasts to it; it may be of another dtype or device than the values of the
network (an integer buffer, a float64 constant), so readers convert it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pycert.errors import UnsupportedOperator

#: Operators that are affine in their inputs, so that back-substitution passes them exactly.
AFFINE = frozenset(
    "linear conv batch_norm mul_const div_const add_const add sum avg_pool reshape gather concat".split()
)
#: Products of two values, relaxed by two planes.
BILINEAR = frozenset(("product", "matmul"))
#: Elementwise activations: one input, the same shape, relaxed by two lines.
ACTIVATIONS = frozenset(
    """relu abs sigmoid tanh leaky_relu prelu clamp elu softplus silu mish hardswish gelu gelu_tanh softsign
    exp log sqrt reciprocal square sin cos custom""".split()
)


@dataclasses.dataclass
class Node:
    """One operator; see the module's table for ``params`` and ``attrs``."""

    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    params: tuple[int, ...] = ()
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: str = ""  # where it stands in the module, as "layer1.0.conv2" or "layer1.0.add"


@dataclasses.dataclass
class Slot:
    """A live parameter, buffer or tensor attribute: read from its owner at every call."""

    owner: nn.Module
    name: str
    path: str

    def value(self) -> Tensor:
        owner = self.owner
        found: Tensor | None = owner._parameters.get(self.name)
        if found is None:
            found = owner._buffers.get(self.name)
        return getattr(owner, self.name) if found is None else found


@dataclasses.dataclass
class Constant:
    """A tensor that no module owns, made or captured by the forward; read by reference, so never stale."""

    tensor: Tensor
    path: str

    def value(self) -> Tensor:
        return self.tensor


@dataclasses.dataclass
class Expression:
    """A function of live tensors, as ``weight.t()`` or ``scale.exp()``; evaluated anew, with gradient, at each call.

    ``args`` and ``kwargs`` hold :class:`Slot`, :class:`Constant` and :class:`Expression` where the
    function was given tensors. ``detached``: the forward computes it under ``torch.no_grad()``.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str
    detached: bool = False

    def value(self, known: dict[int, Any] | None = None) -> Any:
        """The present value; ``known`` keeps values of expressions that several others share."""
        known = {} if known is None else known
        if id(self) not in known:
            args, kwargs = _present(self.args, known), _present(self.kwargs, known)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
                known[id(self)] = self.function(*args, **kwargs)
        return known[id(self)]


#: What a parameter of a node is read from.
Source = Slot | Constant | Expression


def _present(value: Any, known: dict[int, Any]) -> Any:
    """``value`` with the present value in place of every source in it, however nested."""
    if isinstance(value, Expression):
        return value.value(known)
    if isinstance(value, (Slot, Constant)):
        return value.value()
    if isinstance(value, (tuple, list)):
        return type(value)(_present(item, known) for item in value)
    if isinstance(value, dict):
        return {key: _present(item, known) for key, item in value.items()}
    return value


@dataclasses.dataclass
class Pin:
    """A buffer, or a function of some, whose value shaped the trace (as indices do): it must stay as it was."""

    source: Source
    traced: Tensor

    def holds(self) -> bool:
        now = self.source.value()
        return now is self.traced or (
            now.shape == self.traced.shape and torch.equal(now.to(self.traced.device), self.traced)
        )


@dataclasses.dataclass
class Graph:
    """A traced network: nodes in topological order, the last result in ``output``."""

    nodes: list[Node]
    output: int
    slots: list[Source]
    inputs: list[tuple[int, ...]]  # shape of one sample of every argument
    batch_norms: list[nn.Module]
    eval_only: list[tuple[str, nn.Module]] = dataclasses.field(default_factory=list)
    pins: list[Pin] = dataclasses.field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """The present value of every slot, in slot order."""
        known: dict[int, Any] = {}
        return [slot.value(known) if isinstance(slot, Expression) else slot.value() for slot in self.slots]

    def numel(self, node: int) -> int:
        return math.prod(self.nodes[node].shape)

    def check(self) -> None:
        """Refuses what no longer is as it was traced; to be called before each use, cheap.

        Raises:
            UnsupportedOperator: a module that was traced in evaluation mode and differs in training
                mode (Dropout) has been put into training mode.
            RuntimeError: a buffer whose value is built into the trace has changed.
        """
        for path, module in self.eval_only:
            if module.training:
                hint = "its output is random or differs in training mode; call .eval() on it, or trace again"
                raise UnsupportedOperator(path, f"{type(module).__name__} in training mode", hint)
        for pin in self.pins:
            if not pin.holds():
                raise RuntimeError(
                    f"'{pin.source.path}' has changed since the network was traced, and its value is built into "
                    "the trace (as an index, a mask or in control flow); trace the network again"
                )
