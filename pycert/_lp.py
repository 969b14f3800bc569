"""Linear programs over relaxed ReLU networks, solved by HiGHS; what counts as a bound is recomputed by the engine."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycert import _branch, krelu
from pycert.errors import UnsupportedOperator
from pycert.graph.ir import AFFINE, Node
from pycert.options import Options
from pycert.regions import Box

if TYPE_CHECKING:
    from pycert.bounded import BoundedModule, Bounds

Array = NDArray[np.float64]
#: A row has to be violated by as much, in units of its largest coefficient, to enter the program.
VIOLATION = 1e-6
#: Rows that enter at a time, at most, and how often.
ROWS_AT_A_TIME, ROUNDS = 250, 12
#: Neurons of a sample whose sign is open, at most, where leaves are bounded by linear programs; else by ascent.
LARGEST_BRANCHED = 100


def solver() -> Any:
    """HiGHS.

    Raises:
        ImportError: it is not installed; says how to get it.
    """
    try:
        return importlib.import_module("highspy")
    except ImportError as error:
        raise ImportError("method 'lp' needs HiGHS: pip install highspy (or pycert[solvers])") from error


@dataclasses.dataclass
class Affine:
    """A value as ``sum_j matrices[j] @ source_j + constant``; sources by node number (inputs and ReLUs)."""

    matrices: dict[int, Array]
    constant: Array


def affine_maps(bm: BoundedModule) -> dict[int, Affine]:
    """Pre-activations of all ReLUs, and the output, as functions of the inputs and the ReLUs before.

    Raises:
        UnsupportedOperator: an operator that is neither affine nor a ReLU.
    """
    graph = bm.graph
    nodes, shapes, sources = list(graph.nodes), list(graph.inputs), {}
    for i, node in enumerate(graph.nodes):
        if node.op == "input":
            sources[int(node.attrs.get("index", 0))] = i
        elif node.op == "relu":
            sources[len(shapes)] = i
            nodes[i] = Node("input", (), node.shape, attrs={"index": len(shapes)})
            shapes.append(node.shape)
        elif node.op not in AFFINE and node.op != "constant":
            raise UnsupportedOperator(node.path, node.op, "method 'lp' takes ReLU networks; use 'krelu'")
    wanted = sorted({n.inputs[0] for n in graph.nodes if n.op == "relu"} | {graph.output})
    like = next((t for t in graph.tensors() if t.dtype.is_floating_point), torch.empty(0))
    found = {}
    for target in wanted:
        known = [j for j, i in sources.items() if i <= target]
        part = dataclasses.replace(
            graph, nodes=nodes[: target + 1], output=target, inputs=[shapes[j] for j in known]
        )
        module = bm._part(part)
        zeros = [torch.zeros(1, *shapes[j], dtype=like.dtype, device=like.device) for j in known]
        regions, _ = module._regions(tuple(Box(z, z) for z in zeros))
        with torch.no_grad():
            options = Options(side="lower", soundness="none", intersect=False)
            linear = module._bound(regions, None, "crown", options, return_linear=True).linear
        assert linear is not None and linear.c_lower is not None
        parts = linear.A_lower if isinstance(linear.A_lower, tuple) else (linear.A_lower,)
        matrices = {
            sources[j]: _array(A[0].flatten(1)) for j, A in zip(known, parts, strict=True) if A is not None
        }
        found[target] = Affine(matrices, _array(linear.c_lower[0]))
    return found


def _array(t: Tensor) -> Array:
    return t.detach().double().cpu().numpy()


@dataclasses.dataclass
class Layer:
    """One ReLU layer of a sample's program: where its variables and rows stand."""

    relu: int
    z: int  # first column of the pre-activations
    y: int  # first column of the activations
    lower: Array
    upper: Array
    above: Array  # rows y >= z, by neuron; -1 where stable


