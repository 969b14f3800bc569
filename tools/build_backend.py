"""PEP 517 backend: setuptools, compiling against the torch of the environment pycert goes into.

An isolated build hides that environment, and listing torch as a build requirement would fetch a
second one, of gigabytes and perhaps of another version, whose compiled module the first cannot
load. So the environment's torch is looked for and shown to the build. Only where there is none is
torch asked for: then the front end fetches one, and the wheel's metadata names its version.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import build_meta

_PROBE = """
import importlib.util, json, sys
found = importlib.util.find_spec("torch")
print(json.dumps([found is not None, sys.implementation.cache_tag, sys.path]))
"""


def _interpreters() -> Iterator[str]:
    """Python programs whose environment pycert may be going into, the likeliest first."""
    yield sys.executable  # pip builds with the target's own interpreter and only hides its packages
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if variable in os.environ:
            yield str(Path(os.environ[variable]) / "bin" / "python")
    parent = Path(f"/proc/{os.getppid()}/cmdline")  # "python -m build" runs this from a fresh environment
    if parent.exists():
        yield parent.read_bytes().split(b"\0")[0].decode()


def _search_path(interpreter: str) -> list[str]:
    """sys.path of an interpreter that has torch and the same kind of Python as this one, else []."""
    program = shutil.which(interpreter)
    if program is None or not Path(program).name.startswith("python"):
        return []
    # pip isolates with PYTHONPATH; a fresh process without it sees its real environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [program, "-c", _PROBE], env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return []
    has_torch, cache_tag, path = json.loads(done.stdout)
    return path if has_torch and cache_tag == sys.implementation.cache_tag else []


def _show_torch() -> bool:
    """Make torch importable, and say whether it is."""
    if importlib.util.find_spec("torch") is not None:
        return True
    for interpreter in _interpreters():
        path = _search_path(interpreter)
        if path:
            # At the end: what the isolated environment brings itself goes first.
            sys.path += [entry for entry in path if entry and entry not in sys.path]
            return True
    return False


def _requirements() -> list[str]:
    return [] if _show_torch() else ["torch>=2.6"]


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return []


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _requirements()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _requirements()


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    return build_meta.build_sdist(sdist_directory, config_settings)


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    _show_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    _show_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    _show_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    _show_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
