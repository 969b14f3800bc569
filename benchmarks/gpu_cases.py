"""What benchmarks/gpu_suite.py runs on the GPU: small cases for the sanitizers, and the figures of the issue.

    python -m benchmarks.gpu_cases small            # every kernel once, on shapes with ragged ends
    python -m benchmarks.gpu_cases check            # the check before the first use of a device, and its time
    python -m benchmarks.gpu_cases choices          # both ways to form products, for pycert/gpu_choices.json
    python -m benchmarks.gpu_cases measure FILE     # figures as lines of JSON, each written as soon as it is known

Times are medians of CUDA events around calls that were warmed up; "plain" runs with TF32 off. Roofs are the card's own
copy bandwidth and float32 matrix-product rate in the same process.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import traceback
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
    "k-ReLU hulls, k = 3": "1e5 groups/s",
    "masked power iteration, cifar 6C2F's widest convolution, batch 64 / two convolutions a step": "not slower",
    "back-substitution step 4096 windows of 64x9x9 through 64x64x3x3: share of roof": "50 %",
}
#: Rows, terms and columns at which both ways to form a product are timed.
SHAPES = [(64, 512, 512), (256, 4096, 4096), (1024, 784, 1024), (8192, 2048, 2048), (32768, 256, 3072)]
#: Rows, side of their windows, channels of a layer and of its input: both ways through a convolution are timed.
WINDOWS = [(4096, 9, 64, 64), (4096, 20, 64, 3), (1024, 16, 128, 128)]
#: Sizes of the figures, as their names say them.
SIZES = {
    "linear": (512, 4096),
    "convolution": (128, 128, 16),
    "bandwidth": (8192,),
    "rows": (8192, 2048),
    "windows": (4096, 9, 64, 64),
    "groups": (20_000,),
    "power": (64, 64, 16),
}
DEVICE = "cuda"


# ---- sanitizers -----------------------------------------------------------------------------------------------------


def small_nets() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Networks whose shapes fill no tile and no warp, with the shapes of their inputs."""
    conv = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(5, 3, 3, 2), nn.LeakyReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(75, 7), nn.Sigmoid(), nn.Linear(7, 3),
    )  # fmt: skip
    dense = nn.Sequential(nn.Linear(37, 33), nn.ReLU(), nn.Linear(33, 5), nn.GELU(), nn.Linear(5, 3))
    return [(conv, (3, 9, 9)), (dense, (37,))]


def every_kernel() -> int:
    """The check before the first use, telling of each kernel and method; returns how many failed."""
    from pycert import _cuda_check

    failed = []

    def report(name: str, error: RuntimeError | None) -> None:
        if error is not None:
            failed.append(name)
        print(f"{name}: {'ok' if error is None else error}", flush=True)

    _cuda_check.run(torch.device(DEVICE), report=report)
    if failed:
        print(f"{len(failed)} failed: {'; '.join(failed)}", flush=True)
    return len(failed)


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
            print(f"{method}, l{p}, {list(shape)}, {dtype}: done", flush=True)
    return count


def family_cases(device: str) -> int:
    """The norm, ball-and-box and k-ReLU families on ragged shapes; returns how many calls were made."""
    import pycert
    from pycert.ops.norm import power_norm
    from pycert.train import losses

    torch.manual_seed(0)
    count = 0
    conv, hidden, last = nn.Conv2d(3, 5, 3, 2, 1), nn.Linear(125, 7), nn.Linear(7, 4)
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), hidden, nn.ReLU(), last).to(device)
    x, y = torch.rand(5, 3, 9, 9, device=device), torch.arange(5, device=device) % 4
    losses.bcp_loss(losses.worst_logits(net, x, y, 0.2), y).backward()
    count += 1
    for dtype in (torch.float32, torch.float64):
        weight = torch.randn(5, 3, 3, 2, dtype=dtype, device=device, requires_grad=True)
        rows = torch.rand(4, 5, 7, 8, dtype=dtype, device=device)
        columns = torch.rand(4, 3, 9, 9, device=device) < 0.5
        power_norm(weight, rows, columns, steps=2, conv=dict(input_shape=(3, 9, 9))).value.sum().backward()
        for k in (1, 2, 3, 4):
            lower, upper = (
                -torch.rand(9, k, dtype=dtype, device=device),
                torch.rand(9, k, dtype=dtype, device=device),
            )
            A = -pycert.ops.octahedral_directions(k, dtype).to(device).expand(9, -1, -1)
            b = torch.where(A > 0, -A * lower.unsqueeze(1), -A * upper.unsqueeze(1)).sum(2) * 0.9
            rows_found, number = pycert.ops.krelu_hull(lower, upper, A, b, max_rows=20, pivots=20)
            assert rows_found.isfinite().all() and (number > 0).all()
            count += 1
        count += 1
    return count


