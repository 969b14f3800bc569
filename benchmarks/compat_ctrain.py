"""Certified training by a wrapper of CTRAIN on a part of MNIST.

``compat_launch.py [--here] compat_ctrain.py ibp|crown-ibp``.

Prints the loss of every epoch, as CTRAIN does, and at the end the sum of the absolute weights and interval bounds.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch
import torchvision.datasets
import torchvision.transforms
from torch import nn

for module, names in (
    (torchvision.transforms, "RandomRotation RandomResizedCrop RandomAffine Resize CenterCrop"),
    (torchvision.datasets, "GTSRB ImageFolder"),
):
    for name in names.split():  # CTRAIN imports them for other data sets
        if not hasattr(module, name):
            setattr(module, name, mock.MagicMock())

from auto_LiRPA import BoundedTensor, PerturbationLpNorm  # noqa: E402
from CTRAIN.data_loaders import load_mnist  # noqa: E402
from CTRAIN.model_wrappers import CrownIBPModelWrapper, ShiIBPModelWrapper  # noqa: E402


class Net(nn.Module):
    """Two convolutions and two linear layers; CTRAIN reads ``layers``.

    No biases before BatchNorm: their gradients are rounding errors, which Adam takes for steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
            nn.Linear(784, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


torch.manual_seed(0)
train, test = load_mnist(val_split=False, batch_size=64)
options = {
    "model": Net(), "input_shape": [1, 28, 28], "eps": 0.1, "num_epochs": 3, "warm_up_epochs": 1,
    "ramp_up_epochs": 2, "device": "cpu",
}  # fmt: skip
if sys.argv[1] == "ibp":
    wrapper = ShiIBPModelWrapper(lr_decay_kwargs={"milestones": (3,), "gamma": 0.2}, **options)
else:
    wrapper = CrownIBPModelWrapper(loss_fusion=False, **options)
wrapper.train_model(train)
weights = sum(value.detach().double().abs().sum() for value in wrapper.bounded_model.parameters())
print(f"sum of absolute weights: {float(weights):.2f}")
x, _ = next(iter(test))
x = x[:8]
module = wrapper.bounded_model
module.eval()
region = PerturbationLpNorm(x_L=x - 0.02, x_U=x + 0.02)
with torch.no_grad():
    lower, upper = module.compute_bounds(x=(BoundedTensor(x, region),), method="IBP")
for low, high in zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True):
    print(f"{low:.4f} <= f <= {high:.4f}")
