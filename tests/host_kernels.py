"""The kernels of csrc/cuda compiled for the host (tests/cpp/cuda_shim.h), in place of the processor's."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pycert import _C

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "-std=c++20 -fPIC -U_FORTIFY_SOURCE -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Werror "
    f"-DPYCERT_HOST_SHIM -I{ROOT / 'csrc'} -I{ROOT / 'tests/cpp'}"
).split()


def sources() -> list[Path]:
    return [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "tests/cpp/shim_table.cpp"]


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler to run the CUDA kernels on the host with: set CXX or install g++")
    return found


def build() -> Path:
    """The shared library; compiled once for what the sources hold."""
    read = [
        *sources(),
        *(ROOT / "csrc").glob("c*/*.h"),
        *(ROOT / "csrc/cuda").glob("*.cuh"),
        *(ROOT / "tests/cpp").glob("*.h"),
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(read))).hexdigest()[:16]
    library = ROOT / "build" / "host_kernels" / f"{digest}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        running = []
        for source in sources():
            out = Path(folder) / f"{source.stem}.o"
            command = [compiler(), *FLAGS, "-O1", "-x", "c++", "-c", str(source), "-o", str(out)]
            running.append((out, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        for out, process in running:
            _, messages = process.communicate()
            assert process.returncode == 0, f"{out.stem}:\n{messages}"
        made = Path(folder) / "kernels.so"
        subprocess.run(
            [compiler(), "-shared", *(str(out) for out, _ in running), "-o", str(made)], check=True
        )
        os.replace(made, library)
    return library


def tables() -> tuple[int, int]:
    """Addresses of the tables for float32 and float64."""
    library = ctypes.CDLL(str(build()))
    functions = (library.pycert_shim_kernels_float, library.pycert_shim_kernels_double)
    for function in functions:
        function.restype = ctypes.c_void_p
    return functions[0](), functions[1]()


@contextlib.contextmanager
def broken(name: str, float64: bool = False) -> Iterator[None]:
    """As `replaced`, with one kernel of the float32 (or float64) table that does nothing, or what ``name`` says."""
    library = ctypes.CDLL(str(build()))
    made = library.pycert_shim_broken_double if float64 else library.pycert_shim_broken_float
    made.restype, made.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    table = made(name.encode())
    assert table is not None, f"no kernel {name!r} to break"
    whole = tables()
    _C.testing_replace_kernels(*((whole[0], table) if float64 else (table, whole[1])))
    try:
        yield
    finally:
        _C.testing_replace_kernels(0, 0)


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """As `replaced`, and the engine believes that its calls are recorded into a graph, so that nothing may wait."""
    library = ctypes.CDLL(str(build()))
    library.pycert_shim_set_captured(ctypes.c_bool(True))
    try:
        with replaced():
            yield
    finally:
        library.pycert_shim_set_captured(ctypes.c_bool(False))


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    """Within it pycert's operators on the CPU run the bodies of the CUDA kernels."""
    _C.testing_replace_kernels(*tables())
    try:
        yield
    finally:
        _C.testing_replace_kernels(0, 0)
