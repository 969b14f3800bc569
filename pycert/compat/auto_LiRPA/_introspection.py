"""The nodes that auto_LiRPA would show for a network, linked to those of pycert's graph.

Names come from torch's TorchScript exporter, as there. It is asked only when a script wants to see nodes,
and where it fails the nodes of pycert's own graph are shown, named ``/0``, ``/1``, ...
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pycert.compat.auto_LiRPA.operators import CLASSES, Bound, BoundBuffers, BoundInput, BoundParams, class_of
from pycert.graph import Graph

#: Kinds of the exporter whose values an operator of pycert's graph has, in the same order.
_SAME = {
    "Conv": "conv",
    "ConvTranspose": "conv",
    "BatchNormalization": "batch_norm",
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Elu": "elu",
    "Softplus": "softplus",
    "Clip": "clamp",
    "Exp": "exp",
    "Log": "log",
    "Sqrt": "sqrt",
    "Reciprocal": "reciprocal",
    "Sin": "sin",
    "Cos": "cos",
    "Abs": "abs",
    "MaxPool": "max_pool",
    "AveragePool": "avg_pool",
}
_VIEWS = frozenset("Flatten Reshape Squeeze Unsqueeze Identity Dropout Cast".split())


@dataclasses.dataclass
class Nodes:
    """All nodes by name, in topological order after the inputs and parameters."""

    by_name: dict[str, Bound]
    inputs: list[str]
    roots: list[str]
    output: str
    batch: int  # of the example


def nodes_of(module: nn.Module, examples: tuple[Any, ...], graph: Graph) -> Nodes:
    """The nodes of ``module``, linked to ``graph``.

    Args:
        module: in the mode (training or not) that names are wanted for; buffers that its forward
            changes are put back.
        examples: the inputs it was built with.
        graph: pycert's trace of it.
    """
    try:
        exported = _export(module, examples)
    except Exception as error:  # private interfaces of torch, which any version may change
        warnings.warn(
            f"auto_LiRPA's node names are not available ({type(error).__name__}: {error}); using pycert's own",
            stacklevel=3,
        )
        return _own(module, graph)
    nodes = _build(module, examples, exported)
    _link(nodes, graph)
    return nodes


def _export(module: nn.Module, examples: tuple[Any, ...]) -> Any:
    """The exporter's graph; its pass over the forward changes no buffer."""
    utils = importlib.import_module("torch.onnx.utils")
    try:
        settings = importlib.import_module("torch.onnx._internal.torchscript_exporter._globals").GLOBALS
    except ImportError:
        settings = importlib.import_module("torch.onnx._globals").GLOBALS
    before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    inlining = settings.autograd_inlining
    try:
        settings.autograd_inlining = False  # keeps torch.autograd.Function as one node
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph, _ = torch.jit._get_trace_graph(module, examples)
            first = next(iter(graph.inputs())).debugName()
            kind = torch.onnx.OperatorExportTypes.ONNX_ATEN_FALLBACK
            return utils._optimize_graph(
                graph, kind, params_dict={}, input_names=[first], dynamic_axes={first: {0: "batch"}}
            )
    finally:
        settings.autograd_inlining = inlining
        for name, buffer in module.named_buffers():
            if name in before:
                buffer.detach().copy_(before[name])


def _build(module: nn.Module, examples: tuple[Any, ...], exported: Any) -> Nodes:
    scopes = {value.debugName(): "" for value in exported.inputs()}
    for item in exported.nodes():
        scopes.update((value.debugName(), item.scopeName()) for value in item.outputs())

    def name_of(value: Any) -> str:
        return f"{scopes[value.debugName()]}/{value.debugName()}".replace(".", "-")

    read = {value.debugName() for item in exported.nodes() for value in item.inputs()}
    read |= {value.debugName() for value in exported.outputs()}
    named = [*_state_of(module)]
    nodes: dict[str, Bound] = {}
    inputs, roots = [], []
    for position, value in enumerate(exported.inputs()):
        if value.debugName() not in read:
            continue
        name = name_of(value)
        roots.append(name)
        if position < len(examples):
            node = _input(name, position, examples[position])
            inputs.append(name)
        else:
            node = _state(name, *named[position - len(examples)])
        nodes[name] = node
    for item in exported.nodes():
        sources = [nodes[name_of(value)] for value in item.inputs() if name_of(value) in nodes]
        attr = {name: _attribute(item, name) for name in item.attributeNames()}
        for number, value in enumerate(item.outputs()):
            if number > 0 and value.debugName() not in read:
                continue
            node = class_of(item.kind())(name_of(value), item.kind(), sources, attr)
            node.output_shape = _shape_of(value, examples[0].shape[0])
            for source in sources:
                source.output_name.append(node.name)
            nodes[node.name] = node
    output = name_of(next(iter(exported.outputs())))
    nodes[output].is_final_node = True
    return Nodes(nodes, inputs, roots, output, examples[0].shape[0])


