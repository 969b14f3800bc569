"""auto_LiRPA's layout of coefficients of convolutions; here coefficients are plain tensors."""

from __future__ import annotations

from typing import Any


class Patches:
    """For ``isinstance``: no coefficient that pycert returns is one.

    Raises:
        NotImplementedError: when built.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Patches: coefficients are plain tensors [B, S, *in] here")


def inplace_unfold(*args: Any, **kwargs: Any) -> Any:
    """Of use for ``Patches`` alone, and not supported."""
    raise NotImplementedError("inplace_unfold: there are no Patches here")