# ---- which way ------------------------------------------------------------------------------------------------------


def choice_times() -> Iterator[dict[str, Any]]:
    """Seconds of every product's two ways at SHAPES, as pycert/_choices.py keeps them."""
    import pycert

    operators = torch.ops.pycert
    for dtype, (m, k, n) in itertools.product((torch.float32, torch.float64), SHAPES):

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=DEVICE)  # noqa: B023 - called at once

        rows, weight, wide = random(m, k), random(k, n), random(n, k)
        samples = torch.zeros(m, dtype=torch.int64, device=DEVICE)
        slopes = [random(1, k).abs() for _ in range(4)]
        line = (*slopes, None, None, None)
        dense = [1, 0, 0, 0, 0, 0, 0]

        def product() -> None:
            operators.rows_product(rows, weight, None, None, None)  # noqa: B023

        def boxes() -> None:
            pycert.ops.interval_linear(rows, rows, wide)  # noqa: B023

        def at_once() -> None:
            operators.relax_product(rows, None, 2**62, samples, [1, 1, k], *line, weight, None, None, 0)  # noqa: B023

        def in_steps() -> None:
            relaxed, _ = operators.relax_rows(rows, None, 2**62, samples, None, dense, [1, 1, k], *line)  # noqa: B023
            operators.rows_product(relaxed.view(m, k), weight, None, None, None)  # noqa: B023

        plain = [("product", product, product), ("dual_product", boxes, boxes)]
        for name, own, other in [*plain, ("relax_product", at_once, in_steps)]:
            found = {}
            for way, call in (("own", own), ("other", other)):
                # a table that makes the way in question the faster one everywhere
                forced = (name, dtype == torch.float64, (m, k, n), 1.0, 0.5 if way == "other" else 2.0)
                pycert._C.set_choices(torch.device(DEVICE).type, [forced])
                found[way] = seconds(call, 0.3)
            pycert._C.set_choices(torch.device(DEVICE).type, [])
            yield {"operator": name, "dtype": str(dtype).removeprefix("torch."), "shape": [m, k, n], **found}
        torch.cuda.empty_cache()


