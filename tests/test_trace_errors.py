"""Tracing: what cannot be bounded is refused by path, type and nearest supported form."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycert.nn
from pycert.errors import UnsupportedOperator
from pycert.graph import trace
from test_trace import Apply, parameter


def refused(net: nn.Module, *shape: int, match: str) -> UnsupportedOperator:
    with pytest.raises(UnsupportedOperator, match=match) as caught:
        trace(net.eval(), torch.empty(1, *shape))
    return caught.value


LAYERS = {
    "hardshrink": (nn.Hardshrink(), (3,), "Hardshrink", "register_activation"),
    "elu": (nn.ELU(-1.0), (3,), "elu with alpha=-1", "negative"),
    "celu": (nn.CELU(-1.0), (3,), "celu with alpha=-1", "positive"),
    "softplus": (nn.Softplus(0.0), (3,), "softplus with beta=0", "beta not 0"),
    "lstm": (nn.LSTM(3, 3, batch_first=True), (2, 3), "LSTM", "loop over time"),
    "local_response_norm": (nn.LocalResponseNorm(2), (4, 3), "LocalResponseNorm", ""),
    "attention_over_the_batch": (nn.TransformerEncoderLayer(4, 1, 4), (2, 4), "batch_first=False", "True"),
    "bilinear": (Apply(lambda m, x: m.layer(x, x), layer=nn.Bilinear(3, 3, 2)), (3,), "Bilinear", "matmul"),
    "max_pool_indices": (nn.MaxPool2d(2, return_indices=True), (1, 4, 4), "MaxPool2d", "leave the indices"),
    "batch_norm_statistics": (nn.BatchNorm1d(3, track_running_stats=False), (3,), "track_running_stats", "True"),
    "embedding": (nn.Embedding(3, 3), (3,), "Embedding", "floating"),
    "upsample": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 2), "bilinear", "nearest"),
}  # fmt: skip

FUNCTIONS = {
    "power": (lambda m, x: x**2.5, "pow", "0.5"),
    "power_of_a_constant": (lambda m, x: 2**x, "pow", ""),
    "logarithm": (lambda m, x: x.log1p(), "log1p", "register_activation"),
    "floor_division": (lambda m, x: x // 2, "floordiv", "without rounding"),
    "softmax_without_dim": (lambda m, x: F.softmax(x), "softmax without dim", "name"),
    "softmax_of_another_type": (lambda m, x: F.softmax(x, 1, dtype=torch.float64), "softmax with dtype", "leave"),
    "softmax_of_nothing": (lambda m, x: x.masked_fill(torch.ones(3, dtype=torch.bool), -math.inf).softmax(1), "all -inf", "unmasked"),
    "matrix_product_of_two_ranks": (lambda m, x: x.unsqueeze(1) @ x, "of 3 and 2 dimensions", "the batch first"),
    "attention_dropout": (lambda m, x: _attended(x, dropout_p=0.1), "attention with dropout_p", "repeat key"),
    "attention_mask_of_values": (lambda m, x: _attended(x, attn_mask=x.unsqueeze(1)), "a mask that depends", "constants"),
    "threshold": (lambda m, x: F.threshold(x, 1.0, 0.0), "threshold at 1", "clamp"),
    "norm": (lambda m, x: x.norm(dim=1), "norm", "sum"),
    "variance": (lambda m, x: x.var(1), "var", "mean"),
    "sort": (lambda m, x: x.sort(1)[0], "sort", "GroupSort"),
    "max_over_all": (lambda m, x: x.max(), "max or min over all dimensions", "amax"),
    "positions_of_a_maximum": (lambda m, x: 2 * x.max(1)[1], "positions of a maximum", "its values"),
    "autocast": (lambda m, x: _in_bfloat16(x), "autocast in the forward", "leave it out"),
    "einsum": (lambda m, x: torch.einsum("bi,bj,bk->bijk", x, x, x), "einsum", "matmul"),
    "einsum_trace": (lambda m, x: torch.einsum("bii,bi->b", x.unsqueeze(2), x), "einsum", "matmul"),
    "comparison": (lambda m, x: (x > 0) * 1.0, "gt", "relu"),
    "control_flow": (lambda m, x: x if x[:, 0] else -x, "bool", "control flow"),
    "item": (lambda m, x: x * x[:, 0].item(), "item", "not known"),
    "numpy": (lambda m, x: x.numpy(), "numpy", "not known"),
    "where_on_values": (lambda m, x: torch.where(x.relu(), x, 0), "where with a condition", "clamp"),
    "indexing_by_values": (lambda m, x: torch.arange(3)[x.to(x.dtype)], "by values of the network", "constants"),
    "random": (lambda m, x: x + torch.rand(3), "random function rand", "random network"),
    "noise": (lambda m, x: x + torch.randn_like(x), "randn_like", ""),
    "dropout": (lambda m, x: F.dropout(x, 0.5, True), "dropout in training mode", "eval"),
    "batch_statistics": (lambda m, x: F.batch_norm(x, None, None, training=True), "statistics of the batch", "BatchNorm1d"),
    "narrowing_sum": (lambda m, x: x.sum(1, dtype=torch.float16), "sum with dtype=torch.float16", "rounds"),
    "integer_mean": (lambda m, x: x.mean(1, dtype=torch.int64), "mean with dtype=torch.int64", "rounds"),
    "bits": (lambda m, x: x.view(torch.int32), "view of the bits", "not bounded"),
    "narrowing_cast": (lambda m, x: x.half(), "float16", "leave it out"),
    "integer_cast": (lambda m, x: x.long(), "long", "floating"),
    "out_argument": (lambda m, x: torch.add(x, 1, out=torch.empty(3)), "out=", "returns"),
    "write_into_constant": (lambda m, x: torch.zeros(x.shape).add_(x), "into a constant tensor", "torch.cat"),
    "assignment_into_constant": (lambda m, x: _filled(torch.zeros(x.size(0), 3), x), "constant tensor", "torch.cat"),
    "changed_through_a_possible_view": (lambda m, x: _possible_view(x), "may have been changed in place", "in-place"),
    "empty": (lambda m, x: x[:, 3:], "an output without elements", ""),
    "tuple": (lambda m, x: (x, x), "output of type tuple", "one tensor"),
    "dictionary": (lambda m, x: {"logits": x}, "output of type dict", "one tensor"),
    "nothing": (lambda m, x: None, "output of type NoneType", "one tensor"),
    "constant_output": (lambda m, x: torch.ones(3), "an output that does not depend", "one tensor"),
    "hidden": (lambda m, x: x + _hidden(x), "hides from torch_function", "torch functions"),
}  # fmt: skip

BATCH = {
    "view_one": (lambda m, x: x.view(1, -1), "moves the batch dimension"),
    "flatten_all": (lambda m, x: x.flatten(), "moves the batch dimension"),
    "view_mixing": (lambda m, x: x.view(-1, 2), "moves the batch dimension"),
    "permute": (lambda m, x: x.permute(1, 0), "moves the batch dimension"),
    "transposed": (lambda m, x: x.t(), "moves the batch dimension"),
    "first_sample": (lambda m, x: x[0], "moves the batch dimension"),
    "iteration": (lambda m, x: torch.stack(list(x)), "moves the batch dimension"),
    "flip": (lambda m, x: x.flip(0), "mixes samples"),
    "roll": (lambda m, x: x.roll(1), "mixes samples"),
    "sum": (lambda m, x: x.sum(), "over the batch dimension"),
    "mean": (lambda m, x: x - x.mean(0), "over the batch dimension"),
    "cat": (lambda m, x: torch.cat([x, x]), "over the batch dimension"),
    "stack": (lambda m, x: torch.stack([x, x]), "before the batch dimension"),
    "outer_sum": (lambda m, x: x[:, :1] + x[:, 0], "broadcasting"),
    "parameter_per_sample": (lambda m, x: x + torch.arange(2.0).reshape(2, 1), "differs along the batch"),
    "constant_of_more_dimensions": (lambda m, x: x + torch.ones(4, 1, 4), "3 dimensions against a value of 2"),
    "batch_size_in_values": (lambda m, x: x / x.shape[0], "depend on the batch size"),
    "one_sample_alone": (lambda m, x: x if len(x) == 1 else 2 * x, "depend on the batch size"),
    "batch_size_in_layers": (lambda m, x: m.fc(x) if len(x) == 2 else x, "depend on the batch size"),
    "only_batch_two": (lambda m, x: x.reshape(2, -1), "works at batch 2 and not at 3"),
    "matrix_on_the_left": (lambda m, x: torch.ones(3, 2) @ x, "matrix product over the batch"),
    "unbatched_convolution": (lambda m, x: F.conv1d(x, torch.ones(1, 2, 1)), "of a value of 2 dimensions"),
    "assignment": (lambda m, x: _filled(x.clone(), 0.0, 0), "over the batch dimension"),
}  # fmt: skip


def _filled(target: Tensor, value: Tensor | float, index: int | slice = slice(None)) -> Tensor:
    target[index] = value
    return target


def _attended(x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1), **options)


def _possible_view(x: Tensor) -> Tensor:
    y = x * 2
    y.reshape(-1, 3).relu_()
    return y + 1


def _in_bfloat16(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x * 2


def _hidden(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x.view(-1)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer, shape, kind, hint = LAYERS[name]
    error = refused(nn.Sequential(nn.Identity(), nn.ModuleDict({"deep": layer})["deep"]), *shape, match=kind)
    assert error.path.startswith("1") and "'1" in str(error)
    assert kind in error.kind and hint in error.hint


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, kind, hint = FUNCTIONS[name]
    error = refused(nn.Sequential(Apply(function)), 3, match=".")
    assert kind in error.kind and hint in error.hint
    if "output" not in kind:
        assert error.path == "0"
        assert "test_trace_errors.py, line" in error.hint


@pytest.mark.parametrize("name", BATCH)
def test_the_batch_stays_first_and_samples_apart(name):
    function, kind = BATCH[name]
    assert kind in refused(Apply(function, fc=nn.Linear(4, 4)), 4, match=".").kind


def test_the_source_line_is_that_of_the_forward():
    def forward(m, x):
        y = x + 1
        return y.cumsum(1)

    line = forward.__code__.co_firstlineno + 2
    assert f"line {line}" in refused(Apply(forward), 3, match="cumsum").hint


def test_weights_that_depend_on_the_input():
    for function in (
        lambda m, x: F.linear(torch.ones(3), x.unsqueeze(1)),
        lambda m, x: F.conv1d(x.unsqueeze(1), x.reshape(x.size(0), 1, 3)),
        lambda m, x: F.linear(x, torch.ones(3, 3), x[:, 0]),
    ):
        refused(Apply(function), 3, match="depends on the input")


def test_a_parameter_in_control_flow_is_refused():
    error = refused(
        Apply(lambda m, x: x if m.w.sum() > 0 else -x, w=parameter(3)), 3, match="depends on a parameter"
    )
    assert "frozen" in error.hint
    refused(Apply(lambda m, x: x * m.w.item(), w=parameter(1)), 3, match="depends on a parameter")
    refused(Apply(lambda m, x: x[:, m.w.argsort()], w=parameter(3)), 3, match="depends on a parameter")


@pytest.mark.parametrize(
    "function, kind",
    [
        (lambda m, x: x * nn.Parameter(m.w * 2), "a Parameter made or copied"),
        (lambda m, x: x * copy.deepcopy(m.w), "a Parameter made or copied"),
        (lambda m, x: x * (copy.deepcopy(m.w) + 1), "a Parameter made or copied"),
        (lambda m, x: x * torch.vmap(lambda w: w * 2)(m.w), "torch.func"),
        (lambda m, x: torch.vmap(lambda row: row * 2)(x), "torch.func"),
        (lambda m, x: x * torch.func.grad(lambda w: (w * w).sum())(m.w), "torch.func"),
        (lambda m, x: x * F.dropout(m.w, 0.5, True), "random function dropout"),
        (lambda m, x: x * torch.zeros(3).copy_(m.w), "copy_ changing"),
        (lambda m, x: x * m.w.clone().mul_(2), "mul_ changing"),
        (lambda m, x: x * torch.from_numpy(m.w.detach().numpy()), "depends on a parameter"),
        (lambda m, x: torch.compile(lambda a: a * 2, backend="eager")(x), "torch.compile"),
    ],
)
def test_no_parameter_is_frozen_in_silence(function, kind):
    assert kind in refused(Apply(function, w=parameter(3)), 3, match=".").kind


def test_values_drawn_by_numpy_are_refused():
    generator = np.random.default_rng(0)
    refused(Apply(lambda m, x: x * float(generator.random())), 3, match="depend on the batch size")


def test_state_changed_in_the_forward_is_refused():
    def forward(m, x):
        m.count += 1
        return x

    refused(Apply(forward, count=torch.tensor(0)), 3, match="'count'")
    refused(Apply(lambda m, x: (m.mean.mul_(0.9), x)[1], mean=torch.zeros(3)), 3, match="'mean'")


def test_training_mode_layers_are_refused():
    for layer in (nn.Dropout(), nn.Dropout2d(), nn.RReLU(), nn.BatchNorm1d(2, track_running_stats=False)):
        with pytest.raises(UnsupportedOperator, match="'0'"):
            trace(nn.Sequential(layer).train(), torch.empty(1, 2, 3))


def test_forward_hooks_that_change_values_are_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    error = refused(net, 3, match="forward hook .* at '0'")
    assert "forward" in error.hint
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    refused(net, 3, match="forward hook")


def test_script_quantised_and_lazy_modules_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(nn.Sequential(torch.jit.script(nn.Linear(3, 3))), 3, match="ScriptModule at '0'")
        quantised = torch.ao.nn.quantized.Linear(3, 3)
        refused(nn.Sequential(nn.Linear(3, 3), quantised), 3, match="quantised module .* at '1'")
        refused(nn.Sequential(nn.LazyLinear(3)), 3, match="uninitialised LazyLinear at '0'")


def test_shapes_that_do_not_fit_are_value_errors():
    cases = (
        (nn.Sequential(nn.Linear(4, 2)), (3,), "0: linear needs 4 features, got 3"),
        (nn.Sequential(nn.Conv2d(3, 2, 3)), (2, 5, 5), "0: conv2d needs 3 input channels, got 2"),
        (nn.Sequential(nn.Conv2d(2, 2, 3)), (2, 2, 5), "larger than the padded input"),
        (nn.Sequential(nn.BatchNorm1d(3)), (2, 4), "BatchNorm of 3 channels got 2"),
        (nn.Sequential(nn.MaxPool2d(3)), (1, 2, 4), "larger than the padded input"),
        (nn.Sequential(nn.AvgPool2d(2, padding=2)), (1, 4, 4), "half the kernel"),
        (nn.Sequential(nn.PReLU(3)), (2, 4), "3 slopes for 2 channels"),
        (Apply(lambda m, x: x.clamp(1, 0)), (2,), "min <= max"),
        (Apply(lambda m, x: x + torch.arange(3.0)), (2,), "do not broadcast"),
    )
    for net, shape, message in cases:
        with pytest.raises(ValueError, match=message):
            trace(net.eval(), torch.empty(1, *shape))


def test_arguments_are_checked():
    net = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="module must be a torch.nn.Module, got function"):
        trace(F.relu, torch.empty(1, 3))
    with pytest.raises(TypeError, match="example must be a tensor or a tuple"):
        trace(net, 3)
    with pytest.raises(TypeError, match="must hold tensors, got int"):
        trace(net, (torch.empty(1, 3), 3))
    with pytest.raises(TypeError, match="float32 or float64, got torch.int64"):
        trace(net, torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="got torch.bfloat16"):
        trace(net, torch.ones(1, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="batch dimension"):
        trace(net, torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"one batch size, got \[1, 2\]"):
        trace(net, (torch.empty(1, 3), torch.empty(2, 3)))


def test_pycert_layers_check_their_arguments():
    with pytest.raises(ValueError, match="std must be positive"):
        pycert.nn.Normalize([0.0, 0.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="2 channels and std 1"):
        pycert.nn.Normalize([0.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        pycert.nn.Normalize([float("nan")], [1.0])
    with pytest.raises(ValueError, match="one value per channel"):
        pycert.nn.Normalize(torch.zeros(1, 3), [1.0])
    with pytest.raises(ValueError, match="group_size must be 2, got 3"):
        pycert.nn.GroupSort(3)
    with pytest.raises(ValueError, match="even number of channels"):
        trace(pycert.nn.MaxMin(), torch.empty(1, 3))
    with pytest.raises(ValueError, match=r"\[B, 3, ...\], got \[2, 1, 4\]"):
        trace(pycert.nn.Normalize([0, 0, 0], [1, 1, 1]), torch.empty(1, 1, 4))


def test_pycert_layers_compute_what_they_say():
    x = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    assert pycert.nn.GroupSort()(x).tolist() == [[1.0, 3.0, 2.0, 4.0]]
    assert pycert.nn.MaxMin()(x).tolist() == [[3.0, 4.0, 2.0, 1.0]]
    assert pycert.nn.Normalize([1.0], [2.0])(x).tolist() == [[1.0, 0.0, 0.5, 1.5]]
    assert "group_size=2" in repr(pycert.nn.GroupSort()) and "mean=[1.0]" in repr(
        pycert.nn.Normalize([1.0], [2.0])
    )
