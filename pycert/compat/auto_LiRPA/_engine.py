"""Between a call of ``compute_bounds`` and pycert's engine: networks, regions, boxes, linear functions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycert.bounded import BoundedModule as Engine
from pycert.bounded import Bounds, Boxes
from pycert.compat.auto_LiRPA.bounded_tensor import BoundedTensor, plain
from pycert.compat.auto_LiRPA.perturbations import Perturbation
from pycert.compat.auto_LiRPA.wrapper import CrossEntropyWrapper, CrossEntropyWrapperMultiInput, FusedLoss
from pycert.options import Options, parse
from pycert.regions import Box

#: pycert's method for a call: (method in lower case) -> (method, of the intermediate bounds).
METHODS = {
    "ibp": "ibp",
    "backward": "crown",
    "crown": "crown",
    "crown-ibp": "crown-ibp",
    "ibp+backward": "crown-ibp",
    "ibp+crown": "crown-ibp",
    "forward": "forward",
    "dynamic-forward": "forward",
    "forward+backward": "crown",
    "forward+crown": "crown",
    "dynamic-forward+backward": "crown",
    "dynamic-forward+crown": "crown",
    "crown-optimized": "alpha-crown",
    "alpha-crown": "alpha-crown",
    "forward-optimized": "alpha-crown",
}
_WRAPPERS = (CrossEntropyWrapper, CrossEntropyWrapperMultiInput)


def method_of(method: str | None, ibp: bool, forward: bool) -> str:
    """pycert's name of the method that ``method``, ``IBP`` and ``forward`` ask for.

    Raises:
        ValueError: an unknown name.
    """
    if method is None:
        if not (ibp or forward):
            raise ValueError("compute_bounds: method=None needs IBP=True or forward=True")
        return "ibp" if ibp else "forward"
    if not isinstance(method, str) or method.lower() not in METHODS:
        raise ValueError(f"compute_bounds: unknown method {method!r}; known are {', '.join(sorted(METHODS))}")
    found = METHODS[method.lower()]
    return "crown-ibp" if found == "crown" and ibp else found


@dataclasses.dataclass
class Inputs:
    """One call's inputs as the network takes them: values, perturbations and pycert's regions."""

    values: list[Tensor]
    perturbations: list[Perturbation | None]
    regions: list[Any]
    labels: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.regions[0].batch

    @property
    def like(self) -> Tensor:
        return self.regions[0].lower


class _CleanBox(Box):
    """A box that knows its clean input, whose batch statistics BatchNorm takes in training mode."""

    def __init__(self, lower: Tensor, upper: Tensor, x: Tensor) -> None:
        super().__init__(lower, upper)
        self.x = x

    def _for_engine(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, bool]:
        return self.lower, self.upper, self.x, None, 0, False


def _around(x: Tensor, region: Any) -> Any:
    """The region, where it is a box with its clean input; one outside of it is not taken for its centre."""
    if not isinstance(region, Box) or x.shape != region.lower.shape:
        return region
    with torch.no_grad():
        inside = bool(((region.lower <= x) & (x <= region.upper)).all())
    return _CleanBox(region.lower, region.upper, x) if inside else region


class Network:
    """A network in pycert's engine; with loss fusion also the network without the loss."""

    def __init__(self, module: nn.Module, examples: tuple[Tensor, ...]) -> None:
        self.module = module
        self.fused = isinstance(module, _WRAPPERS)
        self.parts: dict[int, Engine] = {}
        if not self.fused:
            self.scores: Engine | None = None
            self.engine = _traced(module, examples)
            return
        inner = module.model
        assert isinstance(inner, nn.Module)
        labels, inputs = self.split(examples)
        self.scores = _traced(inner, tuple(inputs))
        classes = self.scores.graph.numel(self.scores.graph.output)
        like = inputs[0]
        one_hot, shift = like.new_zeros(labels.shape[0], classes), like.new_zeros(labels.shape[0], 1)
        self.engine = _traced(FusedLoss(inner), (one_hot, shift, *inputs))

    def split(self, inputs: tuple[Any, ...]) -> tuple[Tensor, list[Any]]:
        """The labels and the other inputs of a wrapped network."""
        if isinstance(self.module, CrossEntropyWrapperMultiInput):
            return plain(inputs[0]), list(inputs[1:])
        return plain(inputs[-1]), list(inputs[:-1])

    def inputs(self, given: tuple[Any, ...], aux: Any, outward: bool) -> Inputs:
        """Regions of a call's inputs; what carries no perturbation is a point.

        Raises:
            ValueError: another number of inputs than the network has.
        """
        labels, rest = self.split(given) if self.fused else (None, list(given))
        wanted = len((self.scores or self.engine).graph.inputs)
        if len(rest) != wanted:
            raise ValueError(f"compute_bounds: the network has {wanted} inputs, x has {len(rest)}")
        perturbations = [value.ptb if isinstance(value, BoundedTensor) else None for value in rest]
        values = [plain(value) for value in rest]
        regions = [
            Box(value, value) if ptb is None else _around(value, ptb.region(value, aux, outward))
            for value, ptb in zip(values, perturbations, strict=True)
        ]
        return Inputs(values, perturbations, regions, labels)

    def part(self, node: int) -> Engine:
        """The network up to a node of its graph."""
        if node == self.engine.graph.output:
            return self.engine
        if node not in self.parts:
            graph = dataclasses.replace(
                self.engine.graph, nodes=self.engine.graph.nodes[: node + 1], output=node
            )
            norms = {n.attrs["module"] for n in graph.nodes if n.op == "batch_norm"}
            graph = dataclasses.replace(graph, batch_norms=graph.batch_norms[: len(norms)])
            self.parts[node] = self.engine._part(graph)
        return self.parts[node]


