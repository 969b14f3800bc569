"""``pycert plot``: draw results again, or what relaxations look like."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pycert import plot
from pycert.cli import records
from pycert.cli.inputs import CommandError


def add_parser(subparsers: Any) -> None:
    """Options of the command."""
    parser = subparsers.add_parser(
        "plot",
        help="draw results of certify or demo, or relaxations",
        description="Draw what pycert certify or demo found, or what relaxations look like; prints what it wrote.",
    )
    parser.add_argument(
        "results",
        metavar="RESULTS|relaxation",
        type=Path,
        help="certify's FILE.jsonl (finished or not), demo's results.json, or the word relaxation: pictures of "
        "what box, zonotope, CROWN, triangle and k-ReLU allow, and an interactive page",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="picture: .png, .svg or .pdf (default RESULTS.png); for relaxation a folder (default: here)",
    )
    relaxation = parser.add_argument_group("relaxation")
    relaxation.add_argument("--lower", type=float, default=-1.0, help="end of the interval (default -1)")
    relaxation.add_argument("--upper", type=float, default=1.0, help="end of the interval (default 1)")
    relaxation.add_argument("--format", choices=("png", "svg", "pdf"), default="png", help="of the pictures")
    parser.add_argument("--title", help="in place of the network's and the data's names")


def run(args: argparse.Namespace) -> int:
    """Draw and print the paths of what was written."""
    if str(args.results) == "relaxation":
        return _relaxation(args)
    if args.results.suffix == ".jsonl":
        results = records.summarize(*records.read(args.results))
    else:
        try:
            results = json.loads(args.results.read_text())
        except ValueError as error:
            raise CommandError(f"{args.results}: not JSON ({error})") from error
        if not isinstance(results, dict) or not {"rows", "clean"} <= results.keys():
            raise CommandError(
                f"{args.results}: no results of pycert demo or certify (rows and clean are missing)"
            )
    if args.title is not None:
        results |= {"network": args.title, "data": ""}
    print(plot.certified_accuracy(results, args.out or args.results.with_suffix(".png")))
    return 0


def _relaxation(args: argparse.Namespace) -> int:
    folder = args.out or Path()
    folder.mkdir(parents=True, exist_ok=True)
    data = plot.relaxation_data(args.lower, args.upper)
    for draw in (plot.relaxation_neuron, plot.relaxation_plane, plot.relaxation_solid):
        print(draw(data, folder / f"{draw.__name__}.{args.format}"))
    for path in plot.relaxation_page(folder / "relaxation.html"):
        print(path)
    return 0
