"""Networks from ONNX files: every operator against onnxruntime and its own bounds, hostile files, public networks."""

from __future__ import annotations

import copy
import csv
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import pycert

onnx = pytest.importorskip("onnx", reason="ONNX files need the package onnx: pip install 'pycert[onnx]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.helper import make_node as node  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

try:
    import onnxruntime
except ImportError:  # ONNX's own evaluator is slower and knows everything that the tests use
    onnxruntime = None

GENERATOR = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def i(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def model(nodes, shape, constants=None, opset=13, kind=TensorProto.FLOAT, outputs=("y",)):
    """A file with the input ``x`` of ``shape`` and constants as initializers."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def load(folder, *args, check=None, name="net.onnx", options=None, **kwargs):
    onnx.save(model(*args, **kwargs), folder / name)
    return pycert.load_onnx(folder / name, check=check, **(options or {}))


def evaluate(made, x: torch.Tensor) -> torch.Tensor:
    """Each sample by itself, as another program computes it; ``x``: ``[B, *shape of the file]``."""
    if onnxruntime is not None:
        session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        found = [session.run(None, {"x": sample.numpy()})[0] for sample in x]
    else:
        found = [ReferenceEvaluator(made).run(None, {"x": sample.numpy()})[0] for sample in x]
    return torch.from_numpy(np.stack(found))


def assert_bounds_hold(net, samples=24, methods=("ibp", "crown"), radius=0.25) -> None:
    """Outputs of points in a box lie within the bounds, for a batch of three boxes."""
    x = 2 * torch.rand(3, *net.sample_shape, generator=torch.Generator().manual_seed(1)) - 1
    bm = pycert.BoundedModule(net, net.example_input())
    with torch.no_grad():
        for method in methods:
            bounds = bm.bound(pycert.LpBall(x, eps=radius), method=method)
            assert bounds.lower.shape == (3, *net.output_shape)
            for _ in range(samples):
                outputs = net(x + radius * (2 * torch.rand_like(x) - 1))
                assert (bounds.lower <= outputs).all() and (outputs <= bounds.upper).all(), method


@pytest.fixture(autouse=True)
def without_transforms():
    with torch.backends.nnpack.flags(enabled=False):
        yield


# ---- operators --------------------------------------------------------------------------------

#: name: (nodes, shape of the file's input, constants, opset)
CASES: dict[str, tuple] = {}
#: Read and compared, and bounded as soon as the tracer knows them.
UNBOUNDED = set()


def case(name, nodes, shape, constants=None, opset=13, bounded=True):
    CASES[name] = (nodes, shape, constants or {}, opset)
    if not bounded:
        UNBOUNDED.add(name)


def one(name, shape, constants=None, inputs=None, opset=13, bounded=True, **attributes):
    op = name.split()[0]
    constants = constants or {}
    case(name, [node(op, inputs or ["x", *constants], ["y"], **attributes)], shape, constants, opset, bounded)


one("Gemm", [1, 5], dict(W=f(5, 4), b=f(4)))
one("Gemm alpha, beta, C of rows", [1, 5], dict(W=f(4, 5), b=f(1, 4)), transB=1, alpha=0.7, beta=0.3)
one("Gemm scalar C, symbolic batch", ["n", 5], dict(W=f(4, 5), b=f(1)), transB=1)
one("Gemm without C", [1, 5], dict(W=f(4, 5)), transB=1)
one("Gemm of three rows a sample", [3, 5], dict(W=f(4, 5), b=f(3, 4)), transB=1)
one("MatMul of rows", [1, 6, 5], dict(W=f(5, 4)))
one("MatMul with a batch of one matrix", [1, 6, 5], dict(W=f(1, 5, 4)))
one("MatMul with a vector", [1, 5], dict(W=f(5)))
one("MatMul without batch", [5], dict(W=f(5, 3)))
one("MatMul from the left", [1, 5, 3], dict(W=f(4, 5)), ["W", "x"])
one("MatMul from the left without batch", [5, 3], dict(W=f(4, 5)), ["W", "x"])
one("MatMul from the left of one row", [1, 3], dict(W=f(4, 1)), ["W", "x"])
case(
    "MatMul, Add",
    [node("MatMul", ["x", "W"], ["a"]), node("Add", ["b", "a"], ["y"])],
    [1, 5],
    dict(W=f(5, 4), b=f(4)),
)
case(
    "MatMul read twice",
    [
        node("MatMul", ["x", "W"], ["a"]),
        node("Add", ["a", "b"], ["c"]),
        node("Sub", ["c", "a"], ["d"]),
        node("Add", ["d", "a"], ["y"]),
    ],
    [1, 5],
    dict(W=f(5, 4), b=f(4)),
)
case(
    "weight computed in the file",
    [node("Transpose", ["W"], ["T"]), node("Mul", ["T", "two"], ["V"]), node("MatMul", ["x", "V"], ["y"])],
    [1, 5],
    dict(W=f(4, 5), two=np.float32(2)),
)
one("Conv", [1, 3, 7, 8], dict(W=f(4, 3, 3, 3), b=f(4)), pads=[1, 0, 1, 0], strides=[2, 1])
one("Conv with pads of one side", [1, 3, 7, 8], dict(W=f(4, 3, 3, 3)), pads=[1, 0, 0, 2])
one("Conv in one dimension, groups", [1, 4, 9], dict(W=f(6, 2, 3), b=f(6)), group=2, pads=[1, 1])
for mode in ("SAME_UPPER", "SAME_LOWER", "VALID"):
    one(f"Conv {mode}", [1, 2, 7, 8], dict(W=f(4, 2, 3, 2)), auto_pad=mode, strides=[2, 2])
case(
    "Conv, Add of channels",
    [node("Conv", ["x", "W"], ["a"]), node("Add", ["a", "b"], ["y"])],
    [1, 2, 5, 5],
    dict(W=f(3, 2, 3, 3), b=f(3, 1, 1)),
)
case(
    "Conv, Add along the width",
    [node("Conv", ["x", "W"], ["a"]), node("Add", ["a", "b"], ["y"])],
    [1, 2, 5, 5],
    dict(W=f(3, 2, 3, 3), b=f(3)),
)
one(
    "ConvTranspose",
    [1, 3, 4, 5],
    dict(W=f(3, 2, 3, 3), b=f(2)),
    strides=[2, 2],
    pads=[1, 1, 1, 1],
    output_padding=[1, 1],
)
one(
    "ConvTranspose with pads of one side",
    [1, 3, 4, 5],
    dict(W=f(3, 2, 3, 3)),
    strides=[2, 2],
    pads=[1, 0, 0, 1],
)
one("ConvTranspose SAME_UPPER", [1, 3, 4, 5], dict(W=f(3, 2, 3, 3)), strides=[2, 2], auto_pad="SAME_UPPER")
one("ConvTranspose SAME_LOWER", [1, 3, 4, 5], dict(W=f(3, 2, 3, 3)), strides=[2, 2], auto_pad="SAME_LOWER")
one(
    "ConvTranspose output_shape",
    [1, 3, 4, 5],
    dict(W=f(3, 2, 3, 3), b=f(2)),
    strides=[2, 2],
    output_shape=[8, 10],
)
one("ConvTranspose in one dimension, groups", [1, 4, 4], dict(W=f(4, 3, 3)), group=2, strides=[2])
for shape in ([1, 3, 4, 5], [1, 3, 4], ["n", 3]):
    one(
        f"BatchNormalization {len(shape)}",
        shape,
        dict(s=f(3), b=f(3), m=f(3), v=np.abs(f(3)) + 0.1),
        epsilon=1e-3,
    )
for op in "Relu Sigmoid Tanh LeakyRelu Abs Neg Sign Identity HardSigmoid".split():
    one(op, [1, 6])
for op in "Elu Selu Celu Softplus Softsign Exp Sin Cos Atan Erf".split():
    one(op, [1, 6], bounded=False)
one("HardSwish", [1, 6], opset=14, bounded=False)
one("Mish", [1, 6], opset=18, bounded=False)
one("Gelu", [1, 6], opset=20, bounded=False)
one("Gelu by tanh", [1, 6], opset=20, approximate="tanh", bounded=False)
one("Clip", [1, 6], dict(a=np.float32(-0.3), b=np.float32(0.4)))
one("Clip by attributes", [1, 6], opset=9, min=0.0, max=6.0)
one("Clip from below", [1, 6], dict(a=np.float32(0)))
one("Clip from above", [1, 6], dict(b=np.float32(0.2)), ["x", "", "b"])
one("Clip without limits", [1, 6])
one("PRelu of channels", [1, 3, 4, 5], dict(s=f(3, 1, 1)))
one("PRelu of columns", [1, 3, 4, 3], dict(s=f(3)))
one("PRelu of features", [1, 3], dict(s=f(3)))
one("PRelu of elements", [1, 3, 2], dict(s=f(3, 2)))
one("PRelu of all", [1, 3], dict(s=f(1)))
for op in "Add Sub Mul Div Max Min".split():
    one(f"{op} a row", [1, 3, 4], dict(c=f(4) + 3))
    one(f"{op} channels", [1, 3, 4], dict(c=f(1, 3, 1) + 3))
    one(f"{op} a number", [1, 3, 4], dict(c=np.float32(2)))
one("Sub from a constant", [1, 3, 4], dict(c=f(1, 3, 1)), ["c", "x"])
one("Add broadcast over the batch", [1, 4], dict(c=f(3, 4)))
one("Add of more dimensions", [1, 4], dict(c=f(2, 3, 4)))
one("Add without batch", [4], dict(c=f(3, 1)))
case(
    "Sub, Div, Mul as normalisation",
    [node("Sub", ["x", "m"], ["a"]), node("Div", ["a", "s"], ["b"]), node("Mul", ["b", "k"], ["y"])],
    [1, 3, 2, 2],
    dict(m=f(1, 3, 1, 1), s=np.abs(f(3, 1, 1)) + 0.5, k=np.float32(0.5)),
)
case("Add of values", [node("Relu", ["x"], ["a"]), node("Add", ["a", "x"], ["y"])], [1, 4])
case(
    "Add of values of other dimensions",
    [node("Reshape", ["x", "s"], ["a"]), node("Add", ["a", "x"], ["y"])],
    [1, 4],
    dict(s=i(1, 4, 1)),
)
case(
    "Sub without batch",
    [node("Squeeze", ["x"], ["a"]), node("Relu", ["a"], ["r"]), node("Sub", ["r", "x"], ["y"])],
    [1, 4, 3],
)
for op in ("Sum", "Mean", "Max"):
    case(
        f"{op} of three", [node("Neg", ["x"], ["a"]), node(op, ["a", "x", "c"], ["y"])], [1, 4], dict(c=f(4))
    )
case("Mul of values", [node("Relu", ["x"], ["a"]), node("Mul", ["a", "x"], ["y"])], [1, 4], bounded=False)
one("Pow 1", [1, 4], dict(c=np.float32(1)))
one("Pow 2", [1, 4], dict(c=np.float32(2)), bounded=False)
case(
    "Where",
    [node("Relu", ["x"], ["r"]), node("Where", ["m", "r", "c"], ["y"])],
    [1, 4],
    dict(m=np.array([True, False, True, True]), c=f(4)),
)
case(
    "Where of values",
    [node("Relu", ["x"], ["r"]), node("Where", ["m", "x", "r"], ["y"])],
    [1, 4],
    dict(m=np.array([[True], [False]])),
)
case("SiLU", [node("Sigmoid", ["x"], ["a"]), node("Mul", ["x", "a"], ["y"])], [1, 4], bounded=False)
case(
    "Mish written out",
    [node("Softplus", ["x"], ["s"]), node("Tanh", ["s"], ["a"]), node("Mul", ["x", "a"], ["y"])],
    [1, 4],
    bounded=False,
)
case(
    "HardSwish written out",
    [node("HardSigmoid", ["x"], ["a"], alpha=1 / 6), node("Mul", ["a", "x"], ["y"])],
    [1, 4],
    bounded=False,
)
case(
    "GELU written out",
    [
        node("Div", ["x", "r"], ["s"]),
        node("Erf", ["s"], ["e"]),
        node("Add", ["e", "o"], ["p"]),
        node("Mul", ["x", "p"], ["q"]),
        node("Mul", ["q", "h"], ["y"]),
    ],
    [1, 4],
    dict(r=np.float32(2**0.5), o=np.float32(1), h=np.float32(0.5)),
    bounded=False,
)
for axis in (0, 1, 2, -1):
    one(f"Flatten {axis}", [1, 3, 4, 5], axis=axis)
one("Flatten without batch", [3, 4], axis=1)
for target in (
    (1, -1),
    (-1, 12),
    (1, 12),
    (0, -1),
    (0, 0, -1),
    (12,),
    (3, 4),
    (-1, 3, 2, 2),
    (2, 6),
    (1, 1, 12),
):
    one(f"Reshape {target}", [1, 3, 4], dict(s=i(*target)))
one("Reshape of a symbolic batch", ["n", 3, 4], dict(s=i(-1, 12)))
one("Reshape of a symbolic batch to one row", ["n", 3, 4], dict(s=i(1, -1)))
case(
    "Shape, Gather, Unsqueeze, Concat",
    [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["b"]),
        node("Unsqueeze", ["b", "axis"], ["u"]),
        node("Concat", ["u", "rest"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["a"]),
        node("Gemm", ["a", "W", "c"], ["y"], transB=1),
    ],
    ["n", 3, 2, 2],
    dict(zero=np.int64(0), axis=i(0), rest=i(-1), W=f(4, 12), c=f(4)),
)
case(
    "Shape with Constant nodes",
    [
        node("Shape", ["x"], ["s"]),
        node("Constant", [], ["zero"], value=numpy_helper.from_array(np.int64(0))),
        node("Gather", ["s", "zero"], ["b"], axis=0),
        node("Unsqueeze", ["b"], ["u"], axes=[0]),
        node("Constant", [], ["rest"], value=numpy_helper.from_array(i(-1))),
        node("Concat", ["u", "rest"], ["t"], axis=0),
        node("Reshape", ["x", "t"], ["y"]),
    ],
    [1, 3, 2, 2],
    opset=11,
)
case(
    "Shape, Slice, ReduceProd, Cast",
    [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "from", "to"], ["h"]),
        node("ReduceProd", ["h"], ["p"]),
        node("Concat", ["rest", "p"], ["t"], axis=0),
        node("Cast", ["t"], ["c"], to=TensorProto.INT64),
        node("Reshape", ["x", "c"], ["y"]),
    ],
    ["n", 3, 2, 2],
    {"from": i(1), "to": i(4), "rest": i(-1)},
)
one("Expand", [1, 1, 4], dict(e=i(1, 3, 4)))
one("Expand over the batch", [1, 4], dict(e=i(3, 4)))
one("Expand to more dimensions", [1, 4], dict(e=i(2, 1, 4)))
for order in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
    one(f"Transpose {order}", [1, 3, 4], perm=order)
one("Transpose without batch", [3, 4])
one("Squeeze", [1, 1, 3, 1], opset=11, axes=[1, 3])
one("Squeeze the batch", [1, 1, 3], dict(a=i(0)))
one("Squeeze all", [1, 1, 3, 1])
one("Unsqueeze", [1, 3], dict(a=i(0, 3)))
one("Unsqueeze without batch", [3], opset=11, axes=[0])
case("Concat", [node("Relu", ["x"], ["a"]), node("Concat", ["a", "x"], ["y"], axis=-1)], [1, 3, 2])
case(
    "Concat along the batch", [node("Relu", ["x"], ["a"]), node("Concat", ["a", "x"], ["y"], axis=0)], [1, 3]
)
case("Concat with a constant", [node("Concat", ["c", "x"], ["y"], axis=1)], [1, 3], dict(c=f(1, 2)))
case(
    "Concat with a constant along the batch",
    [node("Concat", ["c", "x"], ["y"], axis=0)],
    [1, 3],
    dict(c=f(2, 3)),
)
case("Concat without batch", [node("Concat", ["c", "x"], ["y"], axis=0)], [3], dict(c=f(2)))
one("Slice", [1, 6, 5], dict(s=i(1, 0), e=i(5, 2**62), a=i(1, 2), t=i(2, 3)))
one("Slice by attributes", [1, 6], opset=9, starts=[1], ends=[-1], axes=[1])
one("Slice backwards", [1, 6], dict(s=i(-1), e=i(-(2**62)), a=i(1), t=i(-1)))
one("Slice without axes", [1, 6], dict(s=i(0, 2), e=i(1, 4)))
one("Slice without batch", [6], dict(s=i(2), e=i(4)))
one("Gather", [1, 6, 3], dict(i=i(2, 0, -1)), axis=1)
one("Gather one", [1, 6, 3], dict(i=np.int64(2)), axis=1)
one("Gather one of the last", [1, 6], dict(i=np.int64(2)), axis=1)
one("Gather the batch", [1, 6, 3], dict(i=np.int64(0)))
one("Gather a matrix of indices", [1, 6, 3], dict(i=np.array([[0, 1], [3, 3]])), axis=1)
case(
    "Split",
    [
        node("Split", ["x", "s"], ["a", "b"], axis=1),
        node("Relu", ["b"], ["r"]),
        node("Concat", ["r", "a"], ["y"], axis=1),
    ],
    [1, 5],
    dict(s=i(2, 3)),
)
case(
    "Split in equal parts",
    [node("Split", ["x"], ["a", "b"], axis=1), node("Sub", ["a", "b"], ["y"])],
    [1, 6],
    opset=11,
)
case(
    "Split in two of five",
    [node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), node("Concat", ["b", "a"], ["y"], axis=1)],
    [1, 5],
    opset=18,
)
one("Pad", [1, 2, 3, 4], dict(p=i(0, 0, 1, 0, 0, 1, 0, 2), v=np.float32(0.5)))
one("Pad by attributes", [1, 2, 3, 4], opset=10, pads=[0, 0, 1, 1, 0, 0, 1, 1])
one("Pad that crops", [1, 2, 3, 4], dict(p=i(0, 0, -1, 0, 0, 0, 0, 2)))
one("Pad of the batch", [1, 3], dict(p=i(0, 1, 2, 0)))
one("Pad reflect", [1, 2, 3, 4], dict(p=i(0, 0, 1, 2, 0, 0, 1, 1)), mode="reflect")
one("Pad edge", [1, 2, 3, 4], dict(p=i(0, 1, 1, 2, 0, 0, 1, 1)), mode="edge")
one("Pad of an axis", [1, 2, 3], dict(p=i(1, 1), v=np.float32(0), a=i(-1)), opset=18)
for form, rounding in (
    ("asymmetric", "floor"),
    ("half_pixel", "round_prefer_floor"),
    ("align_corners", "ceil"),
):
    one(
        f"Resize {form}",
        [1, 2, 3, 4],
        dict(r=f(0), s=np.array([1, 1, 2, 3], np.float32)),
        coordinate_transformation_mode=form,
        nearest_mode=rounding,
    )
one("Resize to sizes", [1, 2, 3, 4], dict(e=f(0), n=f(0), s=i(1, 2, 2, 7)), nearest_mode="round_prefer_ceil")
one("Resize of old", [1, 2, 3, 4], dict(s=np.array([1, 1, 2, 1], np.float32)), opset=10)
one("Upsample", [1, 2, 3, 4], opset=7, scales=[1.0, 1.0, 2.0, 2.0])
one("Tile", [1, 2, 3], dict(r=i(1, 2, 1)))
one("Tile of the batch", [1, 2, 3], dict(r=i(2, 1, 2)))
one("DepthToSpace DCR", [1, 8, 2, 3], blocksize=2)
one("DepthToSpace CRD", [1, 8, 2, 3], blocksize=2, mode="CRD")
one("SpaceToDepth", [1, 2, 4, 6], blocksize=2)
one("MaxPool", [1, 2, 6, 7], kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 0])
one("MaxPool with pads of one side", [1, 2, 6, 7], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 2])
one("MaxPool SAME_LOWER", [1, 2, 6, 7], kernel_shape=[2, 2], auto_pad="SAME_LOWER")
one("MaxPool SAME_LOWER by steps", [1, 2, 6, 7], kernel_shape=[3, 3], auto_pad="SAME_LOWER", strides=[2, 2])
one("MaxPool ceil_mode", [1, 2, 6, 7], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
one("MaxPool dilated", [1, 2, 9, 7], kernel_shape=[3, 2], dilations=[2, 2])
one("MaxPool in one dimension", [1, 2, 9], kernel_shape=[3])
for counted in (0, 1):
    one(
        f"AveragePool counted {counted}",
        [1, 2, 6, 7],
        kernel_shape=[3, 2],
        strides=[2, 2],
        pads=[1, 0, 1, 0],
        count_include_pad=counted,
    )
    one(
        f"AveragePool with pads of one side, counted {counted}",
        [1, 2, 6, 7],
        kernel_shape=[3, 3],
        strides=[2, 1],
        pads=[0, 1, 1, 2],
        count_include_pad=counted,
    )
    one(
        f"AveragePool SAME_UPPER counted {counted}",
        [1, 2, 6, 7],
        kernel_shape=[3, 3],
        strides=[2, 2],
        auto_pad="SAME_UPPER",
        count_include_pad=counted,
    )
one("GlobalAveragePool", [1, 3, 4, 5])
one("GlobalAveragePool in one dimension", [1, 3, 4])
one("GlobalMaxPool", [1, 3, 4, 5])
one("ReduceSum", [1, 3, 4], dict(a=i(1)), keepdims=0)
one("ReduceSum of the last two", [1, 3, 4], dict(a=i(-1, 1)))
one("ReduceSum of all", [1, 3, 4], keepdims=0)
one("ReduceSum of a batch of one", [1, 3, 4], dict(a=i(0)), keepdims=0)
for op in ("ReduceMean", "ReduceMax", "ReduceMin"):
    one(op, [1, 3, 4], axes=[2], keepdims=0)
    one(f"{op} of two", [1, 3, 4], axes=[1, 2])
one("Softmax", [1, 3, 4], axis=1, bounded=False)
one("Softmax of old", [1, 4], opset=9, bounded=False)
one("LogSoftmax", [1, 4], bounded=False)
one("LayerNormalization", [1, 3, 4], dict(s=f(4), b=f(4)), opset=17, bounded=False)
case(
    "attention",
    [
        node("MatMul", ["x", "Q"], ["q"]),
        node("MatMul", ["x", "K"], ["k"]),
        node("Transpose", ["k"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["q", "t"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "x"], ["y"]),
    ],
    [1, 3, 4],
    dict(Q=f(4, 4), K=f(4, 4)),
    bounded=False,
)
case(
    "product with itself without batch",
    [node("Transpose", ["x"], ["t"]), node("MatMul", ["x", "t"], ["y"])],
    [3, 4],
    bounded=False,
)
case(
    "Dropout, Cast, Identity",
    [
        node("Dropout", ["x"], ["a"]),
        node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        node("Identity", ["b"], ["c"]),
        node("Relu", ["c"], ["y"]),
    ],
    [1, 5],
)


@pytest.mark.parametrize("name", list(CASES))
def test_operators_compute_what_onnxruntime_does_and_bounds_hold(name, tmp_path):
    nodes, shape, constants, opset = CASES[name]
    net = load(tmp_path, nodes, shape, constants, opset)
    assert not net.training
    x = 2 * torch.rand(3, *net.sample_shape, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        outputs = net(x)
    assert outputs.shape == (3, *net.output_shape)
    single = [1 if isinstance(size, str) else size for size in shape]
    expected = evaluate(model(nodes, shape, constants, opset), x.reshape(3, *single))
    declared = expected.shape[1:]
    assert net.output_shape == (declared[1:] if len(declared) > 1 and declared[0] == 1 else declared)
    torch.testing.assert_close(outputs, expected.reshape(outputs.shape), rtol=1e-4, atol=1e-5)
    try:
        pycert.BoundedModule(net, net.example_input())
    except pycert.UnsupportedOperator:
        assert name in UNBOUNDED
    else:
        assert_bounds_hold(net)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_dilated_same_padding_follows_the_definition(mode, tmp_path):
    """onnxruntime refuses it, so the expected output is that of explicit pads."""
    weight = f(4, 2, 3, 2)
    net = load(
        tmp_path,
        [node("Conv", ["x", "W"], ["y"], auto_pad=mode, dilations=[2, 2])],
        [1, 2, 9, 8],
        {"W": weight},
        check=False,
    )
    x = torch.rand(2, 2, 9, 8)
    padded = nn.functional.pad(x, (1, 1, 2, 2))
    expected = nn.functional.conv2d(padded, torch.from_numpy(weight), dilation=2)
    torch.testing.assert_close(net(x), expected)


def test_activations_that_are_written_out_become_one(tmp_path):
    kinds = {
        "SiLU": nn.SiLU,
        "Mish written out": nn.Mish,
        "HardSwish written out": nn.Hardswish,
        "GELU written out": nn.GELU,
    }
    for name, kind in kinds.items():
        nodes, shape, constants, opset = CASES[name]
        net = load(tmp_path, nodes, shape, constants, opset)
        assert [type(child) for child in net.children()] == [kind]


def test_a_gate_is_no_activation(tmp_path):
    """A sigmoid, or the root of two, of something else."""
    gate = [node("Neg", ["x"], ["a"]), node("Sigmoid", ["a"], ["s"]), node("Mul", ["x", "s"], ["y"])]
    assert load(tmp_path, gate, [1, 4]).checked
    nodes, shape, constants, opset = CASES["GELU written out"]
    net = load(tmp_path, nodes, shape, constants | dict(r=np.float32(1.5)), opset)
    assert net.checked and not any(isinstance(child, nn.GELU) for child in net.children())


# ---- the module -------------------------------------------------------------------------------

MLP = [
    node("Flatten", ["x"], ["a"], name="/flat"),
    node("Gemm", ["a", "W", "b"], ["c"], name="layer.0", transB=1),
    node("Relu", ["c"], ["d"], name="forward"),
    node("MatMul", ["d", "V"], ["e"]),
    node("Add", ["e", "v"], ["y"]),
]
WEIGHTS = dict(W=f(7, 6), b=f(7), V=f(7, 3), v=f(3))


def test_the_module_is_trainable_and_says_what_it_takes(tmp_path):
    net = load(tmp_path, MLP, ["batch", 1, 2, 3], WEIGHTS)
    assert isinstance(net, pycert.OnnxNetwork)
    assert (net.file_shape, net.sample_shape, net.output_shape) == (("batch", 1, 2, 3), (1, 2, 3), (3,))
    assert (net.input_name, net.output_name, net.checked) == ("x", "y", "onnx.reference")
    assert net.example_input(4).shape == (4, 1, 2, 3)
    assert [name for name, _ in net.named_children()] == ["flat", "layer_0", "node_forward", "MatMul_3"]
    parameters = dict(net.named_parameters())
    assert list(parameters) == ["layer_0.weight", "layer_0.bias", "MatMul_3.weight", "MatMul_3.bias"]
    assert all(
        p.dtype == torch.float32 and p.requires_grad and p.is_contiguous() or p.dim() == 2
        for p in parameters.values()
    )
    assert net.sha256 in repr(net)
    bm = pycert.BoundedModule(net, net.example_input())
    region = pycert.LpBall(torch.rand(2, 1, 2, 3), eps=0.1)
    before = bm.bound(region, method="crown", soundness="none").lower
    before.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert not torch.equal(bm.bound(region, method="crown", soundness="none").lower, before)


def test_the_module_is_copied_pickled_and_cast(tmp_path):
    net = load(tmp_path, MLP, [1, 1, 2, 3], WEIGHTS)
    x = torch.rand(2, 1, 2, 3)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
    double = copy.deepcopy(net).double()
    assert double.example_input().dtype == torch.float64
    torch.testing.assert_close(double(x.double()), net(x).double(), rtol=1e-4, atol=1e-5)
    assert_bounds_hold(net, methods=("ibp", "crown-ibp", "crown", "forward"))


def test_float64_files_stay_float64(tmp_path):
    net = load(
        tmp_path,
        [node("Gemm", ["x", "W"], ["y"])],
        [1, 4],
        dict(W=f(4, 3).astype(np.float64)),
        kind=TensorProto.DOUBLE,
    )
    assert next(net.parameters()).dtype == net.example_input().dtype == torch.float64
    assert net.checked


def test_a_weight_that_is_used_twice_is_one_parameter(tmp_path):
    nodes = [node("Gemm", ["x", "W"], ["a"]), node("Relu", ["a"], ["b"]), node("Gemm", ["b", "W"], ["y"])]
    net = load(tmp_path, nodes, [1, 4], dict(W=f(4, 4)))
    first, second = net.Gemm_0.weight, net.Gemm_2.weight
    assert first is second and len(list(net.parameters())) == 1
    assert_bounds_hold(net)


def test_constants_of_arithmetic_are_no_parameters(tmp_path):
    net = load(
        tmp_path,
        [node("Sub", ["x", "m"], ["a"]), node("Gemm", ["a", "W"], ["y"])],
        [1, 4],
        dict(m=f(4), W=f(4, 3)),
    )
    assert [name for name, _ in net.named_parameters()] == ["Gemm_1.weight"]
    assert [name for name, _ in net.named_buffers()] == ["Sub_0.constant"]


def test_other_shapes_are_refused_with_the_right_one(tmp_path):
    net = load(tmp_path, MLP, [1, 1, 2, 3], WEIGHTS)
    with pytest.raises(ValueError, match=r"takes 'x' of shape \[batch, 1, 2, 3\], got \[5, 6\]"):
        net(torch.rand(5, 6))


def test_open_sizes_need_an_input_shape(tmp_path):
    nodes = [
        node("Conv", ["x", "W"], ["a"]),
        node("GlobalAveragePool", ["a"], ["b"]),
        node("Flatten", ["b"], ["y"]),
    ]
    arguments = (nodes, ["n", 2, "h", "w"], dict(W=f(3, 2, 3, 3)))
    with pytest.raises(
        ValueError, match=r"gives 'x' shape \['n', 2, 'h', 'w'\]; say for which one.*input_shape"
    ):
        load(tmp_path, *arguments)
    for given in ((2, 6, 5), (1, 2, 6, 5)):
        net = load(tmp_path, *arguments, options=dict(input_shape=given))
        assert net.sample_shape == (2, 6, 5)
    assert_bounds_hold(net)
    for given in ((3, 6, 5), (2, 2, 6, 5), (6, 5), (2, 0, 5)):
        with pytest.raises(ValueError, match="does not fit 'x' of shape"):
            load(tmp_path, *arguments, options=dict(input_shape=given))


def test_an_output_is_chosen_by_name(tmp_path):
    nodes = [node("Gemm", ["x", "W"], ["a"]), node("Relu", ["a"], ["r"]), node("Neg", ["r"], ["y"])]
    arguments = dict(shape=[1, 4], constants=dict(W=f(4, 3)), outputs=("y", "r"))
    with pytest.raises(ValueError, match=r"2 outputs, choose one: output=\['y', 'r'\]"):
        load(tmp_path, nodes, **arguments)
    assert load(tmp_path, nodes, **arguments, options=dict(output="r")).output_name == "r"
    scores = load(tmp_path, nodes, **arguments, options=dict(output="a"))
    assert [name for name, _ in scores.named_children()] == ["Gemm_0"] and scores.checked
    fused = [node("MatMul", ["x", "W"], ["a"]), node("Add", ["a", "b"], ["y"])]
    before = load(tmp_path, fused, [1, 4], dict(W=f(4, 3), b=f(3)), check=False, options=dict(output="a"))
    assert before.MatMul_0.bias is None  # what follows is not drawn into it
    with pytest.raises(ValueError, match="output='q' is no output"):
        load(tmp_path, nodes, **arguments, options=dict(output="q"))


def test_a_file_that_mixes_samples_is_refused(tmp_path):
    mean = [node("ReduceMean", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["y"])]
    with pytest.raises(
        pycert.UnsupportedOperator, match="ReduceMean over the batch dimension at 'ReduceMean_0'"
    ):
        load(tmp_path, mean, ["n", 3])
    gram = [
        node("Transpose", ["x"], ["t"]),
        node("ReduceMean", ["t"], ["m"], axes=[1], keepdims=0),
        node("Add", ["x", "m"], ["y"]),
    ]
    with pytest.raises(ValueError, match="the file mixes samples"):
        load(tmp_path, gram, ["n", 3])
    assert load(tmp_path, gram, [1, 3]).checked  # of one sample: twice x


def test_a_wrong_conversion_would_be_noticed(tmp_path, monkeypatch):
    from pycert.onnx_import import elementwise  # registers the converters before one is replaced
    from pycert.onnx_import.nodes import HANDLERS

    monkeypatch.setitem(
        HANDLERS, "Relu", lambda conv, n: elementwise.same_shape(conv, n, nn.Sigmoid(), n.live())
    )
    with pytest.raises(ValueError, match=r"the converted network and onnx\.reference .*differ by"):
        load(tmp_path, MLP, [1, 1, 2, 3], WEIGHTS)
    if onnxruntime is not None:
        with pytest.raises(ValueError, match="the converted network and onnxruntime differ by"):
            load(tmp_path, MLP, [1, 1, 2, 3], WEIGHTS, check=True)
    assert load(tmp_path, MLP, [1, 1, 2, 3], WEIGHTS, check=False).checked is None


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("ArgMax", ["x"], ["y"], name="decide")], "ONNX operator ArgMax at 'decide' is not supported; end the network at the scores"),
        ([node("Relu", ["x"], ["a"]), node("LSTM", ["a"], ["y"])], "ONNX operator LSTM at 'LSTM_1' is not supported; recurrent"),
        ([node("Thing", ["x"], ["y"], domain="com.example")], r"ONNX operator com\.example\.Thing at 'Thing_0'"),
        ([node("Floor", ["x"], ["y"])], "Floor of a value that depends on the input at 'Floor_0' is not supported; steps"),
        ([node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16)], "Cast of torch.float32 values to another type at 'Cast_0'"),
        ([node("Reshape", ["x", "x"], ["y"])], "the shape must be constant"),
        ([node("MaxPool", ["x"], ["y", "i"], kernel_shape=[1, 1])], "with a second output 'i'"),
        ([node("AveragePool", ["x"], ["y"], kernel_shape=[1, 1], ceil_mode=1, strides=[4, 4])], "last window lies in the padding alone"),
        ([node("BatchNormalization", ["x", "s", "s", "s", "s"], ["y"], training_mode=1)], "training mode"),
        ([node("Conv", ["x", "w3"], ["y"])], "Conv at 'Conv_0' cannot be converted: a weight"),
        ([node("Gemm", ["x", "s"], ["y"])], "Gemm at 'Gemm_0' cannot be converted: A and B must be matrices"),
        ([node("Reshape", ["x", "seven"], ["y"])], r"\[1, 2, 4, 4\] has not as many elements as \[7\]"),
        ([node("Expand", ["x", "huge"], ["y"])], "has more than"),
        ([node("ConstantOfShape", ["huge"], ["c"]), node("Add", ["x", "c"], ["y"])], "its result has [0-9]+ elements, at most"),
        ([node("Slice", ["x", "back", "largest", "back", "back"], ["y"])], "Slice backwards from -1 to 9223372036854775807"),
        ([node("Slice", ["x", "before", "back", "back", "back"], ["y"])], "Slice backwards from -5 to -1 of 4 elements"),
        ([node("Clip", ["x", "nan"], ["y"])], "Clip with min=nan"),
        ([node("Resize", ["x", "", "scales"], ["y"], mode="linear")], "Resize with mode 'linear'"),
        ([node("Resize", ["x", "", "scales"], ["y"], coordinate_transformation_mode="align_corners")], "Resize by 0.7 of 4 elements"),
        ([node("Pow", ["x", "deep"], ["y"])], r"exponents of shape \[1, 1, 1, 1, 1\]"),
        ([node("Relu", ["q"], ["y"])], "is not valid ONNX"),
        ([node("Relu", ["x"], ["y"], alpha=1.0)], "is not valid ONNX"),
        ([node("Neg", ["s"], ["y"])], "of constants alone|does not depend on the input"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(nodes, message, tmp_path):
    constants = dict(s=f(2), w3=f(3, 5, 1, 1), seven=i(7), huge=i(1 << 20, 1 << 20, 2, 4, 4), back=i(-1), largest=i(2**63 - 1), before=i(-5), scales=np.array([1, 1, 0.7, 1], np.float32),
                     nan=np.float32(np.nan), deep=f(1, 1, 1, 1, 1))  # fmt: skip
    with pytest.raises((pycert.UnsupportedOperator, ValueError), match=message):
        load(tmp_path, nodes, [1, 2, 4, 4], constants, opset=14)


def test_inputs_that_cannot_be_bounded_are_named(tmp_path):
    made = model([node("Gemm", ["x", "W"], ["y"])], [1, 4], dict(W=f(4, 3)))
    made.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, [1, 3]))
    onnx.save(made, tmp_path / "two.onnx")
    with pytest.raises(
        ValueError, match=r"one input, this one has 2: 'x' float \[1, 4\], 'mask' bool \[1, 3\]"
    ):
        pycert.load_onnx(tmp_path / "two.onnx")
    with pytest.raises(TypeError, match=r"the input 'x' is int64 \[1, 4\]"):
        load(tmp_path, [node("Identity", ["x"], ["y"])], [1, 4], kind=TensorProto.INT64)
    with pytest.raises(TypeError, match=r"float16 \[1, 4\].*convert it to float32"):
        load(tmp_path, [node("Relu", ["x"], ["y"])], [1, 4], kind=TensorProto.FLOAT16)


def test_a_function_cannot_take_the_name_of_an_operator(tmp_path):
    made = model([node("Relu", ["x"], ["y"])], [1, 4])
    made.functions.append(
        helper.make_function(
            "", "Relu", ["a"], ["b"], [node("Neg", ["a"], ["b"])], [helper.make_opsetid("", 13)]
        )
    )
    onnx.save(made, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="gives the operator 'Relu' a meaning of its own"):
        pycert.load_onnx(tmp_path / "net.onnx")


def test_weights_listed_as_inputs_are_none(tmp_path):
    """Before IR version 4 every initializer was an input too."""
    made = model([node("Gemm", ["x", "W"], ["y"])], [1, 4], dict(W=f(4, 3)))
    made.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [4, 3]))
    onnx.save(made, tmp_path / "old.onnx")
    assert pycert.load_onnx(tmp_path / "old.onnx").checked


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 40, b"\x08\x07", b"\x80" * 10_000])
def test_files_that_are_not_onnx(content, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.onnx is not an ONNX file"):
        pycert.load_onnx(tmp_path / "bad.onnx")


def test_files_that_are_missing_too_old_or_too_large(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*none.onnx"):
        pycert.load_onnx(tmp_path / "none.onnx")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        pycert.load_onnx(tmp_path)
    with pytest.raises(ValueError, match="has opset 6, supported are 7 and newer"):
        load(tmp_path, MLP, [1, 1, 2, 3], WEIGHTS, opset=6)
    with pytest.raises(ValueError, match=r"net\.onnx is larger than max_size allows"):
        load(tmp_path, MLP, [1, 1, 2, 3], WEIGHTS, options=dict(max_size=100))
    with pytest.raises(ValueError, match="max_size must be bytes or text"):
        load(tmp_path, MLP, [1, 1, 2, 3], WEIGHTS, options=dict(max_size="lots"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.onnx")
        with pytest.raises(FileNotFoundError):  # and not wait for someone who writes into it
            pycert.load_onnx(tmp_path / "pipe.onnx")


def external(folder, location, **entries):
    """A file in ``folder/net`` whose weight W lies in ``location``."""
    (folder / "net").mkdir(exist_ok=True)
    made = model([node("Gemm", ["x", "W"], ["y"])], [1, 4], dict(W=np.ones((4, 3), np.float32)))
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    (folder / "net" / "net.onnx").write_bytes(made.SerializeToString())
    return folder / "net" / "net.onnx"


def test_external_data_is_read_from_the_folder_of_the_file(tmp_path):
    path = external(tmp_path, "sub/w.bin", offset=4, length=48)
    (tmp_path / "net" / "sub").mkdir()
    (tmp_path / "net" / "sub" / "w.bin").write_bytes(
        b"head" + np.arange(12, dtype=np.float32).tobytes() + b"tail"
    )
    net = pycert.load_onnx(path)
    assert net.Gemm_0.weight.detach().T.flatten().tolist() == list(range(12))
    assert net.checked


@pytest.mark.parametrize(
    "location",
    ["../w.bin", "sub/../../w.bin", "/etc/hostname", "C:/w.bin", "..\\w.bin", "", "link.bin", "linked/w.bin"],
)
def test_external_data_outside_of_the_folder_is_refused(location, tmp_path):
    path = external(tmp_path, location)
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder in (tmp_path, outside):
        (folder / "w.bin").write_bytes(bytes(48))
    (tmp_path / "net" / "link.bin").symlink_to(outside / "w.bin")
    (tmp_path / "net" / "linked").symlink_to(outside, target_is_directory=True)
    with pytest.raises(ValueError, match="must be a relative path without|leads out of the model's folder"):
        pycert.load_onnx(path)


def test_external_data_that_does_not_fit(tmp_path):
    path = external(tmp_path, "w.bin")
    with pytest.raises(FileNotFoundError, match="no such file beside the model"):
        pycert.load_onnx(path)
    data = tmp_path / "net" / "w.bin"
    data.write_bytes(bytes(47))
    with pytest.raises(ValueError, match=r"W.*47 bytes"):
        pycert.load_onnx(path)
    with pytest.raises(ValueError, match="48 bytes from 0 on are wanted, the file has 47"):
        pycert.load_onnx(external(tmp_path, "w.bin", length=48))
    with pytest.raises(ValueError, match="offset must be a number, got '-4'"):
        pycert.load_onnx(external(tmp_path, "w.bin", offset=-4))
    with open(data, "wb") as file:
        file.truncate(1 << 33)  # sparse: larger than the limit, and nowhere read
    with pytest.raises(ValueError, match="larger than max_size allows"):
        pycert.load_onnx(external(tmp_path, "w.bin"))
    if hasattr(os, "mkfifo"):
        data.unlink()
        os.mkfifo(data)
        with pytest.raises(FileNotFoundError):
            pycert.load_onnx(external(tmp_path, "w.bin"))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_raise_named_errors_only(seed, tmp_path):
    """Bytes changed at random: an error of those that are documented, or a network, soon."""
    random = np.random.default_rng(seed)
    names = [name for name in CASES if len(CASES[name][0]) > 1 or "Pool" in name or "Conv" in name]
    path = tmp_path / "damaged.onnx"
    for _ in range(150):
        content = bytearray(model(*CASES[names[random.integers(len(names))]]).SerializeToString())
        for _ in range(random.integers(1, 5)):
            content[random.integers(len(content))] = random.integers(256)
        path.write_bytes(bytes(content[: random.integers(20, 4 * len(content))]))
        began = time.monotonic()
        try:
            pycert.load_onnx(path, check=False)
        except (ValueError, TypeError, pycert.UnsupportedOperator) as error:
            assert str(error)
        assert time.monotonic() - began < 20


def test_pycert_works_without_onnx(tmp_path):
    program = (
        "import sys; sys.modules['onnx'] = None\n"
        "import pycert\n"
        "try:\n    pycert.load_onnx('net.onnx')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "load_onnx needs the package onnx: pip install 'pycert[onnx]'"


def test_no_module_that_could_run_code_is_imported_for_a_file(tmp_path):
    """Reading needs neither pickle of the file's content nor generated code: both are made to fail."""
    program = (
        "import sys, pickle, builtins, onnx, torch, pycert\n"
        "import onnx.reference, pycert.onnx_import.converter\n"
        "def refuse(*arguments, **options):\n    raise SystemExit('ran code')\n"
        "pickle.loads = pickle.load = torch.load = refuse\n"
        "net = pycert.load_onnx(sys.argv[1], check=False)\n"
        "print(net(net.example_input()).shape)\n"
    )
    onnx.save(model(MLP, [1, 1, 2, 3], WEIGHTS), tmp_path / "net.onnx")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "net.onnx")], capture_output=True, text=True
    )
    assert "torch.Size([1, 3])" in done.stdout, done.stderr


