"""``pycert doctor``: what this installation is, what it lacks, and how to get it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import sys
import warnings
from importlib import metadata
from typing import Any

import torch

from pycert._flags import nnpack_enabled, tf32_allowed

#: Import name, name to install, what it is needed for.
OPTIONAL_PACKAGES = (
    ("sklearn", "scikit-learn", "the digits of `make demo` and of the tests"),
    ("matplotlib", "matplotlib", "plots"),
    ("tqdm", "tqdm", "progress bars"),
    ("onnx", "onnx", "networks from ONNX files (pycert.load_onnx)"),
    ("onnxruntime", "onnxruntime", "checks of what pycert.load_onnx has read"),
    ("highspy", "highspy", 'method "lp"'),
    ("scipy", "scipy", "output constraints of pycert.compat.auto_LiRPA"),
    ("gurobipy", "gurobipy", "build_solver_module of pycert.compat.auto_LiRPA (needs a licence)"),
)


@dataclasses.dataclass
class Finding:
    """One line of the report: ``state`` is "ok", "note" (works, but know this) or "missing"."""

    section: str
    name: str
    value: str
    state: str = "ok"
    advice: str = ""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add ``doctor`` to the subcommands of ``pycert``; ``run`` stands in ``args.run``."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is installed, what is missing and how to get it",
        description="Report on this installation and check one bound. '!' marks a note, 'x' what is missing.",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when pycert works here, 1 when its own check fails."""
    findings = report()
    if getattr(args, "json", False):
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print(as_text(findings))
    return 1 if any(f.state == "missing" and f.section != "optional packages" for f in findings) else 0


def report() -> list[Finding]:
    """Every finding, in the order of the printed report."""
    return [
        *_installation(),
        *_processor(),
        *_cuda(),
        *_soundness_flags(),
        *_optional_packages(),
        _self_check(),
    ]


