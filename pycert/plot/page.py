"""The interactive page: one file without anything to load, and the numbers it shows beside it."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycert.plot.pictures import COLOURS, NAMES
from pycert.plot.relaxations import relaxation_data

#: Ends of the interval that the sliders offer.
LOWERS = tuple(-0.25 * i for i in range(8, -1, -1))
UPPERS = tuple(0.25 * i for i in range(9))
_PLACE = "/*NUMBERS*/"


def relaxation_page(
    path: str | Path, lowers: Sequence[float] = LOWERS, uppers: Sequence[float] = UPPERS
) -> tuple[Path, Path]:
    """A page with sliders for the ends of the interval, and the JSON of the numbers it shows.

    The page draws the three scenes of :func:`relaxation_data` and computes none of their numbers: it looks them up in a
    table for every pair of ends, which is part of the page and is written beside it. ``#lower=-1&upper=1``
    behind its address chooses where the sliders start.

    Args:
        path: of the page, ``*.html``; the numbers go to the same name with the suffix ``.json``.
        lowers: ascending, positions of the first slider; at most every one of ``uppers``.
        uppers: ascending, of the second.

    Returns:
        The paths of the page and of the numbers.

    Raises:
        ValueError: positions are missing or not ascending, or a lower end is above an upper one.
    """
    for name, ends in (("lowers", lowers), ("uppers", uppers)):
        if not ends or list(ends) != sorted(set(ends)):
            raise ValueError(f"relaxation_page: {name} must be ascending and not empty, got {list(ends)}")
    numbers: dict[str, Any] = {
        "names": NAMES,
        "colours": COLOURS,
        "lowers": list(lowers),
        "uppers": list(uppers),
        "cells": [[relaxation_data(lower, upper, digits=6) for upper in uppers] for lower in lowers],
    }
    text = json.dumps(numbers, separators=(",", ":"), allow_nan=False)
    page = Path(path)
    template = importlib.resources.files("pycert.plot").joinpath("relaxation.html").read_text("utf-8")
    page.write_text(template.replace(_PLACE, text), "utf-8")
    beside = page.with_suffix(".json")
    beside.write_text(text + "\n", "utf-8")
    return page, beside
