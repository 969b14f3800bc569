"""One pass over a traced network: Lipschitz constants of every value, with the boxes that decide what may vary.

Every value ``z`` carries a length ``K`` with ``||z(x) - z(y)||_p <= K ||x - y||_p`` for all inputs of the region, and a
second one, ``E``: how far an execution in the network's own floating point may be from ``z`` (in real arithmetic: how
far a softplus with a threshold is from one without). Both grow by the same norms. An affine layer is *open* until
something other than an elementwise function reads it: slopes of activations collect as a diagonal on its rows, and
``||D W S||`` is asked for once, with the support ``S`` of the layer's input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pycert.graph import Graph
from pycert.graph.ir import ACTIVATIONS, Node
from pycert.lipschitz.blocks import known_blocks
from pycert.lipschitz.slopes import ELEMENTARY, largest_slope, softplus_jump
from pycert.norms.arithmetic import UP, exact_double, gamma, root, with_gradient
from pycert.norms.bounds import cached, upper_norm
from pycert.norms.operator import Geometry, Operator
from pycert.ops.norm import power_norm

Box = tuple[Tensor, Tensor]


@dataclasses.dataclass
class Value:
    """Lengths ``[B, 2]`` of a value, and which elements may vary, ``[B, *shape]`` (None: all).

    ``open``: the affine node whose rows still collect slopes; ``lengths`` and ``support`` are then those of its
    input, ``rows`` the diagonal so far (None: 1) and ``noise`` ``[B, *shape]`` the rounding of what came after the
    product (None: none).
    """

    lengths: Tensor
    support: Tensor | None = None
    open: int = -1
    rows: Tensor | None = None
    noise: Tensor | None = None


@dataclasses.dataclass
class LayerNorm:
    """One affine layer: its norm for every sample and without masks, and the shares of varying inputs and outputs."""

    path: str
    local: Tensor
    everywhere: Tensor
    live_in: float
    live_out: float

    @property
    def ratio(self) -> Tensor:
        """Local over global, ``[B]``."""
        return self.local / self.everywhere.clamp(min=1e-300)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a walk is asked for: the norm, how norms are found, whether executions are covered, layers reported."""

    p: float = 2.0
    method: str = "gram"
    effort: str = "normal"
    deployed: bool = False
    layers: bool = False


class UnsupportedBound(ValueError):
    """The network has an operator that ``method="lipschitz"`` does not cover."""