class Program:
    """The relaxed network of one sample: triangles, and rows of hulls as they are violated."""

    def __init__(
        self,
        bm: BoundedModule,
        maps: dict[int, Affine],
        ends: dict[int, tuple[Array, Array]],
        cuts: krelu.CutSet,
        sample: int,
    ) -> None:
        self.highspy = solver()
        self.infinity = self.highspy.kHighsInf
        self.maps, self.output = maps, maps[bm.graph.output]
        self.columns: dict[int, int] = {}  # first column of every source
        self.layers: list[Layer] = []
        self._low: list[Array] = []
        self._high: list[Array] = []
        self._rows: list[tuple[Array, NDArray[np.int32], float, float]] = []
        self.count = 0
        for i, node in enumerate(bm.graph.nodes):
            if node.op == "input":
                self.columns[i] = self._add_columns(*ends[i])
            elif node.op == "relu" and i <= bm.graph.output:
                self._add_relu(i, node.inputs[0], *ends[node.inputs[0]])
        self.cuts = {
            a: krelu.Cuts(
                c.layer, *(getattr(c, n)[sample % len(c.P_c)].cpu() for n in ("index", "P_x", "P_y", "P_c"))
            )
            for a, c in cuts.cuts.items()
        }
        self.taken: list[tuple[int, int]] = []  # (activation, number) of cuts that are rows now
        self.first_cut = len(self._rows)
        self._load()

    def _add_columns(self, low: Array, high: Array) -> int:
        first, self.count = self.count, self.count + len(low)
        self._low.append(low)
        self._high.append(high)
        return first

    def _add_relu(self, relu: int, value: int, low: Array, high: Array) -> None:
        n = len(low)
        z = self._add_columns(low, high)
        y = self._add_columns(np.where(low >= 0, -self.infinity, 0), np.where(high <= 0, 0, self.infinity))
        affine = self.maps[value]
        for j in range(n):
            parts = [(A[j], self.columns[s] + np.flatnonzero(A[j])) for s, A in affine.matrices.items()]
            values = np.concatenate([*(row[row != 0] for row, _ in parts), [-1.0]])
            places = np.concatenate([*(at for _, at in parts), [z + j]])
            self._rows.append((values, places.astype(np.int32), -affine.constant[j], -affine.constant[j]))
        above = np.full(n, -1)
        for j in map(int, np.flatnonzero(high > 0)):
            pair = np.array([y + j, z + j], dtype=np.int32)
            if low[j] >= 0:
                self._rows.append((np.array([1.0, -1.0]), pair, 0.0, 0.0))
                continue
            above[j] = len(self._rows)
            self._rows.append((np.array([1.0, -1.0]), pair, 0.0, self.infinity))
            slope = high[j] / (high[j] - low[j])
            self._rows.append((np.array([1.0, -slope]), pair, -self.infinity, -slope * low[j]))
        self.columns[relu] = y
        self.layers.append(Layer(relu, z, y, low, high, above))

    def _load(self) -> None:
        lp = self.highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.count, len(self._rows)
        lp.col_cost_ = np.zeros(self.count)
        lp.col_lower_, lp.col_upper_ = np.concatenate(self._low), np.concatenate(self._high)
        lp.row_lower_ = np.array([r[2] for r in self._rows])
        lp.row_upper_ = np.array([r[3] for r in self._rows])
        matrix = lp.a_matrix_
        matrix.format_ = self.highspy.MatrixFormat.kRowwise
        matrix.start_ = np.concatenate([[0], np.cumsum([len(r[0]) for r in self._rows])]).astype(np.int32)
        matrix.index_ = np.concatenate([r[1] for r in self._rows])
        matrix.value_ = np.concatenate([r[0] for r in self._rows])
        self.highs = self.highspy.Highs()
        for name, value in (
            ("output_flag", False),
            ("threads", 1),
            ("presolve", "off"),
            ("solver", "simplex"),
        ):
            self.highs.setOptionValue(name, value)
        self.highs.passModel(lp)

    def solve(self, row: Array, until: float) -> tuple[dict[int, Array], dict[int, Array]] | None:
        """Lower slopes by ReLU and multipliers by ReLU from the dual optimum of ``min row @ output``.

        Rows of hulls enter as the optimum violates them. None where time ran out before any optimum.
        """
        cost = np.zeros(self.count)
        for source, A in self.output.matrices.items():
            cost[self.columns[source] : self.columns[source] + A.shape[1]] += row @ A
        self.highs.changeColsCost(self.count, np.arange(self.count, dtype=np.int32), cost)
        found = None
        for _ in range(ROUNDS):
            left = until - time.monotonic()
            if left <= 0:
                break
            if math.isfinite(left):
                self.highs.setOptionValue("time_limit", self.highs.getRunTime() + left)
            self.highs.run()
            if not self.highs.getSolution().dual_valid:
                break
            solution = self.highs.getSolution()
            found = self._multipliers(solution)
            optimal = self.highs.getModelStatus() == self.highspy.HighsModelStatus.kOptimal
            if not optimal or self._separate(np.array(solution.col_value)) == 0:
                break
        return found

    def _multipliers(self, solution: Any) -> tuple[dict[int, Array], dict[int, Array]]:
        """Slopes and multipliers that the engine can make the optimum of.

        It takes one line of a triangle at a time. Where both sides of it have multipliers, as much as both have is
        taken off: y >= z and the upper line together say ``(1 - s) (u - z) >= 0``, y >= 0 and the upper line
        ``s (z - l) >= 0``, with s the upper slope; which are rows of the box.
        """
        duals, reduced = np.array(solution.row_dual), np.array(solution.col_dual)
        slopes: dict[int, Array] = {}
        multipliers = {a: np.zeros(len(c.P_c)) for a, c in self.cuts.items()}
        for at, (a, number) in enumerate(self.taken, start=self.first_cut):
            multipliers[a][number] = max(duals[at], 0.0)
        for layer in self.layers:
            n = len(layer.lower)
            unstable = layer.above >= 0
            up = np.where(unstable, np.maximum(duals[layer.above], 0), 0)
            line = np.where(unstable, np.maximum(-duals[layer.above + unstable], 0), 0)
            floor = np.where(unstable, np.maximum(reduced[layer.y : layer.y + n], 0), 0)
            of_box = reduced[layer.z : layer.z + n]
            low, high = np.maximum(of_box, 0), np.maximum(-of_box, 0)
            width = np.where(unstable, layer.upper - layer.lower, 1)
            s = np.where(unstable, layer.upper / width, 0)
            both = np.minimum(up, line)
            up, line, high = up - both, line - both, high + both * (1 - s)
            both = np.minimum(floor, line)
            floor, low = floor - both, low + both * s
            total = up + floor
            rule = (layer.upper > -layer.lower).astype(float)
            slopes[layer.relu] = np.where(total > 1e-12, up / np.maximum(total, 1e-300), rule)
            hulls = multipliers.get(layer.relu, np.zeros(0))
            multipliers[layer.relu] = np.concatenate([hulls, low, high])
        return slopes, multipliers

    def _separate(self, x: Array) -> int:
        """Adds the rows that a point violates most; how many."""
        worst: list[tuple[float, int, int]] = []
        known = set(self.taken)
        for layer in self.layers:
            if layer.relu not in self.cuts:
                continue
            c = self.cuts[layer.relu]
            index, of_z, of_y = c.index.numpy(), _array(c.P_x), _array(c.P_y)
            value = _array(c.P_c) + (of_z * x[layer.z + index] + of_y * x[layer.y + index]).sum(1)
            scale = np.maximum(np.abs(of_z).max(1), np.abs(of_y).max(1))
            bad = np.flatnonzero(value < -VIOLATION * scale)
            worst += [
                (value[r] / scale[r], layer.relu, int(r)) for r in bad if (layer.relu, int(r)) not in known
            ]
        worst.sort()
        for _, a, r in worst[:ROWS_AT_A_TIME]:
            self._add_cut(a, r)
        return min(len(worst), ROWS_AT_A_TIME)

    def _add_cut(self, activation: int, number: int) -> None:
        layer = next(item for item in self.layers if item.relu == activation)
        c = self.cuts[activation]
        index = c.index[number].numpy()
        entries: dict[int, float] = {}
        for first, values in ((layer.z, c.P_x[number]), (layer.y, c.P_y[number])):
            for at, value in zip(index, values.tolist(), strict=True):
                entries[first + int(at)] = entries.get(first + int(at), 0.0) + value
        places = np.array(list(entries), dtype=np.int32)
        coefficients = np.array(list(entries.values()))
        self.highs.addRow(-float(c.P_c[number]), self.infinity, len(places), places, coefficients)
        self.taken.append((activation, number))


