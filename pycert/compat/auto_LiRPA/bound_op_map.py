"""Registration of operators by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pycert.activations import RegisteredActivation, register_activation

#: Activations that :func:`register_custom_op` has made, by the operator's name.
bound_op_map: dict[str, RegisteredActivation] = {}


def register_custom_op(
    op_name: str,
    bound_obj: Any,
    *,
    df: Callable[[Tensor], Tensor] | None = None,
    inflections: Sequence[float] = (),
) -> RegisteredActivation | None:
    """Makes an elementwise function an activation; a class with its own bounds is not needed here.

    A ``torch.autograd.Function`` whose ``forward`` consists of torch functions is traced through,
    whatever its ``symbolic`` says: registering a ``Bound`` subclass for it is accepted and does nothing.
    An elementwise function is given with its derivative, and goes to :func:`pycert.register_activation`.

    Args:
        op_name: as ``"custom::Name"``.
        bound_obj: a subclass of ``Bound`` (ignored), or the function, of one tensor.
        df: the function's derivative; with it, ``bound_obj`` is the function.
        inflections: where its curvature changes sign.

    Returns:
        The activation's layer, or None for a class.

    Raises:
        TypeError: neither a class nor a function with its derivative.
    """
    if isinstance(bound_obj, type):
        return None
    if not callable(bound_obj) or df is None:
        raise TypeError(
            "register_custom_op: give a Bound subclass (its operator is traced through, so nothing is needed), or an "
            "elementwise function with df= and inflections=, which goes to pycert.register_activation; operators "
            "that are not elementwise must be written with torch functions"
        )
    made = register_activation(bound_obj, df, inflections, name=op_name)
    bound_op_map[op_name] = made
    return made


def unregister_custom_op(op_name: str) -> None:
    """Forgets the name."""
    bound_op_map.pop(op_name, None)
