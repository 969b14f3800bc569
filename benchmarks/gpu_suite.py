"""Everything that needs a GPU, in one unattended command: build, tests, sanitizers, benchmarks.

    python -m benchmarks.gpu_suite [--out FOLDER] [--minutes 9.5] [--only STAGE ...] [--peer auto_LiRPA=PATH]

Builds pycert in place for the card that is there, against the torch that runs it; then the check that every process
makes before it first uses kernels that never ran on a GPU (pycert/_cuda_check; here it names every kernel that fails,
and the other stages leave it out), `pytest -m cuda`, compute-sanitizer's memcheck, racecheck and synccheck on small
cases, the times that choose between pycert's kernels and the library's (written to pycert/gpu_choices.json), and the
benchmarks, each against the roofs that the card shows in the same run.

Needs no network, and of Python no more than torch, numpy, pytest, setuptools and ninja. Stages share the time given:
what no longer fits is left out and said so, and can be run by --only. FOLDER (default benchmarks/results) gets gpu.json
and gpu.md after every stage, and gpu.log with everything that was printed, as it is printed. Figures that were not
measured are written as such, never guessed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import torch

from . import gpu_cases

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_MEASURED = "not yet measured on a GPU"
#: Stage: most seconds each of its commands may take, and whether a failure ends the run.
STAGES = {
    "build": (330, True),
    "check": (60, False),
    "tests": (120, False),
    "sanitizer": (60, False),
    "choices": (60, False),
    "benchmarks": (200, False),
}
#: Lines that say why something failed, wherever they stand in its output.
TELLING = re.compile(r"\berror\b|Error\b|^FAILED|undefined|Killed|No space|=========", re.IGNORECASE)
#: What compute-sanitizer looks for; memory is not cached where it would hide accesses beyond a tensor's end.
SANITIZERS = {"memcheck": ["PYTORCH_NO_CUDA_MEMORY_CACHING=1"], "racecheck": [], "synccheck": []}


def build_command() -> list[str]:
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def test_command() -> list[str]:
    # only the file that has such tests: another one may not even be imported where packages are missing
    options = ["-q", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "-m", "cuda", *options, "tests/test_cuda.py"]


def of_toolkit(program: str) -> str:
    """A program of the CUDA toolkit, which is not always on the path."""
    return shutil.which(program) or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/{program}"


def sanitizer_commands() -> list[list[str]]:
    """compute-sanitizer on the small cases that touch every kernel; none where the program is missing."""
    program = of_toolkit("compute-sanitizer")
    if shutil.which(program) is None:
        return []
    # torch's own calls may fail and be asked again another way; pycert's launches are checked where they are made
    options = ["--kernel-name", "kernel_substring=pycert", "--report-api-errors=no", "--error-exitcode=9"]
    case = [sys.executable, "-m", "benchmarks.gpu_cases", "small"]
    return [
        ["env", *settings, program, f"--tool={tool}", *options, *case]
        for tool, settings in SANITIZERS.items()
    ]


def commands(figures: pathlib.Path, peers: list[str]) -> dict[str, list[list[str]]]:
    """What each stage runs."""
    cases = [sys.executable, "-m", "benchmarks.gpu_cases"]
    named = [f"--peer={peer}" for peer in peers]
    return {
        "build": [build_command()],
        "check": [[*cases, "check"]],
        "tests": [test_command()],
        "sanitizer": sanitizer_commands(),
        "choices": [[*cases, "choices"]],
        "benchmarks": [[*cases, "measure", str(figures), *named]],
    }


def said_by(command: list[str]) -> str:
    """The last line that a program prints, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    return ((done.stdout + done.stderr).strip().splitlines() or ["nothing"])[-1]


