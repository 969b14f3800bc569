"""Where a bound spends its time: per layer and kernel, against what the device can do."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pycert import _C


@dataclasses.dataclass(frozen=True)
class Roofs:
    """What the device was measured to do: ``bandwidth`` in bytes/s (read and written), ``rate`` in FLOP/s."""

    bandwidth: float
    rate: float


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kernel in one layer and phase: ``seconds`` without what is nested in it, ``bytes`` read and written at
    least, ``flops`` of arithmetic. Kernel ``"torch"`` is the rest of a layer's time: elementwise steps, indexing,
    the engine itself."""

    layer: str
    phase: str
    kernel: str
    calls: int
    seconds: float
    bytes: float
    flops: float

    def roof_share(self, roofs: Roofs) -> float | None:
        """Least time that memory or arithmetic asks for, over the time taken; None where neither was counted.

        Above 1 where operands came out of a cache: the roof is the one of memory.
        """
        least = max(self.bytes / roofs.bandwidth, self.flops / roofs.rate)
        return least / self.seconds if least > 0 and self.seconds > 0 else None


@dataclasses.dataclass(frozen=True)
class Target:
    """A value bounded by back-substitution: ``rows`` walked (two a neuron for both sides), out of ``neurons`` of all
    samples, in ``seconds`` with everything that the walk did."""

    layer: str
    rows: int
    neurons: int
    seconds: float


class Profile:
    """What :func:`profile` returns; filled when its ``with`` block ends.

    Attributes:
        entries: list of :class:`Entry`, the longest first.
        targets: list of :class:`Target`, the longest first.
        seconds: wall time of the block.
        peak_bytes: memory taken at the worst moment beyond what was in use before, or None where the system does
            not say.
    """

    _active = False

    def __init__(self, device: str | torch.device, dtype: torch.dtype, trace: str | Path | None) -> None:
        self.device, self.dtype = torch.device(device), dtype
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"profile: device must be cpu or cuda, got {device}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"profile: dtype must be float32 or float64, got {dtype}")
        self.trace = None if trace is None else Path(trace)
        self.entries: list[Entry] = []
        self.targets: list[Target] = []
        self.seconds = 0.0
        self.peak_bytes: int | None = None
        self._tracer: Any = None

    def __enter__(self) -> Profile:
        if Profile._active:
            raise RuntimeError("profile: another profile is running; they cannot be nested")
        Profile._active = True
        if self.trace is not None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._tracer = torch.profiler.profile(activities=activities)
            self._tracer.__enter__()
        self._memory = _Memory(self.device)
        self._start = time.perf_counter()
        _C.profile_start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        entries, targets = _C.profile_stop()
        Profile._active = False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = self._memory.peak()
        if self._tracer is not None:
            self._tracer.__exit__(kind, error, where)
            if error is None:
                self._tracer.export_chrome_trace(str(self.trace))
        fields = [field.name for field in dataclasses.fields(Entry)]
        self.entries = [Entry(**{name: getattr(found, name) for name in fields}) for found in entries]
        self.entries.sort(key=lambda entry: -entry.seconds)
        self.targets = [Target(t.layer, t.rows, t.neurons, t.seconds) for t in targets]
        self.targets.sort(key=lambda target: -target.seconds)

    # ---- reports ------------------------------------------------------------------------------------

    def roofs(self) -> Roofs:
        """The device's copy bandwidth and matrix-product rate, measured once per process, dtype and thread count."""
        return measured_roofs(str(self.device), self.dtype, torch.get_num_threads())

    def summed(self, *keys: str) -> list[Entry]:
        """Entries added up over everything but ``keys`` (of "layer", "phase", "kernel"), the longest first."""
        unknown = [key for key in keys if key not in ("layer", "phase", "kernel")]
        if unknown:
            raise ValueError(f"profile: keys are 'layer', 'phase' and 'kernel', got {unknown[0]!r}")
        sums: dict[tuple[str, ...], Entry] = {}
        for entry in self.entries:
            layer = entry.layer if "layer" in keys else ""
            phase = entry.phase if "phase" in keys else ""
            kernel = entry.kernel if "kernel" in keys else ""
            old = sums.get((layer, phase, kernel), Entry(layer, phase, kernel, 0, 0.0, 0.0, 0.0))
            sums[layer, phase, kernel] = Entry(
                layer,
                phase,
                kernel,
                old.calls + entry.calls,
                old.seconds + entry.seconds,
                old.bytes + entry.bytes,
                old.flops + entry.flops,
            )
        return sorted(sums.values(), key=lambda entry: -entry.seconds)

    def table(self, by: tuple[str, ...] | str = ("layer", "phase", "kernel"), limit: int = 25) -> str:
        """The report as text: the ``limit`` longest lines, then what was back-substituted for which layer.

        Args:
            by: which of "layer", "phase" and "kernel" have lines of their own; the others are added up.
            limit: lines at most; the rest stands in one line.
        """
        keys = (by,) if isinstance(by, str) else tuple(by)
        entries, roofs = self.summed(*keys), self.roofs()
        rows = [[*keys, "calls", "ms", "%", "GB", "GFLOP", "GB/s", "GFLOP/s", "% of roof"]]
        total = sum(entry.seconds for entry in entries)
        for entry in entries[:limit]:
            rows.append([*(getattr(entry, key) or "-" for key in keys), *_numbers(entry, total, roofs)])
        rest = sum(entry.seconds for entry in entries[limit:])
        if rest > 0:
            names = [f"{len(entries) - limit} more", *[""] * (len(keys) - 1)]
            rows.append([*names, "", f"{1e3 * rest:.3g}", f"{100 * rest / total:.1f}", *[""] * 5])
        parts = [_aligned(rows, len(keys))]
        if self.targets:
            heads = [["bounds of", "rows", "of neurons %", "ms"]]
            for t in self.targets:
                rebounded = 50 * t.rows / t.neurons if t.layer != "output" else 100.0
                heads.append([t.layer, str(t.rows), f"{rebounded:.1f}", f"{1e3 * t.seconds:.3g}"])
            parts.append(_aligned(heads, 1))
        parts.append(self.summary())
        if any((entry.roof_share(roofs) or 0) > 1 for entry in entries[:limit]):
            parts.append(
                "More than 100 % of the roof: data came out of a cache, and the roof is the memory's."
            )
        return "\n\n".join(parts)

    def summary(self) -> str:
        """Time, what of it was seen, memory and roofs, in one sentence each."""
        seen, roofs = sum(entry.seconds for entry in self.entries), self.roofs()
        peak = "unknown" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.1f} MiB"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{1e3 * self.seconds:.3g} ms, {1e3 * seen:.3g} of them inside layers; memory at its peak: {peak}. "
            f"Roofs of {self.device} ({dtype}): copies {roofs.bandwidth / 1e9:.3g} GB/s, "
            f"matrix products {roofs.rate / 1e9:.4g} GFLOP/s."
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "device": str(self.device),
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "roofs": dataclasses.asdict(self.roofs()),
            "entries": [dataclasses.asdict(entry) for entry in self.entries],
            "targets": [dataclasses.asdict(target) for target in self.targets],
        }

    def picture(self, path: str | Path) -> Path:
        """Draw the roofline of every kernel and the time of every layer; needs matplotlib. Returns ``path``."""
        from pycert.plot import profile_picture

        return profile_picture(self, path)


