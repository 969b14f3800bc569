"""Compiling csrc/cuda with nvcc: flags, and what the assembler reports of every kernel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNEL_FILES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")
LIMITED = ("registers", "shared", "stack")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def nvcc() -> str:
    """The compiler: on the path, in CUDA_HOME, or where the toolkit installs itself."""
    for name in ("nvcc", f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"):
        if shutil.which(name):
            return shutil.which(name)
    pytest.skip("no nvcc: the CUDA kernels are not compiled here")


def compile_kernels(name: str, architecture: str, folder: Path) -> dict[str, dict[str, int]]:
    """Compile one file, warnings being errors, and return the resources of its kernels by their mangled names."""
    command = [
        nvcc(),
        "-std=c++17",
        f"-arch={architecture}",
        "-O3",
        "--fmad=false",
        f"-I{ROOT / 'csrc'}",
        "-cubin",
    ]
    command += ["-Xcompiler=-Wall,-Wextra,-ffp-contract=off", "-Werror=all-warnings", "-Xptxas=-v"]
    command += ["-o", str(folder / f"{name}.cubin"), str(ROOT / "csrc/cuda" / f"{name}.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return resources(done.stderr)


def resources(report: str) -> dict[str, dict[str, int]]:
    """Registers, shared memory, stack and spilled bytes of every kernel in ptxas' report."""
    found: dict[str, dict[str, int]] = {}
    kernel = ""
    for line in report.splitlines():
        if match := ENTRY.search(line):
            kernel = match[1]
            found[kernel] = {}
        elif (match := SPILLS.search(line)) and kernel and "stack" not in found[kernel]:
            found[kernel] |= {"stack": int(match[1]), "spilled": int(match[2]) + int(match[3])}
        elif (match := USED.search(line)) and kernel:
            found[kernel] |= {"registers": int(match[1]), "shared": int(match[2] or 0)}
            kernel = ""
    return found


def short_name(mangled: str) -> str:
    """``relax_kernel<float, 32>`` of a mangled name."""
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^.*\(anonymous namespace\)::(\w+(?:<[^()]*?>)?)\(.*$", r"\1", text.strip())


def main(names: list[str]) -> None:
    """Write tests/cuda_limits.json: what the kernels of these files (all, if none is named) take today."""
    path = ROOT / "tests" / "cuda_limits.json"
    limits = json.loads(path.read_text()) if path.exists() and names else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names or KERNEL_FILES:
            limits[name] = {}
            for architecture in ARCHITECTURES:
                for mangled, used in compile_kernels(name, architecture, Path(folder)).items():
                    kept = limits[name].setdefault(short_name(mangled), dict.fromkeys(LIMITED, 0))
                    for what in LIMITED:
                        kept[what] = max(kept[what], used[what])
                    kept["registers"] = min(
                        255, -(-kept["registers"] // 8) * 8
                    )  # they are given out by eights
                    if used["spilled"]:
                        print(f"{short_name(mangled)} spills {used['spilled']} bytes on {architecture}")
    path.write_text(json.dumps(limits, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
