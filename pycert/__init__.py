"""Provable bounds on neural networks: interval, linear and Lipschitz bounds, sound in floating point.

>>> bm = pycert.BoundedModule(net, torch.empty(1, 1, 28, 28))
>>> bounds = bm.bound(pycert.LpBall(x, eps=0.1, clip=(0, 1)), method="crown")
"""

from pycert._build_check import check_build

check_build()

# torch must be loaded before the compiled module, which the check has done.
from pycert import _C as _C
from pycert import _cuda_check as _cuda_check
from pycert import attacks, krelu, nn, ops, plot, train
from pycert._version import __version__
from pycert.activations import register_activation
from pycert.bounded import BoundedModule, Bounds, Cost, LinearBounds, margins
from pycert.certification import CertifyResult, certify
from pycert.errors import UnsupportedOperator
from pycert.onnx_import import OnnxNetwork, load_onnx
from pycert.profiling import profile
from pycert.regions import Box, LpBall

from pycert import lipschitz  # isort: skip - it needs the names above

__all__ = [
    "BoundedModule",
    "Bounds",
    "Box",
    "CertifyResult",
    "Cost",
    "LinearBounds",
    "LpBall",
    "OnnxNetwork",
    "UnsupportedOperator",
    "__version__",
    "attacks",
    "certify",
    "lipschitz",
    "krelu",
    "load_onnx",
    "margins",
    "nn",
    "ops",
    "plot",
    "profile",
    "register_activation",
    "train",
]