# ---- the command line -------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A file and data for it, in the present folder."""
    monkeypatch.chdir(tmp_path)
    net = load(tmp_path, MLP, [1, 1, 2, 3], WEIGHTS)
    x = GENERATOR.random((8, 1, 2, 3)).astype(np.float32)
    with torch.no_grad():
        y = net(torch.from_numpy(x)).argmax(1).numpy()
    np.savez("data.npz", x=x, y=y)
    np.savez("flat.npz", x=x.reshape(8, 6), y=y)
    return tmp_path


def test_certify_takes_an_onnx_file(command, capsys):
    from pycert.cli import main, records

    arguments = (
        "certify net.onnx --data data.npz --eps 0.01 --method ibp crown --no-plot --quiet --out r.jsonl"
    )
    assert main(arguments.split()) == 0
    header, rows = records.read(command / "r.jsonl")
    found = [row["certified"] for row in rows if row["method"] == "crown"]
    file = np.load("data.npz")
    net = pycert.load_onnx("net.onnx")
    x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    expected = pycert.certify(pycert.BoundedModule(net, x[:1]), x, y, eps=0.01)
    assert found == expected.certified.tolist() and any(found)
    assert header["run"]["network"] == "net.onnx"
    assert main(arguments.replace("data.npz", "flat.npz").split()) == 2
    assert "--shape" in capsys.readouterr().err
    assert (
        main([*arguments.replace("data.npz", "flat.npz").split(), "--shape", "1", "2", "3", "--overwrite"])
        == 0
    )


