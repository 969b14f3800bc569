"""Conversion of resizing to the nearest element."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pycert.onnx_import.converter import Converter
from pycert.onnx_import.movement import pick
from pycert.onnx_import.nodes import Array, Live, Node, Value, axis_of, converts

_CLOSE = 1e-4  # to a step of the rounding, where runtimes in float32 may take the other element
_ROUNDED: dict[str, Callable[[Array], Array]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}


@converts("Resize", "Upsample")
def resize(conv: Converter, node: Node) -> Value:
    """Each axis by an index per element; only mode "nearest" moves elements."""
    value = node.live()
    dims, mode = len(value.shape), node.attribute("mode", "nearest")
    if mode != "nearest":
        node.refuse(f"with mode {mode!r}", "use nearest, or ConvTranspose")
    if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        node.refuse("that keeps an aspect ratio", "name the sizes")
    axes = [axis_of(axis, dims) for axis in node.attribute("axes") or range(dims)]
    scales, sizes = _wanted(node, value, axes)
    picked = {}
    for axis, scale, size in zip(axes, scales, sizes):
        index = _nearest(node, value.shape[axis], scale, size)
        if not np.array_equal(index, np.arange(value.shape[axis])):
            picked[axis] = index
    raw, offset = conv.along(node, value, list(picked))
    for axis, index in picked.items():
        raw = pick(conv, node, raw, axis + offset, index)
    return conv.finish(node, raw, offset)


def _wanted(node: Node, value: Live, axes: list[int]) -> tuple[list[float], list[int]]:
    """Scales and sizes of the axes, by whichever is given."""
    old = node.op == "Upsample" or node.opset < 11
    found = node.constant(1 if old else 2, "scales")
    scales = node.attribute("scales") if found is None or not found.size else found.reshape(-1)
    given = None if old else node.constant(3, "sizes")
    if scales is None and given is not None:
        sizes = [int(size) for size in given.reshape(-1)]
        scales = [size / value.shape[axis] for axis, size in zip(axes, sizes)]
    elif scales is not None:
        scales = [float(scale) for scale in scales]
        if not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"scales must be positive numbers, got {scales}")
        sizes = [math.floor(value.shape[axis] * scale) for axis, scale in zip(axes, scales)]
    else:
        raise ValueError("it needs scales or sizes")
    if len(scales) != len(axes) or min(sizes) < 1:
        raise ValueError(f"sizes {sizes} for {len(axes)} axes")
    return scales, sizes


def _nearest(node: Node, before: int, scale: float, size: int) -> Array:
    """Which of ``before`` elements each of ``size`` is."""
    form = node.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = node.attribute("nearest_mode", "round_prefer_floor")
    if node.op == "Upsample" or node.opset < 11:
        form, rounding = "asymmetric", "floor"
        agreed = scale == int(scale)
    else:
        agreed = form in ("asymmetric", "half_pixel") or abs(before * scale - size) < _CLOSE
    if not agreed:
        node.refuse(
            f"by {scale:.4g} of {before} elements", "use a scale of a whole number: runtimes disagree"
        )
    x = np.arange(size, dtype=np.float64)
    if form == "asymmetric":
        place = x / scale
    elif form == "half_pixel" or (form == "pytorch_half_pixel" and size > 1):
        place = (x + 0.5) / scale - 0.5
    elif form == "pytorch_half_pixel" or (form == "align_corners" and size == 1):
        place = 0 * x
    elif form == "align_corners":
        place = x * (before - 1) / (size - 1)
    else:
        node.refuse(
            f"with coordinate_transformation_mode {form!r}", "use asymmetric, half_pixel or align_corners"
        )
    if rounding not in _ROUNDED:
        raise ValueError(f"nearest_mode must be one of {', '.join(_ROUNDED)}, got {rounding!r}")
    edges = place if rounding in ("floor", "ceil") else place - 0.5
    close = np.abs(edges - np.round(edges))
    if size != before and bool(((close < _CLOSE) & (close != 0)).any()):
        node.refuse(
            f"by {scale:.4g} of {before} elements", "use a scale of a whole number: runtimes disagree"
        )
    return np.clip(_ROUNDED[rounding](place), 0, before - 1).astype(np.int64)
