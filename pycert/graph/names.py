"""Names of torch functions: which are metadata, which are random, how to say what is supported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

_DUNDER = {"__iadd__": "add_", "__isub__": "sub_", "__imul__": "mul_", "__itruediv__": "div_"}
_ALIASES = {
    "__radd__": "add",
    "__rmul__": "mul",
    "__rsub__": "rsub",
    "__rtruediv__": "rdiv",
    "__rdiv__": "rdiv",
    "__rmatmul__": "rmatmul",
    "__getitem__": "getitem",
    "__setitem__": "setitem_",
    "__neg__": "neg",
    "__abs__": "abs",
    "__pos__": "positive",
    "__add__": "add",
    "__sub__": "sub",
    "__mul__": "mul",
    "__truediv__": "div",
    "__matmul__": "matmul",
    "__pow__": "pow",
    "subtract": "sub",
    "subtract_": "sub_",
    "multiply": "mul",
    "multiply_": "mul_",
    "divide": "div",
    "divide_": "div_",
    "true_divide": "div",
    "true_divide_": "div_",
    "negative": "neg",
    "negative_": "neg_",
    "absolute": "abs",
    "absolute_": "abs_",
    "clip": "clamp",
    "clip_": "clamp_",
    "concat": "cat",
    "concatenate": "cat",
    "special_expit": "sigmoid",
    "special_softmax": "softmax",
    "linalg_matmul": "matmul",
    "special_log_softmax": "log_softmax",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "fmax": "maximum",
    "fmin": "minimum",
    "_threshold": "threshold",
    "__rpow__": "rpow",
}

#: Functions and properties that tell the form of a tensor, not its values.
METADATA = frozenset(
    """size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex is_signed
    element_size get_device storage_offset __len__ __hash__ __repr__ __format__ is_same_size is_inference
    shape ndim dtype device is_cuda is_cpu layout requires_grad is_leaf is_sparse is_quantized is_meta is_mps
    is_mkldnn is_xpu itemsize nbytes names grad_fn output_nr retains_grad is_pinned is_shared is_tensor
    is_conj is_neg is_nested has_names _is_view _version""".split()
)
#: Those of them that tell the device.
ON_DEVICE = frozenset("get_device is_cuda is_cpu is_meta is_mps is_xpu is_mkldnn".split())
#: Functions that take only the form (shape, dtype, device) of their second tensor.
FORM_OF_SECOND = frozenset("to type_as view_as reshape_as expand_as".split())
#: Functions whose result depends on the form of their tensors only.
FACTORIES = frozenset(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor".split()
)
DROPOUT = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout".split()
)
CASTS = frozenset("to type type_as float double cpu cuda".split())
RANDOM = frozenset(
    """rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson
    binomial normal_ uniform_ bernoulli_ random_ exponential_ cauchy_ geometric_ log_normal_ rrelu_with_noise
    gumbel_softmax""".split()
)

_ACTIVATION = "use one of torch's common activations (docs/methods.md), or pycert.register_activation"
_CONTROL = "control flow and comparisons on values cannot be bounded; use relu, maximum, minimum or clamp"
_FROZEN = "values of the network are not known while it is traced"
_HINTS = {
    _ACTIVATION: """hardshrink threshold expm1 log1p erf
        heaviside tan asin acos sinh cosh logit exp2 log2 log10 sinc atan2 xlogy floor ceil round""",
    _CONTROL: "gt lt ge le eq ne __eq__ __ne__ __gt__ __lt__ __ge__ __le__ __bool__ isnan isfinite isinf equal "
    "allclose any all nonzero argmax argmin argsort logical_not logical_and is_nonzero __contains__ isclose",
    _FROZEN: "item tolist numpy grad __array__ __float__ __int__ __index__ __iter__ data_ptr backward __complex__",
    "bound the logits and leave it out of the network": "cross_entropy nll_loss logsumexp",
    "use LayerNorm, GroupNorm or BatchNorm": "local_response_norm normalize",
    "use Conv1d, Conv2d or Conv3d": "unfold_copy im2col",
    "use AvgPool1d, AvgPool2d, MaxPool1d or MaxPool2d": """avg_pool3d max_pool3d lp_pool1d lp_pool2d
        adaptive_avg_pool3d adaptive_max_pool3d fractional_max_pool2d""",
    "write it out with matmul, mul and sum": "tensordot inner outer bilinear mv dot baddbmm addbmm",
    "use pycert.nn.GroupSort or pycert.nn.MaxMin": "sort topk msort kthvalue median",
    "use mean or sum": "var std norm prod logcumsumexp cumsum cumprod linalg_norm linalg_vector_norm var_mean std_mean",
    "the network must work on floating point values": "embedding long int short byte bool one_hot",
    "leave the indices out": "max_pool1d_with_indices max_pool2d_with_indices",
    "divide without rounding": "floor_divide __floordiv__ __rfloordiv__ __mod__ remainder fmod",
    "write out its steps, with one loop over time": "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell",
}
_HINT_OF = {name: text for text, function_names in _HINTS.items() for name in function_names.split()}


def function_name(func: Any) -> str:
    """One name for all forms of a torch function: ``torch.add``, ``Tensor.add``, ``x + y``, ``aten.add``."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        return func.__self__.__name__ if name == "__get__" else f"assignment to .{func.__self__.__name__}"
    name = name.split(".")[0]  # an overload of an operator: add.Tensor
    name = _DUNDER.get(name, name)
    return _ALIASES.get(name, name)


def without_in_place(name: str) -> tuple[str, bool]:
    """The name of the function that an in-place one is a form of, and whether it is in place."""
    in_place = name.endswith("_") and not name.endswith("__")
    return (name[:-1], True) if in_place else (name, False)


def plain_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments under torch's own names where numpy's were used."""
    renamed = {"axis": "dim", "keepdims": "keepdim"}
    return {renamed.get(key, key): value for key, value in kwargs.items() if key != "_stacklevel"}


def layer_type(module: nn.Module) -> type:
    """The class of a module, without the one that parametrisation puts before it."""
    return parametrize.type_before_parametrizations(module)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one operation for its user: of torch.nn or pycert.nn, not a container."""
    home = layer_type(module).__module__
    return home == "pycert.nn" or (home.startswith("torch.nn.modules.") and not home.endswith(".container"))


def display(func: Any, name: str) -> str:
    home = getattr(func, "__module__", None) or ""
    return (
        f"{home}.{name}"
        if home.startswith("torch.nn.functional")
        else name.strip("_")
        if name
        else repr(func)
    )


def hint(name: str) -> str:
    """The nearest supported form of a function that is not supported."""
    return _HINT_OF.get(name) or _HINT_OF.get(without_in_place(name)[0]) or ""


def registered_activation(target: Callable[..., Any] | nn.Module) -> str | None:
    """Name under which ``pycert.register_activation`` knows a function or module, if it does."""
    try:
        from pycert.activations import lookup
    except ImportError:
        return None
    return lookup(target)
