"""What sound rounding costs: time, width and certified accuracy of `real` and `deployed` over `none`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import pycert

from . import files, isolate, libraries, nets, timing

MODES = ("none", "real", "deployed")
EPS = 2 / 255  # of the limits on extra width
#: Largest extra width allowed: (mode, method) to a share of the width of plain bounds.
LIMITS = {
    ("real", "ibp"): 1e-3, ("real", "crown-ibp"): 1e-3, ("real", "crown"): 1e-3,
    ("deployed", "ibp"): 1e-2, ("deployed", "crown-ibp"): 1e-2, ("deployed", "crown"): 5e-2,
}  # fmt: skip
#: Trained network: (radius, test images for ibp and crown-ibp, test images for crown).
TRAINED = {
    "digits": (0.05, 500, 500),
    "CONV_box": (0.3, 10000, 0),
    "CONV_crownibp1to1": (0.3, 10000, 0),
    "CONV_crown": (0.3, 1000, 500),
    "FC_box": (0.3, 10000, 0),
    "FC_crownibp1to1": (0.3, 10000, 0),
    "FC_crown": (0.3, 1000, 1000),
}


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``soundness``."""
    parser.add_argument("--width-nets", default=",".join(nets.STANDARD), help="networks of the first table")
    parser.add_argument("--width-batch", type=int, default=4, help="samples of the first table (default 4)")
    parser.add_argument("--trained", default=",".join(TRAINED), help="networks of the second table")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both tables: random networks, then trained ones."""
    common = {"threads": args.threads, "seconds": args.seconds, "clock": args.clock}
    widths: list[dict[str, Any]] = []
    missing: list[str] = []
    names = ["mlp_tiny"] if args.quick else args.width_nets.split(",")
    for net in names:
        for method in libraries.METHODS:
            batch = args.width_batch if (net, 32) not in nets.TOO_BIG_FOR_CROWN or method != "crown" else 1
            if method == "crown" and (net, batch) in nets.TOO_BIG_FOR_CROWN:
                continue
            case = {"net": net, "batch": batch, "method": method, **common}
            for row in isolate.run_case("benchmarks.bench_soundness:measure_width", case, 300):
                widths.append({"net": net, "method": method, "batch": batch, **row})
                print(widths[-1], flush=True)
    accuracies: list[dict[str, Any]] = []
    for net in [] if args.quick else args.trained.split(","):
        for row in isolate.run_case(
            "benchmarks.bench_soundness:measure_accuracy", {"net": net, "threads": args.threads}, 1800
        ):
            if "failed" in row:
                missing.append(f"{net}: {row['failed']}.")
            else:
                accuracies.append({"net": net, **row})
                print(accuracies[-1], flush=True)
    missing += [f"{row['net']}, {row['method']}: {row['failed']}." for row in widths if "failed" in row]
    return {"tables": tables([row for row in widths if "failed" not in row], accuracies), "notes": missing}


def measure_width(
    net: str, batch: int, method: str, threads: int, seconds: float, clock: str
) -> Iterator[dict[str, Any]]:
    """Time ratios and extra widths of one random network and method."""
    torch.set_num_threads(threads)
    module, x, _ = nets.make(net, batch)
    bounded = pycert.BoundedModule(module, x[:1])
    region = pycert.LpBall(x, eps=EPS)

    def bounds(mode: str) -> Any:
        with torch.no_grad():
            return bounded.bound(region, method=method, intersect=False, soundness=mode)

    width = {mode: (found.upper - found.lower).double().sum() for mode in MODES for found in [bounds(mode)]}
    calls = {mode: (lambda mode=mode: bounds(mode)) for mode in MODES}
    start = timing.processor_ticks()
    times = timing.alternate(calls, seconds, clock)
    row: dict[str, Any] = {"none ms": times["none"].median * 1e3, "busy": timing.busy_since(start)}
    for mode in MODES[1:]:
        middle, low, high = timing.ratio(times[mode], times["none"])
        row[f"{mode} time"], row[f"{mode} time quartiles"] = middle, [low, high]
        row[f"{mode} extra width"] = ((width[mode] - width["none"]) / width["none"]).item()
        row[f"{mode} limit"] = LIMITS[mode, method]
    yield row


def measure_accuracy(net: str, threads: int) -> Iterator[dict[str, Any]]:
    """Certified accuracy of a trained network, percent, in every mode; one row a method."""
    torch.set_num_threads(threads)
    eps, many, few = TRAINED[net]
    module = files.digits_network(eps) if net == "digits" else files.paradox_network(net)
    x, y = files.digits()[1] if net == "digits" else files.mnist_test()
    bounded = pycert.BoundedModule(module, x[:1])
    for method in libraries.METHODS:
        count = min(len(x), few if method == "crown" else many)
        if count == 0:
            continue
        row: dict[str, Any] = {"method": method, "eps": eps, "samples": count}
        for mode in MODES:
            row[f"{mode} %"] = 100 * certified(bounded, x[:count], y[:count], eps, method, mode) / count
        yield row


def certified(bounded: Any, x: torch.Tensor, y: torch.Tensor, eps: float, method: str, mode: str) -> int:
    """How many samples are certified over the ball clipped to [0, 1]; by ``method`` alone."""
    size = 50 if method == "crown" else 500
    options: dict[str, Any] = {
        "method": method,
        "clip": (0, 1),
        "intersect": False,
        "cascade": False,
        "soundness": mode,
    }
    found = 0
    for begin in range(0, len(x), size):
        part = slice(begin, begin + size)
        found += int(pycert.certify(bounded, x[part], y[part], eps=eps, **options).certified.sum())
    return found


def tables(widths: list[dict[str, Any]], accuracies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The two tables; limits stand beside what was measured."""
    columns = ["net", "method", "batch", "none ms"]
    columns += [f"{mode} {what}" for mode in MODES[1:] for what in ("time", "extra width", "limit")] + [
        "busy"
    ]
    made = [
        {
            "title": "Random networks at eps 2/255: time over `none`, extra width over the width of `none`",
            "columns": columns,
            "rows": widths,
        }
    ]
    if accuracies:
        title = "Trained networks: certified accuracy at the training radius, one method alone, percent"
        columns = ["net", "method", "eps", "samples", *(f"{mode} %" for mode in MODES)]
        made.append({"title": title, "columns": columns, "rows": accuracies})
    return made
