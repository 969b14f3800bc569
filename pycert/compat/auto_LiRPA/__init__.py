"""auto_LiRPA's interface on pycert's engine: existing scripts run with the import changed.

>>> from pycert.compat.auto_LiRPA import BoundedModule, BoundedTensor
>>> from pycert.compat.auto_LiRPA.perturbations import PerturbationLpNorm

Unchanged scripts, and packages that import ``auto_LiRPA`` themselves, run by
``python -m pycert.compat.auto_LiRPA script.py ...`` or after :func:`install`.
"""

from pycert.compat.auto_LiRPA.bound_general import BoundedModule
from pycert.compat.auto_LiRPA.bound_multi_gpu import BoundDataParallel
from pycert.compat.auto_LiRPA.bound_op_map import register_custom_op, unregister_custom_op
from pycert.compat.auto_LiRPA.bounded_tensor import BoundedParameter, BoundedTensor
from pycert.compat.auto_LiRPA.installing import install
from pycert.compat.auto_LiRPA.perturbations import (
    PerturbationL0Norm,
    PerturbationLinear,
    PerturbationLpNorm,
    PerturbationSynonym,
)
from pycert.compat.auto_LiRPA.wrapper import CrossEntropyWrapper, CrossEntropyWrapperMultiInput

#: The version of auto_LiRPA whose interface this is.
__version__ = "0.7.1"

__all__ = [
    "BoundDataParallel",
    "BoundedModule",
    "BoundedParameter",
    "BoundedTensor",
    "CrossEntropyWrapper",
    "CrossEntropyWrapperMultiInput",
    "PerturbationL0Norm",
    "PerturbationLinear",
    "PerturbationLpNorm",
    "PerturbationSynonym",
    "install",
    "register_custom_op",
    "unregister_custom_op",
]
