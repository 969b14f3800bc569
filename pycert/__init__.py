"""Provable bounds on neural networks: interval, linear and Lipschitz bounds, sound in floating point.

>>> bm = pycert.BoundedModule(net, torch.empty(1, 1, 28, 28))
>>> bounds = bm.bound(pycert.LpBall(x, eps=0.1, clip=(0, 1)), method="crown")
"""

from pycert._build_check import check_build

check_build()

# torch must be loaded before the compiled module, which the check has done.
from pycert import _C as _C  # noqa: E402
from pycert import attacks, nn, ops  # noqa: E402
from pycert._version import __version__  # noqa: E402
from pycert.activations import register_activation  # noqa: E402
from pycert.bounded import BoundedModule, Bounds, Cost, LinearBounds, margins  # noqa: E402
from pycert.certification import CertifyResult, certify  # noqa: E402
from pycert.errors import UnsupportedOperator  # noqa: E402
from pycert.regions import Box, LpBall  # noqa: E402

__all__ = [
    "BoundedModule",
    "Bounds",
    "Box",
    "CertifyResult",
    "Cost",
    "LinearBounds",
    "LpBall",
    "UnsupportedOperator",
    "__version__",
    "attacks",
    "certify",
    "margins",
    "nn",
    "ops",
    "register_activation",
]