def _state_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers in the order of the exporter: those of ``state_dict``, tied ones once."""
    seen: set[int] = set()
    found = []
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            found.append((name, value))
    return found


def _input(name: str, position: int, example: Any) -> Bound:
    node = BoundInput(name, "Parameter", [], {})
    node.ori_name, node.from_input, node.perturbed = f"input_{position}", True, True
    node.output_shape, node.batch_dim = torch.Size(example.shape), 0
    return node


def _state(name: str, ori_name: str, value: Tensor) -> Bound:
    node: Bound
    if isinstance(value, nn.Parameter):
        node = BoundParams(name, "Parameter", [], {})
        node.param = value
    else:
        node = BoundBuffers(name, "Parameter", [], {})
        node.register_buffer("buffer", value)
    node.ori_name, node.output_shape = ori_name, value.shape
    return node


def _shape_of(value: Any, batch: int) -> torch.Size | None:
    """The shape of a value at the batch size of the example; None where the exporter has lost it."""
    sizes = value.type().varyingSizes() if value.type().kind() == "TensorType" else None
    if not sizes or any(size is None for size in sizes[1:]):
        return None
    return torch.Size((batch if sizes[0] is None else sizes[0], *sizes[1:]))


def _attribute(item: Any, name: str) -> Any:
    return getattr(item, item.kindOf(name))(name)


def _link(nodes: Nodes, graph: Graph) -> None:
    """Notes which node of pycert's graph has the values of a node, where that is certain."""
    of_op: dict[str, list[int]] = collections.defaultdict(list)
    for number, item in enumerate(graph.nodes):
        of_op[item.op].append(number)
        if item.op == "input":
            names = nodes.inputs
            index = item.attrs["index"]
            if index < len(names):
                nodes.by_name[names[index]].link = number
    wanted: dict[str, list[Bound]] = collections.defaultdict(list)
    ordered = [
        node for node in nodes.by_name.values() if node.from_input and not isinstance(node, BoundInput)
    ]
    for node in ordered:
        op = _operator(node, nodes)
        if op is not None:
            wanted[op].append(node)
    tensors = graph.tensors()
    for op, members in wanted.items():
        pairs = list(zip(members, of_op[op]))
        if len(members) == len(of_op[op]) and all(
            _agrees(node, graph.nodes[number], tensors) for node, number in pairs
        ):
            for node, number in pairs:
                node.link = number
    for node in ordered:
        if node.link is None and node.kind.rpartition("::")[2] in _VIEWS:
            node.link = node.inputs[0].link
    nodes.by_name[nodes.output].link = graph.output
    _unlink_strangers(ordered, graph)
    for node in ordered:
        if node.link is not None and node.output_shape is not None:
            if graph.numel(node.link) != node.output_shape[1:].numel():
                node.link = None
        elif node.link is not None:
            node.output_shape = torch.Size((nodes.batch, *graph.nodes[node.link].shape))


def _multiplied(node: Bound) -> Bound:
    """The product before a bias that is added in a step of its own, else the node itself."""
    before = [source for source in node.inputs if source.kind.endswith("::MatMul")]
    return before[0] if node.kind.endswith("::Add") and before else node


def _constants(node: Bound) -> list[Tensor]:
    """Tensors that a node takes and that do not depend on the input, as far as they are known."""
    found = []
    for source in node.inputs:
        values = (getattr(source, "param", None), getattr(source, "buffer", None), source.attr.get("value"))
        if not source.from_input:
            found += [value.detach() for value in values if isinstance(value, Tensor)]
    return found


