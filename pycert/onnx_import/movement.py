"""Conversion of operators that move elements."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from pycert.onnx_import import steps
from pycert.onnx_import.converter import MAX_ELEMENTS, Converter
from pycert.onnx_import.nodes import Array, Live, Node, Raw, Value, axis_of, converts, has_batch

# ---- the same order ---------------------------------------------------------------------------


@converts("Reshape")
def reshape(conv: Converter, node: Node) -> Value:
    """To a constant shape, 0 for a size of the input (unless allowzero), -1 for what is left."""
    value = node.live()
    target = [int(size) for size in node.given(1, "shape").reshape(-1)]
    if not node.attribute("allowzero", 0):
        target = [value.shape[i] if size == 0 else size for i, size in enumerate(target)]
    if target.count(-1) == 1:
        known = math.prod(size for size in target if size != -1)
        target[target.index(-1)] = math.prod(value.shape) // max(known, 1)
    if any(size < 0 for size in target):
        raise ValueError(f"shape {target} has a size below zero")
    return conv.reshape(node, value, tuple(target))


@converts("Flatten")
def flatten(conv: Converter, node: Node) -> Value:
    value = node.live()
    dims = len(value.shape)
    axis = int(node.attribute("axis", 1))
    axis = axis + dims if axis < 0 else axis
    if not 0 <= axis <= dims:
        raise ValueError(f"axis {axis} of a value of {dims} dimensions")
    shape = (math.prod(value.shape[:axis]), math.prod(value.shape[axis:]))
    if axis == 1 and has_batch(value.shape) and len(value.raw.sample) > 1:
        return conv.apply(node, nn.Flatten(), [value.raw], shape)
    return conv.reshape(node, value, shape)


@converts("Squeeze")
def squeeze(conv: Converter, node: Node) -> Value:
    value = node.live()
    axes = node.ints("axes", 1)
    dims = len(value.shape)
    gone = (
        [i for i in range(dims) if value.shape[i] == 1] if axes is None else [axis_of(a, dims) for a in axes]
    )
    if any(value.shape[i] != 1 for i in gone):
        raise ValueError(f"axes {axes} of {list(value.shape)} are not all 1")
    return conv.reshape(node, value, tuple(size for i, size in enumerate(value.shape) if i not in gone))


@converts("Unsqueeze")
def unsqueeze(conv: Converter, node: Node) -> Value:
    value = node.live()
    axes = node.ints("axes", 1) or []
    dims = len(value.shape) + len(axes)
    new = {axis_of(axis, dims) for axis in axes}
    if len(new) != len(axes):
        raise ValueError(f"axes {axes} name one twice")
    rest = iter(value.shape)
    return conv.reshape(node, value, tuple(1 if i in new else next(rest) for i in range(dims)))


# ---- other orders -----------------------------------------------------------------------------


@converts("Transpose")
def transpose(conv: Converter, node: Node) -> Value:
    value = node.live()
    dims = len(value.shape)
    order = [int(axis) for axis in node.attribute("perm") or range(dims)[::-1]]
    if sorted(order) != list(range(dims)):
        raise ValueError(f"perm {order} is no order of {dims} dimensions")
    raw, offset = conv.along(node, value, [] if order[0] == 0 else [0])
    moved = (0, *(axis + 1 for axis in order)) if offset else tuple(order)
    return conv.finish(node, conv.emit(node, steps.Permute(moved), [raw])[0], offset)


@converts("Concat")
def concat(conv: Converter, node: Node) -> Value:
    """Values and constants along one axis."""
    dims = len(next(part.shape for part in node.inputs if isinstance(part, Live)))
    axis = axis_of(int(node.attribute("axis")), dims)
    parts = [part for part in node.inputs if part is not None]
    if any(len(part.shape) != dims for part in parts):
        raise ValueError("parts of different numbers of dimensions")
    batched = axis != 0 and all(part.shape[0] == 1 for part in parts) and dims > 1
    offset = 0 if batched else 1
    raws: list[Raw] = []
    constants: list[torch.Tensor | None] = []
    for part in parts:
        if isinstance(part, Live):
            raws.append(part.raw if batched else conv.whole(node, part))
            constants.append(None)
        else:
            constants.append(conv.tensor(part[0] if batched else part))
    raw, _ = conv.emit(node, steps.Concat(axis + offset, constants), raws)
    return conv.finish(node, raw, offset)


@converts("Split")
def split(conv: Converter, node: Node) -> Value | list[Value]:
    value = node.live()
    axis = axis_of(int(node.attribute("axis", 0)), len(value.shape))
    size, count = value.shape[axis], len(node.outputs)
    sizes = node.ints("split", 1)
    if sizes is None and int(node.attribute("num_outputs", count)) != count:
        raise ValueError(f"num_outputs={node.attribute('num_outputs')} with {count} outputs")
    if sizes is None:
        part = -(-size // count)
        sizes = [min(part, size - start) for start in range(0, size, max(part, 1))]
    if len(sizes) != count or sum(sizes) != size or min(sizes) < 0:
        raise ValueError(f"split {sizes} of {size} elements into {count} outputs")
    raw, offset = conv.along(node, value, [axis])
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    narrows = [steps.Narrow(axis + offset, start, length) for start, length in zip(starts, sizes)]
    return [conv.finish(node, conv.emit(node, narrow, [raw])[0], offset) for narrow in narrows]


def pick(conv: Converter, node: Node, raw: Raw, dim: int, index: Array) -> Raw:
    """Elements ``index`` along dimension ``dim`` of the module; neighbours are a view."""
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        if len(index) == raw.sample[dim - 1]:
            return raw
        return conv.emit(node, steps.Narrow(dim, int(index[0]), len(index)), [raw])[0]
    return conv.emit(node, steps.Select(dim, torch.from_numpy(index.astype(np.int64))), [raw])[0]


@converts("Slice")
def slices(conv: Converter, node: Node) -> Value:
    """Starts, ends and steps by the rules of Python, where runtimes agree."""
    value = node.live()
    dims = len(value.shape)
    starts, ends = node.ints("starts", 1), node.ints("ends", 2)
    if starts is None or ends is None or len(starts) != len(ends):
        raise ValueError(f"starts {starts} and ends {ends}")
    axes = [axis_of(axis, dims) for axis in node.ints("axes", 3) or range(len(starts))]
    by = node.ints("steps", 4) or [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, by):
        if step == 0:
            raise ValueError("a step of 0")
        if step < 0 and (end in (2**31 - 1, 2**63 - 1) or start < -value.shape[axis]):
            node.refuse(f"backwards from {start} to {end} of {value.shape[axis]} elements",
                        "start at an element, and end at the least integer for the first")  # fmt: skip
    picked = {
        axis: np.arange(value.shape[axis])[start:end:step]
        for axis, start, end, step in zip(axes, starts, ends, by)
    }
    picked = {
        axis: index
        for axis, index in picked.items()
        if not np.array_equal(index, np.arange(value.shape[axis]))
    }
    raw, offset = conv.along(node, value, list(picked))
    for axis, index in picked.items():
        raw = pick(conv, node, raw, axis + offset, index)
    return conv.finish(node, raw, offset)


@converts("Gather")
def gather(conv: Converter, node: Node) -> Value:
    value, index = node.live(), node.given(1, "indices")
    axis = axis_of(int(node.attribute("axis", 0)), len(value.shape))
    size = value.shape[axis]
    if index.size and not (-size <= index.min() and index.max() < size):
        raise ValueError(f"indices from {index.min()} to {index.max()} into {size} elements")
    raw, offset = conv.along(node, value, [axis])
    raw = pick(conv, node, raw, axis + offset, index.reshape(-1) % size)
    shape = conv.back(raw, offset)
    shape = (*shape[:axis], *index.shape, *shape[axis + 1 :])
    return conv.finish(node, conv.reshaped(node, raw, shape if offset else shape[1:]), offset)


@converts("Pad")
def pad(conv: Converter, node: Node) -> Value:
    """With a constant, or with elements of the value; negative pads crop."""
    value = node.live()
    dims, mode = len(value.shape), node.attribute("mode", "constant")
    given = node.ints("pads", 1) or []
    axes = [axis_of(axis, dims) for axis in node.ints("axes", 3) or range(dims)]
    if len(given) != 2 * len(axes):
        raise ValueError(f"pads {given} for {len(axes)} axes")
    pads = {axis: (given[i], given[i + len(axes)]) for i, axis in enumerate(axes)}
    pads = {axis: pair for axis, pair in pads.items() if pair != (0, 0)}
    if any(max(abs(before), abs(behind)) > MAX_ELEMENTS for before, behind in pads.values()):
        raise ValueError(f"pads {given} are too large")
    fill = node.constant(2, "value")
    number = float(node.attribute("value", 0.0) if fill is None else fill.reshape(-1)[0])
    if mode == "constant" and not math.isfinite(number):
        node.refuse(f"with {number}", "pad with a finite number")
    raw, offset = conv.along(node, value, list(pads))
    if mode == "constant":
        order = [pads.get(axis, (0, 0)) for axis in range(dims - 1, -offset, -1)] if pads else []
        flat = tuple(number for pair in order for number in pair)
        raw = conv.emit(node, steps.Pad(flat, number), [raw])[0] if flat else raw
        return conv.finish(node, raw, offset)
    if mode not in ("reflect", "edge", "wrap") or any(min(pair) < 0 for pair in pads.values()):
        node.refuse(f"with mode {mode!r}", "use constant, reflect, edge or wrap, with pads from 0 on")
    if mode == "reflect" and any(max(pair) >= value.shape[axis] for axis, pair in pads.items()):
        raise ValueError(f"pads {given} reflect more than there is")
    for axis, pair in pads.items():
        index = np.pad(np.arange(value.shape[axis]), pair, mode=mode)  # type: ignore[call-overload]
        raw = pick(conv, node, raw, axis + offset, index)
    return conv.finish(node, raw, offset)


@converts("Expand")
def expand(conv: Converter, node: Node) -> Value:
    value = node.live()
    shape = tuple(
        np.broadcast_shapes(value.shape, tuple(int(size) for size in node.given(1, "shape").reshape(-1)))
    )
    if shape == value.shape:
        return value
    if has_batch(value.shape) and has_batch(shape) and len(shape) == len(value.shape):
        return conv.apply(node, steps.Expand(shape[1:]), [value.raw], shape)
    raw, _ = conv.emit(node, steps.Expand(shape), [conv.whole(node, value, len(shape))])
    return conv.finish(node, raw, 1)


@converts("Tile")
def tile(conv: Converter, node: Node) -> Value:
    value = node.live()
    repeats = [int(count) for count in node.given(1, "repeats").reshape(-1)]
    if len(repeats) != len(value.shape):
        raise ValueError(f"repeats {repeats} of a value of {len(value.shape)} dimensions")
    raw, offset = conv.along(node, value, [] if repeats[0] == 1 else [0])
    module = steps.Tile(tuple(repeats if offset else repeats[1:]))
    return conv.finish(node, conv.emit(node, module, [raw])[0], offset)


@converts("DepthToSpace", "SpaceToDepth")
def blocks(conv: Converter, node: Node) -> Value:
    """Channels to blocks of space and back, as reshape, transpose, reshape."""
    value, size = node.live(), int(node.attribute("blocksize"))
    if len(value.shape) != 4 or not has_batch(value.shape):
        node.refuse(f"of a value of shape {list(value.shape)}", "it needs one image [1, C, H, W] per sample")
    channels, height, width = value.shape[1:]
    if node.op == "SpaceToDepth":
        split = (channels, height // size, size, width // size, size)
        order, merged = (0, 3, 5, 1, 2, 4), (channels * size * size, height // size, width // size)
    else:
        rest = channels // size**2
        crd = node.attribute("mode", "DCR") == "CRD"
        split = (rest, size, size, height, width) if crd else (size, size, rest, height, width)
        order = (0, 1, 4, 2, 5, 3) if crd else (0, 3, 4, 1, 5, 2)
        merged = (rest, height * size, width * size)
    raw = conv.reshaped(node, value.raw, split)
    raw, _ = conv.emit(node, steps.Permute(order), [raw])
    raw = conv.reshaped(node, raw, merged)
    return Live((1, *merged), raw)
