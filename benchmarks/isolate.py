"""Run one case in a child process, so that running out of memory or time stays its own affair.

Child: ``python -m benchmarks.isolate module:function OUTPUT`` with the case as JSON on standard input. The
function is a generator; each dict it yields is written to OUTPUT as a line of JSON at once, so what was
measured before a failure is kept.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_case(function: str, case: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """Rows that ``function`` (``"module:name"``) yields for ``case``; a failure adds ``{"failed": why}``.

    Args:
        function: a generator taking the case as keyword arguments.
        case: JSON values; ``threads`` is also given to OpenMP through the environment.
        timeout: seconds.
    """
    threads = str(case["threads"])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONWARNINGS": "ignore",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    failed = ""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "rows.jsonl"
        output.touch()
        command = [sys.executable, "-m", "benchmarks.isolate", function, str(output)]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(case),
                capture_output=True,
                text=True,
                timeout=timeout,
                env=environment,
            )
            if done.returncode != 0:
                tail = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
                failed = tail[0][:300]
        except subprocess.TimeoutExpired:
            failed = f"not finished after {timeout:g} s"
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    return [*rows, {"failed": failed}] if failed else rows


def limit_memory(share: float = 0.75) -> None:
    """Let this process have ``share`` of what is free: past it an allocation fails, not the machine."""
    try:
        import resource

        with open("/proc/meminfo") as meminfo:
            free = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (int(share * free), resource.RLIM_INFINITY))
    except (ImportError, OSError):
        return  # not Linux: the case runs without a limit


def main() -> None:
    """Run the case given on standard input; see the module's first lines."""
    function, output = sys.argv[1:3]
    case = json.load(sys.stdin)
    limit_memory()
    module, name = function.split(":")
    generate = getattr(importlib.import_module(module), name)
    with open(output, "w") as rows:
        for row in generate(**case):
            rows.write(json.dumps(row) + "\n")
            rows.flush()


if __name__ == "__main__":
    main()
