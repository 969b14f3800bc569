"""Progress bars: tqdm where it is installed, one line at the end where it is not."""

from __future__ import annotations

import sys
import time
from typing import Any


class _Lines:
    """Stands in for tqdm: prints its text once, when it is closed."""

    def __init__(self, total: int, initial: int, description: str, show: bool) -> None:
        self.total, self.count, self.description, self.text, self.show = total, initial, description, "", show
        self.started = time.perf_counter()

    def update(self, count: int = 1) -> None:
        self.count += count

    def set_postfix_str(self, text: str) -> None:
        self.text = text

    def close(self) -> None:
        seconds = time.perf_counter() - self.started
        if self.show:
            print(
                f"{self.description}: {self.count}/{self.total} in {seconds:.0f} s, {self.text}",
                file=sys.stderr,
            )


def progress_bar(
    total: int, *, initial: int = 0, description: str = "", unit: str = "it", show: bool = True
) -> Any:
    """An object with ``update(count)``, ``set_postfix_str(text)`` and ``close()`` that writes to standard
    error."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _Lines(total, initial, description, show)
    return tqdm(
        total=total, initial=initial, desc=description, unit=unit, disable=not show, dynamic_ncols=True
    )
