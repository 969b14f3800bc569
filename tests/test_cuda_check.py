"""The check of CUDA kernels before their first use, with their bodies on the host in the device's place: whole it
passes; with any kernel broken it fails and names it."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import host_kernels
import pycert
from pycert import _C, _cuda_check

CPU = torch.device("cpu")
#: In `make test`; the others are slow.
SAMPLE = ("prepare", "relax_convolution")
#: What else is wrong with a kernel that does everything else.
SUBTLE = {
    "prepare, to nearest": "prepare",
    "scale, to nearest": "scale",
    "relu_lines, half an intercept": "relu_lines",
}


@pytest.fixture(scope="module", autouse=True)
def _library():
    host_kernels.build()


@pytest.fixture()
def nan_everywhere():
    """Memory that no kernel writes to holds NaN, not by chance what a kernel should have written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture()
def due(monkeypatch):
    """As in a process that has not used a CUDA device."""
    monkeypatch.setattr(_cuda_check, "_state", "due")


def test_every_untested_kernel_has_a_case():
    assert set(_cuda_check.CASES) == set(_C.untested_cuda_kernels())


def test_whole_kernels_pass_once_with_a_warning(due):
    """And the check calls every kernel: one that the table has and the check never calls would pass unseen."""
    with (
        pycert.profile() as p,
        pytest.warns(UserWarning, match=r"by their authors.*passed on this one, in \d"),
    ):
        assert _cuda_check.ensure(CPU, host_kernels.replaced)
    renamed = {"relu_lines": "relu_relaxation", "relu_backward": "relu_relaxation_backward"}
    called = {entry.kernel for entry in p.entries}
    assert {renamed.get(name, name) for name in _C.untested_cuda_kernels()} <= called
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _cuda_check.ensure(CPU, lambda: pytest.fail("checked twice"))


def accused(name: str, float64: bool) -> str:
    with pytest.raises(RuntimeError, match="check of its CUDA kernels failed on cpu") as error:
        _cuda_check.run(CPU, lambda: host_kernels.broken(name, float64))
    return str(error.value)


@pytest.mark.parametrize("float64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in _cuda_check.CASES],
)
def test_a_kernel_that_does_nothing_is_named(name, float64, nan_everywhere):
    if name == "pack_bits" and float64:
        pytest.skip("bits are packed by the kernel of the float32 table alone")
    message = accused(name, float64)
    assert f"kernel '{name}' ({'float64' if float64 else 'float32'})" in message
    assert "cannot be trusted" in message and "PYCERT_CUDA_UNTESTED=unchecked" in message


@pytest.mark.parametrize("name", SUBTLE)
def test_a_kernel_whose_bounds_do_not_hold_is_named(name):
    assert f"kernel '{SUBTLE[name]}' (float32)" in accused(name, False)


def test_a_failure_stays_and_running_out_of_memory_does_not(due, monkeypatch):
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_cuda_check, "CASES", {"prepare": fail})
    with pytest.raises(torch.OutOfMemoryError):
        _cuda_check.ensure(CPU)
    assert _cuda_check._state == "due"
    monkeypatch.setattr(_cuda_check, "CASES", {"prepare": lambda check: check.holds(None, torch.ones(3), torch.zeros(3))})  # fmt: skip
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="kernel 'prepare' .float32.: an exact value lies 1 outside its bounds"
        ):
            _cuda_check.ensure(CPU)


def test_nothing_is_checked_while_a_graph_is_captured(due, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="compute one bound before a CUDA graph is captured"):
        _cuda_check.ensure()
    assert _cuda_check._state == "due"


PROBE = """
import pycert
from pycert import _C
calls, off = [], 0
def check():
    calls.append(1)
    if len(calls) < 3:
        raise ValueError("kernel 'dot' is wrong")
    return len(calls) > 3
_C.set_cuda_check(check)
for _ in range(5):
    try:
        _C.check_cuda_kernels()
    except RuntimeError as error:
        assert "kernel 'dot' is wrong" in str(error) or "are off" in str(error), error
        off += "are off" in str(error)
print(len(calls), off)
"""


@pytest.mark.parametrize("value, calls", [("1", 4), ("unchecked", 0), ("0", 0), ("", 0)])
def test_the_check_is_asked_until_it_passes_or_left_out(value, calls):
    """Errors reach the caller; once passed it is not asked again; kernels that never ran are off unless asked for."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYCERT_CUDA_UNTESTED": value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(calls), str(0 if value in ("1", "unchecked") else 5)]
