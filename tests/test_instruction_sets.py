"""The kernels of every instruction set the processor has are sound; one set serves a process, so each runs in its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pycert import _C

TESTS = Path(__file__).parent
CHOSEN = "(test_long_sums and 1025) or (test_no_execution_escapes and (conv_plain-linf- or residual-l2-) and not more)"


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYCERT_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "isa", ["portable", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("avx2", "avx512"))]
)
def test_soundness_under_every_instruction_set(isa):
    if isa == _C.isa():
        pytest.skip("every other test runs under this one")
    chosen = run(isa, "-c", "import pycert._C as c; print(c.isa())")
    if chosen.returncode != 0 and (
        "does not have it" in chosen.stderr or "portable kernels only" in chosen.stderr
    ):
        pytest.skip(f"this processor or build has no {isa}")
    assert chosen.stdout.strip() == isa, chosen.stderr
    tests = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_soundness.py", "-k", CHOSEN)
    assert tests.returncode == 0, tests.stdout[-3000:] + tests.stderr[-1000:]


def test_unknown_instruction_sets_are_refused():
    refused = run("sse9", "-c", "import pycert._C as c; c.isa()")
    assert refused.returncode != 0
    assert "PYCERT_ISA must be portable, avx2 or avx512" in refused.stderr
