"""What benchmarks/gpu_suite.py runs on the GPU: small cases for the sanitizers, and the figures of the issue.

    python -m benchmarks.gpu_cases small            # every kernel once, on shapes with ragged ends
    python -m benchmarks.gpu_cases measure FILE     # figures as lines of JSON, each written as soon as it is known

Times are medians of CUDA events around calls that were warmed up; "plain" runs with TF32 off. Roofs are the card's own
copy bandwidth and float32 matrix-product rate in the same process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import libraries, nets, results

#: Figure and what it must reach.
FIGURES = {
    "interval linear 4096x4096, batch 512 / two float32 products": "not slower",
    "interval conv 128x128x3x3 on 16x16, batch 128 / two convolutions": "not slower",
    "interval linear 8192x8192, batch 1: share of copy bandwidth over W": "60 %",
    "ibp training step / plain float32 step, cnn7_bn, batch 128": "<= 2.0x",
    "crown-ibp training step, auto_LiRPA / pycert, cnn7_bn, batch 128": "2.5x",
    "crown, auto_LiRPA / pycert, resnet4b, batch 32": "4x",
    "crown, auto_LiRPA / pycert, dm_medium, batch 32": "4x",
    "crown, cnn7_bn, batch 1": "runs",
    "back-substitution step 8192 rows through 2048x2048: share of roof": "50 %",
}


# ---- sanitizers -----------------------------------------------------------------------------------------------------


def small_nets() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Networks whose shapes fill no tile and no warp, with the shapes of their inputs."""
    conv = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(5, 3, 3, 2), nn.LeakyReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(75, 7), nn.Sigmoid(), nn.Linear(7, 3),
    )  # fmt: skip
    dense = nn.Sequential(nn.Linear(37, 33), nn.ReLU(), nn.Linear(33, 5), nn.GELU(), nn.Linear(5, 3))
    return [(conv, (3, 9, 9)), (dense, (37,))]


def small_cases(device: str) -> int:
    """Every method on the small networks, with gradients; returns how many bounds were computed."""
    import pycert

    torch.manual_seed(0)
    methods, norms = ("ibp", "crown-ibp", "crown", "forward", "alpha-crown"), (1, 2, float("inf"))
    count = 0
    for (net, shape), dtype in itertools.product(small_nets(), (torch.float32, torch.float64)):
        bounded = pycert.BoundedModule(net.to(dtype).to(device), torch.empty(1, *shape, dtype=dtype))
        for method, p in itertools.product(methods, norms):
            options = {"iterations": 2} if method == "alpha-crown" else {}
            x = torch.rand(3, *shape, dtype=dtype, device=device, requires_grad=method != "alpha-crown")
            bounds = bounded.bound(pycert.LpBall(x, eps=0.05, p=p), method=method, **options)
            assert bounds.lower is not None and bounds.upper is not None
            if x.requires_grad:
                (bounds.upper - bounds.lower).sum().backward()
            count += 1
    return count


