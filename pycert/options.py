"""Names and options of the methods, checked in one place."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import time
from typing import Any

import torch

from pycert._groups import check_selection
from pycert.ops.norm import EFFORTS
from pycert.ops.norm import METHODS as NORMS
from pycert.ops.relaxation import SLOPES

#: Methods of :meth:`pycert.BoundedModule.bound`, cheapest first.
METHODS = ("ibp", "crown-ibp", "fastlin", "crown", "alpha-crown", "forward", "lipschitz", "krelu", "lp")
SOUNDNESS = ("none", "real", "deployed")
SIDES = ("both", "lower", "upper")
PRECISIONS = ("exact", "fast")
POOLINGS = ("adaptive", "constant")
#: Whose intermediate bounds ``"alpha-crown"`` rests on; with its own name they are optimised too.
INTERMEDIATES = ("crown-ibp", "crown", "alpha-crown")
#: Of ``"krelu"`` too: with its own name rows of earlier layers tighten the bounds of later ones.
JOINT_INTERMEDIATES = (*INTERMEDIATES, "krelu")
ALPHAS = ("per spec", "shared")

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``bound`` and its relatives take by keyword; see :meth:`pycert.BoundedModule.bound`."""

    side: str = "both"
    slope: str = "adaptive"
    intersect: bool = True
    soundness: str = "deployed"
    precision: str = "exact"
    memory: str | float | None = None
    pooling: str = "adaptive"
    iterations: int = 20
    learning_rate: float = 0.5
    alpha: str = "per spec"
    intermediate: str = "crown"
    threshold: float | None = None
    k: int = 3
    ns: int = 70
    s: int = 1
    cover: str = "sparse"
    least: float = 0.0
    rows: int = 12
    cut_rate: float = 0.1
    directions: int = 0
    cuts: Any = None
    time_limit: float | None = None
    norms: str = "gram"
    effort: str = "normal"
    leaves: int = 1


_NAMES = tuple(field.name for field in dataclasses.fields(Options))
#: Options of ``"alpha-crown"`` alone.
ASCENT = ("iterations", "learning_rate", "alpha", "intermediate", "threshold")
#: Options of groups of neurons, of ``"krelu"``.
JOINT = ("k", "ns", "s", "cover", "least", "rows", "cut_rate", "directions", "cuts")
#: Which methods take an option; all where it is not listed.
TAKEN_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ASCENT, ("alpha-crown", "krelu", "lp")),
    **dict.fromkeys(JOINT, ("krelu", "lp")),
    "norms": ("lipschitz",),
    "effort": ("lipschitz",),
    **dict.fromkeys(("time_limit", "leaves"), ("krelu", "lp")),
}
#: Defaults that differ from those of ``Options``.
_DEFAULTS: dict[str, dict[str, Any]] = {"krelu": {"iterations": 60}, "lp": {"iterations": 60, "rows": 0}}


def _choose(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}{hint}")


