"""The results file of ``pycert certify``: a header line, then one JSON line per sample, eps and method.

The order of the lines is fixed by the header, so a file cut short at any byte is the beginning of the full
    one: to
go on, whatever follows the last complete batch is dropped and the rest is computed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pycert.cli.inputs import CommandError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples ``start`` to ``stop`` under one method and eps: what is computed and written at once."""

    method: str
    eps: float
    start: int
    stop: int


def plan(methods: Sequence[str], radii: Sequence[float], samples: int, batch_size: int) -> list[Batch]:
    """Every batch in the order of the file."""
    return [
        Batch(method, eps, start, min(start + batch_size, samples))
        for method in methods
        for eps in radii
        for start in range(0, samples, batch_size)
    ]


class Records:
    """A results file, open for appending, with the records it holds so far.

    Args:
        path: the file; created with its header if it does not exist.
        header: ``run`` must equal that of an existing file; the rest describes where it was made.
        batches: from :func:`plan`.
        overwrite: begin anew whatever the file holds.

    Raises:
        CommandError: the file is of another run, or is no results file.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], batches: list[Batch], overwrite: bool = False
    ) -> None:
        self.path, self.batches, self.rows = path, batches, []  # type: tuple[Path, list[Batch], list[dict[str, Any]]]
        self.done = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite or not path.exists() or path.stat().st_size == 0:
            self.file: BinaryIO = open(path, "wb")
            self._write([header])
            return
        with open(path, "rb") as file:
            _check_header(path, file.readline(), header)
            end = self._read(file)
        self.file = open(path, "r+b")
        self.file.truncate(end)
        self.file.seek(end)

    def remaining(self) -> Iterator[Batch]:
        yield from self.batches[self.done :]

    def add(self, batch: Batch, rows: list[dict[str, Any]]) -> None:
        """Write the rows of the next batch."""
        self._write(rows)
        self.rows += rows
        self.done += 1

    def close(self) -> None:
        self.file.close()

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())
        self.file.flush()

    def _read(self, file: BinaryIO) -> int:
        """Take over every complete batch; returns where the last one ends."""
        end = file.tell()
        for batch in self.batches:
            rows = []
            for index in range(batch.start, batch.stop):
                line = file.readline()
                if not line.endswith(b"\n"):
                    return end
                row = _parse(self.path, line)
                if (row.get("method"), row.get("eps"), row.get("sample")) != (batch.method, batch.eps, index):
                    raise CommandError(
                        f"{self.path}: line for sample {index} expected, got {line[:80]!r}; "
                        "choose another --out, or --overwrite to begin anew"
                    )
                rows.append(row)
            self.rows += rows
            self.done += 1
            end = file.tell()
        return end


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and complete records of a results file, finished or not."""
    with open(path, "rb") as file:
        header = _parse(path, file.readline())
        if header.get("format") != FORMAT:
            raise CommandError(f"{path}: not a results file of pycert certify, format {FORMAT}")
        return header, [_parse(path, line) for line in file if line.endswith(b"\n")]


def summarize(header: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What :func:`pycert.plot.certified_accuracy` draws and ``--json`` prints, from records."""
    run, groups = header["run"], {}  # type: tuple[dict[str, Any], dict[tuple[str, float], list[dict[str, Any]]]]
    for row in rows:
        groups.setdefault((row["method"], row["eps"]), []).append(row)
    correct = {row["sample"]: row["correct"] for row in rows}
    options = run["options"]
    return {
        "network": run["network"],
        "data": run["data"],
        "samples": len(correct),
        "p": options["p"],
        "soundness": options["soundness"],
        "clean": sum(correct.values()) / max(1, len(correct)),
        "rows": [
            {
                "method": method,
                "eps": eps,
                "accuracy": sum(row["certified" if method != "pgd" else "robust"] for row in group)
                / len(group),
                "samples": len(group),
                "seconds": sum(row["seconds"] for row in group),
                **(
                    {"radius": sum(row["radius"] for row in group) / len(group)}
                    if all("radius" in row for row in group)
                    else {}
                ),
            }
            for (method, eps), group in groups.items()
        ],
        "run": run,
        "made": header["made"],
    }


def _parse(path: Path, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise CommandError(f"{path}: not a results file of pycert certify (a line reads {line[:60]!r})")
    return row


def _check_header(path: Path, line: bytes, header: dict[str, Any]) -> None:
    """An existing file must be of the same weights, data, library and options."""
    found = _parse(path, line)
    wanted = json.loads(json.dumps(header))
    if found.get("format") == FORMAT and found.get("run") == wanted["run"]:
        return
    changed = sorted(_differences(found.get("run") or {}, wanted["run"]))
    raise CommandError(
        f"{path} holds results of another run (different: {', '.join(changed) or 'format'}); "
        "choose another --out, or --overwrite to begin anew"
    )


def _differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {**found, **wanted}:
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key} ")
        elif a != b:
            short = [str(value)[:12] if isinstance(value, str) else str(value) for value in (a, b)]
            yield f"{prefix}{key} {short[0]} -> {short[1]}"
