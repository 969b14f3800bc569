"""Tracing: from a module and an example input to a Graph over its live parameters."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycert._flags import no_autocast
from pycert.errors import UnsupportedOperator
from pycert.graph import (  # noqa: F401 - they register the lowerings
    attention,
    convolution,
    convolution3d,
    elementwise,
    joining,
    movement,
    normalization,
    pooling,
    products,
    reduction,
    softmax,
    standardization,
)
from pycert.graph.builder import prune
from pycert.graph.ir import Constant, Expression, Graph, Node, Slot, Source
from pycert.graph.live import leaves
from pycert.graph.modules import Shadows, unwrap
from pycert.graph.tracer import Traced, Tracer

_BATCHES = (2, 3)  # the forward runs on both: what depends on the batch size shows as a difference


def trace(module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Graph:
    """The network as a flat program whose parameters stay those of ``module``.

    The forward runs on stand-ins that know shapes but no values, so nothing is computed, and
    control flow on shapes and on Python values is followed. ``module`` is not changed, and other
    threads may use it meanwhile. Parameters, buffers and what the forward computes from them are read
    at each use of the graph (:meth:`Graph.tensors`), never copied.

    Args:
        module: any module of supported layers and functions; DataParallel, DistributedDataParallel and
            torch.compile wrappers are taken off.
        example: ``[B, *in]``, float32 or float64, or a tuple of one tensor for each argument of the
            forward. Only shapes, dtype and device are used; the batch size is free afterwards.

    Returns:
        The graph, in canonical form (see :mod:`pycert.graph.ir`).

    Raises:
        UnsupportedOperator: a layer, a function, control flow on values, or a use of the batch
            dimension that cannot be bounded, with its path, type and the nearest supported form.
        TypeError, ValueError: ``module`` or ``example`` is of the wrong type, dtype or shape.

    Soundness: the graph computes in exact arithmetic what the forward does; constants of one value
    become Python floats.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"trace: module must be a torch.nn.Module, got {type(module).__name__}")
    examples = _checked_examples(example)
    root = unwrap(module)
    graph, met = _trace_at(root, examples, _BATCHES[0])
    again, met_again = _trace_again(root, examples)
    # a constant that both runs met was not made in the forward: it is read by reference, for it may change
    outside = [value for number, value in met.items() if number in met_again]
    if outside:
        graph, _ = _trace_at(root, examples, _BATCHES[0], outside)
        again, _ = _trace_again(root, examples, outside)
    if not same(graph, again) or _special_at_one(root, examples, outside, graph):
        raise UnsupportedOperator(
            "",
            "a forward whose values depend on the batch size",
            "samples must stay apart, and numbers must be those of every run (none drawn, none NaN)",
        )
    return graph


def _checked_examples(example: Any) -> tuple[Tensor, ...]:
    examples = (example,) if isinstance(example, Tensor) else example
    if not isinstance(examples, (tuple, list)) or not examples:
        raise TypeError(
            f"trace: example must be a tensor or a tuple of tensors, got {type(example).__name__}"
        )
    for item in examples:
        if not isinstance(item, Tensor):
            raise TypeError(f"trace: example must hold tensors, got {type(item).__name__}")
        if item.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"trace: example must be float32 or float64, got {item.dtype}")
        if item.dim() == 0:
            raise ValueError(
                "trace: example must have a batch dimension, [B, *in], got a tensor without dimensions"
            )
    if len({item.shape[0] for item in examples}) != 1:
        sizes = [item.shape[0] for item in examples]
        raise ValueError(f"trace: the examples must have one batch size, got {sizes}")
    return tuple(examples)


def _trace_again(
    root: nn.Module, examples: tuple[Tensor, ...], outside: Sequence[Tensor] = ()
) -> tuple[Graph, dict[int, Tensor]]:
    """A run at another batch size."""
    try:
        return _trace_at(root, examples, _BATCHES[1], outside)
    except Exception as error:
        raise UnsupportedOperator(
            "", f"a forward that works at batch {_BATCHES[0]} and not at {_BATCHES[1]}", f"it says: {error}"
        ) from error


def _special_at_one(
    root: nn.Module, examples: tuple[Tensor, ...], outside: Sequence[Tensor], graph: Graph
) -> bool:
    """Whether one sample alone is treated in another way; what takes no single sample, as squeeze(), is left."""
    try:
        alone, _ = _trace_at(root, examples, 1, outside)
    except Exception:
        return False
    return not same(graph, alone)


