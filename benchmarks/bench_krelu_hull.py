"""Hulls of groups of ReLUs: time a group, rows and how much of the way from triangles to the exact hull is left."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import itertools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import pycert

from . import isolate, libraries

#: Rows (b, a) of an octahedron, its box -> a call that returns rows (b, a, c) over (x, relu(x)).
Hull = Callable[[np.ndarray, np.ndarray, np.ndarray], Callable[[], np.ndarray]]
#: Exact facets of larger groups take minutes each.
LARGEST = {"cdd": 3}
REPEATS = 5


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``krelu_hull``."""
    parser.add_argument("--groups", type=int, default=20, help="groups of every size (default 20)")
    parser.add_argument("--sizes", default="2,3,4", help="neurons in a group (default 2,3,4)")


def directions(k: int) -> np.ndarray:
    return np.array([c for c in itertools.product((-1, 0, 1), repeat=k) if any(c)], dtype=np.float64)


def net_limits(rng: np.random.Generator, k: int, correlation: float) -> np.ndarray:
    """Bounds on all directions of ``k`` unstable neurons of a small random network, by crown."""
    while True:
        inputs, depth = int(rng.integers(6, 14)), int(rng.integers(1, 4))
        layers: list[torch.nn.Module] = []
        for width in [16] * depth:
            fan = layers[-2].out_features if layers else inputs
            W = rng.standard_normal((width, fan)) / np.sqrt(fan)
            W = (1 - correlation) * W + correlation * rng.standard_normal((1, fan)) / np.sqrt(fan)
            layer = torch.nn.Linear(fan, width, dtype=torch.float64)
            layer.weight.data, layer.bias.data = (
                torch.tensor(W),
                torch.tensor(0.1 * rng.standard_normal(width)),
            )
            layers += [layer, torch.nn.ReLU()]
        x = torch.tensor(rng.uniform(-1, 1, (1, inputs)))
        bm = pycert.BoundedModule(torch.nn.Sequential(*layers[:-1]), x)
        region = pycert.LpBall(x, eps=float(rng.choice([0.05, 0.1, 0.2, 0.4])))
        with torch.no_grad():
            box = bm.bound(region, "crown")
        assert box.lower is not None and box.upper is not None
        lower, upper = box.lower[0].numpy(), box.upper[0].numpy()
        unstable = np.nonzero((lower < -1e-3) & (upper > 1e-3))[0]
        if len(unstable) < k:
            continue
        widest = unstable[np.argsort(lower[unstable] * upper[unstable])][: max(k, 6)]
        spec = np.zeros((3**k - 1, 16))
        spec[:, rng.choice(widest, k, replace=False)] = directions(k)
        with torch.no_grad():
            found = bm.bound(region, "crown", spec=torch.tensor(spec)).upper
        assert found is not None
        return found[0].numpy()


def cloud_limits(rng: np.random.Generator, k: int) -> np.ndarray:
    """The octahedron around a sheared cloud of points with both signs in every coordinate."""
    while True:
        points = rng.uniform(-1, 1, (6 * k + 10, k)) @ rng.standard_normal(
            (k, k)
        ).T + 0.25 * rng.standard_normal(k)
        if (points.min(0) < -0.05).all() and (points.max(0) > 0.05).all():
            return (directions(k) @ points.T).max(1)


def box_limits(rng: np.random.Generator, k: int) -> np.ndarray:
    lower, upper, C = -rng.uniform(0.1, 2, k), rng.uniform(0.1, 2, k), directions(k)
    return np.where(C > 0, C * upper, C * lower).sum(1)


def groups(k: int, count: int, seed: int = 7) -> list[np.ndarray]:
    """Limits of ``count`` groups: of six, two from networks, one from similar neurons, two clouds, a box."""
    rng = np.random.default_rng([seed, k])
    makers: list[Callable[[], np.ndarray]] = [
        lambda: net_limits(rng, k, 0.0),
        lambda: net_limits(rng, k, 0.0),
        lambda: net_limits(rng, k, 0.6),
        lambda: cloud_limits(rng, k),
        lambda: cloud_limits(rng, k),
        lambda: box_limits(rng, k),
    ]
    return [makers[i % 6]() for i in range(count)]


