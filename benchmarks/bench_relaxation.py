"""Area between the lines around each activation, beside the least possible and auto_LiRPA's; time per interval."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from pycert.ops import activation_lines
from pycert.reference import curves

from . import timing


class Case(NamedTuple):
    """One activation: pycert's name and arguments, and the layer another library bounds."""

    name: str
    arguments: dict[str, float]
    run: Callable[[Tensor], Tensor]
    domain: str = "all"


CASES = {
    "sigmoid": Case("sigmoid", {}, torch.sigmoid),
    "tanh": Case("tanh", {}, torch.tanh),
    "elu": Case("elu", {}, functional.elu),
    "elu 1.673": Case("elu", {"alpha": 1.673}, lambda x: functional.elu(x, 1.673)),
    "softplus": Case("softplus", {}, functional.softplus),
    "silu": Case("silu", {}, functional.silu),
    "mish": Case("mish", {}, functional.mish),
    "gelu": Case("gelu", {}, functional.gelu),
    "gelu_tanh": Case("gelu_tanh", {}, lambda x: functional.gelu(x, approximate="tanh")),
    "hardswish": Case("hardswish", {}, functional.hardswish),
    "softsign": Case("softsign", {}, functional.softsign),
    "exp": Case("exp", {}, torch.exp),
    "log": Case("log", {}, torch.log, "positive"),
    "sqrt": Case("sqrt", {}, torch.sqrt, "positive"),
    "reciprocal": Case("reciprocal", {}, torch.reciprocal, "positive"),
    "square": Case("square", {}, lambda x: x**2),
    "sin": Case("sin", {}, torch.sin),
    "cos": Case("cos", {}, torch.cos),
}


class Layer(nn.Module):
    """The activation between a copy of its input and its output, which some libraries need to build a graph."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``relaxation``."""
    parser.add_argument(
        "--grid", type=int, default=60, help="ends per axis of the grid of intervals (default 60)"
    )


def intervals(domain: str, count: int) -> tuple[Tensor, Tensor]:
    """``[n, 1]`` ends: every pair of a grid on [-8, 8], or on [0.02, 16], geometric."""
    if domain == "positive":
        ends = torch.logspace(math.log10(0.02), math.log10(16), count)
    else:
        ends = torch.linspace(-8, 8, count) + 0.0137  # off the kinks and inflections
    lower, upper = torch.meshgrid(ends, ends, indexing="ij")
    keep = lower < upper
    return lower[keep][:, None], upper[keep][:, None]


def ours(case: Case, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Heights of both lines at the midpoint, float64; their difference times the width is the area."""
    lines = [t.double() for t in activation_lines(lower, upper, case.name, **case.arguments)]
    middle = (lower.double() + upper.double()) / 2
    return lines[0] * middle + lines[1], lines[2] * middle + lines[3]


def theirs(case: Case, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The same of auto_LiRPA's CROWN lines through this one layer."""
    import auto_LiRPA

    middle = (lower + upper) / 2
    logging.disable()  # what it does not support is said in the table
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        layer: nn.Module = Layer(case.run)
        if case.name == "gelu":  # it knows the exact one by a layer of its own
            layer = importlib.import_module("auto_LiRPA.operators.gelu").GELU()
        bounded = auto_LiRPA.BoundedModule(layer, middle)
        region = auto_LiRPA.PerturbationLpNorm(x_L=lower, x_U=upper)
        needed = {bounded.output_name[0]: [bounded.input_name[0]]}
        _, _, found = bounded.compute_bounds(
            x=(auto_LiRPA.BoundedTensor(middle, region),),
            method="CROWN",
            return_A=True,
            needed_A_dict=needed,
        )
    line = found[bounded.output_name[0]][bounded.input_name[0]]
    below, above = (
        line[f"{side}A"].double().reshape(-1, 1) * middle.double()
        + line[f"{side}bias"].double().reshape(-1, 1)
        for side in "lu"
    )
    return below, above


def least(case: Case, lower: Tensor, upper: Tensor, points: int = 160) -> Tensor:
    """The least distance at the midpoint that two lines can have, from points on the curve; a little too small."""
    t = torch.linspace(0, 1, 2 * points + 1, dtype=torch.float64)
    x = lower.double() + (upper - lower).double() * t
    y = curves.FUNCTIONS[case.name](x, case.arguments) if case.name in curves.FUNCTIONS else case.run(x)
    best: list[Tensor] = []
    for row_x, row_y in zip(x.split(64), y.split(64), strict=True):
        left, right, middle = (
            row_x[:, : points + 1, None],
            row_x[:, None, points:],
            row_x[:, points, None, None],
        )
        width = (right - left).clamp(min=1e-300)
        share = ((middle - left) / width).clamp(0, 1)
        value = row_y[:, : points + 1, None] * (1 - share) + row_y[:, None, points:] * share
        best.append(value.amax((1, 2)) - value.amin((1, 2)))
    return torch.cat(best)[:, None]


def percent(ratio: Tensor) -> float:
    """By how much a ratio exceeds 1."""
    return 100 * (float(ratio) - 1)


def measure(label: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Worst and mean ratios of areas. Differences below 1e-5 of the values are rounding, and left out."""
    lower, upper = intervals(case.domain, 12 if args.quick else args.grid)
    low, high = ours(case, lower, upper)
    area, size = high - low, torch.maximum(low.abs(), high.abs())
    row: dict[str, Any] = {"activation": label, "intervals": len(lower)}
    best = least(case, lower, upper)
    counts = best > 1e-5 * size
    ratio = (area / best)[counts]
    row.update({"above least, mean %": percent(ratio.mean()), "above least, worst %": percent(ratio.max())})
    try:
        below, above = theirs(case, lower, upper)
        encloses = (above - below) >= 0.99 * best
        ratio = (area / (above - below))[counts & encloses]
        row["auto_LiRPA below least"] = int((counts & ~encloses).sum())
        row.update(
            {"to auto_LiRPA, mean %": percent(ratio.mean()), "to auto_LiRPA, worst %": percent(ratio.max())}
        )
    except ImportError:
        pass
    except Exception as error:  # the peer has no such operator, or fails: said in the table
        row["auto_LiRPA"] = type(error).__name__
    times = timing.alternate(
        {"ours": lambda: activation_lines(lower, upper, case.name, deployed=True, **case.arguments)},
        args.seconds / 4,
        args.clock,
    )
    row["ns"] = times["ours"].median * 1e9 / len(lower)
    return row


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every activation on its grid of intervals."""
    rows = []
    for label, case in CASES.items():
        rows.append(measure(label, case, args))
        print(rows[-1], flush=True)
    columns = ["activation", "intervals", "above least, mean %", "above least, worst %"]
    columns += [
        "to auto_LiRPA, mean %",
        "to auto_LiRPA, worst %",
        "auto_LiRPA below least",
        "auto_LiRPA",
        "ns",
    ]
    notes = [
        "Area between pycert's two lines beyond the least area that any two lines leave (brute force on points, which "
        "miss kinks and so make it a little too small), and beyond that of auto_LiRPA's CROWN lines (negative: ours is "
        "smaller); mean and worst over the intervals. An error's name: auto_LiRPA does not bound this operator.",
        "`auto_LiRPA below least`: intervals, left out of the comparison, where its lines, as called here, leave less "
        "than the least possible area, that is, do not enclose the curve.",
        "Intervals: all pairs of a grid on [-8, 8]; on [0.02, 16] for positive domains. `ns`: time per interval.",
    ]
    return {"tables": [{"title": "Areas of relaxations", "columns": columns, "rows": rows}], "notes": notes}
