"""Time to trace a ResNet-20 and to build a BoundedModule of it."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import torch

import pycert
import pycert.graph

from . import libraries, nets, timing


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``trace``: none beside the runner's."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the trace alone, of the construction, and of a peer's construction."""
    builders = {"mlp_784_256x5": (lambda: nets.make("mlp_784_256x5", 1)[0], (1, 28, 28))}
    if not args.quick:
        builders["resnet20"] = (lambda: nets.resnet20().eval(), (3, 32, 32))
    rows = []
    for name, (build, shape) in builders.items():
        torch.manual_seed(0)
        net, example = build(), torch.zeros(1, *shape)
        calls = {
            "trace": lambda net=net, example=example: pycert.graph.trace(net, example),
            "BoundedModule": lambda net=net, example=example: pycert.BoundedModule(net, example),
            "forward": lambda net=net, example=example: net(example),
        }
        with contextlib.suppress(ImportError):
            libraries.AutoLirpa(net, example, "ibp")
            calls["auto_LiRPA"] = lambda net=net, example=example: libraries.AutoLirpa(net, example, "ibp")
        start = timing.processor_ticks()
        times = timing.alternate(calls, args.seconds, args.clock)
        row = {"net": name, **{f"{call} ms": found.median * 1e3 for call, found in times.items()}}
        rows.append({**row, "busy": timing.busy_since(start)})
        print(rows[-1], flush=True)
    columns = ["net", *(f"{call} ms" for call in ("forward", "trace", "BoundedModule", "auto_LiRPA")), "busy"]
    return {"tables": [{"title": "Tracing, once per network", "columns": columns, "rows": rows}], "notes": []}