def _agrees(node: Bound, item: Any, tensors: list[Tensor]) -> bool:
    """Whether constants allow that a node is this one of pycert's graph: equal counts alone prove nothing."""
    params = [tensors[i].detach() if i >= 0 else None for i in item.params]
    if item.op in ("linear", "conv"):
        weights = _constants(_multiplied(node))
        weight = params[0]
        assert weight is not None
        if item.op == "linear":
            biased = node is not _multiplied(node) or len(node.inputs) > 2
            if biased != (params[1] is not None):
                return False
        same = [w.shape == weight.shape and torch.equal(w, weight) for w in weights]
        same += [w.dim() == 2 and w.t().shape == weight.shape and torch.equal(w.t(), weight) for w in weights]
        return any(same) or not weights
    if item.op == "add_const":
        sign = -1.0 if node.kind.endswith("::Sub") else 1.0
        value = torch.as_tensor(item.attrs["value"]) if not params else params[0]
        assert value is not None
        wanted = item.attrs["sign"] * value.double().reshape(-1)
        known = [sign * constant.double().reshape(-1) for constant in _constants(node)]
        return any(constant.shape == wanted.shape and torch.equal(constant, wanted) for constant in known)
    return True


def _unlink_strangers(ordered: list[Bound], graph: Graph) -> None:
    """Takes links away where the nodes that are read are linked, and not to those that pycert's node reads."""

    def without_views(number: int) -> int:
        while graph.nodes[number].op == "reshape":
            number = graph.nodes[number].inputs[0]
        return number

    for node in ordered:
        if node.link is None or node.is_final_node or node.kind.rpartition("::")[2] in _VIEWS:
            continue
        sources = [source.link for source in _multiplied(node).inputs if source.from_input]
        read = {without_views(i) for i in graph.nodes[node.link].inputs}
        if any(link is not None and without_views(link) not in read for link in sources):
            node.link = None


def _operator(node: Bound, nodes: Nodes) -> str | None:
    """The operator of pycert's graph that a node is, by its kind."""
    kind = node.kind.rpartition("::")[2]
    dependent = sum(source.from_input for source in node.inputs)
    if kind in ("Gemm", "Linear") and dependent == 1:
        return "linear"
    if kind == "MatMul":
        after = [nodes.by_name[name] for name in node.output_name]
        biased = len(after) == 1 and after[0].kind.endswith("::Add") and not after[0].inputs[-1].from_input
        return "matmul" if dependent == 2 else None if biased else "linear"
    if kind == "Add" and dependent == 1:
        before = next(source for source in node.inputs if source.from_input)
        return "linear" if before.kind.endswith("::MatMul") else "add_const"
    if kind == "Sub" and dependent == 1 and node.inputs[0].from_input:
        return "add_const"
    if kind in ("Add", "Sub"):
        return "add" if dependent == 2 else None
    return _SAME.get(kind)


def _own(module: nn.Module, graph: Graph) -> Nodes:
    """Nodes of pycert's graph, where the exporter's are not to be had."""
    nodes: list[Bound] = []
    classes = {"linear": "BoundLinear", "conv": "BoundConv", "relu": "BoundRelu"}
    for number, item in enumerate(graph.nodes):
        sources = [nodes[i] for i in item.inputs]
        node = (
            _input(f"/{number}", item.attrs["index"], torch.empty(1, *item.shape, device="meta"))
            if item.op == "input"
            else CLASSES[classes.get(item.op, "BoundUnknown")](f"/{number}", item.op, sources, {})
        )
        node.output_shape, node.link = torch.Size((1, *item.shape)), number
        for source in sources:
            source.output_name.append(node.name)
        nodes.append(node)
    inputs = [node.name for node in nodes if isinstance(node, BoundInput)]
    states = [_state(f"/{len(nodes) + position}", *named) for position, named in enumerate(_state_of(module))]
    nodes[graph.output].is_final_node = True
    by_name = {node.name: node for node in (*states, *nodes)}
    return Nodes(by_name, inputs, [*inputs, *(node.name for node in states)], nodes[graph.output].name, 1)