def bound_rows(
    bm: BoundedModule, regions: list[Any], rows: krelu.Rows | None, parsed: Options, return_linear: bool
) -> Bounds:
    """``method="lp"`` of :meth:`BoundedModule.bound`."""
    solver()
    _branch.check(parsed, return_linear)
    boxes, cuts = krelu.known_boxes(bm, regions, parsed)
    if parsed.cuts is not None:
        cuts = cuts._with(parsed.cuts)
    given = dataclasses.replace(parsed, intermediate="crown")  # these bounds are given
    maps = affine_maps(bm)
    best = krelu.ascended(bm, regions, rows, given, boxes, cuts, return_linear)
    if not any(node.op == "relu" for node in bm.graph.nodes[: bm.graph.output + 1]):
        return best  # nothing is relaxed
    plain = dataclasses.replace(given, iterations=0, alpha="per spec")  # a row has slopes of its own
    first = _solve_all(bm, maps, regions, rows, parsed, boxes, cuts, best)
    every = cuts._with(krelu.box_rows(bm, boxes))
    found = bm._bound(
        regions, rows, "alpha-crown", plain, return_linear, boxes=(boxes, {}), cuts=every, first=first
    )

    best = krelu._better(best, found)
    if parsed.leaves == 1:
        return best
    if _open_neurons(bm, boxes) > LARGEST_BRANCHED:
        solve = krelu.leaf_solver(bm, parsed, _used(cuts, first[1]))
    else:
        solve = _leaf_solver(bm, maps, parsed, cuts)
    return _branch.branched(bm, regions, rows, parsed, boxes, best, solve)