def parse(
    method: str, given: dict[str, Any], also: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> Options:
    """The options of a call.

    Args:
        method: one of ``METHODS``.
        given: keyword arguments of the call.
        also: names the caller takes itself, listed in the error for unknown ones.
        without: options that mean nothing to the caller.

    Raises:
        ValueError: an unknown method, option or value.
    """
    if all(type(value) in _PLAIN for value in given.values()):  # a loop gives the same ones again and again
        return _parse_plain(method, also, without, **given)
    return _parse(method, given, also, without)


_PLAIN = frozenset({str, int, float, bool, type(None)})


@functools.lru_cache(maxsize=256, typed=True)
def _parse_plain(method: str, also: tuple[str, ...], without: tuple[str, ...], /, **given: Any) -> Options:
    return _parse(method, given, also, without)


def _parse(method: str, given: dict[str, Any], also: tuple[str, ...], without: tuple[str, ...]) -> Options:
    _choose("method", method, METHODS)
    taken = [name for name in _NAMES if name not in without]
    unknown = [name for name in given if name not in taken]
    if unknown:
        known = sorted({*taken, *also})
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown option {unknown[0]!r}; known are {', '.join(known)}.{hint}")
    for name in given:
        if method not in TAKEN_BY.get(name, (method,)):
            owners = ", ".join(map(repr, TAKEN_BY[name]))
            raise ValueError(f"option {name!r} is one of {owners}, not of {method!r}")
    options = Options(**{**_DEFAULTS.get(method, {}), **given})
    _choose("side", options.side, SIDES)
    _choose("slope", options.slope, SLOPES)
    _choose("soundness", options.soundness, SOUNDNESS)
    _choose("precision", options.precision, PRECISIONS)
    _choose("pooling", options.pooling, POOLINGS)
    _choose("effort", options.effort, EFFORTS)
    _choose("norms", options.norms, NORMS)
    if options.norms == "power":
        raise ValueError(
            "norms='power' gives estimates from below, which prove nothing: bounds and certificates take norms='gram'; "
            "for the estimate itself see pycert.lipschitz.local_bound(..., method='power')"
        )
    if not isinstance(options.intersect, bool):
        raise ValueError(f"intersect must be True or False, got {options.intersect!r}")
    _check_ascent(options, INTERMEDIATES if method == "alpha-crown" else JOINT_INTERMEDIATES)
    _check_joint(options)
    return options


def _check_joint(options: Options) -> None:
    for name in ("k", "ns", "s", "rows", "directions"):
        value = getattr(options, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    check_selection(options.k, options.ns, options.s, options.cover)
    for name, least in (("least", 0), ("rows", 0), ("cut_rate", 0), ("directions", 0)):
        value = getattr(options, name)
        if not _is_number(value) or not least <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least {least}, got {value!r}")
    if not isinstance(options.leaves, int) or isinstance(options.leaves, bool) or options.leaves < 1:
        raise ValueError(f"leaves must be an integer of at least 1, got {options.leaves!r}")
    limit = options.time_limit
    if limit is not None and not (_is_number(limit) and limit >= 0):
        raise ValueError(f"time_limit must be seconds or None, got {limit!r}")
    if options.cuts is not None and not hasattr(options.cuts, "_for_engine"):
        raise TypeError(f"cuts must be a pycert.krelu.CutSet, got {type(options.cuts).__name__}")


def _check_ascent(options: Options, intermediates: tuple[str, ...]) -> None:
    _choose("alpha", options.alpha, ALPHAS)
    _choose("intermediate", options.intermediate, intermediates)
    iterations, rate, threshold = options.iterations, options.learning_rate, options.threshold
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise ValueError(f"iterations must be an integer of at least 0, got {iterations!r}")
    if not _is_number(rate) or not 0 < rate < math.inf:
        raise ValueError(f"learning_rate must be a positive finite number, got {rate!r}")
    if threshold is not None and (not _is_number(threshold) or math.isnan(threshold)):
        raise ValueError(f"threshold must be a number or None, got {threshold!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def memory_bytes(memory: str | float | None, device: torch.device | None = None) -> int:
    """Bytes of a ``memory=`` option: a number, or text such as ``"2GiB"``; by default a quarter of what is free."""
    if memory is None:
        return max(2**26, free_bytes(device) // 4)
    size: float
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", memory)
        if match is None or match.group(2).lower() not in _UNITS:
            raise ValueError(f"memory must be bytes or text such as '2GiB' or '500MB', got {memory!r}")
        size = float(match.group(1)) * _UNITS[match.group(2).lower()]
    elif isinstance(memory, (int, float)) and not isinstance(memory, bool):
        size = memory
    else:
        raise TypeError(
            f"memory must be bytes or text such as '2GiB' or '500MB', got {type(memory).__name__}"
        )
    if not size >= 1:
        raise ValueError(f"memory must be at least one byte, got {memory!r}")
    return int(min(size, 2**62))


def free_bytes(device: torch.device | None = None) -> int:
    """Memory that is free on a device, by default the processor's; 4 GiB where the system does not say."""
    if device is not None and device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free to torch
        return torch.cuda.mem_get_info(device)[0] + kept
    return _free_to_processes(int(time.monotonic() * 8))


@functools.lru_cache(maxsize=1)
def _free_to_processes(eighth_of_a_second: int) -> int:
    """Asked anew eight times a second at most: asking takes as long as a small bound does."""
    try:
        with open("/proc/meminfo") as info:
            for line in info:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 2**32
