"""What every picture starts from."""

from __future__ import annotations

from typing import Any


def make_figure(size: tuple[float, float], dpi: int = 90) -> Any:
    """A figure that needs no display; ``size`` in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install matplotlib", name="matplotlib"
        ) from error
    return Figure(figsize=size, dpi=dpi, layout="constrained")