def through_convolution(
    rows: int, side: int, channels: int, before: int, dtype: torch.dtype
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Windows through a ReLU and its 3x3 convolution: in one pass, and in two."""
    operators = torch.ops.pycert

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    window, extent = [0, side, side, 1, 0, 1, 0], [channels, side, side]
    after, after_extent = [0, side + 2, side + 2, 1, -1, 1, -1], [before, side, side]
    zeros = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    line = [random(1, channels * side**2).abs() for _ in range(4)]
    given = (
        random(rows, channels, side, side),
        None,
        2**62,
        zeros,
        zeros.unsqueeze(1).repeat(1, 2),
        window,
        extent,
    )
    weight = random(channels, before, 3, 3)
    unit, none = [1, 1], [0, 0]

    def at_once() -> Any:
        geometry = (unit, unit, unit, 1, after, after_extent)
        return operators.relax_convolution(*given, *line, None, None, None, weight, *geometry, None, None, 0)

    def in_steps() -> Any:
        relaxed, sums = operators.relax_rows(*given, *line, None, None, None)
        return operators.rows_convolution(relaxed, weight, unit, none, unit, none, 1, True, None), sums

    return at_once, in_steps


def convolution_choices() -> Iterator[dict[str, Any]]:
    """As choice_times, for rows through convolutions; the shape is that of the product which one is."""
    for dtype, (rows, side, channels, before) in itertools.product((torch.float32, torch.float64), WINDOWS):
        at_once, in_steps = through_convolution(rows, side, channels, before, dtype)
        found = {"own": seconds(at_once, 0.3), "other": seconds(in_steps, 0.3)}
        name, shape = str(dtype).removeprefix("torch."), [before, 9 * channels, rows * side**2]
        yield {"operator": "relax_convolution", "dtype": name, "shape": shape, **found}
        torch.cuda.empty_cache()


def choose() -> None:
    """Write what is measured to pycert/gpu_choices.json, as soon as it is known."""
    from pycert import _choices

    _choices.load()  # now, or the first bound would put the file's choices in place of those that are forced here
    found = []
    for entry in itertools.chain(choice_times(), convolution_choices()):
        found.append(entry)
        _choices.save(torch.cuda.get_device_name(), found)
        print(entry, flush=True)
    print("written:", _choices.PATH)


# ---- figures --------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any], budget: float = 2.0) -> float:
    """Median time of a call on the device, after a warm-up; of one call where it takes longer than ``budget``."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - start, 1e-6)
    if once > budget:
        return once
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


def against_peer(name: str, mine: float, peer: Callable[[], float] | None) -> dict[str, Any]:
    """How many times longer auto_LiRPA takes; without it, or where it fails, pycert's own seconds."""
    if peer is None:
        return figure(name, mine, "s (no auto_LiRPA there)", pycert=mine)
    try:
        theirs = peer()
    except Exception as error:  # of another library: its failure says nothing of pycert's time
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
        return figure(name, mine, f"s (auto_LiRPA: {why})", pycert=mine)
    return figure(name, theirs / mine, "x", auto_LiRPA=theirs, pycert=mine)


def interval_figures() -> Iterator[dict[str, Any]]:
    import pycert

    ops = pycert.ops
    batch, width = SIZES["linear"]
    weight, lower = torch.randn(width, width, device=DEVICE), torch.randn(batch, width, device=DEVICE)
    size = weight.abs()
    plain = seconds(lambda: (torch.mm(lower, weight), torch.mm(lower, size)))
    mine = seconds(lambda: ops.interval_linear(lower, lower, weight))
    yield figure(list(FIGURES)[0], mine / plain, "x", plain=plain, pycert=mine)
    batch, width, side = SIZES["convolution"]
    kernel = torch.randn(width, width, 3, 3, device=DEVICE)
    image = torch.randn(batch, width, side, side, device=DEVICE)
    absolute = kernel.abs()
    conv = nn.functional.conv2d
    plain = seconds(lambda: (conv(image, kernel, padding=1), conv(image, absolute, padding=1)))
    mine = seconds(lambda: ops.interval_conv2d(image, image, kernel, padding=1))
    yield figure(list(FIGURES)[1], mine / plain, "x", plain=plain, pycert=mine)
    (width,) = SIZES["bandwidth"]
    large, one = torch.randn(width, width, device=DEVICE), torch.randn(1, width, device=DEVICE)
    mine = seconds(lambda: ops.interval_linear(one, one, large))
    roofs = pycert.profiling.measured_roofs(DEVICE, torch.float32, torch.get_num_threads())
    share = large.numel() * 4 / mine / roofs.bandwidth
    yield figure(list(FIGURES)[2], share, "%", pycert=mine, bandwidth=roofs.bandwidth)


def back_substitution_figure() -> Iterator[dict[str, Any]]:
    import pycert

    count, width = SIZES["rows"]
    rows, weight = torch.randn(count, width, device=DEVICE), torch.randn(width, width, device=DEVICE)
    product = torch.ops.pycert.rows_product
    mine = seconds(lambda: product(rows, weight, None, None, None))
    roofs = pycert.profiling.measured_roofs(DEVICE, torch.float32, torch.get_num_threads())
    yield figure(
        list(FIGURES)[8], 2 * count * width**2 / mine / roofs.rate, "%", pycert=mine, rate=roofs.rate
    )
    count, side, channels, before = SIZES["windows"]
    mine = seconds(through_convolution(count, side, channels, before, torch.float32)[0])
    work = 2 * count * side**2 * channels * before * 9
    yield figure(list(FIGURES)[11], work / mine / roofs.rate, "%", pycert=mine, rate=roofs.rate)


def family_figures() -> Iterator[dict[str, Any]]:
    """Hulls of triples like those of a layer's neurons, and power iteration under random masks."""
    import pycert
    from pycert.ops.norm import power_norm

    (groups,) = SIZES["groups"]
    A = -pycert.ops.octahedral_directions(3, torch.float32).to(DEVICE)
    spread = torch.randn(groups, 3, 8, device=DEVICE)
    middle = 0.3 * torch.randn(groups, 3, device=DEVICE)
    directions = -A @ spread  # the limits of an affine layer over a box of eight inputs
    b = (-A @ middle.unsqueeze(2)).squeeze(2) + 0.4 * directions.abs().sum(2)
    reach = 0.4 * spread.abs().sum(2)
    time_here = seconds(
        lambda: pycert.ops.krelu_hull(middle - reach, middle + reach, A.expand(groups, -1, -1), b), 4
    )
    yield figure(list(FIGURES)[9], groups / time_here, "groups/s", pycert=time_here)
    (batch, width, side), steps = SIZES["power"], 4
    weight = torch.randn(width, width, 3, 3, device=DEVICE)
    masks = torch.rand(2, batch, width, side, side, device=DEVICE) < 0.5
    image = torch.randn(batch, width, side, side, device=DEVICE)
    conv = dict(input_shape=(width, side, side), padding=1)
    mine = seconds(lambda: power_norm(weight, masks[0], masks[1], steps=steps, conv=conv))
    plain = seconds(lambda: nn.functional.conv2d(image, weight, padding=1)) * (2 * steps + 1)
    yield figure(list(FIGURES)[10], mine / plain, "x", plain=plain, pycert=mine)


def training_figures(peers: list[str]) -> Iterator[dict[str, Any]]:
    """A training step on cnn7_bn: loss of the margins, and its gradients."""
    net, x, eps = nets.make("cnn7_bn", 128)
    net, x = net.to(DEVICE), x.to(DEVICE)
    labels = torch.zeros(len(x), dtype=torch.long, device=DEVICE)

    def step(bounds: Any) -> None:
        net.zero_grad(set_to_none=True)
        nn.functional.softplus(-bounds.margins(x, eps, labels)).sum().backward()

    def plain() -> None:
        net.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(x), labels).backward()

    base = seconds(plain)
    ibp = libraries.Pycert(net, x, "ibp", soundness="none")
    mine = seconds(lambda: step(ibp))
    yield figure(list(FIGURES)[3], mine / base, "x", plain=base, pycert=mine)
    crown = libraries.Pycert(net, x, "crown-ibp", soundness="none")
    mine = seconds(lambda: step(crown))

    def peer() -> float:
        other = libraries.AutoLirpa(net, x, "crown-ibp")
        return seconds(lambda: step(other))

    yield against_peer(list(FIGURES)[4], mine, peer if peers else None)


