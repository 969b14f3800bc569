"""The networks that are measured, from fixed seeds.

Shapes as in the literature on certified training and in public verification benchmarks: a fully connected
network for MNIST, the small, medium and large convolutional networks used with IBP on CIFAR-10, the
seven-layer network with batch normalisation, and two residual networks without it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Fully connected ReLU network with the given layer sizes, input first."""
    layers: list[nn.Module] = [nn.Flatten()]
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet(
    shape: tuple[int, int, int],
    convs: Sequence[tuple[int, int, int, int]],
    hidden: Sequence[int],
    classes: int = 10,
    norm: bool = False,
) -> nn.Sequential:
    """Convolutions ``(channels, kernel, stride, padding)``, dense layers, ReLU after all but the last."""
    channels = shape[0]
    layers: list[nn.Module] = []
    for out, kernel, stride, padding in convs:
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding))
        layers += [nn.BatchNorm2d(out), nn.ReLU()] if norm else [nn.ReLU()]
        channels = out
    layers.append(nn.Flatten())
    with torch.no_grad():
        width = nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).shape[1]
    for out in hidden:
        layers.append(nn.Linear(width, out))
        layers += [nn.BatchNorm1d(out), nn.ReLU()] if norm else [nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Linear(width, classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, then ReLU: ``relu(residual(x) + shortcut(x))``."""

    def __init__(self, channels: int, out: int, stride: int, norm: bool = False) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(out), nn.BatchNorm2d(out)] if norm else [nn.Identity(), nn.Identity()]
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=not norm), norms[0], nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=not norm), norms[1],
        )  # fmt: skip
        same = stride == 1 and channels == out
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


def resnet(width: int, stages: int) -> nn.Sequential:
    """Residual network without batch normalisation: two blocks a stage, then 100 hidden units."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1), nn.ReLU()]
    channels = width
    for _ in range(stages):
        layers += [ResidualBlock(channels, 2 * width, 2), ResidualBlock(2 * width, 2 * width, 1)]
        channels = 2 * width
    side = 16 // 2**stages
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels * side**2, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def resnet20() -> nn.Sequential:
    """The 20-layer CIFAR-10 network of He et al., "Deep Residual Learning" (CVPR 2016), section 4.2."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for out in (16, 32, 64):
        for block in range(3):
            stride = 2 if block == 0 and out > 16 else 1
            layers.append(ResidualBlock(channels, out, stride, norm=True))
            channels = out
    return nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10))


@dataclasses.dataclass(frozen=True)
class Net:
    """A network to measure: its input, the radius it is bounded at, and the batches it is run with."""

    shape: tuple[int, ...]
    eps: float
    build: Callable[[], nn.Module]
    batches: tuple[int, ...] = (1, 32)


_WIDE = [(64, 3, 1, 1), (64, 3, 1, 1), (128, 3, 2, 1), (128, 3, 1, 1), (128, 3, 1, 1)]
_MEDIUM = [(32, 3, 1, 0), (32, 4, 2, 0), (64, 3, 1, 0), (64, 4, 2, 0)]

NETS = {
    "mlp_tiny": Net((1, 4, 4), 0.02, lambda: mlp([16, 16, 10]), (1,)),
    "mlp_784_256x5": Net(MNIST, 0.02, lambda: mlp([784] + [256] * 5 + [10]), (1, 256)),
    "dm_small": Net(CIFAR, 2 / 255, lambda: convnet(CIFAR, [(16, 4, 2, 0), (32, 4, 1, 0)], [100])),
    "dm_medium": Net(CIFAR, 2 / 255, lambda: convnet(CIFAR, _MEDIUM, [512, 512])),
    "dm_large": Net(CIFAR, 2 / 255, lambda: convnet(CIFAR, _WIDE, [512])),
    "cnn7_bn": Net(CIFAR, 2 / 255, lambda: convnet(CIFAR, _WIDE, [512], norm=True)),
    "resnet2b": Net(CIFAR, 1 / 255, lambda: resnet(8, 1)),
    "resnet4b": Net(CIFAR, 1 / 255, lambda: resnet(16, 2)),
}
STANDARD = tuple(name for name in NETS if name != "mlp_tiny")

#: (net, batch) where every library's full CROWN needs minutes or tens of gigabytes; tried only on request.
TOO_BIG_FOR_CROWN = frozenset(
    [("dm_large", 1), ("dm_large", 32), ("cnn7_bn", 1), ("cnn7_bn", 32), ("dm_medium", 32), ("resnet4b", 32)]
)


def make(
    name: str, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[nn.Module, Tensor, float]:
    """Network in evaluation mode, inputs in [0, 1] of shape ``[batch, *shape]``, and the radius."""
    if name not in NETS:
        raise ValueError(f"net: got {name!r}, known are {', '.join(NETS)}")
    torch.manual_seed(seed)
    net = NETS[name].build().to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.rand((batch, *NETS[name].shape), generator=generator).to(dtype)
    return net, x, NETS[name].eps
