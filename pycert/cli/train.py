"""``pycert train``: certified training of a user's network, or of the demo's on the digits."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pycert import train
from pycert.cli import demo, inputs
from pycert.cli.inputs import CommandError


def add_parser(subparsers: Any) -> None:
    """Options of the command."""
    defaults = demo.RECIPE
    parser = subparsers.add_parser(
        "train",
        help="certified training: IBP, then CROWN-IBP",
        description="Train a network so that it can be certified; without --network and --data, the demo's.",
    )
    parser.add_argument(
        "--network",
        metavar="MODULE:FUNCTION|FILE.onnx",
        help="returns the nn.Module (runs code of that module); or an ONNX file, whose weights are trained further",
    )
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="arrays x [N, ...] and y [N]")
    parser.add_argument("--x-key", default="x", metavar="NAME", help="inputs in FILE.npz (default x)")
    parser.add_argument("--y-key", default="y", metavar="NAME", help="classes in FILE.npz (default y)")
    parser.add_argument(
        "--shape", type=int, nargs="+", metavar="N", help="shape of one sample, where x has another"
    )
    parser.add_argument(
        "--scale",
        type=inputs.number,
        metavar="S",
        help="divide x by S; required for integer x (255 for pixels)",
    )
    parser.add_argument(
        "--mean", type=inputs.number, nargs="+", metavar="M", help="normalise inside the network: mean"
    )
    parser.add_argument(
        "--std", type=inputs.number, nargs="+", metavar="S", help="and standard deviation, one or per channel"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE.pt", help="start from this state dict")
    parser.add_argument(
        "--eps",
        type=inputs.number,
        default=defaults.eps,
        help="radius at the end, as 0.1 or 8/255 (default %(default)s)",
    )
    parser.add_argument(
        "--clip",
        type=inputs.number,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LO", "HI"),
        help="range of valid inputs (default 0 1)",
    )
    parser.add_argument(
        "--method", choices=("ibp", "crown-ibp"), default=defaults.method, help="default %(default)s"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help=f"default {defaults.epochs}; every phase scales with it"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", default=defaults.batch_size, help="default %(default)s"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        default=defaults.learning_rate,
        help="default %(default)s",
    )
    parser.add_argument(
        "--kappa",
        type=float,
        default=defaults.kappa[1],
        metavar="SHARE",
        help="share of the clean loss at the end (default %(default)s)",
    )
    parser.add_argument(
        "--beta",
        type=float,
        default=defaults.beta[1],
        metavar="SHARE",
        help="share of CROWN-IBP at the end (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("weights.pt"),
        metavar="FILE.pt",
        help="state dict (default %(default)s)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE.pt",
        help="written after every epoch; an existing one is continued",
    )
    parser.add_argument("--history", type=Path, metavar="FILE.jsonl", help="JSON lines, one an epoch")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Train and save the state dict."""
    inputs.set_threads(args.threads)
    if (args.network is None) != (args.data is None):
        raise CommandError("--network and --data must be given together (or neither, for the demo's)")
    args.samples = None
    if args.network is None:
        torch.manual_seed(args.seed)
        net: nn.Module = demo.network()
        data = demo.digits()[0]
    else:
        net, data = inputs.load_network(args), inputs.load_data(args)
    inputs.check_fit(net, *data)
    if args.weights is None and (args.network is None or not inputs.is_onnx(args.network)):
        train.initialize_for_ibp(net, args.seed)
    recipe = dataclasses.replace(
        demo.shortened(demo.RECIPE, args.epochs),
        eps=args.eps,
        clip=tuple(args.clip),
        method=args.method,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        kappa=(1.0, args.kappa),
        beta=(0.0, args.beta),
        seed=args.seed,
    )
    rows = train.train(
        net, data, recipe, checkpoint=args.checkpoint, history=args.history, progress=not args.quiet
    )
    inner = (
        net if args.mean is None else net.get_submodule("1")
    )  # certify puts the normalisation in front again
    torch.save(inner.state_dict(), args.out)
    last = rows[-1]
    print(
        f"eps {last['eps']:g}: clean {last['clean']:.1%}, certified {last['certified']:.1%} in training; "
        f"weights written to {args.out}"
    )
    return 0
