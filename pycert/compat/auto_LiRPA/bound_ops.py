"""All classes of :mod:`pycert.compat.auto_LiRPA.operators`, as scripts import them."""

from pycert.compat.auto_LiRPA.operators import *  # noqa: F403
from pycert.compat.auto_LiRPA.operators.s_shaped import SigmoidGradOp, TanhGradOp  # noqa: F401
