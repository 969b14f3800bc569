"""Lowering of functions that only move elements: each is run on indices, which show what it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycert.graph.elementwise import activation, mul
from pycert.graph.parts import check_batch, constant_index, expand, indices
from pycert.graph.tracer import GENERIC, Traced, Tracer, lowers

#: Elements stay in their order, so the shape of the result says all.
_SAME_ORDER = "view unflatten squeeze unsqueeze view_as _unsafe_view reshape flatten ravel reshape_as"
#: Of these, whether the result shares memory with the argument depends on strides.
_UNCERTAIN = frozenset("reshape flatten ravel reshape_as".split())
#: The result may share memory with the argument.
_VIEWS = """permute transpose movedim t T mT expand expand_as broadcast_to narrow select
    split chunk unbind tensor_split hsplit vsplit dsplit split_with_sizes diagonal unfold slice"""
_COPIES = """repeat tile repeat_interleave index_select flip fliplr flipud roll rot90 gather take_along_dim
    pixel_shuffle pixel_unshuffle channel_shuffle index"""
#: Elements that these clear become the constant 0.
_CLEARING = "tril triu"


@lowers(*_SAME_ORDER.split(), table=GENERIC)
def same_order(tracer: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """view, reshape, flatten and their like: a reshape, if samples stay apart."""
    value = _moved_value(tracer, name, args, kwargs)
    result = func(*args, **kwargs)
    check_batch(tracer, name, result.shape)
    if result.dtype != value.dtype:
        tracer.refuse(
            f"{name} of the bits of {value.dtype} as {result.dtype}", "the bits of values are not bounded"
        )
    node = tracer.reshape(tracer.node(value), tuple(result.shape[1:]), helper=False)
    return tracer.view(node, value, certain=name not in _UNCERTAIN)


@lowers(*_VIEWS.split(), table=GENERIC)
def view(tracer: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Views in another order: a gather of the indices that the function itself moves."""
    value = _moved_value(tracer, name, args, kwargs)
    if func is F.unfold:
        return _patches(tracer, value, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
    return _moved(tracer, name, value, _run(tracer, func, value, args, kwargs), shared=True)


def _patches(tracer: Tracer, value: Traced, *args: Any, **kwargs: Any) -> Traced:
    """F.unfold, which pads by 0: numbers of elements from 1 on, as float64, in which they are exact."""
    patches = F.unfold((indices(value) + 1).double(), *args, **kwargs).long() - 1
    return _moved(tracer, "unfold", value, patches)


@lowers(*_COPIES.split(), table=GENERIC)
def copy(tracer: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same for functions that return new memory."""
    value = _moved_value(tracer, name, args, kwargs)
    return _moved(tracer, name, value, _run(tracer, func, value, args, kwargs))


@lowers("getitem", table=GENERIC)
def getitem(tracer: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x[...]``: a view where torch returns one (slices, integers, tensors that are one), else a copy."""
    value = _moved_value(tracer, name, args, kwargs)
    numbers = indices(value)
    moved = func(numbers, constant_index(tracer, args[1]))
    shared = moved.untyped_storage().data_ptr() == numbers.untyped_storage().data_ptr()
    return _moved(tracer, "indexing", value, moved, shared=shared)


@lowers(*_CLEARING.split(), table=GENERIC)
def clear(tracer: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """tril and triu: indices from 1 on, so that 0 marks what was cleared."""
    value = _moved_value(tracer, name, args, kwargs)
    moved = func(indices(value) + 1, *args[1:], **kwargs) - 1
    return _moved(tracer, name, value, moved)


@lowers("glu")
def glu(tracer: Tracer, input: Traced, dim: int = -1) -> Traced:
    """The first half times the sigmoid of the second."""
    size = int(input.shape[dim])
    if size % 2 or dim % input.dim() == 0:
        raise ValueError(
            f"{tracer.path or 'network'}: glu halves a dimension of a sample, got {size} along dim {dim}"
        )
    numbers = indices(input).split(size // 2, dim)
    value, gate = (_moved(tracer, "glu", input, half) for half in numbers)
    return mul(tracer, value, activation(tracer, "sigmoid", gate))


@lowers("zero")
def zero(tracer: Tracer, input: Traced) -> Traced:
    return fill(tracer, input, 0.0)


@lowers("fill")
def fill(tracer: Tracer, input: Traced, value: Any) -> Traced:
    """``x.fill_(c)``: what x holds afterwards, one constant number."""
    if isinstance(value, Tensor) and (isinstance(value, Traced) or tracer.source(value) is not None):
        tracer.refuse("fill with a value or a parameter", "use expand_as")
    index = torch.full(input.shape, -1, device="cpu")
    return _moved(tracer, "fill", input, index, fill=float(value))


@lowers("copy")
def copied(tracer: Tracer, input: Traced, src: Any, non_blocking: bool = False) -> Traced:
    """``x.copy_(y)``: what x holds afterwards."""
    if not isinstance(src, Traced) or src.dim() != input.dim():
        tracer.refuse(
            "copy_ of a constant, or of a value of other dimensions", "assign it: x[:, ...] = constant"
        )
    node = expand(tracer, tracer.node(src), tuple(input.shape[1:]))
    return tracer.wrap(node, input.dtype)


@lowers("constant_pad_nd")
def constant_pad(tracer: Tracer, input: Traced, padding: Any, value: float = 0.0) -> Traced:
    return pad(tracer, input, padding, value=value)


@lowers("pad")
def pad(
    tracer: Tracer, input: Traced, pad: Any, mode: str = "constant", value: float | None = None
) -> Traced:
    """F.pad in all modes; indices travel as float64, in which they are exact."""
    if mode == "constant":
        filled = F.pad(indices(input), tuple(pad), value=-1)
    else:
        filled = F.pad(indices(input).double(), tuple(pad), mode=mode).long()
    return _moved(tracer, "pad", input, filled, fill=float(value or 0.0))


@lowers("interpolate", "upsample")
def interpolate(
    tracer: Tracer,
    input: Traced,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    **options: Any,
) -> Traced:
    """Nearest-neighbour resizing only."""
    if mode not in ("nearest", "nearest-exact"):
        tracer.refuse(f"interpolate with mode='{mode}'", "use mode='nearest' or ConvTranspose2d")
    numbers = indices(input).double()
    result = F.interpolate(numbers, size=size, scale_factor=scale_factor, mode=mode, **options)
    return _moved(tracer, "interpolate", input, result.long())


@lowers("detach", "requires_grad", "positive", "data", "alias")
def identity(tracer: Tracer, input: Traced, *unused: Any) -> Traced:
    return tracer.view(tracer.node(input), input)


@lowers("contiguous")
def contiguous(tracer: Tracer, input: Traced, memory_format: Any = None) -> Traced:
    return tracer.view(tracer.node(input), input, certain=False)


@lowers("clone")
def clone(tracer: Tracer, input: Traced, **options: Any) -> Traced:
    return tracer.wrap(tracer.node(input), input.dtype)


@lowers("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", table=GENERIC)
def cast(tracer: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """Casts that keep every value; what would round is refused."""
    value = _moved_value(tracer, name, args, kwargs)
    wanted = {
        "float": torch.float32,
        "double": torch.float64,
        "half": torch.float16,
        "bfloat16": torch.bfloat16,
    }
    dtype = wanted.get(name, value.dtype)
    for argument in (*args[1:], *kwargs.values()):
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, Tensor):
            dtype = argument.dtype
        elif name == "type" and isinstance(argument, str):
            dtype = getattr(torch, argument.split(".")[-1].replace("Tensor", "").lower())
    if dtype not in (torch.float32, torch.float64) or dtype.itemsize < value.dtype.itemsize:
        tracer.refuse(f"cast from {value.dtype} to {dtype}", "it rounds every value; leave it out")
    return tracer.view(tracer.node(value), value, certain=False, dtype=dtype)


@lowers("zeros_like", "ones_like", "full_like", "empty_like", table=GENERIC)
@lowers("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", table=GENERIC)
def factory(tracer: Tracer, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Constants in the form of a value."""
    value = _moved_value(tracer, name, args, kwargs)
    form = tracer.stand_in(value)
    return func(form, *args[1:], **kwargs) if args else func(**{**kwargs, "input": form})


def _moved_value(tracer: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    """The value that a function moves."""
    value = args[0] if args else kwargs.get("input", kwargs.get("self"))
    if not isinstance(value, Traced):
        tracer.refuse(f"{name} of a constant by values of the network", "indices must be constants")
    return value


def _run(
    tracer: Tracer, func: Callable[..., Any], value: Traced, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What the function makes of the indices of a value."""
    numbers = indices(value)

    def replaced(argument: Any) -> Any:
        return numbers if argument is value else constant_index(tracer, argument)

    return func(*map(replaced, args), **{key: replaced(argument) for key, argument in kwargs.items()})


def _moved(
    tracer: Tracer, name: str, value: Traced, moved: Any, fill: float = 0.0, shared: bool = False
) -> Any:
    """Values for indices that a function has moved, each checked to keep samples apart."""
    if isinstance(moved, (tuple, list)):
        return tuple(_moved(tracer, name, value, part, fill, shared) for part in moved)
    check_batch(tracer, name, moved.shape)
    node = tracer.node(value)
    count = math.prod(tracer.shape(node))
    row = moved[0]
    offsets = count * torch.arange(tracer.batch, device="cpu").reshape(-1, *[1] * row.dim())
    expected = torch.where(row < 0, row, row + offsets)
    if bool((row >= count).any()) or not torch.equal(moved, expected):
        tracer.refuse(f"{name} that mixes samples", "samples must stay apart, and be treated alike")
    result = tracer.gather(node, row, tuple(row.shape), fill=fill, helper=False)
    return tracer.view(result, value, row) if shared else tracer.wrap(result, value.dtype)