def crown_figure(name: str, number: int, peers: list[str]) -> Iterator[dict[str, Any]]:
    net, x, eps = nets.make(name, 32)
    net, x = net.to(DEVICE), x.to(DEVICE)

    def peer() -> float:
        other = libraries.AutoLirpa(net, x, "crown")
        return seconds(lambda: other.bounds(x, eps), 5.0)

    with torch.no_grad():
        bounds = libraries.Pycert(net, x, "crown", soundness="none")
        mine = seconds(lambda: bounds.bounds(x, eps), 5.0)
        row = against_peer(list(FIGURES)[number], mine, peer if peers else None)
    yield row


def crown_alone() -> Iterator[dict[str, Any]]:
    """What auto_LiRPA cannot hold."""
    net, x, eps = nets.make("cnn7_bn", 1)
    net, x = net.to(DEVICE), x.to(DEVICE)
    with torch.no_grad():
        bounds = libraries.Pycert(net, x, "crown")
        time_here = seconds(lambda: bounds.bounds(x, eps), 5.0)
    yield figure(list(FIGURES)[7], time_here, "s", pycert=time_here)


def about_device() -> dict[str, Any]:
    """The card as it was found, with its own roofs."""
    import pycert

    properties = torch.cuda.get_device_properties(0)
    dtypes, threads = (torch.float32, torch.float64), torch.get_num_threads()
    roofs = {dtype: pycert.profiling.measured_roofs(DEVICE, dtype, threads) for dtype in dtypes}
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

        def about() -> Iterator[dict[str, Any]]:
            yield {"about": {"commit": results.commit()}}
            yield {"about": {"device": about_device()}}

        groups = [about, interval_figures, back_substitution_figure, family_figures]
        groups.append(lambda: training_figures(peers))
        for name, number in (("resnet4b", 5), ("dm_medium", 6)):
            groups.append(functools.partial(crown_figure, name, number, peers))
        for group in [*groups, crown_alone]:
            try:
                for row in group():
                    write(row)
            except Exception as error:  # whatever it is, the other figures are still to be measured
                traceback.print_exc()
                why = (str(error).splitlines() or [""])[0]
                write({"failed": f"{type(error).__name__}: {why}"[:300]})
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Run the small cases or the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cases")
    parser.add_argument("what", choices=("small", "check", "choices", "measure"))
    parser.add_argument("file", type=pathlib.Path, nargs="?", help="of the figures")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: nothing is measured", file=sys.stderr)
        return 3
    os.environ.setdefault("PYCERT_CUDA_UNTESTED", "unchecked")
    libraries.add_peers(args.peer)
    if args.what == "small":
        failed = every_kernel()
        print(small_cases(DEVICE) + family_cases(DEVICE), "small cases done")
        torch.cuda.synchronize()
        return int(failed > 0)
    if args.what == "check":
        start = time.perf_counter()
        failed = every_kernel()
        print(f"every kernel and method against the processor's, in {time.perf_counter() - start:.1f} s")
        return int(failed > 0)
    if args.what == "choices":
        choose()
    elif args.file is None:
        parser.error("measure needs a file")
    else:
        measure(args.file, args.peer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