def profile(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trace: str | Path | None = None,
) -> Profile:
    """Record what pycert does inside a ``with`` block.

    Args:
        device: where the bounds run; decides whose memory and roofs are reported.
        dtype: float32 or float64, of the networks: decides the roof of arithmetic.
        trace: write a Chrome trace (for ui.perfetto.dev) of torch's profiler there, with ranges named after
            layers; tracing slows the block down, so that times are best taken without.

    Returns:
        :class:`Profile`, to be entered.

    Raises:
        ValueError, TypeError: another device or dtype.
        RuntimeError: on entering, where another profile is running.

    Kernels on a GPU are waited for one by one, so that every second stands where it belongs; the sum is then longer
    than without the profile. docs/performance.md says what recording costs.

    Example:
        >>> with pycert.profile() as p:
        ...     bm.bound(region, method="crown")
        >>> print(p.table(by="layer"))
    """
    return Profile(device, dtype, trace)


def _numbers(entry: Entry, total: float, roofs: Roofs) -> list[str]:
    share = entry.roof_share(roofs)
    counted = entry.bytes > 0 or entry.flops > 0
    return [
        str(entry.calls),
        f"{1e3 * entry.seconds:.3g}",
        f"{100 * entry.seconds / total:.1f}" if total > 0 else "",
        f"{entry.bytes / 1e9:.3g}" if counted else "",
        f"{entry.flops / 1e9:.3g}" if counted else "",
        f"{entry.bytes / entry.seconds / 1e9:.3g}" if counted and entry.seconds > 0 else "",
        f"{entry.flops / entry.seconds / 1e9:.3g}" if counted and entry.seconds > 0 else "",
        f"{100 * share:.0f}" if share is not None else "",
    ]


def _aligned(rows: list[list[str]], names: int) -> str:
    """Columns: the first ``names`` to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < names else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


class _Memory:
    """High-water mark of memory since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the mark
            self._before = _status("VmRSS")
        except OSError:
            pass  # not Linux

    def peak(self) -> int | None:
        if self._before is None:
            return None
        now = (
            torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")
        )
        return max(0, now - self._before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


@functools.cache
def measured_roofs(device: str, dtype: torch.dtype, threads: int) -> Roofs:
    """The best of a few copies far larger than the caches, and of a few large square products of ``dtype``."""
    on_gpu = torch.device(device).type == "cuda"
    numbers, side = (2**28, 8192) if on_gpu else (2**25, 1024)
    source = torch.ones(numbers, dtype=dtype, device=device)
    target = torch.empty_like(source)
    matrix = torch.rand(side, side, dtype=dtype, device=device)
    with torch.no_grad(), _exact_products():
        copying = _best_seconds(lambda: target.copy_(source), device)
        multiplying = _best_seconds(lambda: torch.mm(matrix, matrix), device)
    return Roofs(2 * source.numel() * source.element_size() / copying, 2 * side**3 / multiplying)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """No TF32: the roof of float32 products that bounds may use."""
    flags = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(flags, "fp32_precision") else ("allow_tf32", False)
    previous = getattr(flags, name)
    setattr(flags, name, exact)
    try:
        yield
    finally:
        setattr(flags, name, previous)


def _best_seconds(call: Any, device: str, repeat: int = 5) -> float:
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    call()
    best = float("inf")
    for _ in range(repeat):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


__all__ = ["Entry", "Profile", "Roofs", "Target", "profile"]
