"""Prints the requirements of an extra of pyproject.toml, one a line, for ``pip install`` in the Makefile.

``pip install .[extra]`` would build pycert first; this way an environment is ready before it.
``build`` names the build requirements themselves.
"""

import re
import sys
from pathlib import Path


def requirements(name: str, text: str) -> list[str]:
    """The strings of ``name = [...]``; without tomllib, which Python 3.10 lacks."""
    key = "requires" if name == "build" else re.escape(name)
    found = re.search(rf"^{key} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        sys.exit(f"extras.py: pyproject.toml has no extra {name!r}")
    return re.findall(r'"([^"]+)"', found.group(1)) + (["numpy"] if name == "build" else [])


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    print("\n".join(requirements(sys.argv[1], pyproject.read_text(encoding="utf-8"))))
