"""The command line: ``pycert certify | train | demo | bench | profile | plot | doctor``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence

import torch

import pycert
from pycert.cli.inputs import CommandError
from pycert.errors import UnsupportedOperator

#: A command is a module of this package with ``add_parser(subparsers)`` and ``run(args) -> exit status``.
COMMANDS = ("certify", "train", "demo", "bench", "profile", "plot", "doctor")
#: What wrong input or a missing package raises; anything else is a fault of pycert and shows its traceback.
ERRORS = (CommandError, UnsupportedOperator, ValueError, TypeError, ArithmeticError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 success, 2 wrong input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="pycert", description="Provable bounds on neural network outputs, and what follows from them."
    )
    parser.add_argument("--version", action="version", version=f"pycert {pycert.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the program an error arose")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(f"pycert.cli.{name}") for name in COMMANDS}
    for module in modules.values():
        module.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        with _covered() if args.command != "doctor" else contextlib.nullcontext():
            status: int = modules[args.command].run(args) or 0
        return status
    except KeyboardInterrupt:
        print(f"pycert {args.command}: interrupted", file=sys.stderr)
        return 130
    except ERRORS as error:
        if args.traceback:
            raise
        print(f"pycert {args.command}: error: {_sentence(error)}", file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str:
    """What to print of an error: of a file that cannot be opened its name and the reason, without the number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _covered() -> contextlib.AbstractContextManager[None]:
    """NNPACK's transform-based convolutions lie outside what a certificate covers: run networks without it."""
    return torch.backends.nnpack.flags(enabled=False)
