"""auto_LiRPA's own examples and tests through ``pycert.compat.auto_LiRPA``, beside auto_LiRPA itself.

``python -m benchmarks compat --peer auto_LiRPA=PATH`` or ``python benchmarks/compat.py --peer auto_LiRPA=PATH``.
Everything runs in a copy of the peer's checkout, unchanged. Scripts that download data find
``benchmarks/standins/torchvision`` unless torchvision is installed; ``$PYCERT_DATA`` or ``../shared`` holds the data.
``--peer CTRAIN=PATH`` also trains with two of CTRAIN's wrappers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib import util
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(ROOT))

from benchmarks import files, libraries  # noqa: E402

#: The named test files: linear models, convolution, ResNet, pooling, batch norm, activations, return_A, norms.
TESTS = (
    "test_linear_model",
    "test_linear_cnn_model",
    "test_conv",
    "test_conv1d",
    "test_resnet_patches",
    "test_rectangle_patches",
    "test_avgpool",
    "test_avgpool_fast_interp_padding",
    "test_maxpool",
    "test_vision_models",
    "test_1d_activation",
    "test_perturbation",
    "test_simple_verification",
    "test_save_intermediate",
    "test_state_dict_name",
)
_TRAINING = """simple_training.py --device cpu --model mlp_3layer --num_epochs 3 --scheduler_opts start=2,length=1
--batch_size 64 --eps 0.1""".split()


@dataclasses.dataclass(frozen=True)
class Script:
    """An example: its folder and command, and whether ``compat_launch.py`` starts it."""

    folder: str
    command: list[str]
    launched: bool = False

    @property
    def name(self) -> str:
        return f"{self.folder}/{pathlib.Path(self.command[0]).name}" + (
            f" {self.command[1]}" if self.folder == "CTRAIN" else ""
        )


#: The named examples.
EXAMPLES = (
    Script("vision", ["simple_verification.py"]),
    Script("vision", _TRAINING),
    Script("vision", ["bound_option.py"]),
    Script("vision", ["efficient_convolution.py"]),
    Script("simple", ["toy.py"]),
    Script("simple", ["invprop.py"]),
    Script("simple", ["lp_full.py"], launched=True),
    Script("simple", ["mip_lp_solver.py"], launched=True),
    *(
        Script("CTRAIN", [str(ROOT / "benchmarks" / "compat_ctrain.py"), how], True)
        for how in ("ibp", "crown-ibp")
    ),
)
#: What Gurobi reads in the folder of an example: mixed-integer programs that take longer are given up, on both sides.
_GUROBI = "TimeLimit 1\nThreads 1\n"
_BOUND = re.compile(r"(-?\d+\.\d+) <= .*? <= +(-?\d+\.\d+)")
_TOLERANCE = 2e-3  # of printed bounds: three decimals


@dataclasses.dataclass
class Outcome:
    """What one run of a script or test file gave."""

    passed: int = 0
    failed: int = 0
    reason: str = ""
    seconds: float = 0.0
    output: str = ""


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``compat``."""
    parser.add_argument("--only", default="", help="scripts and tests whose name contains this")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one run (default 600)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One row a test file and script: passed or why not, and the time there and here."""
    paths = libraries.peer_paths(args.peer).get("auto_LiRPA")
    if paths is None:
        raise ValueError("compat needs --peer auto_LiRPA=PATH, the checkout whose scripts are run")
    checkout = pathlib.Path(paths.split(os.pathsep)[0])
    tests = [name for name in TESTS if args.only in name]
    examples = [item for item in EXAMPLES if args.only in item.name]
    if args.quick:
        tests, examples = tests[:1], [item for item in examples if item.command[0] == "toy.py"]
    ctrain = libraries.peer_paths(args.peer).get("CTRAIN")
    if ctrain is None:
        examples = [item for item in examples if item.folder != "CTRAIN"]
    else:
        paths = os.pathsep.join([paths, ctrain])
    rows = [_test_row(checkout, paths, name, args) for name in tests]
    scripts = [_example_row(checkout, paths, item, args) for item in examples]
    columns = ["file", "passed here", "failed here", "why", "passed there", "failed there", "why there"]
    times = ["seconds here", "seconds there", "speed-up"]
    total, good = sum(r["passed here"] + r["failed here"] for r in rows), sum(r["passed here"] for r in rows)
    notes = [f"Tests passed here: {good} of {total}." if total else "No tests were run."]
    notes.append(
        "A test passes where ours is inside the stored bound and sound. "
        f"Seconds are of the whole process ({args.clock} time), import of torch included."
    )
    made = [
        {"title": "Test files of auto_LiRPA", "columns": columns + times, "rows": rows},
        {"title": "Examples", "columns": ["file", "here", "there", "bounds", *times], "rows": scripts},
    ]
    return {"tables": made, "notes": notes}


def _test_row(checkout: pathlib.Path, paths: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    ours, theirs = (_tests(checkout, paths, name, here, args) for here in (True, False))
    row = {
        "file": f"{name}.py",
        "passed here": ours.passed,
        "failed here": ours.failed,
        "why": ours.reason,
        "passed there": theirs.passed,
        "failed there": theirs.failed,
        "why there": theirs.reason,
        **_times(ours, theirs),
    }
    print(row, flush=True)
    return row


def _example_row(
    checkout: pathlib.Path, paths: str, script: Script, args: argparse.Namespace
) -> dict[str, Any]:
    ours, theirs = (_example(checkout, paths, script, here, args) for here in (True, False))
    row = {
        "file": script.name,
        "here": ours.reason or "passed",
        "there": theirs.reason or "passed",
        "bounds": compared(ours.output, theirs.output),
        **_times(ours, theirs),
    }
    print(row, flush=True)
    return row


def _times(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    times = {"seconds here": round(ours.seconds, 2), "seconds there": round(theirs.seconds, 2)}
    if not (ours.reason or theirs.reason) and ours.seconds > 0:
        times["speed-up"] = round(theirs.seconds / ours.seconds, 2)
    return times


def compared(ours: str, theirs: str) -> str:
    """How printed bounds ``l <= ... <= u`` relate, in the order they are printed."""
    here, there = (
        [(float(low), float(high)) for low, high in _BOUND.findall(text)] for text in (ours, theirs)
    )
    if not here or len(here) != len(there):
        return ""
    looser = sum(
        low < other_low - _TOLERANCE or high > other_high + _TOLERANCE
        for (low, high), (other_low, other_high) in zip(here, there)
    )
    tighter = sum(
        low > other_low + _TOLERANCE or high < other_high - _TOLERANCE
        for (low, high), (other_low, other_high) in zip(here, there)
    )
    return f"{len(here)}: {tighter} tighter, {looser} looser"


# ---- runs in a copy of the checkout -----------------------------------------------------------------


def _tests(checkout: pathlib.Path, paths: str, name: str, here: bool, args: argparse.Namespace) -> Outcome:
    with tempfile.TemporaryDirectory() as temporary:
        root = _copied(checkout, pathlib.Path(temporary))
        report = pathlib.Path(temporary) / "report.xml"
        pytest = ["pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"{name}.py"]
        words = ["-m", "pycert.compat.auto_LiRPA", "-m", *pytest] if here else ["-m", *pytest]
        if here:
            words[4:4] = ["-p", "benchmarks.compat_judge"]
        environment = _environment(paths, here, extra=[str(root / "examples" / "vision")])
        outcome = _timed(words, root / "tests", environment, args)
        if not report.is_file():
            return dataclasses.replace(outcome, failed=1, reason=outcome.reason or "no report")
        return _counted(report, outcome)


def _counted(report: pathlib.Path, outcome: Outcome) -> Outcome:
    passed, reasons = 0, []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        if problem is not None:
            reasons.append((problem.get("message") or problem.tag).splitlines()[0][:160])
        elif not any(part.tag == "skipped" for part in case):
            passed += 1
    return dataclasses.replace(outcome, passed=passed, failed=len(reasons), reason="; ".join(reasons[:2]))


def _example(
    checkout: pathlib.Path, paths: str, script: Script, here: bool, args: argparse.Namespace
) -> Outcome:
    with tempfile.TemporaryDirectory() as temporary:
        root = _copied(checkout, pathlib.Path(temporary))
        folder = root / "examples" / script.folder
        folder.mkdir(exist_ok=True)
        (folder / "gurobi.env").write_text(_GUROBI)
        if script.launched:
            words = [
                str(ROOT / "benchmarks" / "compat_launch.py"),
                *(["--here"] if here else []),
                *script.command,
            ]
        else:
            words = ["-m", "pycert.compat.auto_LiRPA", *script.command] if here else script.command
        return _timed(words, folder, _environment(paths, here), args)


def _copied(checkout: pathlib.Path, temporary: pathlib.Path) -> pathlib.Path:
    for part in ("tests", "examples"):
        shutil.copytree(checkout / part, temporary / part)
    return temporary


def _environment(paths: str, here: bool, extra: list[str] | None = None) -> dict[str, str]:
    folders = [*(extra or []), str(ROOT), *paths.split(os.pathsep)[1:]]
    if not here:
        folders.insert(0, paths.split(os.pathsep)[0])
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if util.find_spec("torchvision") is None:
        folders.append(str(ROOT / "benchmarks" / "standins"))
        environment["PYCERT_STANDIN_SIZE"] = "640"
        try:
            environment["PYCERT_STANDIN_DATA"] = str(files.locate("data/mnist.npz").parent)
        except files.MissingFileError as error:
            print(error)
    given = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    return {**environment, "PYTHONPATH": os.pathsep.join([*folders, *given])}


def _timed(
    words: list[str], folder: pathlib.Path, environment: dict[str, str], args: argparse.Namespace
) -> Outcome:
    environment = {**environment, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    reason, output = "", ""
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=args.limit,
        )
        output = done.stdout
        if done.returncode != 0:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            reason = (lines[-1] if lines else f"exit status {done.returncode}")[:160]
    except subprocess.TimeoutExpired:
        reason = f"not finished after {args.limit:g} s"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = processor if args.clock == "processor" else time.perf_counter() - start
    return Outcome(reason=reason, seconds=seconds, output=output)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    sys.exit(main(["compat", *sys.argv[1:]]))