def _traced(module: nn.Module, examples: tuple[Tensor, ...]) -> Engine:
    """The engine of a network; dropout, which auto_LiRPA converts in training mode, is traced without."""
    dropping = [m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    for layer in dropping:
        layer.training = False
    try:
        return Engine(module, examples if len(examples) != 1 else examples[0])
    finally:
        for layer in dropping:
            layer.training = True


@dataclasses.dataclass
class Question:
    """What one call asks: a method of pycert, its options, rows, sides and boxes."""

    method: str
    options: dict[str, Any]
    rows: Tensor | None = None  # [B, S, n_out]
    lower: bool = True
    upper: bool = True
    linear: bool = False
    boxes: Boxes | None = None
    final: int | None = None  # number of the node that is bounded, None: the output

    def parsed(self) -> Options:
        side = "both" if self.lower and self.upper else "lower" if self.lower else "upper"
        return parse(self.method, {**self.options, "side": side})


def answer(engine: Engine, regions: list[Any], question: Question) -> Bounds:
    """One call of the engine.

    Raises:
        NotImplementedError: boxes are given to a method that computes no layer by layer bounds.
    """
    if question.boxes is not None and any(question.boxes) and question.method == "forward":
        raise NotImplementedError(
            "interm_bounds and reference_bounds are not supported with method 'forward'"
        )
    native, batch = engine._regions(tuple(regions))
    rows = None if question.rows is None else engine._spec(question.rows, batch, native[0][0])
    boxes = question.boxes
    if boxes is not None and question.final is not None:
        given, references = ({n: box for n, box in each.items() if n < question.final} for each in boxes)
        boxes = given, references
    return engine._bound(native, rows, question.method, question.parsed(), question.linear, boxes=boxes)


def tightened(bounds: Bounds, inputs: Inputs) -> Bounds:
    """Bounds of linear functions over the perturbations themselves, where those are not pycert's regions.

    The functions hold over enclosing regions, so over the perturbations; the better of both ends is kept.
    """
    linear = bounds.linear
    assert linear is not None
    for sign, A, constant in ((-1, linear.A_lower, linear.c_lower), (+1, linear.A_upper, linear.c_upper)):
        if constant is None:
            continue
        total = constant
        each = A if isinstance(A, tuple) else (A,)
        for value, ptb, region, rows in zip(
            inputs.values, inputs.perturbations, inputs.regions, each, strict=True
        ):
            total = total + _extreme(value, ptb, region, rows, sign)
        name = "lower" if sign == -1 else "upper"
        old = getattr(bounds, name)
        total = total.view_as(old)
        better = torch.maximum(old, total) if sign == -1 else torch.minimum(old, total)
        changes: dict[str, Any] = {name: better}
        bounds = dataclasses.replace(bounds, **changes)
    return bounds


def _extreme(value: Tensor, ptb: Perturbation | None, region: Any, rows: Tensor, sign: int) -> Tensor:
    if ptb is not None and not isinstance(region, Box):  # a ball of pycert's, or one that encloses
        if not ptb.concretizes:
            centre = (rows.flatten(2) @ value.flatten(1).unsqueeze(-1)).squeeze(-1)
            dual = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[region.p]
            return centre + sign * region.eps.view(-1, 1) * rows.flatten(2).norm(dual, dim=-1)
    if ptb is not None and ptb.concretizes:
        found = ptb.concretize(value, rows.flatten(2), sign=sign)
        assert found is not None
        return found.reshape(rows.shape[:2])
    lower, upper = region.lower.flatten(1).unsqueeze(-1), region.upper.flatten(1).unsqueeze(-1)
    positive, negative = rows.flatten(2).clamp(min=0), rows.flatten(2).clamp(max=0)
    near, far = (lower, upper) if sign == -1 else (upper, lower)
    return (positive @ near + negative @ far).squeeze(-1)


def layer_boxes(engine: Engine, regions: list[Any], question: Question) -> dict[int, tuple[Tensor, Tensor]]:
    """Bounds of every pre-activation, by node number, as a call with this question has used them."""
    method = question.method
    if method == "forward":
        method = "crown"
    options = {
        name: value
        for name, value in question.options.items()
        if method == "alpha-crown" or name not in _ASCENT
    }
    parsed = parse(method, options)
    if method == "alpha-crown" and parsed.intermediate != "alpha-crown":
        method, parsed = parsed.intermediate, parse(parsed.intermediate, _without_ascent(options))
    native, _ = engine._regions(tuple(regions))
    return engine._layer_boxes(native, method, parsed, question.boxes)


_ASCENT = frozenset(("iterations", "learning_rate", "alpha", "intermediate", "threshold"))


def _without_ascent(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _ASCENT}


def node_box(
    network: Network, inputs: Inputs, question: Question, node: int, boxes: dict[int, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Bounds of any node's value, given those of the pre-activations; never looser than intervals."""
    operator = network.engine.graph.nodes[node]
    if operator.op == "input":
        region = inputs.regions[operator.attrs["index"]]
        return region.lower, region.upper
    if node in boxes:
        return boxes[node]
    method = "ibp" if question.method == "ibp" else "crown"
    options = {**_without_ascent(question.options), "intersect": method != "ibp"}
    known = {number: box for number, box in boxes.items() if number < node}
    asked = Question(method, options, boxes=(known, {}))
    found = answer(network.part(node), inputs.regions, asked)
    assert found.lower is not None and found.upper is not None
    return found.lower, found.upper


def fused_loss(
    network: Network, inputs: Inputs, question: Question, ibp: bool
) -> tuple[Tensor | None, Tensor | None, Tensor, Bounds | None]:
    """Bounds of ``sum_j exp(f_j - f_y - shift)``, ``shift`` being the largest upper bound of an exponent.

    The exponents' interval bounds come from rows ``f_j - f_y``, so that ``f_y`` counts once.

    Returns:
        lower and upper ``[B, 1]`` (None where not asked for), shift ``[B, 1]``, the linear functions.
    """
    assert network.scores is not None and inputs.labels is not None
    classes = network.scores.graph.numel(network.scores.graph.output)
    like = inputs.like
    one_hot = functional.one_hot(inputs.labels, classes).to(like)
    rows = torch.eye(classes, dtype=like.dtype, device=like.device) - one_hot.unsqueeze(1)
    options = _without_ascent(question.options)
    intervals = answer(network.scores, inputs.regions, Question("ibp", options, rows))
    assert intervals.lower is not None and intervals.upper is not None
    shift = intervals.upper.detach().amax(1, keepdim=True)
    low, high = intervals.lower - shift, intervals.upper - shift
    if ibp:
        lower = low.exp().sum(1, keepdim=True) if question.lower else None
        return lower, high.exp().sum(1, keepdim=True) if question.upper else None, shift, None
    graph = network.engine.graph
    exponents = next(node.inputs[0] for node in reversed(graph.nodes) if node.op == "exp")
    shape = (-1, *graph.nodes[exponents].shape)
    given = {exponents: (low.view(shape), high.view(shape))}
    regions = [Box(one_hot, one_hot), Box(shift, shift), *inputs.regions]
    found = answer(network.engine, regions, dataclasses.replace(question, boxes=(given, {})))
    return found.lower, found.upper, shift, found