def as_text(findings: list[Finding]) -> str:
    """The report as text: one section a paragraph, advice indented below the line it belongs to."""
    marks = {"ok": " ", "note": "!", "missing": "x"}
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ([""] if lines else []) + [section]
        lines.append(f"{marks[finding.state]} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"  {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)


def _installation() -> list[Finding]:
    from pycert import _build_info
    from pycert._version import __version__

    section = "installation"
    module = sys.modules["pycert"].__file__ or ""
    return [
        Finding(section, "pycert", f"{__version__} in {os.path.dirname(module)}"),
        Finding(section, "python", f"{platform.python_version()}, {platform.platform()}"),
        Finding(section, "torch running", torch.__version__),
        Finding(section, "torch built against", _build_info.TORCH_VERSION),
        Finding(section, "numpy", metadata.version("numpy")),
    ]


def _processor() -> list[Finding]:
    from pycert import _C

    section = "processor"
    chosen = "PYCERT_ISA" in os.environ
    found = [
        Finding(
            section,
            "instruction set in use",
            _C.isa(),
            "note" if chosen else "ok",
            "chosen by PYCERT_ISA; unset it for the fastest that the machine has" if chosen else "",
        ),
        Finding(section, "torch's instruction set", torch.backends.cpu.get_cpu_capability()),
        Finding(section, "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
    ]
    if platform.machine() not in ("x86_64", "AMD64"):
        found.append(
            Finding(section, "platform", platform.machine(), "note", "portable kernels; not tested here")
        )
    return found


def _cuda() -> list[Finding]:
    from pycert import _C, _build_info

    section = "CUDA"
    built = bool(_C.has_cuda())
    in_torch = torch.version.cuda
    toolkit = shutil.which("nvcc")
    if built:
        kernels = Finding(section, "kernels in pycert", f"built with CUDA {_build_info.CUDA_VERSION}")
    elif in_torch is None:
        kernels = Finding(section, "kernels in pycert", "not built", "note", "this torch has no CUDA")
    else:
        advice = "this version of pycert has none for it" if toolkit else "needs the CUDA toolkit (nvcc)"
        kernels = Finding(section, "kernels in pycert", "not built", "note", advice)
    found = [kernels, Finding(section, "CUDA in torch", in_torch or "none")]
    if torch.cuda.is_available():
        found.append(Finding(section, "GPU", torch.cuda.get_device_name()))
    else:
        found.append(Finding(section, "GPU", "none visible"))
    untested = list(_C.untested_cuda_kernels()) if built else []
    if untested:
        advice = "off; PYCERT_CUDA_UNTESTED=1 turns them on, each checked against the processor first"
        found.append(Finding(section, "never run on a GPU", ", ".join(untested), "note", advice))
        found.append(_cuda_check(section))
    return found


def _cuda_check(section: str) -> Finding:
    """What the check of the kernels says on this machine's GPU."""
    from pycert import _cuda_check

    name = "check of these kernels"
    setting = os.environ.get("PYCERT_CUDA_UNTESTED")
    if setting == "unchecked":
        return Finding(section, name, "left out", "note", "PYCERT_CUDA_UNTESTED=unchecked")
    if setting != "1":
        return Finding(section, name, "not run", "note", "runs with PYCERT_CUDA_UNTESTED=1")
    if not torch.cuda.is_available():
        return Finding(section, name, "not run", "note", "there is no GPU to run it on")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _cuda_check.ensure()
    except RuntimeError as error:
        return Finding(section, name, "failed", "missing", str(error))
    return Finding(section, name, "passed here")


def _soundness_flags() -> list[Finding]:
    """torch's global settings under which an execution is not covered by ``soundness="deployed"``."""
    section = 'torch settings that soundness="deployed" does not cover'
    cuda_matmul = tf32_allowed(torch.backends.cuda.matmul)
    cuda_conv = tf32_allowed(torch.backends.cudnn)
    cpu_precision = {
        name: getattr(getattr(torch.backends.mkldnn, name, None), "fp32_precision", "none")
        for name in ("matmul", "conv")
    }
    lowered = {name: value for name, value in cpu_precision.items() if value not in ("none", "ieee")}
    wanted = torch.get_float32_matmul_precision()
    if wanted != "highest":
        lowered["matmul"] = f"torch.get_float32_matmul_precision() is {wanted!r}"
    nnpack = nnpack_enabled()
    tf32 = [name for name, on in (("matmul", cuda_matmul), ("convolution", cuda_conv)) if on]
    if torch.version.cuda is None:
        tf32 = []  # the flags are there, and nothing that they could change
    return [
        Finding(
            section,
            "TF32 (GPU)",
            "allowed in " + " and ".join(tf32) if tf32 else "off",
            "note" if tf32 else "ok",
            "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False" if tf32 else "",
        ),
        Finding(
            section,
            "oneDNN float32 precision",
            ", ".join(f"{name}: {value}" for name, value in lowered.items()) or "float32",
            "note" if lowered else "ok",
            'torch.set_float32_matmul_precision("highest")' if lowered else "",
        ),
        Finding(
            section,
            "NNPACK convolutions",
            "enabled (float32 convolutions may use Winograd or FFT)" if nnpack else "off",
            "note" if nnpack else "ok",
            "torch.backends.nnpack.set_flags(False)" if nnpack else "",
        ),
    ]


def _optional_packages() -> list[Finding]:
    found = []
    for module, name, purpose in OPTIONAL_PACKAGES:
        if importlib.util.find_spec(module) is not None:
            found.append(Finding("optional packages", name, metadata.version(name)))
        else:
            found.append(
                Finding("optional packages", name, f"missing: {purpose}", "missing", f"pip install {name}")
            )
    return found


def _self_check() -> Finding:
    """Bounds of a small random network must contain its outputs."""
    import pycert

    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        centre = torch.rand(8, 4, generator=generator, dtype=torch.float64)
        noise = 2 * torch.rand(256, 8, 4, generator=generator, dtype=torch.float64) - 1
        outputs = net(centre + 0.1 * noise)
        bounded = pycert.BoundedModule(net, centre[:1])
        for method in ("ibp", "crown"):
            bounds = bounded.bound(pycert.LpBall(centre, eps=0.1), method=method)
            if not ((bounds.lower <= outputs) & (outputs <= bounds.upper)).all():
                advice = "the build is broken: `make clean test`, and please report it"
                return Finding("self-check", "bounds contain outputs", f"no ({method})", "missing", advice)
    return Finding("self-check", "bounds contain outputs", "yes (ibp, crown; 2,048 points)")