class Walk:
    """Lengths of all values over a region, or anywhere (without one).

    Args:
        net, graph, tensors: the network, its trace and the present values of its slots.
        settings: see :class:`Settings`.
        batch: samples; 1 without a region.
        radius: ``[B]`` float64: no input is farther from the centre in the p-norm.
        intervals: gives and takes boxes of values (``_C.IntervalWalk``), None without a region.
        centre: the same at the centre alone.
    """

    def __init__(
        self,
        net: nn.Module,
        graph: Graph,
        tensors: list[Tensor],
        settings: Settings,
        batch: int,
        radius: Tensor | None = None,
        intervals: Any = None,
        centre: Any = None,
    ) -> None:
        self.graph, self.tensors, self.settings, self.batch = graph, tensors, settings, batch
        self.radius, self.intervals, self.centre = radius, intervals, centre
        self.boxes: list[Box | None] = [None] * len(graph.nodes)
        self.centres: list[Box | None] = [None] * len(graph.nodes)
        self.values: list[Value | None] = [None] * len(graph.nodes)
        self.layers: list[LayerNorm] = []
        self._resolved: dict[int, Value] = {}
        self._blocks = known_blocks(net, graph, settings.p)
        self._varies = _depends_on_input(graph)

    # ---- the walk ---------------------------------------------------------------------------------------

    def run(self, last: int) -> None:
        """Boxes and values of nodes 0 to ``last``."""
        for i in range(last + 1):
            if self.intervals is not None:
                self.boxes[i] = self.intervals.advance(i)
                self.centres[i] = self.centre.advance(i)
            node = self.graph.nodes[i]
            if self.intervals is not None and node.op in ("linear", "conv") and self._varies[i]:
                self._tighten(i)

    def lengths(self, i: int) -> Value:
        """The value of node ``i`` with nothing open."""
        if i not in self._resolved:
            self._resolved[i] = self._resolve(self.value(i))
        return self._resolved[i]

    def value(self, i: int) -> Value:
        """The value of node ``i``, which may be open; found when it is first asked for, after its box."""
        found = self.values[i]
        if found is None:
            found = self.values[i] = self._value(i)
        return found

    def varies(self, i: int) -> bool:
        """Whether node ``i`` depends on the input at all."""
        return self._varies[i]

    def is_resolved(self, i: int) -> bool:
        """Whether :meth:`lengths` of node ``i`` costs nothing more."""
        return i in self._resolved

    def size(self, i: int) -> Tensor:
        """Largest magnitude of every element, ``[B, *shape]`` float64; infinite without a region."""
        box = self.boxes[i]
        if box is None:
            shape = self.graph.nodes[i].shape
            return torch.full((1, *shape), math.inf, dtype=torch.float64)
        return torch.maximum(box[0].double().abs(), box[1].double().abs()).detach()

    def _value(self, i: int) -> Value:
        node = self.graph.nodes[i]
        if not self._varies[i]:
            return Value(
                self._zeros(), torch.zeros(1, *node.shape, dtype=torch.bool).expand(self.batch, *node.shape)
            )
        if node.op == "input":
            lengths = self._zeros()
            lengths[:, 0] = 1
            return Value(lengths)
        if node.op in ("linear", "conv"):
            source = self.lengths(node.inputs[0])
            noise = self._affine_noise(i) if self.settings.deployed else None
            return Value(source.lengths, source.support, i, None, noise)
        if node.op in ACTIVATIONS or node.op in (
            "max2",
            "min2",
            "batch_norm",
            "mul_const",
            "div_const",
            "add_const",
        ):
            return self._elementwise(i)
        rule: Callable[[int], Value] | None = getattr(self, "_" + node.op, None)
        if rule is None:
            raise UnsupportedBound(
                f"method 'lipschitz' does not cover the operator '{node.op}' at '{node.path}'; "
                "use 'crown' or 'ibp' for this network"
            )
        return rule(i)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.batch, 2, dtype=torch.float64)

    # ---- elementwise ------------------------------------------------------------------------------------

    def _elementwise(self, i: int) -> Value:
        node = self.graph.nodes[i]
        source = node.inputs[0]
        if node.op in ("max2", "min2"):
            found = self._selection(i)
            if found is not None:
                return found
            source = node.inputs[0] if self._varies[node.inputs[0]] else node.inputs[1]
        slope, noise = self._slope(i, source)
        value = self.value(source)
        if value.open >= 0:
            rows = slope if value.rows is None else value.rows * slope * UP
            kept = None if value.noise is None else value.noise * slope * UP
            if noise is not None:
                kept = noise if kept is None else (kept + noise) * UP
            return Value(value.lengths, value.support, value.open, rows, kept)
        lengths = value.lengths * slope.flatten(1).amax(1, keepdim=True) * UP
        lengths = self._with_noise(lengths, noise)
        varies = (slope > 0).expand(self.batch, *node.shape)
        return Value(lengths, varies if value.support is None else varies & value.support)

    def _slope(self, i: int, source: int) -> tuple[Tensor, Tensor | None]:
        """Largest slopes ``[B or 1, *shape]`` and, in deployed mode, rounding of one elementwise node."""
        node = self.graph.nodes[i]
        shape = node.shape
        if node.op in ("max2", "min2"):
            return self._selection_slope(i, source), None
        if node.op in ("batch_norm", "mul_const", "div_const", "add_const"):
            factor, magnitude, roundings = self._factor(i)
            noise = None
            if self.settings.deployed:
                noise = (
                    self._network_gamma(roundings) * (factor * self.size(source) + magnitude) * UP
                    + self._tiny()
                )
            return factor.expand(1, *shape), noise
        attrs = dict(node.attrs)
        if node.op == "prelu":
            slope = exact_double(self._param(i, 0))
            attrs["slope"] = slope.view(-1, *[1] * (len(shape) - 1)) if slope.numel() > 1 else slope
        box = self.boxes[source]
        ends = (
            box
            if box is not None
            else (torch.full((1, *shape), -math.inf), torch.full((1, *shape), math.inf))
        )
        found = largest_slope(node.op, *ends, attrs)
        if found is None:
            raise UnsupportedBound(f"method 'lipschitz' has no slopes for '{node.op}' at '{node.path}'")
        noise = None
        jump = softplus_jump(attrs) if node.op == "softplus" else 0.0
        if self.settings.deployed and node.op in ELEMENTARY:
            noise = 64 * self._roundoff() * self.size(i).clamp(min=1)
        elif self.settings.deployed and node.op in ("leaky_relu", "prelu", "square"):
            noise = self._network_gamma(2) * self.size(i) + self._tiny()
        if jump > 0:  # twice: the value at the centre has it, too
            noise = 2 * jump * torch.ones_like(found) if noise is None else noise + 2 * jump
        return found, noise

    def _selection_slope(self, i: int, source: int) -> Tensor:
        """Of max and min with a constant: 0 where the constant is certainly taken."""
        node = self.graph.nodes[i]
        box = self.boxes[node.inputs[2]]  # of a - b
        if box is None:
            return torch.ones(1, *node.shape, dtype=torch.float64)
        keeps_first = (box[1] > 0) if node.op == "max2" else (box[0] < 0)
        keeps_second = (box[0] < 0) if node.op == "max2" else (box[1] > 0)
        return (keeps_first if source == node.inputs[0] else keeps_second).double()

    def _selection(self, i: int) -> Value | None:
        """Of max and min with two values that vary; None where one is constant."""
        a, b = self.graph.nodes[i].inputs[:2]
        return self._joint([i]) if self._varies[a] and self._varies[b] else None

    def _factor(self, i: int) -> tuple[Tensor, Tensor, float]:
        """``|factor|``, the size of what is added, and roundings of an execution, of ``factor x + term``."""
        node = self.graph.nodes[i]
        one = torch.ones(1, dtype=torch.float64)
        if node.op == "batch_norm":
            module: Any = self.graph.batch_norms[node.attrs["module"]]
            if module.training:
                raise UnsupportedBound("method 'lipschitz' needs BatchNorm in evaluation mode; call .eval()")
            weight, bias, mean, var = (self._optional_param(i, k) for k in range(4))
            assert mean is not None and var is not None
            scale = (1 if weight is None else weight.abs()) / (var + node.attrs["eps"]).sqrt() * UP
            magnitude = scale * mean.abs() + (0 if bias is None else bias.abs())
            view = (-1, *[1] * (len(node.shape) - 1))
            return scale.view(view), magnitude.view(view), 40 + self._terms(node.inputs[0])
        given = self._optional_param(i, 0)
        number = exact_double(given) if given is not None else one * float(node.attrs["value"])
        if node.op == "add_const":
            return one, number.abs(), 2
        if node.op == "div_const":
            return one / number.abs() * UP, 0 * number, 2
        return number.abs(), 0 * number, 2

    # ---- affine layers ----------------------------------------------------------------------------------

    def _operator(self, i: int) -> Operator:
        node = self.graph.nodes[i]
        weight = self._param(i, 0)
        if node.op == "linear":
            return Operator(weight, None)
        a = node.attrs
        channels, height, width = self.graph.nodes[node.inputs[0]].shape
        if weight.dim() == 3:
            weight = weight.unsqueeze(2)
        geometry = Geometry(
            (channels, height, width),
            tuple(a["stride"]),
            tuple(a["padding"]),
            tuple(a["dilation"]),
            a["groups"],
            bool(a["transposed"]),
            tuple(a.get("output_padding", (0, 0))),
        )
        return Operator(weight, geometry)

    def _norm(self, operator: Operator, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        s = self.settings
        if s.method == "power":
            conv: Any = operator.geometry
            value = power_norm(operator.weight.detach(), _flag(rows), columns, steps=100, conv=conv).value
        else:
            with torch.no_grad():
                value = upper_norm(operator, _flag(rows), columns, s.p, s.effort)
            if torch.is_grad_enabled():
                value = with_gradient(value.double(), plain_norm(operator, rows, columns, s.p))
        return value.double()

    def _everywhere(self, i: int, operator: Operator) -> Tensor:
        owner = self._param(i, 0)
        key = ("norm", operator.geometry, self.settings.p, self.settings.method, self.settings.effort)
        return cached(owner, key, lambda: self._norm(operator, None, None))

    def _resolve(self, value: Value) -> Value:
        if value.open < 0:
            return value
        i = value.open
        node = self.graph.nodes[i]
        operator = self._operator(i)
        batch, rows, columns = self.batch, value.rows, value.support
        if rows is not None:
            rows = rows.expand(batch, *node.shape)
        everywhere = self._everywhere(i, operator)
        if torch.is_grad_enabled() and self.settings.method == "gram":
            everywhere = with_gradient(everywhere, plain_norm(operator, None, None, self.settings.p)[0])
        if node.op == "linear" and len(node.shape) > 1:  # the same matrix for every position
            largest = 1.0 if rows is None else rows.flatten(1).amax(1)
            norm = everywhere * largest * UP
        elif rows is None and (columns is None or bool(columns.all())):
            norm = everywhere.expand(batch)
        else:
            norm = self._norm(operator, rows, columns).expand(batch)
        live = None if rows is None else rows > 0
        if self.settings.layers:
            share_in = 1.0 if columns is None else columns.double().mean().item()
            share_out = 1.0 if live is None else live.double().mean().item()
            self.layers.append(LayerNorm(node.path, norm, everywhere, share_in, share_out))
        lengths = self._with_noise(value.lengths * norm[:, None] * UP, value.noise)
        return Value(lengths, live)

    def _affine_noise(self, i: int) -> Tensor:
        """What an execution may err in one affine layer, elementwise: ``gamma_{n+12} (|W| |a| + |b|)`` and underflow.

        n + 2 roundings of the sum and the bias, and ten for a BatchNorm that may have been folded in. ``|W| |a|`` is at
        most what the box gives, and with the centre's value ``c`` at most ``|W| |c| + ||W_k||_q (K r + E)``.
        """
        node = self.graph.nodes[i]
        operator = self._operator(i)
        size = self.size(node.inputs[0])
        weight = exact_double(operator.weight).abs()
        wide = operator.with_weight(weight)
        charge = (1 + gamma(operator.terms() + 3)) * UP
        product = wide.apply(size) * charge
        around = self.centres[node.inputs[0]]
        if around is not None:
            middle = torch.maximum(around[0].double().abs(), around[1].double().abs()).detach()
            away = self._reach(node.inputs[0]).detach().view(-1, *[1] * len(node.shape))
            norms = self._norms_of_rows(i).detach().view(-1, *[1] * (0 if node.op == "linear" else 2))
            product = torch.minimum(product, (wide.apply(middle) * charge + norms * away * UP) * UP)
        bias = self._optional_param(i, 1)
        if bias is not None:
            product = product + exact_double(bias).abs().view(-1, *([1] * (0 if node.op == "linear" else 2)))
        terms = self._terms(i)
        tiny = self._tiny() * (2 * terms + 2 + size.flatten(1).sum(1).view(-1, *[1] * len(node.shape)))
        return product * self._network_gamma(terms + 12) * UP + tiny

    def _terms(self, i: int) -> float:
        """Length of the sums that an affine node computes; 0 for others."""
        node = self.graph.nodes[i]
        return float(self._operator(i).terms()) if node.op in ("linear", "conv") else 0.0

    def _tighten(self, i: int) -> None:
        """Meets the box with the ball: ``|z_k - z_k(centre)| <= ||W_k||_q (K r + E)``, and the layer's own rounding."""
        if self.settings.method == "power":
            return  # an estimate may shrink no box
        node = self.graph.nodes[i]
        if node.op == "linear" and len(node.shape) > 1:
            return
        reach = self._reach(node.inputs[0])
        around = self.centres[i]
        box = self.boxes[i]
        assert around is not None and box is not None
        norms = self._norms_of_rows(i)
        view = (1, -1, *[1] * (len(node.shape) - 1))
        slack = reach.view(-1, *[1] * len(node.shape)) * norms.view(view) * UP
        noise = self.value(i).noise
        if noise is not None:
            slack = slack + noise
        low = (around[0].double() - slack) - 1e-300
        high = (around[1].double() + slack) + 1e-300
        lower, upper = box
        low, high = _outward(low, high, lower.dtype)
        low, high = torch.maximum(lower, low), torch.minimum(upper, high)
        self.boxes[i] = (low, high)
        self.intervals.set_box(i, low, high)

    def _reach(self, i: int) -> Tensor:
        """``[B]``: how far value ``i``, of the network or of an execution, may be from its value at the centre."""
        lengths = self.lengths(i).lengths
        assert self.radius is not None
        return (lengths[:, 0] * self.radius * UP + lengths[:, 1]) * UP

    def _norms_of_rows(self, i: int) -> Tensor:
        """At least ``||W_k||_q`` with the dual q of p, for every output (channel) of affine node ``i``."""
        operator = self._operator(i)
        norms = cached(  # a convolution and a transposed one may share their weight
            self._param(i, 0),
            ("rows", operator.geometry, self.settings.p),
            lambda: _row_norms(operator, self.settings.p),
        )
        if torch.is_grad_enabled():
            norms = with_gradient(norms, _row_norms(operator, self.settings.p))
        return norms

    # ---- the other affine operators, pooling, joining ----------------------------------------------------

    def _reshape(self, i: int) -> Value:
        closed = self.lengths(self.graph.nodes[i].inputs[0])
        shape = self.graph.nodes[i].shape
        return Value(closed.lengths, None if closed.support is None else closed.support.reshape(-1, *shape))

    def _gather(self, i: int) -> Value:
        node = self.graph.nodes[i]
        given = self.lengths(node.inputs[0]).support
        support = None
        if given is not None:
            index = node.attrs["index"].flatten().to(torch.int64)
            support = (given.flatten(1)[:, index.clamp(min=0)] & (index >= 0)).view(-1, *node.shape)
        return Value(self._joint([i]).lengths, support)

    def _concat(self, i: int) -> Value:
        node = self.graph.nodes[i]
        if i in self._blocks:
            block = self._blocks[i]
            noise = block.noise(self.size(block.source), self._roundoff()) if self.settings.deployed else None
            return Value(self._with_noise(self.lengths(block.source).lengths * block.constant * UP, noise))
        parts = [self.lengths(j) for j in node.inputs]
        support = None
        if any(part.support is not None for part in parts):
            pieces = []
            for j, part in zip(node.inputs, parts):
                given = part.support
                size = self.graph.numel(j)
                pieces.append(
                    torch.ones(self.batch, size, dtype=torch.bool)
                    if given is None
                    else given.reshape(self.batch, -1)
                )
            support = torch.cat(pieces, 1).view(self.batch, *node.shape)
        return Value(self._joint([i]).lengths, support)

    def _add(self, i: int) -> Value:
        node = self.graph.nodes[i]
        parts = [self.lengths(j) for j in node.inputs]
        lengths = (parts[0].lengths + parts[1].lengths) * UP
        noise = None
        if self.settings.deployed:
            total = self.size(node.inputs[0]) + self.size(node.inputs[1])
            noise = self._network_gamma(2 + float(node.attrs.get("roundings", 0))) * total * UP
        support = None
        if parts[0].support is not None and parts[1].support is not None:
            support = parts[0].support | parts[1].support
        return Value(self._with_noise(lengths, noise), support)

    def _sum(self, i: int) -> Value:
        node = self.graph.nodes[i]
        source = node.inputs[0]
        count = self.graph.nodes[source].shape[-1]
        divisor = abs(float(node.attrs.get("divisor", 1)))
        q = 1 - 1 / self.settings.p if self.settings.p != math.inf else 1.0
        lengths = self.lengths(source).lengths * (float(count) ** q / divisor) * UP
        noise = None
        if self.settings.deployed:
            total = self.size(source).sum(-1) / divisor
            noise = self._network_gamma(count + 8 + float(node.attrs.get("roundings", 0))) * total * UP
        return Value(self._with_noise(lengths, noise))

    def _avg_pool(self, i: int) -> Value:
        node = self.graph.nodes[i]
        a, source = node.attrs, node.inputs[0]
        (ky, kx), (sy, sx) = a["kernel"], a["stride"]
        # A window of c counted elements weighs each 1/c; only windows that leave the image count fewer.
        least = 1 if not a.get("count_include_pad", True) or a.get("ceil_mode") else ky * kx
        divisor = abs(a["divisor"]) if a.get("divisor") else least
        windows = (-(-ky // sy)) * (-(-kx // sx))
        # ||.||_inf is at most the elements of a window times 1/c, ||.||_1 at most the windows of an element.
        rows, columns = ky * kx / divisor, windows / divisor
        if divisor == least == 1 and not a.get("divisor"):
            rows = 1.0  # an average
        norm = {1.0: columns, math.inf: rows}.get(self.settings.p, math.sqrt(rows * columns) * UP)
        lengths = self.lengths(source).lengths * norm * UP
        noise = None
        if self.settings.deployed:
            largest = self.size(source).flatten(1).amax(1).view(-1, *[1] * len(node.shape)) * rows
            noise = (self._network_gamma(ky * kx + 8) * largest * UP).expand(self.batch, *node.shape)
        return Value(self._with_noise(lengths, noise))

    def _max_pool(self, i: int) -> Value:
        node = self.graph.nodes[i]
        (ky, kx), (sy, sx) = node.attrs["kernel"], node.attrs["stride"]
        windows = float(
            (-(-ky // sy)) * (-(-kx // sx))
        )  # that an element is in, at most; fewer with dilation
        if tuple(node.attrs.get("dilation", (1, 1))) != (1, 1):
            windows = float(ky * kx)
        growth = 1.0 if self.settings.p == math.inf else windows ** (1 / self.settings.p) * UP
        return Value(self.lengths(node.inputs[0]).lengths * growth * UP)

    def _joint(self, nodes: list[int]) -> Value:
        """Of the values of several nodes one after the other.

        Elements are followed through gathers, concatenations and pairs of maxima and minima to the values they come
        from: ``max(a, b)`` and ``min(a, b)`` together move no more than ``a`` and ``b`` do, and copies of one element
        count as often as they occur.
        """
        leaves = _Leaves(self.graph, self._varies)
        for i in nodes:
            leaves.follow(i, torch.arange(self.graph.numel(i)))
        p = self.settings.p
        parts = []
        for j, count in leaves.counts.items():
            often = float(count.max())
            growth = 1.0 if p == math.inf else often ** (1 / p) * UP
            parts.append(self.lengths(j).lengths * growth * UP)
        if not parts:
            return Value(self._zeros())
        stacked = torch.stack(parts)
        if p == math.inf:
            lengths = stacked.amax(0)
        elif p == 1:
            lengths = stacked.sum(0) * (1 + gamma(len(parts) + 2)) * UP
        else:
            lengths = (
                root(stacked.square().sum(0) * (1 + gamma(len(parts) + 4))) * UP
                if len(parts) > 1
                else parts[0]
            )
        return Value(lengths)

    # ---- shared -----------------------------------------------------------------------------------------

    def _with_noise(self, lengths: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return lengths
        p = self.settings.p
        flat = noise.reshape(len(noise), -1)  # one number a sample has no other dimension
        if p == math.inf:
            size = flat.amax(1)
        elif p == 1:
            size = flat.sum(1) * (1 + gamma(flat.shape[1]))
        else:
            size = root(flat.square().sum(1) * (1 + gamma(flat.shape[1] + 2))) * UP
        return torch.stack([lengths[:, 0], (lengths[:, 1] + size) * UP], 1)

    def _param(self, i: int, k: int) -> Tensor:
        return self.tensors[self.graph.nodes[i].params[k]]

    def _optional_param(self, i: int, k: int) -> Tensor | None:
        params = self.graph.nodes[i].params
        return self.tensors[params[k]].double() if k < len(params) and params[k] >= 0 else None

    def _single(self) -> bool:
        box = self.boxes[0]
        return box is None or box[0].dtype == torch.float32

    def _roundoff(self) -> float:
        return 2.0**-24 if self._single() else 2.0**-53

    def _tiny(self) -> float:
        return 2.0**-126 if self._single() else 2.0**-1022

    def _network_gamma(self, terms: float) -> float:
        """``n u / (1 - n u)`` in the network's own precision."""
        share = terms * self._roundoff()
        if not share < 0.5:
            raise ValueError(f"a sum of {terms:g} terms is too long for a rounding error bound")
        return share / (1 - share) * UP


class _Leaves:
    """From which elements of which values those of a node are taken, and how often."""

    def __init__(self, graph: Graph, varies: list[bool]) -> None:
        self.graph, self.varies = graph, varies
        self.counts: dict[int, Tensor] = {}
        self._pairs: set[tuple[int, int, str, bytes]] = set()

    def follow(self, i: int, wanted: Tensor) -> None:
        node = self.graph.nodes[i]
        if not self.varies[i] or wanted.numel() == 0:
            return
        if node.op == "gather":
            index = node.attrs["index"].flatten().to(torch.int64)[wanted]
            self.follow(node.inputs[0], index[index >= 0])
        elif node.op == "concat":
            start = 0
            for j in node.inputs:
                size = self.graph.numel(j)
                self.follow(j, wanted[(wanted >= start) & (wanted < start + size)] - start)
                start += size
        elif node.op == "reshape":
            self.follow(node.inputs[0], wanted)
        elif node.op in ("max2", "min2"):
            self._pair(node, wanted)
        else:
            count = self.counts.setdefault(i, torch.zeros(self.graph.numel(i), dtype=torch.int64))
            count.index_add_(0, wanted, torch.ones_like(wanted))

    def _pair(self, node: Node, wanted: Tensor) -> None:
        """Once for a maximum and the minimum of the same elements."""
        a, b = node.inputs[:2]
        other = "min2" if node.op == "max2" else "max2"
        key = wanted.sort().values.numpy().tobytes()
        if (a, b, other, key) in self._pairs:
            self._pairs.remove((a, b, other, key))
            return
        self._pairs.add((a, b, node.op, key))
        self.follow(a, wanted)
        self.follow(b, wanted)


def _flag(rows: Tensor | None) -> Tensor | None:
    """0/1 diagonals as bool, which are smaller."""
    if rows is None:
        return None
    return rows > 0 if bool(((rows == 0) | (rows == 1)).all()) else rows


def plain_norm(operator: Operator, rows: Tensor | None, columns: Tensor | None, p: float) -> Tensor:
    """``||D W S||_p`` in plain arithmetic, with a gradient: for p = 2 that of ``v^T D W S u`` at singular vectors."""
    batch = next((len(mask) for mask in (rows, columns) if mask is not None), 1)
    wide = operator.with_weight(operator.weight.double())
    right = columns.double() if columns is not None else wide.weight.new_ones(batch, *operator.input_shape)
    left = rows.double() if rows is not None else wide.weight.new_ones(batch, *operator.output_shape)
    if p != 2:
        absolute = wide.with_weight(wide.weight.abs())
        sums = absolute.apply_adjoint(left) * right if p == 1 else absolute.apply(right) * left
        return sums.flatten(1).amax(1)
    with torch.no_grad():
        conv: Any = operator.geometry
        vector = power_norm(wide.weight, left, right, steps=60, conv=conv).vector * right
    image = left * wide.apply(vector)
    with torch.no_grad():
        size = torch.linalg.vector_norm(vector.flatten(1), dim=1).clamp(min=1e-300)
        top = torch.nn.functional.normalize(image.flatten(1), dim=1, eps=1e-300) / size[:, None]
    return (top * image.flatten(1)).sum(1)


def _row_norms(operator: Operator, p: float) -> Tensor:
    """At least ``||W_k||_q`` of every output (every output channel) with the dual q of p; float64."""
    weight = exact_double(operator.weight).abs()
    geometry = operator.geometry
    if geometry is not None and geometry.transposed:  # [C, O / g, ...]: by output channel
        inner, per_group = weight.shape[0] // geometry.groups, weight.shape[1]
        weight = weight.view(geometry.groups, inner, per_group, -1).transpose(1, 2)
        weight = weight.reshape(geometry.groups * per_group, -1)
    flat = weight.flatten(1)
    charge = (1 + gamma(flat.shape[1] + 4)) * UP
    if p == 1:
        return flat.amax(1)
    if p == math.inf:
        return flat.sum(1) * charge
    largest = flat.amax(1, keepdim=True)
    scaled = flat / torch.where(largest > 0, largest, torch.ones_like(largest))
    return root(scaled.square().sum(1)) * largest[:, 0] * charge * UP + 1e-300


def _outward(low: Tensor, high: Tensor, dtype: torch.dtype) -> Box:
    infinity = torch.full_like(low, math.inf, dtype=dtype)
    ends = []
    for end, towards in ((low.to(dtype), -infinity), (high.to(dtype), infinity)):
        # One step further than needed, for the roundings of the float64 formula.
        further = torch.nextafter(torch.nextafter(end.detach(), towards), towards)
        ends.append(with_gradient(further, end))
    return ends[0], ends[1]


def _depends_on_input(graph: Graph) -> list[bool]:
    found: list[bool] = []
    for node in graph.nodes:
        found.append(node.op == "input" or any(found[j] for j in node.inputs))
    return found


__all__ = ["LayerNorm", "Settings", "UnsupportedBound", "Value", "Walk"]
