"""Networks, weights and data named on the command line: loaded, checked, hashed.

Data, weights and ONNX files are untrusted: arrays without pickle, state dicts with ``weights_only=True``, and
nothing of an ONNX file is run. ``MODULE:FUNCTION`` is not: it runs code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pycert.nn
import pycert.onnx_import

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class CommandError(Exception):
    """Wrong input to a command; the message names the option, what was given and what is accepted."""


def number(text: str) -> float:
    """A number or a fraction of two, as ``0.1`` or ``8/255``."""
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"expected a number or a fraction like 8/255, got {text!r}"
        ) from None
    if math.isnan(value):
        raise argparse.ArgumentTypeError("NaN is not accepted")
    return value


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`load_network` and :func:`load_data` read."""
    group = parser.add_argument_group("network and data")
    group.add_argument(
        "network",
        metavar="MODULE:FUNCTION|FILE.onnx",
        help="a function without arguments that returns the nn.Module; MODULE is importable from the present "
        "folder, or a file FOLDER/FILE.py. This runs the code of that module: name only modules that you "
        "trust. Or an ONNX file, of which nothing is run",
    )
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE.pt",
        help="state dict saved by torch.save, or a dict that holds it as 'state_dict' or 'net'; tensors only",
    )
    group.add_argument(
        "--data", type=Path, required=True, metavar="FILE.npz", help="arrays x [N, ...] and y [N]"
    )
    group.add_argument(
        "--x-key", default="x", metavar="NAME", help="name of the inputs in FILE.npz (default x)"
    )
    group.add_argument(
        "--y-key", default="y", metavar="NAME", help="name of the classes in FILE.npz (default y)"
    )
    group.add_argument(
        "--shape", type=int, nargs="+", metavar="N", help="shape of one sample, where x has another"
    )
    group.add_argument(
        "--scale",
        type=number,
        metavar="S",
        help="divide x by S; required for integer x (255 for pixels, 1 to keep)",
    )
    group.add_argument(
        "--mean", type=number, nargs="+", metavar="M", help="normalise inside the network: mean"
    )
    group.add_argument(
        "--std", type=number, nargs="+", metavar="S", help="and standard deviation, one or per channel"
    )


