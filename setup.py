"""Builds ``pycert._C``; everything else about the package stands in pyproject.toml.

``python setup.py build_ext --inplace`` builds into the checkout, recompiling only what changed.

Environment:
    PYCERT_CUDA: 1 asks for the CUDA kernels (an error where they cannot be built), 0 leaves them
        out; unset, they are built when torch has CUDA and a toolkit is found.
    TORCH_CUDA_ARCH_LIST: as for every torch extension; "8.0;9.0+PTX" when unset.
    MAX_JOBS: compilers at a time; one per core when unset.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
PACKAGE_VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "pycert" / "_version.py").read_text()).group(1)


def find_toolkit() -> None:
    """Set CUDA_HOME where torch would guess wrong: it takes the parent folder of nvcc, which may be a wrapper."""
    program = shutil.which("nvcc")
    if program is None or {"CUDA_HOME", "CUDA_PATH"} & set(os.environ):
        return
    for home in (Path(program).parents[1], Path(program).resolve().parents[1], Path("/usr/local/cuda")):
        if (home / "include" / "cuda_runtime_api.h").is_file() and (home / "bin" / "nvcc").is_file():
            os.environ["CUDA_HOME"] = str(home)
            return


find_toolkit()
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # an sdist and the metadata need no torch; the backend asks for it before a build
    torch = None


def sources(*patterns: str) -> list[str]:
    """Files under csrc, sorted, relative to the root: setuptools wants them so."""
    found = {path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def cuda_sources() -> list[str]:
    """The CUDA files to build: none when they are not wanted, or not possible and not asked for."""
    wanted = os.environ.get("PYCERT_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"PYCERT_CUDA must be 0, 1 or unset, got {wanted!r}")
    found = sources("cuda/*.cu", "ops/*_cuda.cpp")
    if wanted == "0" or (not found and not wanted):
        return []
    missing = "torch without CUDA" if not torch.version.cuda else ""
    if not missing and cpp_extension.CUDA_HOME is None:
        missing = "no CUDA toolkit (set CUDA_HOME)"
    if not missing and not found:
        missing = "no CUDA source in csrc"
    if missing and wanted == "1":
        sys.exit(f"PYCERT_CUDA=1, but the CUDA kernels cannot be built: {missing}")
    return [] if missing else found


def extension() -> Extension:
    """``pycert._C`` with the flags that the arithmetic of csrc/core relies on."""
    cuda = cuda_sources()
    cpp = sources("cpu/*.cpp", "ops/*.cpp", "engine/*.cpp", "bindings.cpp")
    cpp = [path for path in cpp if not path.endswith("_cuda.cpp")]
    # No contraction: a fused multiply-add appears where it is written as fma and nowhere else.
    host = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-psabi"]
    link = ["-Wl,-x"] if platform.system() == "Darwin" else ["-Wl,-s", "-Wl,--gc-sections"]
    if platform.system() == "Linux":
        # at::parallel_for is a header template: compiled without OpenMP it runs serially. The library
        # resolves to the libgomp that torch has loaded already, since both carry the same soname.
        host.append("-fopenmp")
        link.append("-fopenmp")
    # torch's own headers as system headers: the warnings left are about pycert.
    host += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    options: dict[str, Any] = {
        "include_dirs": [str(ROOT / "csrc")],
        "define_macros": [
            # A changed value changes every command line, so another torch recompiles everything.
            ("PYCERT_TORCH_VERSION", f'"{torch.__version__}"'),
            ("PYCERT_VERSION", f'"{PACKAGE_VERSION}"'),
            # Headers of single operators: all of them together are seconds of every file's compilation.
            ("AT_PER_OPERATOR_HEADERS", "1"),
        ],
        "extra_compile_args": {"cxx": host},
        "extra_link_args": link,
        "depends": sources("**/*.h", "**/*.cuh"),
        "language": "c++",
    }
    if not cuda:
        return cpp_extension.CppExtension("pycert._C", cpp, **options)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # build machines often have no GPU to ask
    options["define_macros"].append(("PYCERT_WITH_CUDA", "1"))
    options["extra_compile_args"]["nvcc"] = [
        "-O3",
        "--fmad=false",
        "-Xcompiler=-ffp-contract=off,-fvisibility=hidden,-g0",
    ]
    return cpp_extension.CUDAExtension("pycert._C", cpp + cuda, **options)


def build_commands() -> dict[str, type]:
    """torch's build command, recording next to the module which torch it was built against."""

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            if getattr(self, "editable_mode", False):
                # pip builds editable installs in a temporary folder; keep the objects for the next time.
                tag = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                self.build_temp = str(ROOT / "build" / tag)
                Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            super().run()
            folders = {Path(self.build_lib) / "pycert"}
            if self.inplace:
                folders.add(ROOT / "pycert")
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "_build_info.py").write_text(
                    '"""Written by setup.py: what pycert._C was built against."""\n\n'
                    f'TORCH_VERSION = "{torch.__version__}"\n'
                    f"CUDA_VERSION = {torch.version.cuda if cuda_sources() else None!r}\n"
                )

    return {"build_ext": BuildExtension}


def dependencies() -> list[str]:
    """Run-time requirements: a wheel runs with the torch it was built against, an sdist with any."""
    if torch is None or {"sdist", "egg_info"} & set(sys.argv):
        return ["torch>=2.6", "numpy"]
    return [f"torch=={torch.__version__.split('+')[0]}", "numpy"]


if torch is None and {"build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
    sys.exit("pycert compiles against the torch it will run with: install torch (2.6 or newer) first")

setup(
    install_requires=dependencies(),
    ext_modules=[extension()] if torch is not None else [],
    cmdclass=build_commands() if torch is not None else {},
)
