"""The CUDA kernels' bodies on the host under the address, undefined-behaviour and thread sanitizers.

With a std::thread for every CUDA thread a missing barrier is a data race that the thread sanitizer reports: the last test
takes one out."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import host_kernels
from host_kernels import ROOT

pytestmark = pytest.mark.slow
SANITIZERS = {
    "address, undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


#: The programs of tests/cpp; together they run every kernel.
PROGRAMS = ("test_cuda_kernels", "test_cuda_families")


def build(folder: Path, flags: list[str], *first: Path, name: str = PROGRAMS[0]) -> Path:
    program = folder / "test"
    command = [
        host_kernels.compiler(),
        "-std=c++20",
        "-O1",
        "-g1",
        "-U_FORTIFY_SOURCE",
        "-ffp-contract=off",
        "-pthread",
    ]
    command += ["-DPYCERT_HOST_SHIM", "-DPYCERT_SHIM_THREADS", *flags, *(f"-I{path}" for path in first)]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cpp'}", f"-isystem{ROOT / 'tests/cpp/stubs'}"]
    command += ["-Wno-unknown-pragmas", str(ROOT / f"tests/cpp/{name}.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and "cannot find" in done.stderr:
        pytest.skip("this compiler has no sanitizer libraries")
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    command = [str(program)]
    if shutil.which(
        "setarch"
    ):  # the thread sanitizer of older compilers fails where addresses are too random
        command = ["setarch", "-R", *command]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", SANITIZERS)
def test_kernels_are_clean(name, program, tmp_path):
    done = run(build(tmp_path, SANITIZERS[name], name=program))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "all kernels agree" in done.stdout


def test_a_missing_barrier_is_a_race(tmp_path):
    """Without the barrier between filling a tile and reading it."""
    mutated = tmp_path / "cuda"
    mutated.mkdir()
    text = (ROOT / "csrc/cuda/tile.cuh").read_text()
    barrier = "        load_right(shared, right, first_column, start);\n        __syncthreads();\n"
    assert text.count(barrier) == 1
    (mutated / "tile.cuh").write_text(text.replace(barrier, barrier.splitlines(keepends=True)[0]))
    done = run(build(tmp_path, SANITIZERS["thread"], tmp_path))
    assert done.returncode != 0 and "data race" in done.stderr


def test_a_missing_barrier_of_a_warp_is_a_race(tmp_path):
    """Without the one between writing a vertex of a hull and reading it."""
    mutated = tmp_path / "cuda"
    mutated.mkdir()
    text = (ROOT / "csrc/cuda/krelu_simplex.cuh").read_text()
    barrier = "      to[lane] = sum;\n    }\n    __syncwarp();\n"
    assert text.count(barrier) == 1
    (mutated / "krelu_simplex.cuh").write_text(
        text.replace(barrier, barrier.replace("    __syncwarp();\n", ""))
    )
    done = run(build(tmp_path, SANITIZERS["thread"], tmp_path, name=PROGRAMS[1]))
    assert done.returncode != 0 and "data race" in done.stderr


#: tests/cpp/test_cuda_shim.cpp: a kernel, and what is said of it.
WRONG = {
    "shuffles apart": "lanes of a warp meet at different places",
    "shuffle and barrier": "lanes of a warp meet at different places",
    "barriers apart": "threads of a block meet at different places",
    "after return": "deadlock",
    "part of a warp": "a shuffle of part of a warp",
}


def test_what_a_gpu_would_not_run_is_refused(tmp_path):
    """By the fibers, which run the kernels in every test."""
    program = build(tmp_path, ["-UPYCERT_SHIM_THREADS"], name="test_cuda_shim")
    for kernel, said in WRONG.items():
        done = subprocess.run([program, kernel], capture_output=True, text=True)
        assert done.returncode != 0 and said in done.stderr, kernel
    assert subprocess.run([program, "right"], capture_output=True, text=True).stdout == "ran\n"
