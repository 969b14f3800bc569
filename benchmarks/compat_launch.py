"""Runs an example of auto_LiRPA or CTRAIN unchanged on a machine without a GPU.

``compat_launch.py [--here] SCRIPT ...``; ``--here``: ``auto_LiRPA`` is pycert's. Both sides get the same: tensors that
were saved on a GPU are loaded on the CPU where there is none, and what CTRAIN imports for its search of
hyperparameters is a stand-in where it is not installed.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import runpy
import sys
import types
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

#: What CTRAIN imports beside the wrappers that are run: searches, verifiers, readers of data sets that are not used.
UNUSED = "smac ConfigSpace optuna optuna_integration onnx2pytorch onnx2torch skopt requests".split()
PARTS = ("CTRAIN.complete_verification", "CTRAIN.verification_systems")


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules in which every name is there and does nothing."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def find_spec(
        self, name: str, path: Any = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(name == own or name.startswith(own + ".") for own in self.names):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        made = mock.MagicMock(name=spec.name)
        made.__spec__, made.__path__, made.__name__ = spec, [], spec.name
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def main(arguments: list[str]) -> None:
    """Runs the script that the arguments name."""
    here = arguments[0] == "--here"
    script, *rest = arguments[1:] if here else arguments
    missing = [name for name in UNUSED if importlib.util.find_spec(name) is None]
    sys.meta_path.insert(0, StandIns([*missing, *PARTS]))
    if not torch.cuda.is_available():
        torch.load = functools.partial(torch.load, map_location="cpu")
    if here:
        from pycert.compat.auto_LiRPA import install

        install()
    sys.argv = [script, *rest]
    sys.path[0] = str(pathlib.Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
