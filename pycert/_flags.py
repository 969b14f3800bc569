"""torch's global settings under which a network runs in ways that ``soundness="deployed"`` does not cover."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

from pycert import _C

P = ParamSpec("P")
T = TypeVar("T")

_warned: set[tuple[str, ...]] = set()


def nnpack_enabled() -> bool:
    """Whether float32 convolutions may take NNPACK's Winograd or FFT algorithms."""
    # torch offers no public reader for this flag.
    return torch.backends.nnpack.is_available() and bool(
        getattr(torch._C, "_get_nnpack_enabled", lambda: True)()
    )


def tf32_allowed(settings: Any) -> bool:
    """Of ``torch.backends.cuda.matmul`` or ``torch.backends.cudnn``: by the setting of the operator where torch has it,
    since reading the older one throws when both were used."""
    of_operator = settings if settings is torch.backends.cuda.matmul else getattr(settings, "conv", None)
    precision = getattr(of_operator, "fp32_precision", None)
    return bool(settings.allow_tf32) if precision is None else precision == "tf32"


def uncovered(device: str, dtype: torch.dtype, convolves: bool) -> tuple[str, ...]:
    """One phrase for every kind of execution that is allowed and not covered."""
    if dtype != torch.float32:
        return ()
    found = []
    if device == "cpu":
        for name, products in (("matmul", "matrix products"), ("conv", "convolutions")):
            precision = getattr(getattr(torch.backends.mkldnn, name, None), "fp32_precision", "none")
            if precision not in ("none", "ieee"):
                found.append(f"float32 {products} of precision {precision!r}")
    elif tf32_allowed(torch.backends.cuda.matmul):
        found.append("TF32 matrix products")
    if device == "cuda" and convolves and tf32_allowed(torch.backends.cudnn):
        found.append("TF32 convolutions")
    if device == "cuda" and convolves and torch.backends.cudnn.enabled:
        found.append("cuDNN convolutions (Winograd, FFT)")
    if device == "cpu" and convolves and nnpack_enabled():
        found.append("NNPACK convolutions (Winograd, FFT)")
    return tuple(found)


def no_autocast() -> contextlib.AbstractContextManager[None]:
    """Runs the network's own arithmetic in its own dtype, whatever autocast is on."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return _autocast_off()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _autocast_off() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def subnormals_kept(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` with subnormal numbers, whatever ``torch.set_flush_denormal`` says: outward rounding needs them."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _C.keep_subnormals(True):
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            _C.keep_subnormals(False)

    return run


@contextlib.contextmanager
def plain_convolutions(device: torch.device) -> Iterator[None]:
    """On a CUDA device without cuDNN, whose transforms our own error bounds do not cover."""
    if device.type != "cuda":
        yield
        return
    # not by `cudnn.flags`, which also reads and sets TF32, of which torch has two settings
    kept = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = kept


def refuse_emulation(device: torch.device) -> None:
    """cuBLAS may form float64 products from narrower ones, which our own error bounds do not cover.

    Raises:
        RuntimeError: names the variable.
    """
    variable = "CUBLAS_EMULATE_DOUBLE_PRECISION"
    if device.type == "cuda" and os.environ.get(variable, "0") not in ("", "0"):
        raise RuntimeError(
            f"{variable} makes float64 products inexact, which the error bounds do not cover; unset it"
        )


def warn_once(found: tuple[str, ...]) -> bool:
    """True the first time that these settings are met."""
    if found in _warned:
        return False
    _warned.add(found)
    return True
