"""Lowering of average and maximum pooling."""

from __future__ import annotations

from typing import Any

import torch

from pycert.graph.convolution import from_image, image, pair
from pycert.graph.elementwise import div
from pycert.graph.tracer import Traced, Tracer, lowers

Pair = tuple[int, int]


@lowers("avg_pool1d")
def avg_pool1d(tracer: Tracer, input: Traced, kernel_size: Any, stride: Any = None, padding: Any = 0,
               ceil_mode: bool = False, count_include_pad: bool = True) -> Traced:  # fmt: skip
    return _avg_pool(tracer, 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


@lowers("avg_pool2d")
def avg_pool2d(tracer: Tracer, input: Traced, kernel_size: Any, stride: Any = None, padding: Any = 0,
               ceil_mode: bool = False, count_include_pad: bool = True,
               divisor_override: int | None = None) -> Traced:  # fmt: skip
    return _avg_pool(
        tracer, 2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def _avg_pool(
    tracer: Tracer,
    dims: int,
    input: Traced,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Traced:
    kernel, stride, padding = _windows(tracer, "avg_pool", dims, input, kernel_size, stride, padding)
    node = image(tracer, input, dims)
    shape = _pooled(tracer, node, kernel, stride, padding, (1, 1), ceil_mode)
    result = tracer.emit(
        "avg_pool", (node,), shape, kernel=kernel, stride=stride, padding=padding, ceil_mode=bool(ceil_mode),
        count_include_pad=bool(count_include_pad), divisor=int(divisor or 0),
    )  # fmt: skip
    return from_image(tracer, result, input, dims)


@lowers("max_pool1d")
def max_pool1d(tracer: Tracer, input: Traced, kernel_size: Any, stride: Any = None, padding: Any = 0,
               dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False) -> Traced:  # fmt: skip
    return _max_pool(tracer, 1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


@lowers("max_pool2d")
def max_pool2d(tracer: Tracer, input: Traced, kernel_size: Any, stride: Any = None, padding: Any = 0,
               dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False) -> Traced:  # fmt: skip
    return _max_pool(tracer, 2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _max_pool(
    tracer: Tracer,
    dims: int,
    input: Traced,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    return_indices: bool,
) -> Traced:
    if return_indices:
        tracer.refuse("max_pool with return_indices=True", "leave the indices out")
    kernel, stride, padding = _windows(tracer, "max_pool", dims, input, kernel_size, stride, padding)
    dilation = pair(dilation, dims, 1)
    node = image(tracer, input, dims)
    shape = _pooled(tracer, node, kernel, stride, padding, dilation, ceil_mode)
    result = tracer.emit(
        "max_pool", (node,), shape, kernel=kernel, stride=stride, padding=padding, dilation=dilation,
        ceil_mode=bool(ceil_mode),
    )  # fmt: skip
    return from_image(tracer, result, input, dims)


def _windows(
    tracer: Tracer, name: str, dims: int, input: Traced, kernel_size: Any, stride: Any, padding: Any
) -> tuple[Pair, Pair, Pair]:
    if input.dim() not in (dims + 1, dims + 2):
        tracer.refuse(
            f"{name}{dims}d of a value of {input.dim()} dimensions, batch included",
            f"give it {dims + 2}: batch, channels and {dims} of space",
        )
    kernel = pair(kernel_size, dims, 1)
    given = stride is not None and stride != [] and stride != ()
    stride = pair(stride, dims, 1) if given else kernel
    padding = pair(padding, dims, 0)
    if any(2 * p > k for p, k in zip(padding, kernel)):
        where = tracer.path or "network"
        raise ValueError(
            f"{where}: {name} needs padding of at most half the kernel, got {padding} for {kernel}"
        )
    return kernel, stride, padding


def _pooled(
    tracer: Tracer, node: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[int, int, int]:
    """The shape after pooling, by the rule of torch: with ceil_mode no window starts behind the left padding."""
    channels, *size = tracer.shape(node)
    out = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation):
        count = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
        out.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)
    if min(out) <= 0:
        raise ValueError(
            f"{tracer.path or 'network'}: the window {kernel} is larger than the padded input {size}"
        )
    return channels, out[0], out[1]


# ---- adaptive pooling -------------------------------------------------------------------------


@lowers("adaptive_avg_pool1d")
def adaptive_avg_pool1d(tracer: Tracer, input: Traced, output_size: Any) -> Traced:
    return _adaptive_avg_pool(tracer, 1, input, output_size)


@lowers("adaptive_avg_pool2d")
def adaptive_avg_pool2d(tracer: Tracer, input: Traced, output_size: Any) -> Traced:
    return _adaptive_avg_pool(tracer, 2, input, output_size)


def _adaptive_avg_pool(tracer: Tracer, dims: int, input: Traced, output_size: Any) -> Traced:
    """A plain pool where the windows are equal, else a product with a 0-1 matrix and division by the counts."""
    size, out = _adaptive_sizes(tracer, "adaptive_avg_pool", dims, input, output_size)
    if all(n % o == 0 for n, o in zip(size, out)):
        kernel = tuple(n // o for n, o in zip(size, out))[2 - dims :]
        return _avg_pool(tracer, dims, input, kernel, None, 0, False, True, None)
    windows = torch.kron(_windows_of(size[0], out[0]), _windows_of(size[1], out[1]))
    node = image(tracer, input, dims)
    channels = tracer.shape(node)[0]
    flat = tracer.reshape(node, (channels, size[0] * size[1]))
    slot = tracer.slot(windows)
    sums = tracer.wrap(tracer.emit("linear", (flat,), (channels, out[0] * out[1]), (slot, -1), helper=True))
    means = div(tracer, sums, windows.sum(1))
    result = tracer.reshape(tracer.node(means), (channels, *out))
    return from_image(tracer, result, input, dims)


def _windows_of(size: int, out: int) -> torch.Tensor:
    """0-1 matrix ``[out, size]`` of the windows that adaptive pools use, float64."""
    rows = torch.zeros(out, size, dtype=torch.float64, device="cpu")
    for row in range(out):
        rows[row, row * size // out : -((-(row + 1) * size) // out)] = 1
    return rows


@lowers("adaptive_max_pool1d")
def adaptive_max_pool1d(
    tracer: Tracer, input: Traced, output_size: Any, return_indices: bool = False
) -> Traced:
    return _adaptive_max_pool(tracer, 1, input, output_size, return_indices)


@lowers("adaptive_max_pool2d")
def adaptive_max_pool2d(
    tracer: Tracer, input: Traced, output_size: Any, return_indices: bool = False
) -> Traced:
    return _adaptive_max_pool(tracer, 2, input, output_size, return_indices)


def _adaptive_max_pool(
    tracer: Tracer, dims: int, input: Traced, output_size: Any, return_indices: bool
) -> Traced:
    size, out = _adaptive_sizes(tracer, "adaptive_max_pool", dims, input, output_size)
    kernel = tuple(n // o for n, o in zip(size, out))
    if not any(n % o for n, o in zip(size, out)):
        return _max_pool(tracer, dims, input, kernel[2 - dims :], None, 0, 1, False, return_indices)
    if return_indices:
        tracer.refuse("max_pool with return_indices=True", "leave the indices out")
    return _unequal_max_pool(tracer, dims, input, size, out)


def _unequal_max_pool(tracer: Tracer, dims: int, input: Traced, size: Pair, out: Pair) -> Traced:
    """Every window as a row of its elements, the smaller ones with their last element again."""
    rows, columns = (
        [torch.arange(r * n // o, -((-(r + 1) * n) // o), device="cpu") for r in range(o)]
        for n, o in zip(size, out)
    )
    places = [(row[:, None] * size[1] + column).flatten() for row in rows for column in columns]
    widest = max(len(place) for place in places)
    places = [torch.cat([place, place[-1:].expand(widest - len(place))]) for place in places]
    node = image(tracer, input, dims)
    channels = tracer.shape(node)[0]
    index = torch.stack(places) + size[0] * size[1] * torch.arange(channels, device="cpu")[:, None, None]
    windows = tracer.gather(node, index, (1, channels * len(places), widest))
    result = tracer.emit(
        "max_pool", (windows,), (1, channels * len(places), 1), kernel=(1, widest), stride=(1, widest),
        padding=(0, 0), dilation=(1, 1), ceil_mode=False,
    )  # fmt: skip
    return from_image(tracer, tracer.reshape(result, (channels, *out)), input, dims)


def _adaptive_sizes(
    tracer: Tracer, name: str, dims: int, input: Traced, output_size: Any
) -> tuple[Pair, Pair]:
    if input.dim() not in (dims + 1, dims + 2):
        tracer.refuse(f"{name}{dims}d of a value of {input.dim()} dimensions, batch included")
    size = pair(tuple(input.shape[-dims:]), dims, 1)
    wanted = (
        [output_size] * dims if output_size is None or isinstance(output_size, int) else list(output_size)
    )
    wanted = wanted * dims if len(wanted) == 1 else wanted
    space = size[2 - dims :]
    return size, pair([n if o is None else int(o) for n, o in zip(space, wanted)], dims, 1)
