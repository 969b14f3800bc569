"""``pycert plot``: draw results again."""

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
    parser = subparsers.add_parser("plot", help="draw results of certify or demo")
    parser.add_argument(
        "results", type=Path, help="certify's FILE.jsonl (finished or not) or demo's results.json"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="picture: .png, .svg or .pdf (default RESULTS.png)"
    )
    parser.add_argument("--title", help="in place of the network's and the data's names")


def run(args: argparse.Namespace) -> int:
    """Draw and print the picture's path."""
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
