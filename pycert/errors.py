"""Errors that pycert raises beside ValueError and TypeError."""

from __future__ import annotations


class UnsupportedOperator(NotImplementedError):
    """A layer or function that cannot be bounded; names its path, its type and the nearest supported form."""

    def __init__(self, path: str, kind: str, hint: str = "") -> None:
        self.path, self.kind, self.hint = path, kind, hint
        where = f"at '{path}'" if path else "in the network"
        super().__init__(f"{kind} {where} is not supported" + (f"; {hint}" if hint else ""))
