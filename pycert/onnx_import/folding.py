"""Values that do not depend on the input, computed while the network is read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

#: Evaluated by ONNX's reference implementation. None of them calls anything that the file could name.
OPERATORS = frozenset(
    """Constant ConstantOfShape Identity Cast Gather Concat Unsqueeze Squeeze Slice Split Reshape Transpose Flatten
    Shape Size Expand Tile Range Add Sub Mul Div Mod Neg Abs Sqrt Exp Log Pow Reciprocal Floor Ceil Min Max Sum Equal
    Less LessOrEqual Greater GreaterOrEqual Not And Or Where ReduceProd ReduceSum ReduceMax ReduceMin MatMul""".split()
)
#: A folded value of more elements than this is refused: a small file can ask for any size.
MAX_ELEMENTS = 1 << 26


def fold(node: Any, proto: Any, opset: int) -> list[np.ndarray]:
    """The outputs of a node whose inputs are all known.

    Raises:
        ValueError: an output would be too large, or the node contradicts itself.
        UnsupportedOperator: the operator is not in :data:`OPERATORS`.
    """
    if node.op not in OPERATORS:
        node.refuse("of constants alone", "let the exporter compute it (constant folding)")
    if node.op == "Constant":
        return [_constant(node)]
    size = _size(node)
    if size > MAX_ELEMENTS:
        raise ValueError(f"its result has {size} elements, at most {MAX_ELEMENTS} are accepted")
    names = [name for name in proto.input if name]
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in zip(proto.input, node.inputs)
        if name
    ]
    outputs = [name for name in proto.output if name]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph([proto], "folded", list({info.name: info for info in infos}.values()), results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    values = {name: value for name, value in zip(proto.input, node.inputs) if name}
    with np.errstate(all="ignore"):
        found = iter(ReferenceEvaluator(model).run(None, {name: values[name] for name in names}))
    return [np.asarray(next(found)) if name else np.zeros(0) for name in proto.output]


def _constant(node: Any) -> np.ndarray:
    for name, value in node.attributes.items():
        if name == "value":
            return numpy_helper.to_array(value).copy()
        if name in ("value_float", "value_floats"):
            return np.array(value, dtype=np.float32)
        if name in ("value_int", "value_ints"):
            return np.array(value, dtype=np.int64)
    return node.refuse(f"with {', '.join(node.attributes) or 'no value'}", "use a dense tensor of numbers")


def _size(node: Any) -> int:
    """A limit on the elements of the result, in Python integers, which do not overflow."""
    shapes = [value.shape for value in node.inputs if value is not None]
    sizes = [math.prod(shape) for shape in shapes]
    if node.op == "ConstantOfShape":
        return math.prod(_ints(node.inputs[0]))
    if node.op == "Expand":
        return _broadcast(shapes[0], _ints(node.inputs[1]))
    if node.op == "Tile":
        return sizes[0] * math.prod(_ints(node.inputs[1]))
    if node.op == "Range":
        start, limit, step = (value.reshape(-1)[0].item() for value in node.inputs)
        return max(0, math.ceil((limit - start) / step))
    if node.op == "Gather":
        axis = node.attribute("axis", 0)
        return sizes[0] * sizes[1] // max(shapes[0][axis], 1) if shapes[0] else sizes[1]
    if node.op == "MatMul":
        return sizes[0] // max(shapes[0][-1], 1) * sizes[1]
    if node.op in ("Concat", "Slice", "Reshape", "Split", "Transpose"):
        return sum(sizes)
    return _broadcast(*shapes)


def _ints(values: np.ndarray) -> list[int]:
    return [int(value) for value in values.reshape(-1)]


def _broadcast(*shapes: Any) -> int:
    """Elements of the common shape, or more where the shapes do not fit."""
    dims = max((len(shape) for shape in shapes), default=0)
    padded = [(1,) * (dims - len(shape)) + tuple(shape) for shape in shapes]
    return math.prod(max(sizes) for sizes in zip(*padded))
