"""BoundedModule.estimate against measured peak memory and counted operations."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import pycert

from . import isolate, nets, timing

CASES = (
    ("mlp_784_256x5", 256, "ibp"), ("mlp_784_256x5", 64, "crown-ibp"), ("mlp_784_256x5", 16, "crown"),
    ("dm_small", 32, "ibp"), ("dm_small", 32, "crown-ibp"), ("dm_small", 8, "crown"),
    ("dm_medium", 32, "ibp"), ("dm_medium", 32, "crown-ibp"), ("dm_medium", 1, "crown"),
    ("resnet2b", 32, "ibp"), ("resnet2b", 32, "crown-ibp"), ("resnet2b", 4, "crown"),
)  # fmt: skip

#: Where stride, padding and dilation stand among the arguments of a convolution; 0 where it has none.
CONVOLUTIONS = {
    "aten::mkldnn_convolution": (4, 3, 5),
    "aten::thnn_conv2d": (4, 5, 0),
    "aten::slow_conv_dilated2d": (4, 5, 6),
}

ONE_PASS = 32  # samples up to which interval_linear calls no matrix product


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``estimate``: none beside the runner's."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Predicted over measured, a child process per case."""
    rows = []
    for net, batch, method in (("mlp_tiny", 1, "ibp"),) if args.quick else CASES:
        case = {"net": net, "batch": batch, "method": method, "threads": args.threads}
        for row in isolate.run_case("benchmarks.bench_estimate:measure", case, 240):
            rows.append({"net": net, "batch": batch, "method": method, **row})
            print(rows[-1], flush=True)
    columns = ["net", "batch", "method", "predicted MiB", "measured MiB", "bytes ratio"]
    columns += ["predicted GFLOP", "counted GFLOP", "FLOP ratio"]
    failed = [f"{row['net']}, {row['method']}: {row['failed']}." for row in rows if "failed" in row]
    kept = [row for row in rows if "failed" not in row]
    title = "Predicted and measured; a ratio within 1/2 and 2 is what is promised"
    return {"tables": [{"title": title, "columns": columns, "rows": kept}], "notes": failed}


def measure(net: str, batch: int, method: str, threads: int) -> Iterator[dict[str, Any]]:
    """One row: bytes and operations of one call, predicted and measured."""
    torch.set_num_threads(threads)
    module, x, eps = nets.make(net, batch)
    bounded = pycert.BoundedModule(module, x[:1])
    region = pycert.LpBall(x, eps=eps)

    def bounds() -> None:
        with torch.no_grad():
            bounded.bound(region, method=method, intersect=False)

    bounds()  # what is built once is not part of a call
    predicted = bounded.estimate(region, method=method)
    measured = timing.peak_memory(bounds)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        bounds()
    counted = sum(operations(event) for event in profiled.events())
    row = {"predicted MiB": predicted.bytes / 2**20, "predicted GFLOP": predicted.flops / 1e9}
    if measured:
        row |= {"measured MiB": measured / 2**20, "bytes ratio": predicted.bytes / measured}
    yield {**row, "counted GFLOP": counted / 1e9, "FLOP ratio": predicted.flops / max(counted, 1)}


def operations(event: Any) -> int:
    """Multiplications and additions of one profiled product, by the shapes it was called with; or 0."""
    shapes, values = event.input_shapes, event.concrete_inputs
    if event.name == "pycert::interval_linear":  # both products, where a kernel of pycert's own forms them
        samples, (outputs, inputs) = math.prod(shapes[0][:-1]), shapes[2]
        return 4 * samples * outputs * inputs if samples <= ONE_PASS else 0
    if event.name in ("aten::mm", "aten::bmm", "pycert::rows_product"):
        return 2 * math.prod(shapes[0]) * shapes[1][-1]
    if event.name in ("aten::addmm", "aten::baddbmm"):
        return 2 * math.prod(shapes[1]) * shapes[2][-1]
    if event.name == "aten::convolution" and values[6]:  # transposed: every input element meets the kernel
        return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if event.name not in CONVOLUTIONS:
        return 0
    stride, padding, dilation = (values[at] if at else [1, 1] for at in CONVOLUTIONS[event.name])
    kernel = shapes[1][2:]
    sides = zip(shapes[0][2:], kernel, stride, padding, dilation, strict=True)
    positions = [
        (size + 2 * pad - step * (taps - 1) - 1) // skip + 1 for size, taps, skip, pad, step in sides
    ]
    return 2 * shapes[0][0] * math.prod(positions) * math.prod(shapes[1])