# ---- figures --------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], budget: float = 2.0) -> float:
    """Median time of a call on the device, after a warm-up."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - start, 1e-6)
    times = []
    for _ in range(max(3, min(30, int(budget / once)))):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def figure(name: str, value: float, unit: str, **raw: Any) -> dict[str, Any]:
    text = (
        f"{100 * value:.0f} %" if unit == "%" else f"{value:.2f}x" if unit == "x" else f"{value:.3g} {unit}"
    )
    return {"figure": name, "value": value, "text": text, **raw}


def interval_figures() -> Iterator[dict[str, Any]]:
    import pycert

    ops = pycert.ops
    weight = torch.randn(4096, 4096, device="cuda")
    lower = torch.randn(512, 4096, device="cuda")
    size = weight.abs()
    plain = seconds(lambda: (torch.mm(lower, weight), torch.mm(lower, size)))
    mine = seconds(lambda: ops.interval_linear(lower, lower, weight))
    yield figure(list(FIGURES)[0], mine / plain, "x", plain=plain, pycert=mine)
    kernel, image = torch.randn(128, 128, 3, 3, device="cuda"), torch.randn(128, 128, 16, 16, device="cuda")
    absolute = kernel.abs()
    conv = nn.functional.conv2d
    plain = seconds(lambda: (conv(image, kernel, padding=1), conv(image, absolute, padding=1)))
    mine = seconds(lambda: ops.interval_conv2d(image, image, kernel, padding=1))
    yield figure(list(FIGURES)[1], mine / plain, "x", plain=plain, pycert=mine)
    large, one = torch.randn(8192, 8192, device="cuda"), torch.randn(1, 8192, device="cuda")
    mine = seconds(lambda: ops.interval_linear(one, one, large))
    roofs = pycert.profiling.measured_roofs("cuda", torch.float32, torch.get_num_threads())
    share = large.numel() * 4 / mine / roofs.bandwidth
    yield figure(list(FIGURES)[2], share, "%", pycert=mine, bandwidth=roofs.bandwidth)


def back_substitution_figure() -> Iterator[dict[str, Any]]:
    import pycert

    rows = torch.randn(8192, 2048, device="cuda")
    weight = torch.randn(2048, 2048, device="cuda")
    product = torch.ops.pycert.rows_product
    mine = seconds(lambda: product(rows, weight, None, None, None))
    roofs = pycert.profiling.measured_roofs("cuda", torch.float32, torch.get_num_threads())
    yield figure(list(FIGURES)[8], 2 * 8192 * 2048**2 / mine / roofs.rate, "%", pycert=mine, rate=roofs.rate)


def training_figures(peers: list[str]) -> Iterator[dict[str, Any]]:
    """A training step on cnn7_bn: loss of the margins, and its gradients."""
    net, x, eps = nets.make("cnn7_bn", 128)
    net, x = net.cuda(), x.cuda()
    labels = torch.zeros(len(x), dtype=torch.long, device="cuda")

    def step(margins: Callable[[], Tensor]) -> None:
        net.zero_grad(set_to_none=True)
        nn.functional.softplus(-margins()).sum().backward()

    def plain() -> None:
        net.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(x), labels).backward()

    base = seconds(plain)
    ibp = libraries.Pycert(net, x, "ibp", soundness="none")
    mine = seconds(lambda: step(lambda: ibp.margins(x, eps, labels)))
    yield figure(list(FIGURES)[3], mine / base, "x", plain=base, pycert=mine)
    if not peers:
        return
    crown = libraries.Pycert(net, x, "crown-ibp", soundness="none")
    peer = libraries.AutoLirpa(net, x, "crown-ibp")
    mine = seconds(lambda: step(lambda: crown.margins(x, eps, labels)))
    theirs = seconds(lambda: step(lambda: peer.margins(x, eps, labels)))
    yield figure(list(FIGURES)[4], theirs / mine, "x", auto_LiRPA=theirs, pycert=mine)


def crown_figures(peers: list[str]) -> Iterator[dict[str, Any]]:
    for name, number in (("resnet4b", 5), ("dm_medium", 6)):
        if not peers:
            break
        net, x, eps = nets.make(name, 32)
        net, x = net.cuda(), x.cuda()
        with torch.no_grad():
            mine = libraries.Pycert(net, x, "crown", soundness="none")
            peer = libraries.AutoLirpa(net, x, "crown")
            ours = seconds(lambda: mine.bounds(x, eps), 5.0)  # noqa: B023 - called at once
            theirs = seconds(lambda: peer.bounds(x, eps), 5.0)  # noqa: B023
        yield figure(list(FIGURES)[number], theirs / ours, "x", auto_LiRPA=theirs, pycert=ours)
    net, x, eps = nets.make("cnn7_bn", 1)
    net, x = net.cuda(), x.cuda()
    with torch.no_grad():
        mine = libraries.Pycert(net, x, "crown")
        yield figure(list(FIGURES)[7], seconds(lambda: mine.bounds(x, eps), 5.0), "s")


def about_device() -> dict[str, Any]:
    """The card as it was found, with its own roofs."""
    import pycert

    properties = torch.cuda.get_device_properties(0)
    dtypes, threads = (torch.float32, torch.float64), torch.get_num_threads()
    roofs = {dtype: pycert.profiling.measured_roofs("cuda", dtype, threads) for dtype in dtypes}
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "driver": _driver(),
        "copy GB/s": round(roofs[torch.float32].bandwidth / 1e9),
        "float32 product TFLOP/s": round(roofs[torch.float32].rate / 1e12, 1),
        "float64 product TFLOP/s": round(roofs[torch.float64].rate / 1e12, 1),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measure(path: pathlib.Path, peers: list[str]) -> None:
    """Write every figure as a line of JSON; one that fails does not keep the others from being measured."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with open(path, "a") as lines:

        def write(row: dict[str, Any]) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            print(row, flush=True)

        write({"about": {"device": about_device(), "commit": results.commit()}})
        groups = [interval_figures, back_substitution_figure]
        for group in [*groups, lambda: training_figures(peers), lambda: crown_figures(peers)]:
            try:
                for row in group():
                    write(row)
            except (RuntimeError, ImportError, ValueError) as error:
                write({"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Run the small cases or the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cases")
    parser.add_argument("what", choices=("small", "measure"))
    parser.add_argument("file", type=pathlib.Path, nargs="?", help="of the figures")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: nothing is measured", file=sys.stderr)
        return 3
    os.environ.setdefault("PYCERT_CUDA_UNTESTED", "1")
    libraries.add_peers(args.peer)
    if args.what == "small":
        print(small_cases("cuda"), "small cases done")
        torch.cuda.synchronize()
    elif args.file is None:
        parser.error("measure needs a file")
    else:
        measure(args.file, args.peer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