def _trace_at(
    root: nn.Module, examples: tuple[Tensor, ...], batch: int, outside: Sequence[Tensor] = ()
) -> tuple[Graph, dict[int, Tensor]]:
    """One run of the forward with ``batch`` samples, and the constants that it met beside those ``outside``."""
    tracer = Tracer(batch, examples[0].dtype, examples[0].device, normalization.module_lowering)
    shadows = Shadows(root, tracer.wrap_forward)
    tracer.live.owned = shadows.slots
    for value in outside:
        tracer.live.outside(value, "network")
    inputs = []
    for index, item in enumerate(examples):
        node = tracer.builder.emit(
            "input", (), tuple(item.shape[1:]), index=index, path=f"input{index or ''}"
        )
        inputs.append(tracer.wrap(node, item.dtype))
    with torch.enable_grad(), no_autocast(), tracer:
        output = _run(shadows.root, inputs)
    number = _output(tracer, output)
    nodes, number, slots = prune(tracer.builder.nodes, number)
    used = sorted({kept.attrs["module"] for kept in nodes if kept.op == "batch_norm"})
    for kept in nodes:
        if kept.op == "batch_norm":
            kept.attrs["module"] = used.index(kept.attrs["module"])
    graph = Graph(
        nodes=nodes,
        output=number,
        slots=[tracer.live.sources[slot] for slot in slots],
        inputs=[tuple(item.shape[1:]) for item in examples],
        batch_norms=[tracer.batch_norms[i] for i in used],
        eval_only=list(tracer.eval_only.values()),
        pins=tracer.live.pins,
    )
    return graph, tracer.live.met


def _run(root: nn.Module, inputs: list[Traced]) -> Any:
    try:
        return root(*inputs)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(f"torch{os.sep}_dynamo{os.sep}" in frame.filename for frame in frames):
            hint = "call the function itself (compiled modules are unwrapped by themselves)"
            raise UnsupportedOperator("", "a function under torch.compile", hint) from error
        raise


def _output(tracer: Tracer, output: Any) -> int:
    if isinstance(output, Traced):
        if output.numel() == 0:
            raise UnsupportedOperator(
                "", f"an output without elements, {list(output.shape)[1:]} a sample", ""
            )
        return tracer.node(output)
    hint = "return one tensor [B, ...] that depends on the input; wrap the module to choose one"
    if isinstance(output, (tuple, list, dict)):
        raise UnsupportedOperator("", f"an output of type {type(output).__name__}", hint)
    if isinstance(output, Tensor):
        raise UnsupportedOperator("", "an output that does not depend on the input", hint)
    raise UnsupportedOperator("", f"an output of type {type(output).__name__}", hint)


def same(first: Graph, second: Graph) -> bool:
    """Whether two traces are the same network, whatever batch size they were made at.

    Expressions are compared by their present value and by what they read, so both must be of the same modules.
    """
    if (first.output, len(first.nodes), len(first.slots)) != (
        second.output,
        len(second.nodes),
        len(second.slots),
    ):
        return False
    if not all(_same_node(a, b) for a, b in zip(first.nodes, second.nodes)):
        return False
    return all(_same_source(a, b) for a, b in zip(first.slots, second.slots))


def _same_node(first: Node, second: Node) -> bool:
    fields = ("op", "inputs", "shape", "params", "path")
    return all(getattr(first, name) == getattr(second, name) for name in fields) and _same_attrs(
        first.attrs, second.attrs
    )


def _same_attrs(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        for key, value in first.items()
    )


def _same_source(first: Source, second: Source) -> bool:
    """Expressions may hold the batch size, as ``expand(x.size(0), -1)`` does; their values must agree."""
    if isinstance(first, Slot) and isinstance(second, Slot):
        return first.owner is second.owner and first.name == second.name
    if not isinstance(first, (Constant, Expression)) or type(first) is not type(second):
        return False
    if _slots(first) != _slots(second):
        return False
    if _outside(first) != _outside(second):
        hint = "use the parameter itself: a copy would be frozen into the trace"
        raise UnsupportedOperator("", "a Parameter made or copied in the forward", hint)
    with torch.no_grad():
        a, b = first.value(), second.value()
    return a is b or (a.shape == b.shape and (a.is_meta or torch.equal(a, b)))


def _slots(source: Source) -> list[tuple[int, str]]:
    """What is read anew at every call: values that are equal today need not stay so."""
    return [(id(leaf.owner), leaf.name) for leaf in leaves(source) if isinstance(leaf, Slot)]


def _outside(source: Source) -> set[int]:
    """The tensors with gradient that no module owns, by id: the same in two traces, or made in the forward."""
    return {
        id(leaf.tensor) for leaf in leaves(source) if isinstance(leaf, Constant) and leaf.tensor.requires_grad
    }