def test_results_of_another_file_are_not_continued(command, capsys):
    """The same weights in another graph are another network."""
    from pycert.cli import main

    arguments = (
        "certify net.onnx --data data.npz --eps 0.01 --method ibp --no-plot --quiet --out r.jsonl".split()
    )
    assert main(arguments) == 0
    nodes = copy.deepcopy(MLP)
    nodes[2].op_type = "Sigmoid"
    load(command, nodes, [1, 1, 2, 3], WEIGHTS)
    assert main(arguments) == 2
    assert "structure" in capsys.readouterr().err


def test_a_missing_or_broken_file_is_named(command, capsys):
    from pycert.cli import main

    (command / "bad.onnx").write_bytes(b"hello")
    for name, message in (
        ("none.onnx", "there is no file none.onnx"),
        ("bad.onnx", "bad.onnx is not an ONNX file"),
    ):
        assert main(["certify", name, "--data", "data.npz", "--eps", "0.01"]) == 2
        assert message in capsys.readouterr().err


def test_train_goes_on_from_the_weights_of_the_file(command):
    from pycert.cli import main

    arguments = "train --network net.onnx --data data.npz --epochs 4 --quiet --out w.pt --learning-rate 1e-6"
    assert main(arguments.split()) == 0
    weights = torch.load("w.pt", weights_only=True)
    torch.testing.assert_close(weights["layer_0.weight"], torch.from_numpy(WEIGHTS["W"]), rtol=0, atol=1e-3)
    assert main("certify net.onnx --weights w.pt --data data.npz --eps 0.01 --no-plot --quiet".split()) == 0


