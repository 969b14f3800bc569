"""Networks from ONNX files: every operator against onnxruntime and its own bounds, hostile files, public networks."""

from __future__ import annotations

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
for op in "Relu Sigmoid Tanh LeakyRelu Abs Neg Identity HardSigmoid".split():
    one(op, [1, 6])
for op in "Elu Selu Celu Softplus Softsign Exp Sin Cos Erf".split():
    one(op, [1, 6], bounded=False)
one("HardSwish", [1, 6], opset=14, bounded=False)
one("Mish", [1, 6], opset=18, bounded=False)
one("Gelu", [1, 6], opset=20, bounded=False)
one("Gelu by tanh", [1, 6], opset=20, approximate="tanh", bounded=False)
one("Clip", [1, 6], dict(a=np.float32(-0.3), b=np.float32(0.4)))
one("Clip by attributes", [1, 6], opset=9, min=0.0, max=6.0)
one("Clip from below", [1, 6], dict(a=np.float32(0)))
one("Clip from above", [1, 6], dict(b=np.float32(0.2)), ["x", "", "b"])
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
one("Tile", [1, 2, 3], dict(r=i(1, 2, 1)))
one("Tile of the batch", [1, 2, 3], dict(r=i(2, 1, 2)))
one("DepthToSpace DCR", [1, 8, 2, 3], blocksize=2)
one("DepthToSpace CRD", [1, 8, 2, 3], blocksize=2, mode="CRD")
one("SpaceToDepth", [1, 2, 4, 6], blocksize=2)
one("MaxPool", [1, 2, 6, 7], kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 0])
one("MaxPool with pads of one side", [1, 2, 6, 7], kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 2])
one("MaxPool SAME_LOWER", [1, 2, 6, 7], kernel_shape=[2, 2], auto_pad="SAME_LOWER")
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
