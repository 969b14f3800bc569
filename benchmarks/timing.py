"""Time several callables against each other, and the memory one call takes."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

BLOCK_SECONDS = (
    0.02  # calls of one callable before the next has its turn: short enough that all meet the same machine
)
MAX_ROUNDS = 25


@dataclasses.dataclass
class Timing:
    """What one call of one callable took, in seconds.

    ``low`` and ``high`` are the quartiles around the median, ``processor`` the mean processor time of all
    threads, ``rounds`` the median of every block in the order measured.
    """

    median: float
    low: float
    high: float
    processor: float
    calls: int
    rounds: list[float]

    def as_dict(self) -> dict[str, Any]:
        """JSON form, times rounded to tenths of a microsecond, without the blocks."""
        times = {name: round(getattr(self, name), 7) for name in ("median", "low", "high", "processor")}
        return {**times, "calls": self.calls}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one value, three times itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratio(a: Timing, b: Timing) -> tuple[float, float, float]:
    """``median(a) / median(b)``, and the quartiles of the same ratio taken block by block."""
    low, _, high = quartiles([x / y for x, y in zip(a.rounds, b.rounds, strict=True)])
    return a.median / b.median, low, high


#: What a call is timed by; processor time (of all threads) holds still on a busy machine if one thread is used.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def warm_up(call: Callable[[], Any], seconds: float) -> float:
    """Call four times, fewer if slow, and return the last time: some libraries compile in the first calls."""
    for _ in range(4):
        start = time.perf_counter()
        call()
        last = time.perf_counter() - start
        if last > seconds:
            break
    return last


def alternate(
    calls: Mapping[str, Callable[[], Any]], seconds: float = 1.0, clock: str = "wall"
) -> dict[str, Timing]:
    """Time every callable in turn, block by block, and return one :class:`Timing` each.

    Args:
        calls: name to a callable without arguments.
        seconds: roughly how long the slowest of them is measured; all get equally many blocks.
        clock: one of ``CLOCKS``.
    """
    once = {name: warm_up(call, seconds) for name, call in calls.items()}
    per_block = {name: max(1, int(BLOCK_SECONDS / max(one, 1e-7))) for name, one in once.items()}
    slowest = max(once[name] * per_block[name] for name in calls)
    least = 1 if slowest > 5 * seconds else 3
    rounds = max(least, min(MAX_ROUNDS, int(seconds / slowest)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    processor = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            times, used = time_block(call, per_block[name], CLOCKS[clock])
            samples[name] += times
            blocks[name].append(statistics.median(times))
            processor[name] += used / rounds
    result = {}
    for name in calls:
        low, median, high = quartiles(samples[name])
        result[name] = Timing(median, low, high, processor[name], len(samples[name]), blocks[name])
    return result


def time_block(call: Callable[[], Any], count: int, clock: Callable[[], float]) -> tuple[list[float], float]:
    """Time of each of ``count`` calls and the mean processor time; an uncounted call refills the caches."""
    if count > 1:
        call()
    times = []
    before = time.process_time()
    for _ in range(count):
        start = clock()
        call()
        times.append(clock() - start)
    return times, (time.process_time() - before) / count


def _status_bytes(key: str) -> int:
    """A memory figure of this process from the kernel, in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes of resident memory that one call adds at its worst, or None where the system does not say."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # freed memory goes back first, or the call would reuse it unseen
        with open("/proc/self/clear_refs", "w") as marks:
            marks.write("5")  # resets the high-water mark
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def processor_ticks() -> tuple[int, int, float] | None:
    """All and idle ticks of the machine since it started, and those of this process; None where unknown."""
    try:
        with open("/proc/stat") as stat:
            ticks = [int(word) for word in stat.readline().split()[1:9]]
    except OSError:
        return None
    own = os.times()
    return sum(ticks), ticks[3] + ticks[4], (own.user + own.system) * os.sysconf("SC_CLK_TCK")


def busy_since(start: tuple[int, int, float] | None) -> float | None:
    """Share of the machine's processors that other processes used since ``start`` (from processor_ticks)."""
    now = processor_ticks()
    if start is None or now is None or now[0] == start[0]:
        return None
    passed, idle, own = now[0] - start[0], now[1] - start[1], now[2] - start[2]
    return round(max(0.0, (passed - idle - own) / passed), 2)
