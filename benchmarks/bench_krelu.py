"""k-ReLU in the bound: images certified and seconds an image on MNIST 6x100 and CIFAR-10 networks, image by image."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pycert

from . import results

FOLDER = results.FOLDER / "krelu"
JOINT = dict(intermediate="krelu", iterations=60, cut_rate=0.2)
FINER = dict(intermediate="krelu", iterations=150, cut_rate=0.2, directions=25, ns=100, rows=20)
BRANCHED = dict(FINER, leaves=60000)
#: What stands in the tables: method and options. Each sees what those in CHEAPER leave open.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "crown": ("crown", {}),
    "alpha-crown": ("alpha-crown", {}),
    "krelu": ("krelu", JOINT),
    "lp+krelu+branching": ("lp", BRANCHED),
    "lp-triangle": ("lp", dict(time_limit=60)),
    "lp+krelu": ("lp", dict(time_limit=60, **FINER)),
}
#: What a method certifies counts for the method below as well, which is not run again.
CHEAPER = {
    "crown": (),
    "alpha-crown": ("crown",),
    "krelu": ("crown", "alpha-crown"),
    "lp+krelu+branching": ("crown", "alpha-crown", "krelu"),
    "lp-triangle": ("crown", "alpha-crown"),
    "lp+krelu": ("crown", "alpha-crown", "krelu"),
}
#: Where krelu's worst margin is below this, lp+krelu+branching gives up without trying.
HOPELESS = -2.5
#: Images certified of the first 1000 on the same network, and seconds an image, as published.
PUBLISHED = {
    "DeepPoly": "160 of the first 1000",
    "k-ReLU": "441 of the first 1000, 307 s an image",
    "PRIMA": "510 of the first 1000, 159 s an image",
}
#: name -> (file below the folder of networks, mean, std, eps in pixels of [0, 1])
CIFAR = {
    "cifar_base_kw": ("oval21/onnx/cifar_base_kw.onnx", (0.485, 0.456, 0.406), (0.225,) * 3, 2 / 255),
    "cifar_deep_kw": ("oval21/onnx/cifar_deep_kw.onnx", (0.485, 0.456, 0.406), (0.225,) * 3, 2 / 255),
    "resnet_2b": (
        "cifar10_resnet/onnx/resnet_2b.onnx",
        (0.4914, 0.4822, 0.4465),
        (0.2471, 0.2435, 0.2616),
        2 / 255,
    ),
}


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of the subject ``krelu``."""
    parser.add_argument(
        "--krelu-nets", type=pathlib.Path, help="folder with eran_mlp, oval21, cifar10_resnet"
    )
    parser.add_argument("--krelu-data", type=pathlib.Path, help="folder with mnist.npz, cifar10_test1000.npz")
    parser.add_argument("--krelu-images", type=int, default=100, help="of MNIST (default 100)")
    parser.add_argument("--krelu-cifar-images", type=int, default=10, help="of CIFAR-10 (default 10)")
    parser.add_argument("--krelu-methods", default=",".join(METHODS), help=f"of {','.join(METHODS)}")
    parser.add_argument(
        "--krelu-share", default="0/1", help="I/N: every N-th image from the I-th on (default 0/1)"
    )
    parser.add_argument("--krelu-budget", type=float, default=math.inf, help="stop after so many seconds")
    parser.add_argument("--krelu-remark", default="", help="a line about the machine, for the page")


