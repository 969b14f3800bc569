"""``pycert profile``: where a bound spends its time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import pycert
from pycert.cli.inputs import DTYPES, CommandError, load_network, number, set_threads
from pycert.options import METHODS, SOUNDNESS


def add_parser(subparsers: Any) -> None:
    """Options of the command."""
    parser = subparsers.add_parser(
        "profile",
        help="time a bound by layer and kernel, against the device's roofs",
        description="Run a bound once to warm up and once recorded; print where the time went.",
    )
    parser.add_argument(
        "network",
        metavar="MODULE:FUNCTION|FILE.onnx",
        help="a function without arguments that returns the nn.Module (this runs its code), or an ONNX file",
    )
    parser.add_argument("--method", choices=METHODS, default="crown", help="default crown")
    parser.add_argument(
        "--input-shape", type=int, nargs="+", required=True, metavar="N", help="of one sample, as 3 32 32"
    )
    parser.add_argument("--eps", type=number, required=True, metavar="EPS", help="radius, as 0.1 or 8/255")
    parser.add_argument(
        "--p", type=number, default=float("inf"), help="norm of the ball: 1, 2 or inf (default)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="samples at once (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    parser.add_argument("--soundness", choices=SOUNDNESS, default="deployed", help="default deployed")
    parser.add_argument(
        "--gradient", action="store_true", help="also the gradients of the bounds, as in training"
    )
    parser.add_argument("--memory", metavar="SIZE", help="budget for the rows of one chunk, as 2GiB")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    parser.add_argument("--weights", type=Path, metavar="FILE.pt", help="state dict; tensors only")
    parser.add_argument(
        "--mean", type=number, nargs="+", metavar="M", help="normalise inside the network: mean"
    )
    parser.add_argument("--std", type=number, nargs="+", metavar="S", help="and standard deviation")
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE.pt",
        help="samples [N, *shape] saved by torch.save; by default random ones in [0, 1]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and samples (default 0)")
    parser.add_argument(
        "--by",
        nargs="+",
        choices=("layer", "phase", "kernel"),
        default=["layer", "phase", "kernel"],
        help="what has lines of its own; the rest is added up (default: all three)",
    )
    parser.add_argument("--limit", type=int, default=25, metavar="N", help="lines of the table (default 25)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as JSON")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="Chrome trace of one more run, for ui.perfetto.dev"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture: .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    """Run the bound once to warm up, once recorded, and print the table."""
    if args.batch < 1 or min(args.input_shape) < 1:
        raise CommandError(
            f"--batch and --input-shape must be positive, got {args.batch} and {args.input_shape}"
        )
    if args.device.split(":")[0] == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: this torch sees no GPU (`pycert doctor` says more)")
    set_threads(args.threads)
    dtype = DTYPES[args.dtype]
    net = load_network(args, dtype).to(args.device)
    samples = _samples(args, dtype).to(args.device)
    bounded = pycert.BoundedModule(net, samples[:1])
    options: dict[str, Any] = {"soundness": args.soundness}
    if args.memory is not None:
        options["memory"] = args.memory

    def call() -> None:
        with torch.set_grad_enabled(args.gradient):
            bounds = bounded.bound(
                pycert.LpBall(samples, eps=args.eps, p=args.p), method=args.method, **options
            )
            if args.gradient:
                assert bounds.lower is not None and bounds.upper is not None
                (bounds.upper - bounds.lower).sum().backward()
                net.zero_grad()

    call()
    with pycert.profile(args.device, dtype) as recorded:
        call()
    print(recorded.table(by=tuple(args.by), limit=args.limit))
    print(f"\n{_unstable(bounded, samples, args)}")
    if args.trace is not None:
        with pycert.profile(args.device, dtype, trace=args.trace):
            call()
        print(f"trace: {args.trace} (open it in ui.perfetto.dev)")
    if args.json is not None:
        args.json.write_text(json.dumps(recorded.as_dict(), indent=1) + "\n")
    if args.plot is not None:
        print(f"picture: {recorded.picture(args.plot)}")
    return 0


def _samples(args: argparse.Namespace, dtype: torch.dtype) -> torch.Tensor:
    shape = (args.batch, *args.input_shape)
    if args.input is None:
        return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(args.seed))
    found = torch.load(args.input, map_location="cpu", weights_only=True)
    if (
        not isinstance(found, torch.Tensor)
        or found.dim() == 0
        or tuple(found.shape[1:]) != shape[1:]
        or len(found) < args.batch
    ):
        raise CommandError(f"--input {args.input}: expected a tensor [N >= {args.batch}, {shape[1:]}]")
    return found[: args.batch].to(dtype)


def _unstable(bounded: pycert.BoundedModule, samples: torch.Tensor, args: argparse.Namespace) -> str:
    """Share of pre-activations whose interval bounds have either sign."""
    with torch.no_grad():
        layers = bounded.layer_bounds(pycert.LpBall(samples, eps=args.eps, p=args.p), method="ibp")
    parts, open_neurons, neurons = [], 0, 0
    for path, bounds in layers.items():
        assert bounds.lower is not None and bounds.upper is not None
        unstable = int(((bounds.lower < 0) & (bounds.upper > 0)).sum())
        parts.append(f"{path} {unstable / bounds.lower.numel():.1%}")
        open_neurons, neurons = open_neurons + unstable, neurons + bounds.lower.numel()
    share = open_neurons / neurons if neurons else 0.0
    return f"unstable by intervals: {share:.1%} of {neurons} pre-activations ({', '.join(parts)})"