def _leaf_solver(bm: BoundedModule, maps: dict[int, Affine], parsed: Options, cuts: krelu.CutSet) -> Any:
    """Bounds of leaves of a branching by linear programs."""
    options = dataclasses.replace(
        parsed, intermediate="crown", alpha="per spec", side="lower", iterations=0, threshold=None
    )

    def solve(regions: list[Any], spec: Tensor, boxes: krelu.Boxes, samples: Tensor) -> Tensor:
        own = cuts._of_samples(samples)
        rows = (spec, torch.arange(len(spec), device=spec.device), 1)
        first = _solve_all(bm, maps, regions, rows, options, boxes, own, None)
        every = own._with(krelu.box_rows(bm, boxes))
        leaf = bm._bound(regions, rows, "alpha-crown", options, boxes=(boxes, {}), cuts=every, first=first)
        assert leaf.lower is not None
        return leaf.lower

    return solve


def _used(cuts: krelu.CutSet, multipliers: dict[int, Tensor]) -> krelu.CutSet:
    """The rows that have multipliers in the solution of a program, of any sample."""
    found = krelu.CutSet(cuts.bm)
    for activation, c in cuts.cuts.items():
        use = multipliers[activation][:, : c.P_c.shape[1]].amax(0)
        at = (use > 0).nonzero().flatten()
        if len(at) > 0:
            parts = (t[:, at] for t in (c.index, c.P_x, c.P_y, c.P_c))
            found.cuts[activation] = krelu.Cuts(c.layer, *parts)
    return found


