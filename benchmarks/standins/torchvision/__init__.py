"""Stands in for torchvision where there is none, so that scripts which download data run offline.

``datasets.MNIST`` and ``datasets.CIFAR10`` read ``mnist.npz``, ``cifar10_test1000.npz`` and ``cifar10_train.npz``
from the folder in ``$PYCERT_STANDIN_DATA``; ``$PYCERT_STANDIN_SIZE`` cuts every data set. Only what
auto_LiRPA's examples and CTRAIN use is here. Not part of pycert.
"""

from . import datasets, transforms

__all__ = ["datasets", "transforms"]
