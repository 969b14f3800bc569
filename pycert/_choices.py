"""Which products a GPU forms by pycert's own kernels and which otherwise: by times that were measured on that card.

``benchmarks/gpu_suite.py`` measures both ways at some shapes and writes ``gpu_choices.json`` beside this file. It holds
for the card it was measured on; everywhere else, and without it, pycert's own kernels are taken.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from typing import Any

import torch

from pycert import _C

PATH = pathlib.Path(__file__).with_name("gpu_choices.json")


def save(card: str, entries: list[dict[str, Any]], path: pathlib.Path = PATH) -> None:
    """Write measured times: ``operator``, ``dtype``, ``shape`` (rows, terms, columns), seconds ``own``, ``other``."""
    text = json.dumps({"card": card, "torch": torch.__version__, "measured": entries}, indent=1)
    whole = path.with_suffix(".tmp")  # a process may be stopped while it writes, another may be reading
    whole.write_text(text + "\n")
    os.replace(whole, path)


def ways(card: str, path: pathlib.Path = PATH) -> list[tuple[str, bool, tuple[int, ...], float, float]]:
    """What the file says of this card, for ``_C.set_choices``: nothing if it is of another one, or not there."""
    if not path.exists():
        return []
    written = json.loads(path.read_text())
    if written["card"] != card:
        return []
    return [
        (one["operator"], one["dtype"] == "float64", tuple(one["shape"]), one["own"], one["other"])
        for one in written["measured"]
    ]


@functools.cache
def load() -> None:
    """Tell the operators, once a process, when the first bound on a GPU is asked for."""
    _C.set_choices("cuda", ways(torch.cuda.get_device_name()))
