"""Local and global Lipschitz bounds of networks: :func:`local_bound`, :func:`global_bound`, :func:`certified_radius`;
bounds of Jacobians: :func:`jacobian_bound`.

docs/lipschitz.md has the method, the proofs and a guide to what to use when. ``bound``, ``margins`` and
``certify`` take ``method="lipschitz"``.
"""

from pycert.lipschitz.bounds import GlobalBound, LayerNorm, LipschitzBound, global_bound, local_bound
from pycert.lipschitz.jacobian import JacobianBound, jacobian_bound
from pycert.lipschitz.radius import certified_radius

__all__ = [
    "GlobalBound",
    "JacobianBound",
    "LayerNorm",
    "LipschitzBound",
    "certified_radius",
    "global_bound",
    "jacobian_bound",
    "local_bound",
]