def architecture() -> str:
    """TORCH_CUDA_ARCH_LIST for the card that is there; the newest that pycert names, with PTX, for one newer still."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = said_by(command)
    return found if found in ("8.0", "8.6", "8.7", "8.9", "9.0") else "9.0+PTX"


def environment() -> dict[str, str]:
    """Of every command: this checkout first, and the programs of the Python that runs this, ninja among them."""

    def first(path: pathlib.Path, name: str) -> str:
        return os.pathsep.join(part for part in (str(path), os.environ.get(name, "")) if part)

    fixed = {
        "PYCERT_CUDA": "1",
        "PYCERT_CUDA_UNTESTED": "unchecked",
        "PYTHONPATH": first(ROOT, "PYTHONPATH"),
        "PATH": first(pathlib.Path(sys.executable).parent, "PATH"),
        "PYTHONUNBUFFERED": "1",
    }
    given = {"TORCH_CUDA_ARCH_LIST": architecture(), "MAX_JOBS": str(os.cpu_count() or 1)}
    return {**given, **os.environ, **fixed}


def machine() -> dict[str, str]:
    """What is installed here of all that the stages need."""
    found = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch's CUDA": str(torch.version.cuda),
    }
    for package in ("numpy", "pytest", "setuptools", "ninja"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    programs = {
        "nvcc": [of_toolkit("nvcc"), "--version"],
        "g++": ["g++", "-dumpfullversion"],
        "compute-sanitizer": [of_toolkit("compute-sanitizer"), "--version"],
        "card": ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"],
    }
    return found | {name: said_by(command) for name, command in programs.items()}


def telling(lines: list[str], most: int = 36) -> list[str]:
    """Of the output of what failed: where it speaks of errors, and its end."""
    chosen = [i for i, line in enumerate(lines) if TELLING.search(line)][: most - 12]
    chosen += range(max(0, len(lines) - 12), len(lines))
    return [lines[i][:220] for i in sorted(set(chosen))]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the command with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_stage(name: str, command: list[str], seconds: float, log: pathlib.Path) -> dict[str, Any]:
    """Run one command, its output going to the end of ``log``; its exit status, seconds and last lines."""
    start = time.perf_counter()
    print(f"== {name}: {' '.join(command)}", flush=True)
    with open(log, "ab") as output:
        output.write(f"== {name}: {' '.join(command)}\n".encode())
        output.flush()
        begin = output.tell()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            status = 127
            output.write(f"{error}\n".encode())
        else:
            try:
                status = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                status = 124
            finally:
                stop(process)
    took = round(time.perf_counter() - start, 1)
    with open(log, "rb") as written:
        written.seek(begin)
        lines = written.read().decode(errors="replace").splitlines()
    print(f"   exit status {status} after {took} s", flush=True)
    if status != 0:
        print("\n".join(telling(lines)), flush=True)
    return {"stage": name, "status": status, "seconds": took, "output": [line[:400] for line in lines[-200:]]}


def table(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: one a figure, with what was measured or that it was not."""
    found = {row["figure"]: row for row in measured if "figure" in row}
    rows = []
    for figure, wanted in gpu_cases.FIGURES.items():
        row = found.get(figure, {})
        value = row.get("text", NOT_MEASURED)
        rows.append({"figure": figure, "must reach": wanted, "measured": value})
    return rows


def read_figures(path: pathlib.Path, about: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Figures written so far, and ``about`` with the card; a last line that was cut off is left out."""
    measured: list[dict[str, Any]] = []
    about = dict(about)
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        about |= row.pop("about", {})
        if row:
            measured.append(row)
    return measured, about


def save(
    stages: list[dict[str, Any]], measured: list[dict[str, Any]], about: dict[str, Any], folder: pathlib.Path
) -> None:
    """gpu.json with everything, gpu.md with the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(measured)
    result = {"about": about, "stages": stages, "rows": measured, "table": rows}
    (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# gpu",
        f"`python -m benchmarks.gpu_suite`, {about.get('date', '')}, commit {about.get('commit', '')}.",
    ]
    lines.append(
        "; ".join(f"{key}: {value}" for key, value in about.get("device", {}).items()) or NOT_MEASURED
    )
    lines.append("| figure | must reach | measured |\n|---|---|---|")
    body = "\n".join(f"| {row['figure']} | {row['must reach']} | {row['measured']} |" for row in rows)
    lines[-1] += "\n" + body
    lines.append("| stage | exit status | seconds |\n|---|---|---|")
    lines[-1] += "".join(
        f"\n| {stage['stage']} | {stage['status']} | {stage['seconds']} |" for stage in stages
    )
    (folder / "gpu.md").write_text("\n\n".join(lines) + "\n")


def not_run(name: str, status: str, why: str) -> dict[str, Any]:
    return {"stage": name, "status": status, "seconds": 0, "output": [why]}


def run_stages(
    only: list[str], minutes: float, folder: pathlib.Path, peers: list[str]
) -> list[dict[str, Any]]:
    """Run the stages named, each within its limit and the time left; what was found is kept after each."""
    start = time.perf_counter()
    stages: list[dict[str, Any]] = []
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine()}
    print(about["machine"], flush=True)
    figures, log = folder / "gpu_figures.jsonl", folder / "gpu.log"
    all_commands = commands(figures, peers)
    for name in only:
        limit, essential = STAGES[name]
        if not all_commands[name]:
            stages.append(not_run(name, "missing", "the program was not found"))
        for command in all_commands[name]:
            left = 60 * minutes - (time.perf_counter() - start)
            if left < 10:
                stages.append(not_run(name, "left out", "no time was left"))
            else:
                stages.append(run_stage(name, command, min(limit, left), log))
            save(stages, *read_figures(figures, about), folder)
        save(stages, *read_figures(figures, about), folder)
        if essential and stages[-1]["status"] != 0:
            break
    figures.unlink(missing_ok=True)  # all of it stands in gpu.json
    return stages


def main(arguments: list[str] | None = None) -> int:
    """Run every stage that fits; 0 when all of them passed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together (default 9.5)")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="auto_LiRPA's checkout"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run")
    args = parser.parse_args(arguments)
    folder = args.out.resolve()
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none; what needs one fails and stays {NOT_MEASURED!r}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gpu_figures.jsonl", "gpu.log"):
        (folder / name).unlink(missing_ok=True)
    stages = run_stages(args.only, args.minutes, folder, args.peer)
    choices = ROOT / "pycert" / "gpu_choices.json"
    if folder != ROOT / "benchmarks" / "results" and choices.exists():
        shutil.copy(choices, folder)  # beside the rest, for where only that folder is kept
    print((folder / "gpu.md").read_text())
    return 0 if all(stage["status"] in (0, "missing") for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
