"""Certified accuracy of published MNIST networks against the published numbers, and with pycert's defaults.

The networks are those of Jovanovic et al., "On the Paradox of Certified Training" (TMLR 2022), each certified
at eps 0.3 with the relaxation it was trained with. Published numbers come from plain arithmetic, one method
alone.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

import pycert

from . import files

EPS = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, the method it is certified with, the number of first test images, the expected
    percentage."""

    net: str
    method: str
    samples: int
    expected: float


CASES = (
    Case("CONV_box", "ibp", 10000, 86.8),
    Case("CONV_crownibp1to0", "ibp", 10000, 86.6),
    Case("FC_box", "ibp", 10000, 74.0),
    Case("FC_crownibp1to0", "ibp", 10000, 77.9),
    Case("CONV_crownibp1to1", "crown-ibp", 10000, 75.4),
    Case("FC_crownibp1to1", "crown-ibp", 10000, 70.5),
    Case("CONV_crown", "crown", 500, 63.8),
    Case("FC_crown", "crown", 1000, 50.6),
)
#: Options of the published numbers, and pycert's own.
PLAIN: dict[str, Any] = {"intersect": False, "cascade": False, "soundness": "none"}
DEFAULTS: dict[str, Any] = {}


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``paradox``."""
    names = ",".join(case.net for case in CASES)
    parser.add_argument("--paradox-nets", default=names, help=f"of {names}")
    parser.add_argument(
        "--paradox-samples", type=int, help="at most so many images (the numbers then differ)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Certify every network twice: as published, and with the defaults."""
    wanted, rows = args.paradox_nets.split(","), []
    unknown = sorted(set(wanted) - {case.net for case in CASES})
    if unknown:
        raise SystemExit(f"--paradox-nets: unknown {', '.join(unknown)}")
    limit = 100 if args.quick else args.paradox_samples or 10000
    for case in CASES[:1] if args.quick else [case for case in CASES if case.net in wanted]:
        rows.append(measure(case, min(limit, case.samples)))
        print(rows[-1], flush=True)
    columns = [
        "net",
        "method",
        "images",
        "clean %",
        "expected %",
        "plain %",
        "equal",
        "plain s",
        "default %",
        "default s",
    ]
    title = "MNIST, eps 0.3: certified accuracy, published and measured"
    return {"tables": [{"title": title, "columns": columns, "rows": rows}], "notes": notes(rows)}


def measure(case: Case, samples: int) -> dict[str, Any]:
    """One row of the table; ``equal`` compares to one decimal, where the number of images is that of
    ``expected``."""
    x, y = files.mnist_test(samples)
    bounded = pycert.BoundedModule(files.paradox_network(case.net), x[:1])
    with torch.backends.nnpack.flags(enabled=False):  # Winograd convolutions are not covered by "deployed"
        plain, clean, plain_seconds = certify(bounded, x, y, case.method, PLAIN)
        default, _, default_seconds = certify(bounded, x, y, case.method, DEFAULTS)
    comparable = samples == case.samples
    return {
        "net": case.net,
        "method": case.method,
        "images": samples,
        "clean %": f"{clean:.1f}",
        "expected %": f"{case.expected:.1f}",
        "plain %": f"{plain:.1f}",
        "equal": ("yes" if f"{plain:.1f}" == f"{case.expected:.1f}" else "no")
        if comparable
        else "other images",
        "plain s": round(plain_seconds, 2),
        "default %": f"{default:.1f}",
        "default s": round(default_seconds, 2),
    }


def certify(
    bounded: Any, x: torch.Tensor, y: torch.Tensor, method: str, options: dict[str, Any]
) -> tuple[float, float, float]:
    """Certified and clean accuracy in percent, and seconds, in batches that stay within a few hundred MB."""
    size = 50 if method == "crown" else 500
    certified, correct, seconds = 0, 0, 0.0
    for begin in range(0, len(x), size):
        part = slice(begin, begin + size)
        found = pycert.certify(bounded, x[part], y[part], eps=EPS, method=method, clip=(0, 1), **options)
        certified += int(found.certified.sum())
        correct += int(found.correct.sum())
        seconds += found.seconds
    return 100 * certified / len(x), 100 * correct / len(x), seconds


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """What the columns mean, and how many rows agree."""
    compared = [row for row in rows if row["equal"] != "other images"]
    equal = sum(row["equal"] == "yes" for row in compared)
    return [
        '`plain`: intersect=False, cascade=False, soundness="none", as the published numbers were computed. '
        "`default`: pycert's defaults (intersection with interval bounds, cheap methods first, soundness "
        '"deployed"). Images are the first of the MNIST test set.',
        f"{equal} of {len(compared)} numbers equal the expected ones to one decimal.",
    ]
