"""The runner: ``python -m benchmarks NAME [--peer NAME=PATH ...] [--threads N] [--quick]``."""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
from types import ModuleType

import torch

from . import libraries, results, timing

SUBJECTS = {
    "engine": "benchmarks.bench_engine",
    "soundness": "benchmarks.bench_soundness",
    "trace": "benchmarks.bench_trace",
    "estimate": "benchmarks.bench_estimate",
    "relaxation": "benchmarks.bench_relaxation",
    "lipschitz": "benchmarks.bench_lipschitz",
    "krelu_hull": "benchmarks.bench_krelu_hull",
    "krelu": "benchmarks.bench_krelu",
    "paradox": "benchmarks.paradox",
    "compat": "benchmarks.compat",
    "tightness": "benchmarks.compat_tightness",
}


def parse(arguments: list[str]) -> tuple[argparse.Namespace, dict[str, ModuleType]]:
    """Arguments, and the subjects they name; the subjects add their own options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure pycert, beside its peers."
    )
    parser.add_argument("name", choices=[*SUBJECTS, "all"], help="what to measure")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="a peer's checkout")
    parser.add_argument("--threads", type=int, default=2, help="threads of every library (default 2)")
    parser.add_argument(
        "--quick", action="store_true", help="smallest case only; nothing is written without --out"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="measured time per figure (default 1)")
    parser.add_argument(
        "--clock",
        choices=timing.CLOCKS,
        default="wall",
        help="processor: for a busy machine, with --threads 1",
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results (default benchmarks/results)")
    named = next((word for word in arguments if word in SUBJECTS or word == "all"), None)
    chosen = list(SUBJECTS) if named == "all" else [named] if named else []
    modules = {name: importlib.import_module(SUBJECTS[name]) for name in chosen}
    for name, module in modules.items():
        module.add_arguments(parser.add_argument_group(name, (module.__doc__ or "").splitlines()[0]))
    args = parser.parse_args(arguments)
    if args.threads < 1:
        parser.error(f"--threads: got {args.threads}, accepted are positive numbers")
    try:
        libraries.add_peers(args.peer)
    except ValueError as error:
        parser.error(str(error))
    return args, modules


def main(arguments: list[str] | None = None) -> int:
    """Run the subjects that are named; 0 when each gave figures."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args, modules = parse(arguments)
    torch.set_num_threads(args.threads)
    folder = args.out or (None if args.quick else results.FOLDER)
    empty = False
    for name, module in modules.items():
        about = results.describe(arguments, args.threads, args.peer, args.clock)
        result = {"about": about, **module.run(args)}
        results.print_tables(result)
        if folder is not None:
            print("written:", *results.save(name, result, folder))
        empty = empty or not any(made["rows"] for made in result["tables"])
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
