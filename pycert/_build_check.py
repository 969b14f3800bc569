"""Refuses to load the compiled module into another torch than the one it was built against.

C++ extensions of torch carry no stable ABI: with another version the import of ``pycert._C`` fails
with an undefined symbol, or worse, succeeds. So the version is compared before that import.
"""

from __future__ import annotations

from pathlib import Path

import torch


def rebuild_command() -> str:
    """The command that builds pycert against the torch of this environment."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "setup.py").is_file():
        return f"pip install -e {checkout} --no-build-isolation"
    return "pip install --force-reinstall --no-deps --no-cache-dir --no-binary pycert pycert"


def check_build() -> None:
    """Return when ``pycert._C`` was built against the torch that is running.

    Raises:
        ImportError: it was not built, or against another torch; one sentence and the command to run.
    """
    try:
        from pycert._build_info import TORCH_VERSION
    except ImportError:
        raise ImportError(
            f"pycert's compiled module is missing; build it with: {rebuild_command()}"
        ) from None
    if TORCH_VERSION != torch.__version__:
        raise ImportError(
            f"pycert was built against torch {TORCH_VERSION}, but torch {torch.__version__} is installed; "
            f"rebuild it with: {rebuild_command()}"
        )
