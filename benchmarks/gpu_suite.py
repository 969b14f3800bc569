"""Everything that needs a GPU, in one unattended command: build, tests, sanitizers, benchmarks.

    python -m benchmarks.gpu_suite [--out FOLDER] [--minutes 10] [--peer auto_LiRPA=PATH]

Builds pycert in place against the torch that runs it, then the check that every process makes before it first uses
kernels that never ran on a GPU (pycert/_cuda_check.py; the other stages leave it out), `pytest -m cuda`,
compute-sanitizer's memcheck and racecheck on small cases, the times that choose between pycert's kernels and the
library's (written to pycert/gpu_choices.json), and the benchmarks, each against the roofs that the card shows in the
same run. Needs no network. Stages share the time given: what no longer fits is left out and said so. Results go to
FOLDER (default benchmarks/results) as gpu.json and gpu.md; figures that were not measured are written as such, never
guessed.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOT_MEASURED = "not yet measured on a GPU"
#: Stage: most seconds it may take, and whether a failure ends the run.
STAGES = {
    "build": (420, True),
    "check": (60, False),
    "tests": (150, False),
    "sanitizer": (90, False),
    "choices": (45, False),
    "benchmarks": (200, False),
}


def build_command() -> list[str]:
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def test_command() -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "cuda",
        "-q",
        "--maxfail=20",
        "-p",
        "no:cacheprovider",
    ]


def sanitizer_commands() -> list[list[str]]:
    """memcheck and racecheck on the small cases that touch every kernel; none where the program is missing."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return []
    case = [sys.executable, "-m", "benchmarks.gpu_cases", "small"]
    return [[program, f"--tool={tool}", "--error-exitcode=9", *case] for tool in ("memcheck", "racecheck")]


def measure_command(figures: pathlib.Path, peers: list[str]) -> list[str]:
    named = [f"--peer={peer}" for peer in peers]
    return [sys.executable, "-m", "benchmarks.gpu_cases", "measure", str(figures), *named]


def run_stage(name: str, command: list[str], seconds: float) -> dict[str, Any]:
    """Run one command; its end of output, exit status and seconds."""
    environment = {
        **os.environ,
        "PYCERT_CUDA": "1",
        "PYCERT_CUDA_UNTESTED": "unchecked",
        "PYTHONPATH": str(ROOT),
    }
    environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    start = time.perf_counter()
    print(f"== {name}: {' '.join(command)}", flush=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        status, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status = 124
        output = "".join(
            part if isinstance(part, str) else part.decode() for part in (error.stdout, error.stderr) if part
        )
    except OSError as error:
        status, output = 127, str(error)
    took = round(time.perf_counter() - start, 1)
    print(f"   exit status {status} after {took} s", flush=True)
    if status != 0:
        print("\n".join(output.splitlines()[-40:]), flush=True)
    return {"stage": name, "status": status, "seconds": took, "output": output.splitlines()[-200:]}


def table(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: one a figure, with what was measured or that it was not."""
    from .gpu_cases import FIGURES

    found = {row["figure"]: row for row in measured if "figure" in row}
    rows = []
    for figure, wanted in FIGURES.items():
        row = found.get(figure, {})
        value = row.get("text", NOT_MEASURED)
        rows.append({"figure": figure, "must reach": wanted, "measured": value})
    return rows


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
    start = time.perf_counter()
    stages: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    about: dict[str, Any] = {"date": time.strftime("%Y-%m-%d", time.gmtime())}

    def left() -> float:
        return 60 * args.minutes - (time.perf_counter() - start)

    figures = args.out / "gpu_figures.jsonl"
    commands = {
        "build": [build_command()],
        "check": [[sys.executable, "-m", "benchmarks.gpu_cases", "check"]],
        "tests": [test_command()],
        "sanitizer": sanitizer_commands(),
        "choices": [[sys.executable, "-m", "benchmarks.gpu_cases", "choices"]],
        "benchmarks": [measure_command(figures, args.peer)],
    }
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none; what needs one fails and stays {NOT_MEASURED!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    figures.unlink(missing_ok=True)
    for name in args.only:
        limit, essential = STAGES[name]
        if not commands[name]:
            stages.append(
                {
                    "stage": name,
                    "status": "missing",
                    "seconds": 0,
                    "output": ["compute-sanitizer was not found"],
                }
            )
        for command in commands[name]:
            if left() < 10:
                stages.append(
                    {"stage": name, "status": "left out", "seconds": 0, "output": ["no time was left"]}
                )
                continue
            stages.append(run_stage(name, command, min(limit, left())))
        save(stages, measured, about, args.out)
        if essential and stages[-1]["status"] != 0:
            break
    if figures.exists():
        lines = [json.loads(line) for line in figures.read_text().splitlines()]
        about |= next((line["about"] for line in lines if "about" in line), {})
        measured = [line for line in lines if "about" not in line]
        figures.unlink()
    save(stages, measured, about, args.out)
    print((args.out / "gpu.md").read_text())
    return 0 if all(stage["status"] in (0, "missing") for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