def box_of(octahedron: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals, from the rows with one coefficient."""
    normals, offsets = octahedron[:, 1:], octahedron[:, 0]
    lower, upper = np.zeros(normals.shape[1]), np.zeros(normals.shape[1])
    for row in np.nonzero(np.abs(normals).sum(1) == 1)[0]:
        at = int(np.abs(normals[row]).argmax())
        if normals[row, at] > 0:
            lower[at] = -offsets[row]
        else:
            upper[at] = offsets[row]
    return lower, upper


# ---- programs --------------------------------------------------------------------------------------------------------


def octahedron_rows(octahedron: np.ndarray) -> np.ndarray:
    """What a program that passes one group at a time calls: rows (b, a) -> rows (b, a, c)."""
    return pycert.ops.octahedron_hull(torch.from_numpy(octahedron)).numpy()


def of_pycert(**options: Any) -> Hull:
    def prepare(octahedron: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> Callable[[], np.ndarray]:
        if not options:
            return lambda: octahedron_rows(octahedron)
        return lambda: pycert.ops.octahedron_hull(torch.from_numpy(octahedron), **options).numpy()

    return prepare


class Matrix(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_int), ("columns", ctypes.c_int), ("data", ctypes.POINTER(ctypes.c_double))]


def of_fconv(folder: str) -> Hull:
    """ELINA's fconv, from the folder of libfconv.so."""
    library = ctypes.CDLL(str(pathlib.Path(folder) / "libfconv.so"))
    library.fkrelu.argtypes, library.fkrelu.restype = [Matrix], Matrix
    library.free_MatDouble.argtypes, library.free_MatDouble.restype = [Matrix], None

    def prepare(octahedron: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> Callable[[], np.ndarray]:
        given = Matrix(*octahedron.shape, octahedron.ctypes.data_as(ctypes.POINTER(ctypes.c_double)))

        def call() -> np.ndarray:
            made = library.fkrelu(given)
            rows = np.ctypeslib.as_array(made.data, shape=(made.rows, made.columns)).copy()
            library.free_MatDouble(made)
            return rows

        return call

    return prepare


def of_wralu(name: str) -> Hull:
    sci = importlib.import_module("kact.krelu.sci")
    function = getattr(sci, name)

    def prepare(octahedron: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> Callable[[], np.ndarray]:
        ends = list(lower), list(upper)
        return lambda: function(octahedron, *ends, add_triangle=True)

    return prepare


def of_cdd(octahedron: np.ndarray) -> np.ndarray:
    """The exact facets in rational arithmetic: the vertices of every orthant's part, lifted, and their hull."""
    import cdd

    def polyhedron(rows: Any, kind: str) -> Any:
        matrix = cdd.Matrix(rows, number_type="fraction")
        matrix.rep_type = getattr(cdd.RepType, kind)
        return cdd.Polyhedron(matrix)

    from fractions import Fraction

    k = octahedron.shape[1] - 1
    exact = [[Fraction(float(value)) for value in row] for row in octahedron]
    points = set()
    for signs in itertools.product((-1, 1), repeat=k):
        planes = [[0, *(s if i == j else 0 for j in range(k))] for i, s in enumerate(signs)]
        for _, *x in polyhedron(exact + planes, "INEQUALITY").get_generators():
            points.add((1, *x, *(max(value, 0) for value in x)))
    return np.array(polyhedron(sorted(points), "GENERATOR").get_inequalities(), dtype=np.float64)


def programs(peers: list[str]) -> dict[str, Callable[[], Hull]]:
    """What can be measured: pycert, peers whose path is given, and pycddlib where it is installed."""
    paths = libraries.peer_paths(peers)
    found: dict[str, Callable[[], Hull]] = {"pycert": of_pycert}
    if "fconv" in paths:
        found["fconv"] = lambda: of_fconv(paths["fconv"].split(os.pathsep)[0])
    if "WraLU" in paths:
        found["WraLU SCI"] = lambda: of_wralu("krelu_with_sci")
        found["WraLU SCI+"] = lambda: of_wralu("krelu_with_sciplus")
    if importlib.util.find_spec("cdd") is not None:
        found["cdd"] = lambda: lambda octahedron, lower, upper: lambda: of_cdd(octahedron)
    return found


# ---- figures ---------------------------------------------------------------------------------------------------------


def exact_vertices(limit: np.ndarray) -> np.ndarray:
    """``(x, relu(x))`` of the hull's vertices, found in rational arithmetic by the tests' own checker."""
    path = isolate.ROOT / "tests" / "hulls.py"
    if "hulls" not in sys.modules:
        spec = importlib.util.spec_from_file_location("hulls", path)
        assert spec is not None and spec.loader is not None
        sys.modules["hulls"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["hulls"])
    vertices: np.ndarray = sys.modules["hulls"].ExactHull(limit).vertices()
    return vertices


def optima(rows: np.ndarray, objectives: np.ndarray) -> np.ndarray:
    from scipy.optimize import linprog

    rows = rows / np.abs(rows).max(1, keepdims=True)
    free = {"bounds": (None, None), "method": "highs"}
    return np.array([-linprog(-d, A_ub=-rows[:, 1:], b_ub=rows[:, 0], **free).fun for d in objectives])


def figures(threads: int, peers: list[str], program: str, k: int, count: int) -> Iterator[dict[str, Any]]:
    """One row: a program on the groups of one size."""
    torch.set_num_threads(threads)
    libraries.add_peers(peers)
    hull, base = programs(peers)[program](), of_pycert(max_rows=0)
    rng = np.random.default_rng([7, k, 7])
    objectives = rng.standard_normal((16, 2 * k))
    objectives[8:, :k] = 0  # outputs alone
    seconds, sizes, gaps, violations = [], [], [], []
    for limit in groups(k, count):
        octahedron = np.ascontiguousarray(np.column_stack([limit, -directions(k)]))
        arguments = (octahedron, *box_of(octahedron))
        call, best = hull(*arguments), np.inf
        for _ in range(1 if program == "cdd" else REPEATS):
            start = time.process_time()
            rows = call()
            best = min(best, time.process_time() - start)
        seconds.append(best)
        sizes.append(len(rows))
        vertices = exact_vertices(limit)
        violations.append(
            max(0.0, -float((rows[:, :1] + rows[:, 1:] @ vertices.T).min() / np.abs(rows).max()))
        )
        exact, alone = (vertices @ objectives.T).max(0), base(*arguments)()
        whole = (optima(alone, objectives) - exact).sum()
        if whole > 1e-6:
            gaps.append((optima(np.vstack([alone, rows]), objectives) - exact).sum() / whole)
    middle = sorted(1e6 * s for s in seconds)
    yield {
        "k": k,
        "program": program,
        "us a group": statistics.median(middle),
        "p10": middle[len(middle) // 10],
        "p90": middle[(9 * len(middle)) // 10],
        "us in a batch": batch_time(k, count) if program == "pycert" else "",
        "rows": statistics.median(sizes),
        "gap left": round(float(np.mean(gaps)), 4),
        "largest violation": max(violations),
    }


def batch_time(k: int, count: int) -> float:
    """Microseconds a group of pycert, all groups in one call."""
    limits = np.stack(groups(k, count))
    limits = np.concatenate([limits] * (1 + 200 // len(limits)))
    octahedra = [np.column_stack([limit, -directions(k)]) for limit in limits]
    ends = [torch.tensor(np.stack(e)) for e in zip(*map(box_of, octahedra), strict=True)]
    A, b = -torch.tensor(directions(k)).expand(len(limits), -1, -1), torch.tensor(limits)
    best = np.inf
    for _ in range(REPEATS):
        start = time.process_time()
        pycert.ops.krelu_hull(*ends, A, b)
        best = min(best, time.process_time() - start)
    return 1e6 * best / len(limits)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every program on every size, one process each: some of them end the process on input they refuse."""
    sizes = [2] if args.quick else [int(k) for k in args.sizes.split(",")]
    count = 6 if args.quick else args.groups
    rows = []
    for k, name in itertools.product(sizes, programs(args.peer)):
        if k > LARGEST.get(name, 4):
            continue
        case = {"threads": args.threads, "peers": args.peer, "program": name, "k": k, "count": count}
        found = isolate.run_case("benchmarks.bench_krelu_hull:figures", case, 900)
        rows += [row if "program" in row else {"k": k, "program": name, **row} for row in found]
        print(rows[-1], flush=True)
    columns = ["k", "program", "us a group", "p10", "p90", "us in a batch", "rows", "gap left"]
    columns += ["largest violation", "failed"]
    notes = [
        f"pycert {pycert.__version__}. Processor time of one thread, median over groups of the best of {REPEATS} calls "
        "with one group each, the call from Python included; `us in a batch`: 200 groups and more in a call.",
        "`gap left`: mean over groups of (optimum - exact) / (optimum over triangles - exact), each summed over 16 "
        "random objectives; linear programs over octahedron, triangles and the program's rows; exact from vertices "
        "found in rational arithmetic. 0 is the hull, 1 the triangles. `largest violation`: of a row at such a vertex, "
        "over the rows' largest number.",
        "Groups: half from small random networks, a third of those with similar neurons; a third octahedra around "
        "clouds of points; the rest boxes, which have no gap.",
    ]
    return {
        "tables": [{"title": "Hulls of groups of ReLUs", "columns": columns, "rows": rows}],
        "notes": notes,
    }