def cases(args: argparse.Namespace) -> Iterator[tuple[str, torch.nn.Module, Tensor, Tensor, Tensor, Tensor]]:
    """Name, network, images as the network sees them, labels, lower and upper ends of the boxes."""
    data = np.load(args.krelu_data / "mnist.npz")
    x = torch.from_numpy(data["x_test"][: args.krelu_images]).float().reshape(-1, 1, 28, 28) / 255
    y = torch.from_numpy(data["y_test"][: args.krelu_images]).long()
    net = pycert.load_onnx(args.krelu_nets / "eran_mlp" / "mnist_6_100.onnx")
    region = pycert.LpBall(x, eps=0.026, clip=(0, 1))
    yield "mnist_6_100, eps 0.026", net, x, y, region.lower, region.upper
    if args.krelu_cifar_images == 0 or not (args.krelu_data / "cifar10_test1000.npz").exists():
        return
    data = np.load(args.krelu_data / "cifar10_test1000.npz")
    pixels = torch.from_numpy(data["x"][: args.krelu_cifar_images]).float() / 255
    y = torch.from_numpy(data["y"][: args.krelu_cifar_images]).long()
    for name, (path, mean, std, eps) in CIFAR.items():
        m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        ends = [((pixels + sign * eps).clamp(0, 1) - m) / s for sign in (-1, 1)]
        yield (
            f"{name}, eps 2/255",
            pycert.load_onnx(args.krelu_nets / path),
            (pixels - m) / s,
            y,
            ends[0],
            ends[1],
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Bound what the file of records does not hold yet, then make the tables of all it holds."""
    if args.krelu_nets is None or args.krelu_data is None:
        return {
            "tables": [{"title": "k-ReLU", "columns": [], "rows": []}],
            "notes": ["no networks: --krelu-nets"],
        }
    folder = FOLDER if args.out is None else args.out
    folder.mkdir(parents=True, exist_ok=True)
    path, until = folder / "images.jsonl", time.monotonic() + args.krelu_budget
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(r["net"], r["image"], r["method"]): r for r in records}
    wanted = args.krelu_methods.split(",")
    part, parts = map(int, args.krelu_share.split("/"))
    for name, net, x, y, low, high in cases(args):
        bm = pycert.BoundedModule(net, x[:1])
        for method in (m for m in METHODS if m in wanted):
            for i in in_order(known, name, method, len(x))[part::parts]:
                key = (name, i, method)
                if key in known:
                    continue
                if time.monotonic() >= until:
                    return tables(list(known.values()), args.krelu_remark)
                known[key] = record(bm, name, i, method, x, y, low, high, known)
                with path.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
    return tables(list(known.values()), args.krelu_remark)


def in_order(
    known: dict[tuple[str, int, str], dict[str, Any]], name: str, method: str, count: int
) -> list[int]:
    """Images for the dear methods: those with the best margin so far first, in case the time ends."""
    if method in ("crown", "alpha-crown"):
        return list(range(count))
    last = CHEAPER[method][-1]

    def key(i: int) -> tuple[int, float, int]:
        before = known.get((name, i, last))
        if before is None or before["margin"] is None:
            return (2 if before is None else 0, 0.0, i)
        return 1, -before["margin"], i

    return sorted(range(count), key=key)


def record(
    bm: pycert.BoundedModule,
    name: str,
    i: int,
    method: str,
    x: Tensor,
    y: Tensor,
    low: Tensor,
    high: Tensor,
    known: dict[tuple[str, int, str], dict[str, Any]],
) -> dict[str, Any]:
    """One image by one method; what a cheaper one has certified is not bounded again."""
    found = {"net": name, "image": i, "method": method, "seconds": 0.0, "processor seconds": 0.0}
    with torch.no_grad():
        correct = bool(bm.net(x[i : i + 1]).argmax() == y[i])
    before = [known.get((name, i, m)) for m in CHEAPER[method]]
    if not correct or any(r is not None and r["certified"] for r in before):
        return {**found, "correct": correct, "certified": correct, "margin": None}
    if method == "lp+krelu+branching" and before[-1] is not None and before[-1]["margin"] < HOPELESS:
        return {**found, "correct": correct, "certified": False, "margin": None}
    started, processor = time.perf_counter(), time.process_time()
    chosen, options = METHODS[method]
    if not name.startswith("mnist") and "intermediate" in options:  # thousands of neurons a layer
        options = {**options, "intermediate": "crown"}
    region = pycert.Box(low[i : i + 1], high[i : i + 1])
    margin = pycert.margins(bm, region, y[i : i + 1], chosen, **options).min().item()
    found["seconds"] = round(time.perf_counter() - started, 4)
    found["processor seconds"] = round(time.process_time() - processor, 4)
    return {**found, "correct": correct, "certified": margin > 0, "margin": round(margin, 5)}


def of_cascade(records: list[dict[str, Any]], net: str, mine: list[dict[str, Any]]) -> float:
    """Mean processor time of the right images of a method, with all cheaper methods before it."""
    images, methods = {r["image"] for r in mine if r["correct"]}, {r["method"] for r in mine}
    methods |= {cheaper for m in list(methods) for cheaper in CHEAPER[m]}
    seconds = [
        r["processor seconds"]
        for r in records
        if r["net"] == net and r["image"] in images and r["method"] in methods
    ]
    return sum(seconds) / max(1, len(images))


def tables(records: list[dict[str, Any]], remark: str) -> dict[str, Any]:
    """One table a network: a method's seconds count what it does itself, for the images it bounds."""
    made = []
    columns = [
        "method",
        "images",
        "correct",
        "certified",
        "bounded",
        "processor s an image bounded",
        "s an image bounded",
        "processor s an image, cascade",
    ]
    for net in dict.fromkeys(r["net"] for r in records):
        rows = []
        for method in METHODS:
            mine = [r for r in records if r["net"] == net and r["method"] == method]
            if not mine:
                continue
            bounded = [r for r in mine if r["margin"] is not None]
            row = {"method": method, "images": len(mine), "correct": sum(r["correct"] for r in mine)}
            row |= {"certified": sum(r["certified"] for r in mine), "bounded": len(bounded)}
            for column, key in (
                ("processor s an image bounded", "processor seconds"),
                ("s an image bounded", "seconds"),
            ):
                row[column] = f"{np.mean([r[key] for r in bounded]):.2f}" if bounded else "-"
            row["processor s an image, cascade"] = f"{of_cascade(records, net, mine):.2f}"
            rows.append(row)
        made.append({"title": net, "columns": columns, "rows": rows})
    notes = [f"Published for mnist_6_100: {name} {what}." for name, what in PUBLISHED.items()]
    notes += [
        "What crown, alpha-crown or krelu certifies is not bounded again by the methods after them "
        "(lp-triangle: crown, alpha-crown).",
        "lp+krelu goes on where krelu ends, with more groups, rows and steps, and linear programs at the end.",
        f"lp+krelu+branching gives up where krelu's worst margin is below {HOPELESS}.",
        "The last column is over all right images of the row, with what the cheaper methods took on them.",
        "Images are bounded in the order of their margins by the method before: those left out have the worst.",
    ]
    notes += [remark] if remark else []
    return {"tables": made, "notes": notes}
