"""Whether the CUDA kernels give on this card what the processor's give, before a process trusts them.

Kernels that never ran on a GPU (``_C.untested_cuda_kernels()``) are off unless ``PYCERT_CUDA_UNTESTED=1``, and then
used only after this check, which runs once, when a process first uses a CUDA device: each kernel alone on small cases
with ragged ends, in float32 and float64, then the methods on two small networks. Results must agree with the
processor's within the rounding of their sums, and bounds must hold. ``PYCERT_CUDA_UNTESTED=unchecked`` leaves it out.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from pycert import _C, _choices

from . import families, intervals, relaxations, rows
from .judging import Case, Check, WrongResult
from .methods import METHODS, check_method

#: By the kernel that a failure accuses: each uses, beside its own, only kernels of cases before it.
CASES: dict[str, Case] = {**intervals.CASES, **rows.CASES, **families.CASES, **relaxations.CASES}


def run(
    device: torch.device,
    within: Callable[[], Any] = contextlib.nullcontext,
    report: Callable[[str, RuntimeError | None], None] | None = None,
) -> None:
    """Check every kernel and method on the device.

    Args:
        device: whose kernels are compared with the processor's.
        within: entered around every call that goes to the device; for tests that put kernels in the processor's place.
        report: told of every case by name and dtype, with its error if it failed; then no failure ends the check.

    Raises:
        RuntimeError: without ``report``, naming the kernel or method that gave a wrong result, or could not run.
    """
    cases: list[tuple[str, Case]] = [(f"kernel {name!r}", one) for name, one in CASES.items()]
    cases += [
        (f"bounds by method={name!r}", functools.partial(check_method, method=name)) for name in METHODS
    ]
    # gradients are formed by the thread that asks for them: no other may use the kernels before the end
    alone = torch.autograd.set_multithreading_enabled(False)
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), alone, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's settings: they are for the networks of the user
        for (name, one), dtype in itertools.product(cases, (torch.float32, torch.float64)):
            failed = _failure(name, one, Check(device, dtype, within))
            if report is not None:
                report(f"{name}, {str(dtype).removeprefix('torch.')}", failed)
            elif failed is not None:
                raise failed from failed.__cause__


def _failure(name: str, one: Case, check: Check) -> RuntimeError | None:
    """Runs a case; an error that says what failed where, and what to do."""
    device = check.device
    try:
        one(check)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except (WrongResult, RuntimeError, ValueError) as error:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        failed = RuntimeError(
            f"pycert's check of its CUDA kernels failed on {card}: {name} "
            f"({str(check.dtype).removeprefix('torch.')}): {(str(error).splitlines() or [type(error).__name__])[0]}. "
            "Bounds on this device cannot be trusted: use the CPU, and please report this. "
            "PYCERT_CUDA_UNTESTED=unchecked, set before the process starts, uses the kernels without the check"
        )
        failed.__cause__ = error
        return failed
    return None


_lock = threading.RLock()
_state = "due"  # "running", "passed", or why it failed


def ensure(device: torch.device | None = None, within: Callable[[], Any] = contextlib.nullcontext) -> bool:
    """Run the check once a process; True when it has passed, False inside of it.

    Raises:
        RuntimeError: it failed, now or before.
    """
    global _state
    with _lock:  # other threads wait; the one that checks comes by again
        if _state == "due":
            if device is None and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "pycert's CUDA kernels are checked when a process first uses them, which waits for the device: "
                    "compute one bound before a CUDA graph is captured"
                )
            _state = "running"
            start = time.perf_counter()
            try:
                run(device or torch.device("cuda", torch.cuda.current_device()), within)
            except BaseException as error:
                failed = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
                _state = str(error) if failed else "due"
                raise
            finally:
                _choices.load.cache_clear()
            _state = "passed"
            warnings.warn(
                "pycert's CUDA kernels were not run on a GPU by their authors. A check of each against the processor "
                f"passed on this one, in {time.perf_counter() - start:.1f} s (docs/cuda.md)",
                stacklevel=2,
            )
        elif _state not in ("running", "passed"):
            raise RuntimeError(_state)
        return _state == "passed"


_C.set_cuda_check(ensure)
