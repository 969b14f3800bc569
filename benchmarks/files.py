"""Data sets and trained networks from outside the repository, and a small network that is trained here."""

from __future__ import annotations

import itertools
import os
import pathlib

import numpy as np
import torch
from torch import Tensor, nn

import pycert

ROOTS = [pathlib.Path(__file__).resolve().parent.parent.parent / "shared"]


class MissingFileError(FileNotFoundError):
    """A data set or network was not found; says where it was looked for."""


def locate(name: str) -> pathlib.Path:
    """Path of ``data/mnist.npz``, ``nets/paradox/mnist_FC_box.pt`` and the like.

    Looked for under ``$PYCERT_DATA``, if set, with and without the first folder of ``name``, then in
    ``shared`` beside the checkout.

    Raises:
        MissingFileError: it is nowhere.
    """
    roots = [pathlib.Path(os.environ["PYCERT_DATA"])] if os.environ.get("PYCERT_DATA") else []
    inner = pathlib.Path(*pathlib.Path(name).parts[1:])
    for root in [*roots, *ROOTS]:
        for path in (root / name, root / inner):
            if path.is_file():
                return path
    raise MissingFileError(
        f"{name} not found; set PYCERT_DATA to the folder that holds {name.split('/', maxsplit=1)[0]}/"
    )


def mnist_test(count: int = 10000) -> tuple[Tensor, Tensor]:
    """The first ``count`` MNIST test images ``[count, 1, 28, 28]`` in [0, 1], float32, and their labels."""
    with np.load(locate("data/mnist.npz"), allow_pickle=False) as arrays:
        x, y = arrays["x_test"][:count], arrays["y_test"][:count]
    return torch.from_numpy(x).reshape(-1, 1, 28, 28).float() / 255, torch.from_numpy(y).long()


def paradox_network(name: str) -> nn.Sequential:
    """A network of Jovanovic et al., "On the Paradox of Certified Training" (TMLR 2022).

    ``name`` is ``CONV_`` or ``FC_`` and the relaxation it was trained with, as ``CONV_box``.
    Takes MNIST pixels in [0, 1]; the normalisation is its first layer.
    """
    path = locate(f"nets/paradox/mnist_{name}.pt")
    state = torch.load(path, map_location="cpu", weights_only=True)
    mean, sigma = state.pop("layers.0.mean"), state.pop("layers.0.sigma")
    normalize = pycert.nn.Normalize(mean.flatten(), sigma.flatten())
    if name.startswith("CONV"):
        layers = [
            normalize,
            nn.Conv2d(1, 16, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            *dense([16 * 14 * 14, 100, 10]),
        ]
    else:
        layers = [normalize, nn.Flatten(), *dense([784, 400, 200, 100, 100, 10])]
    net = nn.Sequential(*layers)
    renamed = {key.removeprefix("layers."): value for key, value in state.items()}
    net.load_state_dict({**renamed, **{f"0.{key}": value for key, value in normalize.state_dict().items()}})
    return net.eval()


def dense(sizes: list[int]) -> list[nn.Module]:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return layers[:-1]


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's digits ``[N, 1, 8, 8]`` in [0, 1] with labels, as (training, test); a seeded split."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).unsqueeze(1).float() / 16
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    return (x[train], y[train]), (x[test], y[test])


def digits_network(eps: float = 0.05, epochs: int = 40) -> nn.Sequential:
    """A small convolutional network trained on the digits at ``eps``: interval bounds, then CROWN-IBP."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, *dense([32 * 4 * 4, 64, 10]))
    recipe = pycert.train.Recipe(eps=eps, epochs=epochs, ramp_epochs=epochs // 2)
    pycert.train.train(net, digits()[0], recipe, progress=False)
    return net.eval()
