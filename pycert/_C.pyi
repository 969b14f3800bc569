# The compiled module; docs/architecture.md says what it holds, csrc/bindings.cpp defines it.
from typing import Any

def __getattr__(name: str) -> Any: ...
