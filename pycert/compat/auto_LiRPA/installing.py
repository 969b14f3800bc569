"""Standing in for the package ``auto_LiRPA``."""

from __future__ import annotations

import importlib
import pkgutil
import sys

_HOME = "pycert.compat.auto_LiRPA"


def install() -> None:
    """Makes ``import auto_LiRPA`` and its submodules give this package, in this process.

    Raises:
        RuntimeError: another ``auto_LiRPA`` has been imported before.
    """
    there = sys.modules.get("auto_LiRPA")
    home = importlib.import_module(_HOME)
    if there is home:
        return
    if there is not None:
        raise RuntimeError(
            f"auto_LiRPA has been imported already, from {getattr(there, '__file__', 'somewhere')}; "
            "call pycert.compat.auto_LiRPA.install() before that"
        )
    for found in pkgutil.walk_packages(home.__path__, f"{_HOME}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    for name in [name for name in sys.modules if name == _HOME or name.startswith(f"{_HOME}.")]:
        sys.modules["auto_LiRPA" + name[len(_HOME) :]] = sys.modules[name]