def load_network(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network of ``args`` in evaluation mode, with its weights and, if asked for, its normalisation in
    front."""
    torch.manual_seed(args.seed)
    if is_onnx(args.network):
        net: Any = pycert.onnx_import.load_onnx(args.network)
    else:
        net = _resolve(args.network)()
    if not isinstance(net, nn.Module):
        raise CommandError(f"{args.network} must return a torch.nn.Module, got {type(net).__name__}")
    if args.weights is not None:
        load_weights(net, args.weights)
    if (args.mean is None) != (args.std is None):
        raise CommandError("--mean and --std must be given together")
    if args.mean is not None:
        if len(args.mean) != len(args.std) or not all(std > 0 for std in args.std):
            raise CommandError(f"--std must be positive, one for each --mean, got {args.mean} and {args.std}")
        net = nn.Sequential(pycert.nn.Normalize(args.mean, args.std), net)
    return net.to(dtype).eval()


def set_threads(threads: int | None) -> None:
    """Let torch, and with it pycert, use as many threads; None leaves torch's own choice."""
    if threads is None:
        return
    if threads < 1:
        raise CommandError(f"--threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def is_onnx(network: str) -> bool:
    """Whether a network is named by an ONNX file."""
    return network.lower().endswith(".onnx")


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a state dict into ``net``; a file that holds more than tensors is refused, since loading it runs
    code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(
            f"--weights {path}: not a file of plain tensors as torch.save(net.state_dict(), path) writes it "
            f"({first})"
        ) from error
    for key in ("state_dict", "net"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise CommandError(f"--weights {path}: expected a state dict, got {type(state).__name__}")
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise CommandError(f"--weights {path}: does not fit the network. {error}") from error


def load_data(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """``x [N, *shape]`` in ``dtype`` and ``y [N]`` int64 of the first ``args.samples`` samples."""
    try:
        with np.load(args.data, allow_pickle=False) as file:
            missing = [key for key in (args.x_key, args.y_key) if key not in file.files]
            if missing:
                raise CommandError(
                    f"--data {args.data}: no array {missing[0]!r}, it holds {', '.join(file.files)}; "
                    "--x-key and --y-key name the inputs and the classes"
                )
            x, y = file[args.x_key], file[args.y_key]
    except (ValueError, AttributeError, EOFError) as error:
        raise CommandError(f"--data {args.data}: not a .npz file of plain arrays ({error})") from error
    if y.ndim != 1 or len(x) != len(y) or len(y) == 0:
        raise CommandError(
            f"--data: x and y must hold the same number of samples, got {x.shape} and {y.shape}"
        )
    if not np.issubdtype(y.dtype, np.integer) or int(y.min()) < 0:
        raise CommandError(f"--data: y must hold classes 0, 1, ... as integers, got {y.dtype}")
    if np.issubdtype(x.dtype, np.integer) and args.scale is None:
        raise CommandError(
            f"--data: x is {x.dtype} from {x.min()} to {x.max()}; say --scale 255 to divide it by 255, "
            "or --scale 1 to use it as it is (eps and --clip are in the units after the division)"
        )
    if not (np.issubdtype(x.dtype, np.integer) or np.issubdtype(x.dtype, np.floating)):
        raise CommandError(f"--data: x must hold numbers, got {x.dtype}")
    if args.scale is not None and not (args.scale > 0 and math.isfinite(args.scale)):
        raise CommandError(f"--scale must be positive, got {args.scale}")
    samples = len(x) if args.samples is None else args.samples
    if not 1 <= samples <= len(x):
        raise CommandError(
            f"--samples must lie between 1 and the {len(x)} samples of the data, got {samples}"
        )
    inputs = torch.from_numpy(np.ascontiguousarray(x[:samples])).to(dtype)
    if args.scale is not None:
        inputs = inputs / args.scale
    if not bool(torch.isfinite(inputs).all()):
        raise CommandError("--data: x holds NaN or infinite values")
    if args.shape is not None:
        if math.prod(args.shape) != math.prod(inputs.shape[1:]):
            raise CommandError(
                f"--shape: {args.shape} does not fit samples of shape {list(inputs.shape[1:])}"
            )
        inputs = inputs.reshape(-1, *args.shape)
    return inputs, torch.from_numpy(y[:samples].astype(np.int64))


def check_fit(net: nn.Module, x: Tensor, y: Tensor) -> int:
    """Run the network on one sample; returns the number of classes."""
    with torch.no_grad():
        try:
            outputs = net(x[:1])
        except (RuntimeError, ValueError) as error:
            raise CommandError(
                f"the network does not accept samples of shape {list(x.shape[1:])} (--shape gives them "
                f"another): {error}"
            ) from error
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise CommandError(
            f"the network must give one score a class, [N, classes], got {list(outputs.shape)}"
        )
    if int(y.max()) >= outputs.shape[1]:
        raise CommandError(
            f"--data: y holds class {int(y.max())}, but the network has {outputs.shape[1]} outputs"
        )
    return int(outputs.shape[1])


def hash_tensors(named: Sequence[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in named:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resolve(reference: str) -> Any:
    """The function that ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION`` names; importing it runs its module."""
    module_name, colon, name = reference.rpartition(":")
    if not colon or not module_name or not name:
        raise CommandError(f"expected MODULE:FUNCTION or FILE.onnx, got {reference!r}")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            if spec is None or spec.loader is None or not Path(module_name).exists():
                raise CommandError(f"{reference}: there is no file {module_name}")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            try:
                module = importlib.import_module(module_name)
            finally:
                sys.path.remove("")
    except ModuleNotFoundError as error:
        raise CommandError(
            f"{reference}: {error} (looked in the present folder and the environment)"
        ) from error
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)  # type: ignore[assignment]
    if not callable(found):
        raise CommandError(f"{reference}: module {module_name} has no function {name}")
    return found
