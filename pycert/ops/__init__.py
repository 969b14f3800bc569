"""Single operators, through torch's dispatcher; importing :mod:`pycert` registers them."""

from pycert.ops import shapes as _shapes  # noqa: F401 - registers what fake tensors need
from pycert.ops.activation_hull import activation_hull, maximum_hull
from pycert.ops.backsub import concretize
from pycert.ops.interval import interval_conv2d, interval_linear
from pycert.ops.krelu import krelu_hull, octahedral_directions, octahedron_hull
from pycert.ops.norm import PowerNorm, masked_norm, power_norm
from pycert.ops.relaxation import (
    ActivationLines,
    ReluRelaxation,
    activation_interval,
    activation_lines,
    relu_relaxation,
)

__all__ = [
    "ActivationLines",
    "PowerNorm",
    "ReluRelaxation",
    "activation_hull",
    "activation_interval",
    "activation_lines",
    "concretize",
    "interval_conv2d",
    "interval_linear",
    "masked_norm",
    "maximum_hull",
    "power_norm",
    "krelu_hull",
    "octahedral_directions",
    "octahedron_hull",
    "relu_relaxation",
]
