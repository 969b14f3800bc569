"""``pycert certify``: certified accuracy of a user's network on a user's data."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pycert
from pycert import _C, _flags, attacks, plot
from pycert._groups import COVERS
from pycert._progress import progress_bar
from pycert.cli import environment, inputs, records, report
from pycert.cli.inputs import CommandError
from pycert.options import (
    ALPHAS,
    EFFORTS,
    JOINT_INTERMEDIATES,
    METHODS,
    POOLINGS,
    PRECISIONS,
    SLOPES,
    SOUNDNESS,
    TAKEN_BY,
    memory_bytes,
    parse,
)

#: Options that go on to the methods that take them (``pycert.options.TAKEN_BY``); None is the method's own default.
SOME_OPTIONS = (
    "slope",
    "pooling",
    "precision",
    "iterations",
    "learning_rate",
    "alpha",
    "intermediate",
    "threshold",
    "k",
    "ns",
    "s",
    "cover",
    "least",
    "rows",
    "cut_rate",
    "directions",
    "leaves",
    "time_limit",
    "effort",
)

EPILOG = """
examples:
  pycert certify mynets:small --weights small.pt --data test.npz --scale 255 --eps 2/255 8/255 --clip 0 1
  pycert certify nets.py:make --data test.npz --eps 0.1 --method ibp crown --attack --report page.html
  pycert certify mnist.onnx --data test.npz --shape 784 1 --scale 255 --eps 0.02 --clip 0 1

