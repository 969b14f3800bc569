"""Cost of bounds over the plain forward pass: pycert, plain eager PyTorch and auto_LiRPA in turn."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import isolate, libraries, nets, timing

PASSES = ("bounds", "gradients", "step", "fused")
FUSED = ("crown-ibp", "crown")
#: The pass a library is timed in where pycert's loss is fused: auto_LiRPA 0.7's own fusion needs an operator that
#: it cannot trace with torch 2.13 (onnx::OneHot).
FUSED_BY = {"pycert_none": "fused", "auto_LiRPA": "step"}
CLASSES = 10


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``engine``."""
    parser.add_argument("--nets", default=",".join(nets.STANDARD), help=f"of {', '.join(nets.NETS)}")
    parser.add_argument("--batches", help="batch sizes, as 1,32 (default: each network's own)")
    parser.add_argument("--methods", default=",".join(libraries.METHODS))
    parser.add_argument(
        "--passes",
        default=",".join(PASSES),
        help="bounds, gradients of them, certified-training step, the same by one row a sample",
    )
    parser.add_argument("--libraries", default=",".join(libraries.LIBRARIES))
    parser.add_argument(
        "--timeout", type=float, default=240, help="seconds per case, all libraries (default 240)"
    )
    parser.add_argument(
        "--big", action="store_true", help="also full CROWN where it takes minutes or tens of GB"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every case in a child process; Ctrl-C ends the run with what was measured."""
    rows: list[dict[str, Any]] = []
    cut_short = []
    try:
        for case in cases(args):
            about = {key: case[key] for key in ("net", "batch", "method")}
            for row in isolate.run_case("benchmarks.bench_engine:measure", case, args.timeout):
                rows.append({**about, **row})
                print(describe(rows[-1]), flush=True)
    except KeyboardInterrupt:
        cut_short = ["Interrupted: the cases after the last row were not run."]
    return {"tables": tables(rows), "rows": rows, "notes": [*notes(rows), *cut_short]}


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Arguments of :func:`measure`, one dict a case."""
    common = {"threads": args.threads, "seconds": args.seconds, "clock": args.clock, "peers": args.peer}
    common["names"] = args.libraries.split(",")
    if args.quick:
        quick = {**common, "seconds": 0.05, "passes": list(PASSES)}
        yield {"net": "mlp_tiny", "batch": 1, "method": "ibp", **quick}
        return
    for net in args.nets.split(","):
        batches = (
            [int(batch) for batch in args.batches.split(",")] if args.batches else nets.NETS[net].batches
        )
        for batch in batches:
            for method in args.methods.split(","):
                if method == "crown" and (net, batch) in nets.TOO_BIG_FOR_CROWN and not args.big:
                    continue
                yield {
                    "net": net,
                    "batch": batch,
                    "method": method,
                    "passes": args.passes.split(","),
                    **common,
                }


def measure(
    net: str,
    batch: int,
    method: str,
    passes: list[str],
    names: list[str],
    threads: int,
    seconds: float,
    clock: str,
    peers: list[str],
) -> Iterator[dict[str, Any]]:
    """Rows of one case, one per pass: seconds and peak bytes of every library and of the plain network."""
    torch.set_num_threads(threads)
    libraries.add_peers(peers)
    module, x, eps = nets.make(net, batch)
    built, missing = build(names, module, x, method)
    for each in passes:
        if each == "fused" and method not in FUSED:
            continue
        calls = plain(module, x)
        if each == "bounds":
            del calls["training"]
        for name, library in built.items():
            if each != "fused":
                calls[name] = pass_of(library, module, x, eps, each)
            elif name in FUSED_BY:
                calls[name] = pass_of(library, module, x, eps, FUSED_BY[name])
        yield {
            "pass": each,
            "threads": threads,
            **figures(calls, seconds, clock),
            **missing,
            **agreement(built, x, eps, each),
        }


def build(
    names: list[str], module: nn.Module, x: Tensor, method: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapters that could be built, and why others could not."""
    built, errors = {}, {}
    for name in names:
        try:
            built[name] = libraries.LIBRARIES[name](module, x, method)
        except libraries.NotOfferedError:
            continue
        except Exception as error:
            if not (name in libraries.PEERS and isinstance(error, ImportError)):  # a peer that is not there
                errors[name] = f"{type(error).__name__}: {error}"[:200]
    return built, {"errors": errors}


def plain(module: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The network itself: its forward pass, which a bound's cost is divided by, and forward with backward."""
    parameters = list(module.parameters())

    def forward() -> None:
        with torch.no_grad():
            module(x)

    def training() -> None:
        clear(parameters)
        module(x).sum().backward()

    return {"forward": forward, "training": training}


def pass_of(library: Any, module: nn.Module, x: Tensor, eps: float, each: str) -> Callable[[], Any]:
    """What is timed: ``bounds`` without gradients, ``gradients`` of their width, a training step or a fused one."""
    labels = torch.arange(len(x)) % CLASSES
    zeros = torch.zeros(len(x), dtype=torch.long)
    parameters = list(module.parameters())

    def bounds() -> Any:
        with torch.no_grad():
            return library.bounds(x, eps)

    def gradients() -> None:
        clear(parameters)
        lower, upper = library.bounds(x, eps)
        (upper - lower).sum().backward()

    def step() -> None:
        clear(parameters)
        margins = library.margins(x, eps, labels)
        scores = torch.cat([torch.zeros_like(margins[:, :1]), -margins], dim=1)
        functional.cross_entropy(scores, zeros).backward()

    def fused() -> None:
        clear(parameters)
        library.fused_loss(x, eps, labels).backward()

    return {"bounds": bounds, "gradients": gradients, "step": step, "fused": fused}[each]


def clear(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def figures(calls: dict[str, Callable[[], Any]], seconds: float, clock: str) -> dict[str, Any]:
    """Times (alternating) and peak memory of every call; one that fails is left out with its error."""
    failed = {}
    for name, call in list(calls.items()):
        try:
            call()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:200]
            del calls[name]
    start = timing.processor_ticks()
    times = timing.alternate(calls, seconds, clock)
    busy = timing.busy_since(start)
    peaks = {name: timing.peak_memory(call) for name, call in calls.items()}
    pairs = {}
    for name in calls:
        for other in ("forward", "auto_LiRPA", "torch_ibp"):
            if name.startswith("pycert") and other in calls:
                pairs[f"{name}/{other}"] = [
                    round(value, 3) for value in timing.ratio(times[name], times[other])
                ]
    seconds_of = {name: found.as_dict() for name, found in times.items()}
    return {"seconds": seconds_of, "ratios": pairs, "peak_bytes": peaks, "busy": busy, "failed_calls": failed}


def agreement(built: dict[str, Any], x: Tensor, eps: float, each: str) -> dict[str, Any]:
    """How far plain pycert's bounds lie outside (first) and inside (second) each library's.

    Both are the largest over outputs and samples, relative to the widest output; None where a library failed.
    ``widths`` are the sums over outputs and samples.
    """
    if each != "bounds" or "pycert_none" not in built:
        return {}
    found: dict[str, list[float] | None] = {}
    with torch.no_grad():
        lower, upper = built["pycert_none"].bounds(x, eps)
        scale = (upper - lower).abs().max()
        widths = {"pycert_none": (upper - lower).sum().item()}
        for name, library in built.items():
            if name == "pycert_none":
                continue
            try:
                other_lower, other_upper = library.bounds(x, eps)
            except Exception:
                found[name] = None  # figures() reports the error
                continue
            widths[name] = (other_upper - other_lower).sum().item()
            outside = torch.stack([other_lower - lower, upper - other_upper]) / scale
            found[name] = [float(f"{value:.2e}") for value in (outside.max().item(), -outside.min().item())]
    return {"looser_and_tighter": found, "widths": widths}


def describe(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    head = f"{row['net']} b{row['batch']} {row['method']}"
    if "failed" in row:
        return f"{head}: {row['failed']}"
    times = ", ".join(f"{name} {found['median'] * 1e3:.3g}" for name, found in row["seconds"].items())
    return f"{head} {row['pass']}: {times} ms; busy {row['busy']}"


def tables(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table a pass: milliseconds, ratios of medians, mebibytes."""
    titles = {
        "bounds": "Lower and upper bounds of all outputs, no gradients",
        "gradients": "The same with the gradients of the total width",
        "step": "Certified-training step: nine margins, lower side, cross entropy, gradients",
        "fused": "Certified-training step of one row a sample (loss fusion); auto_LiRPA: nine margins, as above",
    }
    columns = [
        "net", "batch", "method", "forward ms", "training ms",
        "pycert ms", "none ms", "auto_LiRPA ms", "torch_ibp ms",
        "pycert x forward", "auto_LiRPA x forward", "none x training", "auto_LiRPA x training",
        "torch_ibp x training", "pycert / auto_LiRPA", "pycert / torch_ibp",
        "none / auto_LiRPA", "none / torch_ibp", "width / auto_LiRPA", "pycert MiB", "auto_LiRPA MiB", "busy",
    ]  # fmt: skip
    made = []
    for each, title in titles.items():
        lines = [table_row(row) for row in rows if row.get("pass") == each]
        if lines:
            used = [name for name in columns if any(line.get(name) is not None for line in lines)]
            made.append({"title": title, "columns": used, "rows": lines})
    return made


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """Cells of one measured row."""
    names = {"forward": "forward", "pycert": "pycert", "pycert_none": "none"}
    line: dict[str, Any] = {key: row[key] for key in ("net", "batch", "method", "busy")}
    for name, found in row["seconds"].items():
        line[f"{names.get(name, name)} ms"] = found["median"] * 1e3
    for pair, (middle, _, _) in row["ratios"].items():
        top, bottom = pair.split("/")
        line["pycert x forward" if pair == "pycert/forward" else f"{names[top]} / {bottom}"] = middle
    for name, peak in row["peak_bytes"].items():
        line[f"{name} MiB"] = None if peak is None else peak / 2**20
    if "auto_LiRPA" in row["seconds"]:
        both = row["seconds"]["auto_LiRPA"]["median"], row["seconds"]["forward"]["median"]
        line["auto_LiRPA x forward"] = both[0] / both[1]
    if row["pass"] in ("step", "fused"):
        once = row["seconds"]["training"]["median"]
        for name in ("pycert_none", "auto_LiRPA", "torch_ibp"):
            if name in row["seconds"]:
                line[f"{names.get(name, name)} x training"] = row["seconds"][name]["median"] / once
    widths = row.get("widths", {})
    if row["method"] == libraries.OPTIMIZED and "auto_LiRPA" in widths:
        line["width / auto_LiRPA"] = widths["pycert_none"] / widths["auto_LiRPA"]
    return line


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Cases that failed, and bounds that differ between libraries by more than 1e-4 of the widest output."""
    said = [
        f"{row['net']}, batch {row['batch']}, {row['method']}: {row['failed']}."
        for row in rows
        if "failed" in row
    ]
    for row in rows:
        place = f"{row['net']}, batch {row['batch']}, {row['method']}"
        for name, error in {**row.get("errors", {}), **row.get("failed_calls", {})}.items():
            said.append(f"{place}, {row['pass']}: {name} failed with {error}.")
        for name, gaps in row.get("looser_and_tighter", {}).items():
            if name == "pycert" or gaps is None:
                continue  # the widening of sound bounds is what the subject `soundness` measures
            for word, gap in zip(("looser", "tighter"), gaps, strict=True):
                if not gap <= 1e-4:
                    said.append(
                        f"{place}: plain pycert is {word} than {name} by {gap:.1e} of the widest output."
                    )
    return said