def _open_neurons(bm: BoundedModule, boxes: krelu.Boxes) -> int:
    """Neurons of a sample whose sign is open, at most."""
    values = {node.inputs[0] for node in bm.graph.nodes if node.op == "relu"} & set(boxes)
    counts = [((boxes[i][0] < 0) & (boxes[i][1] > 0)).flatten(1).sum(1) for i in values]
    return int(torch.stack(counts).sum(0).max()) if counts else 0


def _solve_all(
    bm: BoundedModule,
    maps: dict[int, Affine],
    regions: list[Any],
    rows: krelu.Rows | None,
    parsed: Options,
    boxes: krelu.Boxes,
    cuts: krelu.CutSet,
    best: Bounds | None,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Slopes and multipliers of every row, as the engine takes them: all lower bounds, then all upper ones."""
    like = regions[0][0]
    batch, outputs = len(like), bm.graph.numel(bm.graph.output)
    if rows is None:
        table = torch.eye(outputs, dtype=like.dtype, device=like.device)
        rows = (table, torch.arange(outputs, device=like.device).repeat(batch), outputs)
    table, source, count = rows
    all_rows = _array(table if source is None else table[source]).reshape(batch, count, -1)
    ends = dict(boxes)
    for i, node in enumerate(bm.graph.nodes):
        if node.op == "input":
            region = regions[int(node.attrs.get("index", 0))]
            ends[i] = (region[0], region[1])
    signs = {"lower": (1,), "upper": (-1,), "both": (1, -1)}[parsed.side]

    def of_sample(b: int) -> list[tuple[dict[int, Array], dict[int, Array]] | None]:
        limit = math.inf if parsed.time_limit is None else parsed.time_limit
        until = time.monotonic() + limit
        mine = {i: (_array(lo[b]).ravel(), _array(up[b]).ravel()) for i, (lo, up) in ends.items()}
        program = Program(bm, maps, mine, cuts, b)
        out = []
        for sign in signs:
            known = None if best is None else best.lower if sign > 0 else best.upper
            for s in range(count):
                value = -math.inf * sign if known is None else float(known[b].detach().flatten()[s])
                done = parsed.threshold is not None and value * sign > parsed.threshold * sign
                out.append(None if done else program.solve(sign * all_rows[b, s], until))
        return out

    with concurrent.futures.ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        solved = list(pool.map(of_sample, range(batch)))
    ordered = [
        solved[b][t * count + s] for t in range(len(signs)) for b in range(batch) for s in range(count)
    ]
    return _tables(bm, ordered, boxes, cuts, like, len(signs) * batch * count)


def _tables(
    bm: BoundedModule,
    solved: list[tuple[dict[int, Array], dict[int, Array]] | None],
    boxes: krelu.Boxes,
    cuts: krelu.CutSet,
    like: Tensor,
    count: int,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    slopes: dict[int, Tensor] = {}
    multipliers: dict[int, Tensor] = {}
    for i, node in enumerate(bm.graph.nodes):
        if node.op == "relu" and node.inputs[0] in boxes:
            lower, upper = boxes[node.inputs[0]]
            rule = (upper > -lower).flatten(1).double().repeat_interleave(count // len(lower), 0)
            of_relu = rule.cpu().numpy().copy()
            for number, found in enumerate(solved):
                if found is not None:
                    of_relu[number] = found[0][i]
            slopes[i] = torch.from_numpy(of_relu).to(like.device, like.dtype)
            hulls = cuts.cuts[i].P_c.shape[1] if i in cuts.cuts else 0
            of_cuts = np.zeros((count, hulls + 2 * lower.shape[1:].numel()))
            for number, found in enumerate(solved):
                if found is not None:
                    of_cuts[number] = found[1][i]
            multipliers[i] = torch.from_numpy(of_cuts).to(like.device, like.dtype)
    return slopes, multipliers