Run the same command again to go on after an interruption: finished samples are read from --out.
MODULE:FUNCTION runs code. FILE.npz, FILE.pt and FILE.onnx are read without running any.
"""


def add_parser(subparsers: Any) -> None:
    """Options of the command."""
    parser = subparsers.add_parser(
        "certify",
        help="certified accuracy of a network, resumable, with a plot and a report",
        description="Prove for each sample that no input within eps changes its class.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inputs.add_network_options(parser)
    _add_bound_options(parser)
    _add_output_options(parser)


def _add_bound_options(parser: argparse.ArgumentParser) -> None:
    """What is to be proved, and how."""
    region = parser.add_argument_group("region: every input within eps of a sample")
    region.add_argument(
        "--eps", type=inputs.number, nargs="+", required=True, help="radii in the units of x, as 8/255"
    )
    region.add_argument(
        "--p", type=inputs.number, default=float("inf"), help="norm of the ball: inf (default), 2 or 1"
    )
    region.add_argument(
        "--clip", type=inputs.number, nargs=2, metavar=("LO", "HI"), help="range of valid inputs"
    )
    region.add_argument("--samples", type=int, metavar="N", help="the first N samples (default all)")

    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--method", nargs="+", choices=METHODS, default=["crown"], help="default crown")
    bounds.add_argument("--soundness", choices=SOUNDNESS, default="deployed", help="default deployed")
    bounds.add_argument(
        "--intersect", action=argparse.BooleanOptionalAction, default=True, help="with interval bounds"
    )
    bounds.add_argument("--slope", choices=SLOPES, help="lower lines of unstable ReLUs (default adaptive)")
    bounds.add_argument("--pooling", choices=POOLINGS, help="upper lines of max-pooling (default adaptive)")
    bounds.add_argument(
        "--precision", choices=PRECISIONS, help="fast: radii in bfloat16, rounded up (default exact)"
    )
    bounds.add_argument(
        "--cascade", action=argparse.BooleanOptionalAction, default=True, help="cheap methods first"
    )
    bounds.add_argument(
        "--iterations", type=int, metavar="N", help="of alpha-crown (default 20) and krelu (default 60)"
    )
    bounds.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="of alpha-crown and krelu (default 0.5)"
    )
    bounds.add_argument(
        "--alpha",
        choices=ALPHAS,
        help=f"of alpha-crown, krelu and lp: slopes for every margin, or one set for all (default {ALPHAS[0]})",
    )
    bounds.add_argument(
        "--intermediate",
        choices=JOINT_INTERMEDIATES,
        help="of alpha-crown, krelu and lp: method of the intermediate bounds (default crown)",
    )
    bounds.add_argument(
        "--threshold",
        type=inputs.number,
        help="of alpha-crown, krelu and lp: margins above it do (default 0)",
    )
    bounds.add_argument("--k", type=int, help="of krelu and lp: neurons in a group, 1 to 4 (default 3)")
    bounds.add_argument(
        "--ns", type=int, metavar="N", help="of krelu and lp: neurons in a block (default 70)"
    )
    bounds.add_argument(
        "--s", type=int, metavar="N", help="of krelu and lp: neurons groups may share (default 1)"
    )
    bounds.add_argument("--cover", choices=COVERS, help="of krelu and lp: groups of a block (default sparse)")
    bounds.add_argument(
        "--least",
        type=float,
        metavar="AREA",
        help="of krelu and lp: neurons of smaller area are in no group (default 0)",
    )
    bounds.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="of krelu and lp: rows of a group (default 12; lp 0, triangles alone)",
    )
    bounds.add_argument(
        "--cut-rate",
        type=float,
        metavar="RATE",
        help="of krelu and lp: first step of rows' multipliers (default 0.1)",
    )
    bounds.add_argument(
        "--directions",
        type=int,
        metavar="N",
        help="of krelu and lp with --intermediate krelu: steps of ascent for octahedral directions (default 0)",
    )
    bounds.add_argument(
        "--leaves",
        type=int,
        metavar="N",
        help="of krelu and lp: parts, at most, that a margin is branched into (default 1: none)",
    )
    bounds.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="of lp, and of krelu's branching, for a sample (default none)",
    )
    bounds.add_argument("--effort", choices=EFFORTS, help="of lipschitz: of its norms (default normal)")
    bounds.add_argument(
        "--radii", action="store_true", help="of lipschitz: also the largest radius found for every sample"
    )
    bounds.add_argument(
        "--attack", action="store_true", help="also attack by PGD: an upper limit on any certificate"
    )
    bounds.add_argument("--attack-steps", type=int, default=40, metavar="N", help="default 40")
    bounds.add_argument("--attack-restarts", type=int, default=3, metavar="N", help="default 3")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    """How it is computed, and what is written."""
    computing = parser.add_argument_group("computing")
    computing.add_argument(
        "--batch-size", type=int, default=100, metavar="N", help="samples at once (default 100)"
    )
    computing.add_argument("--memory", metavar="SIZE", help="limit for intermediate bounds, as 2GiB")
    computing.add_argument("--dtype", choices=tuple(inputs.DTYPES), default="float32")
    computing.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    computing.add_argument("--device", default="cpu", help="default cpu")
    computing.add_argument("--seed", type=int, default=0, help="of the attack and of FUNCTION (default 0)")

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, default=Path("certify.jsonl"), metavar="FILE.jsonl", help="default %(default)s"
    )
    output.add_argument("--overwrite", action="store_true", help="begin anew whatever --out holds")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="accuracy against eps (default: --out with .png)"
    )
    output.add_argument("--no-plot", action="store_true", help="no picture")
    output.add_argument(
        "--report", type=Path, metavar="FILE.html", help="one page with everything the result rests on"
    )
    output.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    output.add_argument("--quiet", action="store_true", help="no progress bar and no table")


def run(args: argparse.Namespace) -> int:
    """Certify, write, summarise; 0 when complete, 130 when interrupted (the file is then resumable)."""
    _check(args)
    inputs.set_threads(args.threads)
    dtype = inputs.DTYPES[args.dtype]
    net = inputs.load_network(args, dtype).to(args.device)
    x, y = inputs.load_data(args, dtype)
    x, y = x.to(args.device), y.to(args.device)
    inputs.check_fit(net, x, y)
    bm = pycert.BoundedModule(net, x[:1])
    methods = [*(["pgd"] if args.attack else []), *dict.fromkeys(args.method)]
    batches = records.plan(methods, list(dict.fromkeys(args.eps)), len(x), args.batch_size)
    file = records.Records(args.out, _header(args, net, x, y), batches, args.overwrite)
    try:
        _work(file, bm, net, x, y, args)
    except KeyboardInterrupt:
        total = sum(batch.stop - batch.start for batch in batches)
        print(
            f"\ninterrupted: {len(file.rows)} of {total} results are in {args.out}; run the same command "
            "again to go on",
            file=sys.stderr,
        )
        return 130
    finally:
        file.close()
    _finish(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before the first sample."""
    for name, least in (("batch_size", 1), ("attack_steps", 1), ("attack_restarts", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise CommandError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not args.no_plot and importlib.util.find_spec("matplotlib") is None:
        if args.plot is not None:
            raise CommandError("--plot needs matplotlib: pip install matplotlib")
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        args.no_plot = True
    for path in (args.plot, args.report):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    memory_bytes(args.memory)  # a wrong size is an error before anything is written
    for method in args.method:
        try:
            parse(method, _options_of(method, args))
        except ValueError as error:
            raise CommandError(f"--{error}") from error
    for name in SOME_OPTIONS:
        if getattr(args, name) is not None and not set(args.method) & set(TAKEN_BY.get(name, METHODS)):
            raise CommandError(f"--{name.replace('_', '-')} is of --method {', '.join(TAKEN_BY[name])}")
    if any(eps < 0 or eps == float("inf") for eps in args.eps):
        raise CommandError(f"--eps must be finite and not negative, got {args.eps}")
    if args.p not in (1, 2, float("inf")):
        raise CommandError(f"--p must be 1, 2 or inf, got {args.p:g}")
    if "lipschitz" in args.method and args.soundness == "none":
        raise CommandError("--method lipschitz needs --soundness real or deployed, got none")
    if args.radii and "lipschitz" not in args.method:
        raise CommandError("--radii is of --method lipschitz")
    if args.clip is not None and not args.clip[0] < args.clip[1]:
        raise CommandError(f"--clip LO HI needs LO < HI, got {args.clip}")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise CommandError(f"--device must be cpu or cuda, got {args.device!r}") from error
    if device.type != "cpu" and not _C.has_cuda():
        raise CommandError(
            f"--device {args.device}: this build of pycert has no CUDA support; see pycert doctor"
        )


def _options_of(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about one method."""
    given = {name: getattr(args, name) for name in SOME_OPTIONS if method in TAKEN_BY.get(name, METHODS)}
    return {name: value for name, value in given.items() if value is not None}


def _header(args: argparse.Namespace, net: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The first line of the results: ``run`` identifies what is computed, ``made`` says where."""
    options = {
        key: getattr(args, key)
        for key in "soundness intersect cascade dtype batch_size seed scale mean std shape".split()
    }
    options |= {"eps": list(dict.fromkeys(args.eps)), "p": "inf" if args.p == float("inf") else args.p}
    options |= {"clip": args.clip, "methods": list(dict.fromkeys(args.method)), "device": args.device}
    options |= {"radii": args.radii}
    options |= {"threads": torch.get_num_threads()}
    options |= {"of_methods": {method: _options_of(method, args) for method in args.method}}
    options |= {"attack": [args.attack_steps, args.attack_restarts] if args.attack else None}
    run_ = {
        "network": args.network,
        "structure": inputs.hash_tensors([(repr(net), torch.zeros(0))]),
        "weights": inputs.hash_tensors(list(net.state_dict().items())),
        "data": args.data.name,
        "inputs": inputs.hash_tensors([("x", x), ("y", y)]),
        "samples": len(x),
        "options": options,
        "library": environment.library(),
    }
    made = {"machine": environment.machine(), "started": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    made["uncovered"] = list(_flags.uncovered(x.device.type, x.dtype, True))
    return {"format": records.FORMAT, "run": run_, "made": made}


def _work(
    file: records.Records, bm: Any, net: torch.nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace
) -> None:
    """Compute and write what is missing, batch by batch."""
    total = sum(batch.stop - batch.start for batch in file.batches)
    bar = progress_bar(
        total, initial=len(file.rows), description="certify", unit="sample", show=not args.quiet
    )
    counts: dict[tuple[str, float], list[int]] = {}
    for row in file.rows:
        _count(counts, row)
    try:
        for batch in file.remaining():
            rows = _compute(batch, bm, net, x[batch.start : batch.stop], y[batch.start : batch.stop], args)
            file.add(batch, rows)
            for row in rows:
                _count(counts, row)
            good, done = counts[batch.method, batch.eps]
            what = "not broken" if batch.method == "pgd" else "certified"
            bar.set_postfix_str(f"{batch.method} eps {batch.eps:.4g}: {good / done:.1%} {what}")
            bar.update(len(rows))
    finally:
        bar.close()


def _count(counts: dict[tuple[str, float], list[int]], row: dict[str, Any]) -> None:
    entry = counts.setdefault((row["method"], row["eps"]), [0, 0])
    entry[0] += bool(row["robust" if row["method"] == "pgd" else "certified"])
    entry[1] += 1


def _compute(
    batch: records.Batch, bm: Any, net: torch.nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one batch."""
    clip = tuple(args.clip) if args.clip is not None else None
    started = time.perf_counter()
    radii: Tensor | None = None
    if batch.method == "pgd":
        with torch.no_grad():
            correct = net(x).argmax(1) == y
        region = pycert.LpBall(x, eps=batch.eps, p=args.p, clip=clip)
        found = attacks.pgd(
            net,
            region,
            y,
            steps=args.attack_steps,
            restarts=args.attack_restarts,
            seed=args.seed + batch.start,
        )
        name, good, margin = "robust", correct & ~found.success, found.margin
    else:
        options = {"intersect": args.intersect, "cascade": args.cascade, "soundness": args.soundness}
        options |= _options_of(batch.method, args)
        if args.memory is not None:
            options["memory"] = args.memory
        options["radii"] = args.radii and batch.method == "lipschitz"
        result = pycert.certify(bm, x, y, eps=batch.eps, p=args.p, method=batch.method, clip=clip, **options)
        name, good, correct, margin = "certified", result.certified, result.correct, result.margin
        radii = result.radius
    seconds = round((time.perf_counter() - started) / len(x), 7)
    finite = torch.isfinite(margin).tolist()
    return [
        {
            "sample": batch.start + number,
            "method": batch.method,
            "eps": batch.eps,
            "correct": right,
            name: proved,
            "margin": value if finite[number] else None,
            "seconds": seconds,
            **({} if radii is None else {"radius": float(radii[number])}),
        }
        for number, (right, proved, value) in enumerate(
            zip(correct.tolist(), good.tolist(), margin.tolist(), strict=True)
        )
    ]


def _finish(args: argparse.Namespace) -> None:
    """Table or JSON, plot and report of a complete file."""
    summary = records.summarize(*records.read(args.out))
    if args.json:
        print(json.dumps(summary, indent=1))
    elif not args.quiet:
        print(table(summary))
    written = [args.out]
    picture = args.plot or args.out.with_suffix(".png")
    if not args.no_plot:
        written.append(plot.certified_accuracy(summary, picture))
    if args.report is not None:
        args.report.write_text(report.page(summary, None if args.no_plot else picture))
        written.append(args.report)
    if not args.quiet and not args.json:
        print("written:", *written)


def table(summary: dict[str, Any]) -> str:
    """Accuracies in percent: one line an eps, one column a method; below it the time per sample."""
    methods = list(dict.fromkeys(row["method"] for row in summary["rows"]))
    cells = {(row["method"], row["eps"]): row for row in summary["rows"]}
    radii = list(dict.fromkeys(row["eps"] for row in summary["rows"]))
    head = f"{'eps':>10}" + "".join(f"{'PGD' if name == 'pgd' else name:>12}" for name in methods)
    lines = [
        f"clean accuracy {summary['clean']:.1%} on {summary['samples']} samples; certified accuracy in %:",
        head,
    ]
    for eps in radii:
        found = [cells.get((name, eps)) for name in methods]
        lines.append(
            f"{eps:>10.4g}" + "".join(f"{100 * row['accuracy']:>12.1f}" if row else " " * 12 for row in found)
        )
    times = []
    for name in methods:
        rows = [row for row in summary["rows"] if row["method"] == name]
        times.append(1000 * sum(row["seconds"] for row in rows) / sum(row["samples"] for row in rows))
    if any("radius" in row for row in summary["rows"]):
        found = [cells.get((name, radii[0]), {}).get("radius") for name in methods]
        lines.append(f"{'radius':>10}" + "".join(" " * 12 if r is None else f"{r:>12.4g}" for r in found))
    lines.append(f"{'ms/sample':>10}" + "".join(f"{value:>12.3g}" for value in times))
    return "\n".join(lines)
