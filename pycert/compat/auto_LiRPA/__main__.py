"""``python -m pycert.compat.auto_LiRPA script.py [arguments]``: runs a script with pycert as auto_LiRPA."""

from __future__ import annotations

import os
import runpy
import sys

from pycert.compat.auto_LiRPA.installing import install

_USAGE = "usage: python -m pycert.compat.auto_LiRPA script.py [arguments], or -m module [arguments]"


def main() -> int:
    """Runs what the command line names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        print(_USAGE, file=sys.stdout if arguments and arguments[0] != "-m" else sys.stderr)
        return 0 if arguments and arguments[0] != "-m" else 2
    if arguments[0] != "-m" and not os.path.isfile(arguments[0]):
        print(f"no such script: {arguments[0]}\n{_USAGE}", file=sys.stderr)
        return 2
    install()
    try:
        _run(arguments)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("auto_LiRPA."):
            raise
        raise ModuleNotFoundError(
            f"{error.name} has no counterpart in pycert; docs/auto_lirpa.md says what is covered",
            name=error.name,
        ) from error
    return 0


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