def test_doctor_lists_the_packages(capsys):
    from pycert.cli import main

    assert main(["doctor"]) == 0
    assert onnx.__version__ in capsys.readouterr().out


# ---- public networks --------------------------------------------------------------------------

ACASXU = [f"acasxu/onnx/ACASXU_run2a_{a}_{b}_batch_2000" for a in range(1, 6) for b in range(1, 10)]
NETWORKS = [
    *(f"mnistfc/onnx/mnist-net_256x{depth}" for depth in (2, 4, 6)),
    *(f"oval21/onnx/cifar_{kind}_kw" for kind in ("base", "wide", "deep")),
    *(f"eran_mlp/mnist_{depth}_100" for depth in (6, 9)),
    "cifar10_resnet/onnx/resnet_2b",
]


def public(name: str):
    """Path of a network of the public set; the test is skipped where it is not found."""
    files = pytest.importorskip(
        "benchmarks.files", reason="the benchmarks are not part of an installed package"
    )
    try:
        return files.locate(f"nets/{name}.onnx")
    except files.MissingFileError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "name",
    [*NETWORKS, *ACASXU],
)
def test_public_networks_load_and_bound(name):
    net = pycert.load_onnx(public(name), check=None if onnxruntime is None else True)
    assert net.checked
    assert_bounds_hold(net, samples=10, methods=("ibp", "crown-ibp", "crown"), radius=0.004)


def test_published_counterexamples_of_acasxu_are_reproduced():
    """Inputs that other verifiers found: the scores are as bad as the property says, and so are the bounds there."""
    table = public(ACASXU[0]).parent.parent / "counterexamples.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 45
    for row in rows[::3]:
        net = pycert.load_onnx(public(f"acasxu/{row['onnx'].removesuffix('.onnx')}"))
        x = torch.tensor([[[[float(row[f"x{k}"]) for k in range(5)]]]])
        with torch.no_grad():
            scores = net(x)[0]
            bounds = pycert.BoundedModule(net, x).bound(pycert.LpBall(x, eps=1e-4), method="crown")
        if row["vnnlib"].endswith("prop_2.vnnlib"):
            assert scores[0] == scores.max()
            assert (bounds.upper[0, 0] >= bounds.lower[0]).all()
        else:  # properties 3 and 4: the first score is the least
            assert scores[0] == scores.min()
            assert (bounds.lower[0, 0] <= bounds.upper[0]).all()
