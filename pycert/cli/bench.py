"""``pycert bench``: run the benchmarks of a checkout."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pycert.cli.inputs import CommandError


def add_parser(subparsers: Any) -> None:
    """Options of the command; everything after it goes to the benchmarks' own runner."""
    parser = subparsers.add_parser(
        "bench", help="run the benchmarks (from a checkout)", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs="*", help="of python -m benchmarks, as: engine --threads 2")


def run(args: argparse.Namespace) -> int:
    """Run ``python -m benchmarks`` of the checkout here, so that paths mean what they say; its exit status."""
    search = [str(checkout()), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
    command = [sys.executable, "-m", "benchmarks", *(args.arguments or ["--help"])]
    return subprocess.run(command, env=environment, check=False).returncode


def checkout() -> Path:
    """The folder that holds ``benchmarks``: the present one, or the one this package is installed from."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / "benchmarks" / "__main__.py").exists():
            return folder
    raise CommandError(
        "there is no folder benchmarks/ here: benchmarks are part of a checkout, not of the installed "
        "package; run this from the root of a clone of the repository"
    )
