"""CUDA without a GPU: every kernel compiles without a warning within its limits of registers and shared memory, and the
torch-facing file compiles against torch's headers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import cuda_tools
import pycert
from cuda_tools import ARCHITECTURES, KERNEL_FILES, ROOT
from pycert import _C

#: Registers of a thread, bytes of shared memory of a block, bytes of stack (local memory) of a thread; nothing spills.
LIMITS = json.loads((ROOT / "tests" / "cuda_limits.json").read_text())
#: One quick file in `make test`; the rest is slow.
CASES = [
    pytest.param(name, architecture, marks=() if name == "charge" else pytest.mark.slow)
    for name in KERNEL_FILES
    for architecture in ARCHITECTURES
]


@pytest.mark.parametrize("name, architecture", CASES)
def test_kernels_compile_within_their_limits(name, architecture, tmp_path):
    if not shutil.which("c++filt"):
        pytest.skip("no c++filt to read the compiler's report with")
    found = {cuda_tools.short_name(kernel): used for kernel, used in cuda_tools.compile_kernels(name, architecture, tmp_path).items()}  # fmt: skip
    assert set(found) == set(LIMITS[name]), "kernels come and go with their limits in tests/cuda_limits.json"
    for kernel, used in found.items():
        limit = LIMITS[name][kernel]
        assert used["spilled"] == 0, f"{kernel} spills {used['spilled']} bytes on {architecture}"
        for what in cuda_tools.LIMITED:
            assert used[what] <= limit[what], (
                f"{kernel} on {architecture}: {what} {used[what]} > {limit[what]}"
            )


def test_limits_leave_room_for_a_block():
    """A block of 256 threads must fit: 65,536 registers and 48 KiB of static shared memory."""
    for kernels in LIMITS.values():
        for kernel, limit in kernels.items():
            assert limit["registers"] <= 255 and limit["shared"] <= 48 * 1024, kernel
            assert not kernel.startswith(("relax", "dot", "concretize", "product", "dual", "convolution")) or limit["stack"] == 0  # fmt: skip


def test_the_report_is_read():
    report = """ptxas info    : Compiling entry function '_Z3fooPf' for 'sm_90'
ptxas info    : Function properties for _Z3fooPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 8 bytes cumulative stack size, 128 bytes smem"""
    expected = {"_Z3fooPf": {"stack": 8, "spilled": 16, "registers": 32, "shared": 128}}
    assert cuda_tools.resources(report) == expected


def toolkit_includes() -> list[str]:
    """The toolkit's headers, which need no GPU and no CUDA in torch."""
    home = Path(cuda_tools.nvcc()).resolve().parents[1]
    for folder in (home / "include", Path("/usr/local/cuda/include")):
        if (folder / "cuda_runtime_api.h").exists():
            return [f"-isystem{folder}"]
    pytest.skip("no CUDA headers beside nvcc to check the syntax against")


def test_torch_facing_files_compile_against_this_torch(tmp_path):
    """Also beside a torch without CUDA, which lacks one generated header: tests/cpp/stubs has it."""
    files = sorted((ROOT / "csrc/ops").glob("*_cuda.cpp"))
    assert files
    stubs = [] if torch.version.cuda else [f"-isystem{ROOT / 'tests/cpp/torch_stubs'}"]
    for path in files:
        command = [shutil.which("g++") or pytest.skip("no g++ to check the syntax with"), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]  # fmt: skip
        command += [f"-I{ROOT / 'csrc'}", *stubs, *toolkit_includes(), "-DPYCERT_WITH_CUDA=1"]
        command += [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
        command += [f"-isystem{sysconfig.get_path('include')}", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_kernel_files_include_no_torch_header():
    for path in (ROOT / "csrc/cuda").iterdir():
        for included in re.findall(r"#include [<\"]([^>\"]+)", path.read_text()):
            assert not included.startswith(("torch/", "ATen/", "c10/", "pybind11/")), (
                f"{path.name}: {included}"
            )
            assert included.startswith(
                ("core/", "cpu/", "cuda/", "cuda_", "c", "type_traits", "algorithm")
            ), f"{path.name}: {included}"


def test_every_kernel_of_the_table_is_listed_as_untested_or_ran():
    """What never ran on a GPU is off by default and says so."""
    table = re.findall(r"t\.(?:main\.)?(\w+) = on_stream", (ROOT / "csrc/cuda/table.h").read_text())
    assert len(table) == 29
    assert set(table) <= set(_C.untested_cuda_kernels())


@pytest.mark.slow
def test_setup_builds_the_kernels_where_torch_has_cuda(tmp_path):
    """setup.py lists every kernel and every *_cuda.cpp for such a torch, and refuses where PYCERT_CUDA=1 cannot be met."""
    probe = """
import sys, types, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = {cuda!r}, {home!r}
import setuptools
setuptools.setup = lambda **arguments: print("SOURCES", arguments["ext_modules"][0].sources)
cpp_extension.CUDAExtension = lambda name, sources, **rest: types.SimpleNamespace(sources=sources)
sys.argv = ["setup.py", "build_ext"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {{"__file__": "setup.py", "__name__": "__main__"}})
"""

    def run(cuda, home, **environment):
        import os

        full = {**os.environ, **environment}
        if not environment:
            full.pop("PYCERT_CUDA", None)
        code = probe.format(cuda=cuda, home=home)
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=full, capture_output=True, text=True
        )

    with_cuda = run("13.0", "/usr/local/cuda")
    assert with_cuda.returncode == 0, with_cuda.stderr
    for name in KERNEL_FILES:
        assert f"csrc/cuda/{name}.cu" in with_cuda.stdout
    assert "csrc/ops/kernels_cuda.cpp" in with_cuda.stdout
    without = run(None, "/usr/local/cuda")
    assert without.returncode == 0 and ".cu'" not in without.stdout and "_cuda.cpp" not in without.stdout
    refused = run(None, "/usr/local/cuda", PYCERT_CUDA="1")
    assert refused.returncode != 0 and "torch without CUDA" in refused.stderr


@pytest.mark.skipif(_C.has_cuda(), reason="a build with CUDA has kernels")
def test_a_build_without_cuda_says_how_to_get_one():
    with pytest.raises(ValueError, match="without CUDA kernels.*build pycert again"):
        pycert.bounded._check_device(torch.device("cuda"))
    with pytest.raises(ValueError, match="cpu or cuda, got meta"):
        pycert.bounded._check_device(torch.device("meta"))
