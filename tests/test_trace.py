"""Tracing: the graph of every supported construct computes what the module computes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycert
import pycert.nn
from pycert.graph import trace
from pycert.reference.graph import evaluate


class Apply(nn.Module):
    """A module out of a function of the module and its inputs; keyword arguments become its children and tensors."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def prepared(net: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and evaluation mode, with statistics and parameters that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    for value in net.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.1)
    return net


def assert_same(net: nn.Module, *shapes: tuple[int, ...], seed: int = 0) -> Any:
    """Traces at batch 1 and compares at batch 1 and 3; returns the graph."""
    net = prepared(net, seed)
    graph = trace(net, tuple(torch.empty(1, *shape, dtype=torch.float64) for shape in shapes))
    generator = torch.Generator().manual_seed(seed + 1)
    for batch in (1, 3):
        inputs = [torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        expected = net(*[x.clone() for x in inputs])
        found = evaluate(graph, *inputs)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    paths = [node.path for node in graph.nodes]
    assert len(set(paths)) == len(paths) and all(paths)
    return graph


CONVOLUTIONS = {
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 7, 5)),
    "conv2d_no_bias": (lambda: nn.Conv2d(3, 4, 1, bias=False), (3, 7, 5)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), (4, 7, 6)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=2), (4, 5, 6)),
    "conv2d_dilated": (lambda: nn.Conv2d(2, 3, (3, 2), dilation=(2, 3), stride=(1, 2), padding=(2, 1)), (2, 9, 8)),
    "conv2d_same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 6, 7)),
    "conv2d_valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 6, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (3, 11)),
    "conv1d_groups": (lambda: nn.Conv1d(4, 4, 3, groups=4), (4, 9)),
    "conv1d_same": (lambda: nn.Conv1d(2, 4, 4, padding="same"), (2, 9)),
    "conv1d_chain": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 2)), (2, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 3, 5)),
    "transposed2d_dilated": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(1, 2), dilation=(3, 2)), (2, 4, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 2, 3, stride=3, padding=1, output_padding=2, groups=2), (4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), stride=(2, 1, 1), padding=(1, 0, 1), groups=2), (2, 3, 4, 2)),
    "conv3d_same": (lambda: nn.Conv3d(2, 3, 2, padding="same", dilation=(1, 2, 1)), (2, 3, 4, 2)),
    "conv3d_circular": (lambda: nn.Conv3d(1, 2, 3, padding=1, padding_mode="circular", bias=False), (1, 3, 2, 2)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, (2, 3, 2), (3, 1, 2), padding=(1, 1, 0), output_padding=(1, 0, 1), groups=2, dilation=(2, 1, 1)), (4, 3, 2, 2)),
    "transposed_size": (lambda: Apply(lambda m, x: m.up(x, output_size=(8, 7)), up=nn.ConvTranspose2d(2, 3, 2, 2)), (2, 4, 3)),
}  # fmt: skip
for _mode in ("zeros", "reflect", "replicate", "circular"):
    CONVOLUTIONS[f"conv2d_{_mode}"] = (
        lambda mode=_mode: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode), (2, 5, 6))  # fmt: skip
    CONVOLUTIONS[f"conv1d_{_mode}"] = (
        lambda mode=_mode: nn.Conv1d(2, 3, 3, padding=2, padding_mode=mode),
        (2, 6),
    )
    CONVOLUTIONS[f"conv2d_same_{_mode}"] = (
        lambda mode=_mode: nn.Conv2d(2, 3, (2, 4), padding="same", padding_mode=mode), (2, 5, 6))  # fmt: skip

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear_tokens": (lambda: nn.Linear(5, 3, bias=False), (4, 2, 5)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "batch_norm1d_length": (lambda: nn.BatchNorm1d(5, eps=0.1), (5, 4)),
    "batch_norm2d_plain": (lambda: nn.BatchNorm2d(3, affine=False), (3, 4, 2)),
    "avg_pool2d": (lambda: nn.AvgPool2d(3, 2, 1), (2, 7, 6)),
    "avg_pool2d_ceil": (lambda: nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=True, count_include_pad=False), (2, 8, 7)),
    "avg_pool2d_divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), (2, 4, 6)),
    "avg_pool1d": (lambda: nn.AvgPool1d(3, 2, 1, ceil_mode=True), (2, 8)),
    "avg_pool1d_plain": (lambda: nn.AvgPool1d(3, 2, 1, count_include_pad=False), (2, 8)),
    "adaptive_avg2d": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 4, 6)),
    "adaptive_avg2d_unequal": (lambda: nn.AdaptiveAvgPool2d((3, 2)), (2, 7, 5)),
    "adaptive_avg2d_larger": (lambda: nn.AdaptiveAvgPool2d(4), (2, 1, 3)),
    "adaptive_avg2d_none": (lambda: nn.AdaptiveAvgPool2d((None, 1)), (2, 3, 4)),
    "adaptive_avg1d": (lambda: nn.AdaptiveAvgPool1d(1), (3, 5)),
    "adaptive_avg1d_unequal": (lambda: nn.AdaptiveAvgPool1d(3), (3, 7)),
    "max_pool2d": (lambda: nn.MaxPool2d(3, 1, 1), (2, 5, 4)),
    "max_pool2d_dilated": (lambda: nn.MaxPool2d((2, 3), (3, 1), (1, 1), dilation=(2, 1)), (2, 9, 7)),
    "max_pool2d_ceil": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 6, 8)),
    "max_pool1d": (lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), (2, 8)),
    "max_pool1d_no_channels": (lambda: nn.MaxPool1d(2), (6,)),
    "max_pool2d_no_channels": (lambda: nn.MaxPool2d(2), (6, 4)),
    "adaptive_max": (lambda: nn.AdaptiveMaxPool2d((2, 3)), (2, 4, 6)),
    "adaptive_max_unequal": (lambda: nn.AdaptiveMaxPool2d((3, 4)), (2, 7, 5)),
    "adaptive_max1d_unequal": (lambda: nn.AdaptiveMaxPool1d(3), (2, 4)),
    "log_sigmoid": (lambda: nn.LogSigmoid(), (4,)),
    "glu": (lambda: nn.Sequential(nn.GLU(), nn.GLU(1)), (4, 6)),
    "normalize": (lambda: pycert.nn.Normalize([0.1, 0.2], [2.0, 3.0]), (2, 3, 4)),
    "normalize_flat": (lambda: pycert.nn.Normalize(torch.tensor(0.1), torch.tensor(3)), (4,)),
    "max_min": (lambda: pycert.nn.MaxMin(), (4, 3, 2)),
    "group_sort": (lambda: pycert.nn.GroupSort(), (6,)),
    "group_sort_image": (lambda: pycert.nn.GroupSort(2), (4, 3, 2)),
    "flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 2)), (2, 3, 4)),
    "flatten_part": (lambda: nn.Flatten(2, 3), (2, 3, 4)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 3)), (6, 2)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.Linear(4, 2)), (4,)),
    "identity": (lambda: nn.Identity(), (3, 2)),
    "batch_norm3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 3, 3, 3)),
    "softmax": (lambda: nn.Sequential(nn.Softmax(1), nn.Softmax(-1), nn.Softmin(2)), (3, 4)),
    "softmax_of_images": (lambda: nn.Softmax2d(), (3, 2, 2)),
    "softmax_of_one": (lambda: nn.Softmax(1), (1, 3)),
    "log_softmax": (lambda: nn.LogSoftmax(1), (3, 4)),
    "layer_norm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.LayerNorm((3, 4), elementwise_affine=False)), (3, 4)),
    "rms_norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "group_norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.GroupNorm(4, 4, affine=False)), (4, 3, 2)),
    "instance_norm": (lambda: nn.Sequential(nn.InstanceNorm2d(2, affine=True), nn.InstanceNorm2d(2, track_running_stats=True)), (2, 3, 4)),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True, activation="gelu"), 2, enable_nested_tensor=False), (3, 4)),
    "zero_pad": (lambda: nn.ZeroPad2d((1, 2, 0, 3)), (2, 3, 4)),
    "constant_pad": (lambda: nn.ConstantPad1d((1, 2), 0.7), (2, 3)),
    "reflection_pad": (lambda: nn.ReflectionPad2d(2), (2, 3, 4)),
    "upsample": (lambda: nn.Upsample(scale_factor=2), (2, 3, 4)),
    "pixel_shuffle": (lambda: nn.PixelShuffle(2), (8, 2, 3)),
    "relu": (lambda: nn.ReLU(inplace=True), (4,)),
    "leaky_relu": (lambda: nn.LeakyReLU(0.2, inplace=True), (4,)),
    "prelu": (lambda: nn.PReLU(), (4, 3)),
    "prelu_channels": (lambda: nn.PReLU(4), (4, 3)),
    "relu6": (lambda: nn.ReLU6(), (4, 3)),
    "hardtanh": (lambda: nn.Hardtanh(-0.3, 0.4), (4, 3)),
    "hardsigmoid": (lambda: nn.Hardsigmoid(), (4, 3)),
    "sigmoid": (lambda: nn.Sigmoid(), (4, 3)),
    "tanh": (lambda: nn.Tanh(), (4, 3)),
    "rrelu": (lambda: nn.RReLU(), (4, 3)),
    "elu": (lambda: nn.Sequential(nn.ELU(1.3), nn.ELU(inplace=True), nn.SELU(), nn.CELU(0.4), nn.CELU()), (4, 3)),
    "silu": (lambda: nn.Sequential(nn.SiLU(inplace=True), nn.Mish(), nn.GELU(), nn.GELU(approximate="tanh")), (4, 3)),
    "softplus": (lambda: nn.Sequential(nn.Softplus(), nn.Softplus(2.0, 0.7), nn.Softsign()), (4, 3)),
    "hardswish": (lambda: nn.Sequential(nn.Hardswish(inplace=True), nn.Tanhshrink(), nn.Softshrink(0.1)), (4, 3)),
}  # fmt: skip

MOVEMENT: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "reshape": (lambda m, x: x.reshape(x.shape[0], 4, -1), (2, 3, 4)),
    "view_size": (lambda m, x: x.view(x.size(0), x.size(2), -1), (2, 3, 4)),
    "view_minus_one": (lambda m, x: x.view(-1, 24), (2, 3, 4)),
    "unpacked_shape": (lambda m, x: (lambda b, c, h, w: x.view(b, c * h, w))(*x.shape), (2, 3, 4)),
    "torch_flatten": (lambda m, x: torch.flatten(x, start_dim=1), (2, 3, 4)),
    "unflatten": (lambda m, x: x.unflatten(1, (2, -1)), (6, 2)),
    "permute": (lambda m, x: x.permute(0, 3, 1, 2), (2, 3, 4)),
    "transpose": (lambda m, x: torch.transpose(x, 1, -1).contiguous().flatten(1), (2, 3, 4)),
    "mT": (lambda m, x: x.mT, (2, 3, 4)),
    "movedim": (lambda m, x: x.movedim(1, 3), (2, 3, 4)),
    "squeeze": (lambda m, x: x.squeeze(2).unsqueeze(1), (3, 1, 2)),
    "none_index": (lambda m, x: x[:, None, ..., None], (3, 2)),
    "expand": (lambda m, x: x.expand(-1, -1, 3), (2, 1)),
    "repeat": (lambda m, x: x.repeat(1, 2, 3), (2, 2)),
    "repeat_interleave": (lambda m, x: x.repeat_interleave(2, dim=1), (2, 2)),
    "slice": (lambda m, x: x[:, 1:, ::2], (3, 5)),
    "select": (lambda m, x: x[:, -1] + x.select(1, 0), (3, 5)),
    "narrow": (lambda m, x: torch.narrow(x, 1, 1, 2), (4, 2)),
    "index_list": (lambda m, x: x[:, [2, 0, 0]], (3, 2)),
    "index_tensor": (lambda m, x: x[..., torch.tensor([1, 0])], (3, 2)),
    "index_mask": (lambda m, x: x[:, torch.tensor([True, False, True])], (3, 2)),
    "index_select": (lambda m, x: torch.index_select(x, 2, torch.tensor([1, 1, 0])), (3, 2)),
    "flip": (lambda m, x: x.flip(1).flip((1, 2)), (3, 2)),
    "roll": (lambda m, x: torch.roll(x, (1, 2), (1, 2)), (3, 4)),
    "tril": (lambda m, x: x.tril(), (3, 4)),
    "patches": (lambda m, x: F.unfold(x, (2, 1), padding=1) + torch.nn.Unfold((2, 1), padding=(1, 1))(x), (2, 3, 4)),
    "unfold": (lambda m, x: x.unfold(1, 3, 2), (7,)),
    "pad": (lambda m, x: F.pad(x, (1, 2, 0, 1), value=-1.5), (3, 4)),
    "pad_negative": (lambda m, x: F.pad(x, (-1, 2)), (3, 4)),
    "pad_reflect": (lambda m, x: F.pad(x, (1, 2), mode="reflect"), (3, 4)),
    "pad_replicate": (lambda m, x: F.pad(x, (1, 2, 2, 0), mode="replicate"), (2, 3, 4)),
    "pad_circular": (lambda m, x: F.pad(x, (1, 2, 2, 0), mode="circular"), (2, 3, 4)),
    "pads_of_two_values": (lambda m, x: F.pad(F.pad(x, (1, 1), value=1.0), (1, 1), value=2.0), (3,)),
    "cat": (lambda m, x: torch.cat([x, -x, x[:, :1]], 1), (2, 3)),
    "cat_inner": (lambda m, x: torch.concat([x, 2 * x], dim=-1), (2, 3)),
    "cat_zeros": (lambda m, x: torch.cat([x, torch.zeros_like(x), x], 1), (2, 3)),
    "cat_two_constants": (lambda m, x: torch.cat([x.new_ones(x.size(0), 1), x, x.new_zeros(len(x), 2)], 1), (2,)),
    "stack": (lambda m, x: torch.stack([x, x + 1], dim=2), (2, 3)),
    "stack_last": (lambda m, x: torch.stack((x, x + 1), -1), (2, 3)),
    "split": (lambda m, x: sum(x.split(2, dim=1)), (6, 2)),
    "split_sizes": (lambda m, x: torch.split(x, [1, 3], 1)[1], (4, 2)),
    "chunk": (lambda m, x: (lambda a, b: a - b)(*x.chunk(2, 1)), (4, 2)),
    "unbind": (lambda m, x: torch.stack(x.unbind(1)[::-1], 1), (4, 2)),
    "where": (lambda m, x: torch.where(torch.eye(3, dtype=torch.bool), x, 0.5), (3, 3)),
    "where_values": (lambda m, x: torch.where(torch.eye(3, dtype=torch.bool), x, x.mT), (3, 3)),
    "masked_fill": (lambda m, x: x.masked_fill(torch.eye(3, dtype=torch.bool), 2.0), (3, 3)),
    "assignment": (lambda m, x: _assigned(x), (3, 4)),
    "where_method": (lambda m, x: x.where(torch.eye(3, dtype=torch.bool), x + 1), (3, 3)),
    "where_parameter_order": (lambda m, x: torch.where(torch.eye(3, dtype=torch.bool), 1.5, x), (3, 3)),
    "in_place_shapes": (lambda m, x: x.clone().unsqueeze_(1).squeeze_(1).add_(1), (3,)),
    "in_place_view": (lambda m, x: _written_through_views(x), (2, 4)),
    "in_place_first_power": (lambda m, x: _added_to(x * 2, lambda y: y**1), (3,)),
    "in_place_bool_index": (lambda m, x: _added_to(x * 2, lambda y: y[:, True]), (3,)),
    "in_place_tensor_index": (lambda m, x: _added_to(x * 2, lambda y: y[:, torch.tensor(1)]), (3,)),
    "in_place_numpy_index": (lambda m, x: _added_to(x * 2, lambda y: y[:, np.int64(1)]), (3,)),
    "in_place_fill": (lambda m, x: _added_to(x * 2, lambda y: y[:, :1].zero_()) + x.clone().fill_(3.0), (3,)),
    "in_place_copy_of": (lambda m, x: x.clone().copy_(x[:, :1] * 2), (3,)),
    "in_place_copy": (lambda m, x: _copied_then_changed(x), (2, 4)),
    "numpy_index": (lambda m, x: x[:, np.array([1, 0])], (3,)),
    "keywords": (lambda m, x: F.linear(input=x, weight=torch.ones(2, 3, dtype=x.dtype)) + torch.flatten(input=x, start_dim=1)[:, :2], (3,)),
    "casts": (lambda m, x: x.to(x.dtype).to(x.device).double().to(memory_format=torch.channels_last), (2, 3, 4)),
    "interpolate": (lambda m, x: F.interpolate(x, size=(5, 3), mode="nearest"), (2, 3, 4)),
    "script": (lambda m, x: _script(x), (3,)),
    "aten": (lambda m, x: torch.ops.aten.relu(torch.ops.aten.add.Tensor(x, x)), (3,)),
}  # fmt: skip


def _added_to(y: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    """y after an in-place sum on what may be a view of it."""
    z = part(y)
    z += 1
    return y


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 2 * x[:, 1]
    y[:, 1, 2:] = 0.25
    y[:, :, 0] += 1
    return y


def _script(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(_doubled)(x)


def _doubled(x: Tensor) -> Tensor:
    return x + x


def _written_through_views(x: Tensor) -> Tensor:
    y = x * 1.5
    part = y.view(-1, 8)[:, 2:6].view(-1, 2, 2).mT
    part[:, 0] *= 3
    other = y.mT[:, 1:]
    other.relu_()
    y -= 1
    return y + torch.cat([other, part[:, :1]], 1).view(-1, 2, 4)


def _copied_then_changed(x: Tensor) -> Tensor:
    y = x.flip(2)
    y += x
    z = x[:, [1, 0]]
    z.relu_()
    return y + z + x


def _in_place(x: Tensor) -> Tensor:
    y = x * 2
    y += x
    y -= 1
    y *= 3
    y /= 2
    y.add_(x, alpha=0.5)
    return F.relu_(y).clamp_(max=2)


ARITHMETIC: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "scalars": (lambda m, x: 2 - (x * 3 + 1 - 0.5) / 4 + -x, (3, 2)),
    "neutral": (lambda m, x: (x * 1 + 0) / 1 - 0, (3, 2)),
    "alpha": (lambda m, x: torch.add(x, x.flip(1), alpha=2).sub(1, alpha=3), (3,)),
    "rsub": (lambda m, x: torch.rsub(x, x.flip(1), alpha=2), (3,)),
    "in_place": (lambda m, x: _in_place(x), (3,)),
    "constants": (lambda m, x: (x + torch.arange(3.0)) * torch.tensor([[1.0], [2.0]]) / torch.tensor(4), (2, 3)),
    "constant_like": (lambda m, x: x + torch.arange(3, dtype=torch.int32).to(x) + torch.ones(1, 1).expand_as(x), (3,)),
    "constant_minus": (lambda m, x: torch.arange(3.0) - x, (3,)),
    "constant_wider": (lambda m, x: x + torch.ones(1, 4, 3).cumsum(1), (1, 3)),
    "batched_constant": (lambda m, x: x + torch.arange(3.0).expand(x.shape[0], 3), (3,)),
    "broadcast": (lambda m, x: x[:, :, :1] + x[:, :1] - x, (2, 3)),
    "sum": (lambda m, x: x.sum(1), (4, 3)),
    "sum_keepdim": (lambda m, x: torch.sum(x, dim=(1, -1), keepdim=True), (4, 3, 2)),
    "mean": (lambda m, x: x.mean((2, 3)), (4, 3, 2)),
    "mean_middle": (lambda m, x: torch.mean(x, axis=1, keepdims=True) - x, (4, 3)),
    "abs": (lambda m, x: abs(x) + x.abs() + torch.absolute(x), (3,)),
    "relus": (lambda m, x: F.relu(x) + torch.relu(x - 1) + (x + 1).relu(), (3,)),
    "activations": (lambda m, x: F.leaky_relu(x, 0.3) + torch.sigmoid(x) - torch.tanh(x) + x.sigmoid().tanh(), (3,)),
    "expit": (lambda m, x: torch.special.expit(x) + F.sigmoid(x) + F.tanh(x), (3,)),
    "clamps": (lambda m, x: torch.clamp(x, -1, 1) + x.clamp(min=0) + x.clip(max=0.5) + x.clamp_min(-0.2), (3,)),
    "clamp_tensor": (lambda m, x: x.clamp(min=torch.tensor([-1.0, 0.0, 0.1])), (3,)),
    "hard": (lambda m, x: F.hardtanh(x, -0.1, 0.2) + F.relu6(x) + F.threshold(x, 0, 0), (3,)),
    "extrema": (lambda m, x: torch.max(x, x.flip(1)) - torch.min(x, 2 * x), (3,)),
    "extrema_constants": (lambda m, x: torch.maximum(x, torch.tensor([0.0, 1.0, -1.0])).minimum(torch.tensor(0.5)), (3,)),
    "max_min_by_hand": (lambda m, x: (lambda a, b: torch.cat([torch.max(a, b), torch.min(a, b)], 1))(*x.chunk(2, 1)), (4, 2)),
    "max_over_dimension": (lambda m, x: torch.max(x, -1, keepdim=True)[0] - x.min(dim=2, keepdim=True).values, (3, 4)),
    "powers_of_tensors": (lambda m, x: x ** torch.tensor(2.0) + torch.linalg.matmul(x, torch.eye(2, dtype=x.dtype)), (2,)),
    "amax": (lambda m, x: x.amax((1, 3)) - x.amin(dim=1, keepdim=True).flatten(1)[:, :3], (2, 3, 4)),
    "pools": (lambda m, x: F.max_pool2d(x, 2, 1) - F.avg_pool2d(x, (2, 2), stride=1), (2, 4, 5)),
    "adaptive": (lambda m, x: F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, (1, 2)), (2, 4, 6)),
    "dropouts": (lambda m, x: F.dropout(x, 0.3, m.training) + F.dropout2d(x, 0.0, True), (2, 4, 6)),
    "powers": (lambda m, x: x**1 + x**2 - x.pow(2.0) + torch.pow(x, -2) + x.abs() ** 0.5 - (x.abs() + 1) ** -0.5, (2,)),
    "squares": (lambda m, x: x * x + torch.square(x) - x.square() + torch.mul(x, x), (2,)),
    "quotients": (lambda m, x: 1 / x - 2.5 / x.exp() + torch.arange(1.0, 3.0) / x + x.reciprocal() - 1 / torch.tensor(3) / x, (2,)),
    "exponential": (lambda m, x: x.exp() - torch.exp(x / 2) + (x.abs() + 1).log() - torch.log(x.exp()) + x.clone().exp_(), (3,)),
    "products": (lambda m, x: x * x.flip(1) - x[:, :1] * x + torch.mul(x, 2 * x) - x * x.sigmoid() - torch.sigmoid(x) * x, (3,)),
    "quotients_of_values": (lambda m, x: x / x.flip(1).exp() + torch.div(x[:, :1], x * x + 1), (3,)),
    "in_place_products": (lambda m, x: x.clone().mul_(x.flip(1)).div_(x.exp()), (3,)),
    "matrix_products": (lambda m, x: x @ x.mT - torch.bmm(x, x.transpose(1, 2)) + x.unsqueeze(1).matmul(x.unsqueeze(1).mT).squeeze(1), (3, 2)),
    "einsum": (lambda m, x: torch.einsum("bhid,bhjd->bhij", x, 2 * x) + torch.einsum("b h i d, b h j d -> b j h i", [x, x]).transpose(1, 2).mT, (2, 3, 4)),
    "einsum_rows": (lambda m, x: torch.einsum("bij,jk", x, torch.eye(2, dtype=x.dtype)) + torch.einsum("kj,bij->bik", torch.ones(2, 2, dtype=x.dtype), x), (3, 2)),
    "softmaxes": (lambda m, x: x.softmax(1) + torch.softmax(x, -1) - F.log_softmax(x, dim=1) + F.softmin(x, 2), (3, 4)),
    "masked_softmax": (lambda m, x: x.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1), (3, 3)),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x, 2 * x, x.exp(), scale=0.3) + F.scaled_dot_product_attention(x, x, x, is_causal=True), (2, 3, 4)),
    "attention_masks": (lambda m, x: F.scaled_dot_product_attention(x, x, x, torch.eye(3).bool()) + F.scaled_dot_product_attention(x, x, x, torch.eye(3, dtype=x.dtype)), (3, 4)),
    "norms": (lambda m, x: F.layer_norm(x, (4,)) + F.group_norm(x, 3) - F.instance_norm(x) + F.rms_norm(x, (3, 4), eps=0.1), (3, 4)),
    "roots": (lambda m, x: x.abs().sqrt() + torch.sqrt(x.square() + 1) - torch.rsqrt(x.abs() + 1) + (x.abs() + 1).rsqrt(), (3,)),
    "waves": (lambda m, x: x.sin() - torch.cos(x) + torch.sin(x).cos(), (3,)),
    "elus": (lambda m, x: F.elu(x, 0.3) - F.elu_(x.clone()) + F.selu(x) - torch.celu(x, 1.7) + F.celu(x) + torch.selu(x), (3,)),
    "gelus": (lambda m, x: F.gelu(x) - F.gelu(x, approximate="tanh") + F.silu(x) - F.mish(x, inplace=False), (3,)),
    "softplus": (lambda m, x: F.softplus(x) - F.softplus(x, beta=-3) + F.softplus(x, 2.0, 0.5) - F.softsign(x), (3,)),
    "hards": (lambda m, x: F.hardswish(x) - F.hardsigmoid(x * 9) + F.tanhshrink(x) - F.softshrink(x, 0.3), (3,)),
}  # fmt: skip

LIVE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "scaled": (lambda: Apply(lambda m, x: x * m.w + m.b, w=parameter(3), b=parameter(1, 2, 1)), (2, 3)),
    "divided": (lambda: Apply(lambda m, x: (m.b - x) / m.w.exp(), w=parameter(3), b=parameter(1)), (2, 3)),
    "expression": (lambda: Apply(lambda m, x: F.linear(x, m.w * 2 + m.v, m.w.sum(1)), w=parameter(4, 3), v=parameter(3)), (2, 3)),
    "matmul": (lambda: Apply(lambda m, x: x @ m.w, w=parameter(3, 4)), (2, 3)),
    "matmul_vector": (lambda: Apply(lambda m, x: torch.matmul(x, m.w), w=parameter(3)), (2, 3)),
    "matmul_left": (lambda: Apply(lambda m, x: m.w @ x, w=parameter(5, 2)), (2, 3)),
    "matmul_left_vector": (lambda: Apply(lambda m, x: m.w @ x, w=parameter(2)), (2, 3)),
    "matmul_single_batch": (lambda: Apply(lambda m, x: x @ m.w, w=parameter(1, 3, 4)), (2, 3)),
    "addmm": (lambda: Apply(lambda m, x: torch.addmm(m.b, x, m.w, beta=2, alpha=3), w=parameter(3, 4), b=parameter(4)), (3,)),
    "linear_row": (lambda: Apply(lambda m, x: F.linear(x, m.w), w=parameter(3)), (2, 3)),
    "functional_conv": (lambda: Apply(lambda m, x: F.conv2d(x, m.w, stride=2) + torch.conv2d(x, m.w, m.b, 2), w=parameter(3, 2, 2, 2), b=parameter(3)), (2, 4, 4)),
    "functional_conv1d": (lambda: Apply(lambda m, x: F.conv_transpose1d(F.conv1d(x, m.w, padding="same"), m.w), w=parameter(3, 2, 3)), (2, 4)),
    "functional_batch_norm": (lambda: Apply(lambda m, x: F.batch_norm(x, m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias, m.training), n=nn.BatchNorm2d(2)), (2, 3, 3)),
    "functional_prelu": (lambda: Apply(lambda m, x: F.prelu(x, m.w), w=parameter(1)), (2, 3)),
    "maximum": (lambda: Apply(lambda m, x: torch.maximum(x, m.w).minimum(m.v), w=parameter(3), v=parameter(1, 2, 1)), (2, 3)),
    "clamp": (lambda: Apply(lambda m, x: x.clamp(max=m.w.abs()), w=parameter(1)), (2, 3)),
    "attention": (lambda: Apply(lambda m, x: (lambda y, w: y * w.sum(1, keepdim=True).mT)(*m.layer(x, x, x, attn_mask=torch.triu(torch.full((2, 2), -torch.inf, dtype=x.dtype), 1))), layer=nn.MultiheadAttention(4, 2, batch_first=True)), (2, 4)),
    "cross_attention": (lambda: Apply(lambda m, x: m.layer(x[:, :2, :4], x, x, attn_mask=torch.eye(2, 3).bool(), need_weights=False)[0], layer=nn.MultiheadAttention(4, 2, batch_first=True, kdim=6, vdim=6, bias=False)), (3, 6)),
    "einsum": (lambda: Apply(lambda m, x: torch.einsum("bnd,hed->bhne", x, m.w), w=parameter(2, 3, 4)), (3, 4)),
    "token": (lambda: Apply(lambda m, x: torch.cat([m.t.expand(x.size(0), -1, -1), x], 1), t=parameter(1, 1, 3)), (2, 3)),
    "no_grad": (lambda: Apply(lambda m, x: x * _without_grad(m.w), w=parameter(3)), (3,)),
    "permutation": (lambda: Apply(lambda m, x: x[:, m.order], order=torch.tensor([2, 0, 1])), (3,)),
    "weight_split": (lambda: Apply(lambda m, x: x * m.w.chunk(2)[1] + torch.stack(m.w.chunk(2)).sum(0), w=parameter(6)), (3,)),
    "parameter_list": (lambda: Apply(lambda m, x: sum(x * w for w in m.ws), ws=nn.ParameterList([torch.ones(3), torch.ones(1)])), (3,)),
    "frozen_batch_norm": (lambda: Apply(lambda m, x: x * (m.w * (m.v + 1e-5).rsqrt()).reshape(1, -1, 1, 1), w=parameter(2), v=torch.rand(2)), (2, 3, 3)),
}  # fmt: skip


def _without_grad(value: Tensor) -> Tensor:
    with torch.no_grad():
        return value.abs()


class Block(nn.Module):
    """A basic residual block with a projection or a parameter-free shortcut."""

    def __init__(self, channels: int, out: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.project = nn.Conv2d(channels, out, 1, stride) if project else None
        self.stride, self.extra = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.project is not None:
            identity = self.project(x)
        elif self.stride != 1 or self.extra:
            identity = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2)
            )
        out += identity
        return self.relu(out)


def resnet(depth: int = 20, width: int = 16, project: bool = False) -> nn.Sequential:
    """The residual network for CIFAR-10 of ``depth`` layers."""
    blocks, channels = [], width
    for stage in range(3):
        for number in range((depth - 2) // 6):
            out = width * 2**stage
            blocks.append(Block(channels, out, 2 if stage and not number else 1, project and channels != out))
            channels = out
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    build, shape = CONVOLUTIONS[name]
    graph = assert_same(build(), shape)
    assert "conv" in {node.op for node in graph.nodes}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    build, shape = LAYERS[name]
    assert_same(build(), shape)


@pytest.mark.parametrize("name", MOVEMENT)
def test_movement(name):
    function, shape = MOVEMENT[name]
    assert_same(Apply(function), shape)


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name):
    function, shape = ARITHMETIC[name]
    assert_same(Apply(function), shape)


@pytest.mark.parametrize("name", LIVE)
def test_parameters_as_operands_are_live(name):
    build, shape = LIVE[name]
    net = build()
    graph = assert_same(net, shape)
    prepared(net, seed=5)  # other values, in the same graph
    x = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(evaluate(graph, x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("project", [False, True])
def test_resnet(project):
    graph = assert_same(resnet(20, 4, project), (3, 16, 12))
    assert len(graph.batch_norms) == 19
    paths = {node.path for node in graph.nodes}
    assert {"0", "3.conv1", "3.bn2", "3.add", "3.relu", "3.relu#2"} <= paths


def test_layers_that_need_no_work_leave_no_nodes():
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Unflatten(1, (2, 3)), nn.Dropout(), nn.Flatten())
    graph = trace(net.eval(), torch.empty(1, 6))
    assert [node.op for node in graph.nodes] == ["input"] and graph.output == 0


def test_chains_of_movement_become_one_gather():
    net = Apply(lambda m, x: x.permute(0, 2, 1).flip(1)[:, 1:].reshape(x.size(0), -1).roll(1, 1))
    graph = assert_same(net, (2, 4))
    assert [node.op for node in graph.nodes] == ["input", "gather"]


def test_movement_that_cancels_becomes_a_reshape():
    graph = assert_same(
        Apply(lambda m, x: x.flip(1).flip(1).transpose(1, 2).transpose(1, 2).flatten(1)), (2, 3)
    )
    assert [node.op for node in graph.nodes] == ["input", "reshape"]


def test_constant_channels_become_fill():
    graph = assert_same(Apply(lambda m, x: torch.cat([x, torch.zeros_like(x)], 1)), (2, 3))
    assert [node.op for node in graph.nodes] == ["input", "gather"]


def test_dead_nodes_are_removed():
    net = Apply(lambda m, x: (m.unused(x), m.used(x))[1], unused=nn.Linear(3, 3), used=nn.Linear(3, 2))
    graph = assert_same(net, (3,))
    assert [node.op for node in graph.nodes] == ["input", "linear"] and len(graph.slots) == 2


def test_both_extrema_share_one_difference():
    graph = assert_same(pycert.nn.MaxMin(), (4, 2))
    assert sorted(node.op for node in graph.nodes).count("add") == 1


def test_relu_forms_are_one_operator():
    graph = assert_same(
        Apply(lambda m, x: torch.maximum(x.clamp(min=0), torch.tensor(0.0)) + F.leaky_relu(x, 0.0)), (3,)
    )
    assert {node.op for node in graph.nodes} == {"input", "relu", "add"}


def test_a_layer_used_twice_reads_one_slot():
    net = Apply(lambda m, x: m.layer(m.layer(x).relu()), layer=nn.Linear(3, 3))
    graph = assert_same(net, (3,))
    assert len(graph.slots) == 2
    assert [node.path for node in graph.nodes] == ["input", "layer", "relu", "layer#2"]


def test_paths_name_functions_and_nested_modules():
    inner = Apply(lambda m, x: F.relu(m.fc(x)) + 1, fc=nn.Linear(3, 3))
    graph = assert_same(nn.Sequential(inner, nn.ModuleDict({"a": nn.Identity()})["a"], nn.Tanh()), (3,))
    assert [node.path for node in graph.nodes] == ["input", "0.fc", "0.relu", "0.add", "2"]


def test_several_inputs_in_any_order():
    net = Apply(lambda m, a, b, unused: m.fc(b) - a.flatten(1), fc=nn.Linear(3, 4))
    graph = assert_same(net, (2, 2), (3,), (5,))
    assert graph.inputs == [(2, 2), (3,), (5,)]


def test_loops_over_modules_and_control_flow_on_shapes():
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in m.layers:
            y = layer(x)
            x = x + y if y.shape == x.shape and x.dim() == 2 else y
        assert isinstance(x, Tensor) and x.is_floating_point() and x.dtype == torch.float64
        return x

    assert_same(
        Apply(forward, layers=nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(4, 4)])), (3,)
    )


def test_torch_batch_norm_takes_its_own_order_of_arguments():
    def forward(m: Any, x: Tensor) -> Tensor:
        n = m.n
        return torch.batch_norm(x, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 0.3, False)

    assert_same(Apply(forward, n=nn.BatchNorm2d(2)), (2, 3, 3))


def test_graph_modules_of_fx_and_export():
    net = prepared(resnet(8, 2, project=True))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    exported = torch.export.export(
        net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    ).module()
    for module in (torch.fx.symbolic_trace(net), exported):
        graph = trace(module, x)
        torch.testing.assert_close(evaluate(graph, x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device):
    net = prepared(
        nn.Sequential(nn.Conv2d(2, 2, 2, padding="same"), nn.AdaptiveAvgPool2d(2), pycert.nn.MaxMin())
    )
    with torch.device(device):
        graph = trace(net, torch.empty(1, 2, 3, 3, dtype=torch.float64, device="cpu"))
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(evaluate(graph, x), net(x), rtol=1e-12, atol=1e-12)


def test_a_softmax_over_one_element_is_bounded():
    net = Apply(lambda m, x: x + torch.cat([x[:, :1].softmax(1), x[:, 1:].log_softmax(-1)], 1))
    bm = pycert.BoundedModule(net, torch.empty(1, 2))
    for method in ("ibp", "crown"):
        lower, upper = bm.bound(pycert.Box(torch.zeros(1, 2), torch.ones(1, 2)), method)
        torch.testing.assert_close(torch.cat([lower, upper]), torch.tensor([[1.0, 0.0], [2.0, 1.0]]))


def test_scalar_samples():
    assert_same(Apply(lambda m, x: (2 * x).unsqueeze(1) + m.w, w=parameter(3)), ())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_of_the_example_does_not_matter(batch):
    net = prepared(resnet(8, 2))
    graph = trace(net, torch.empty(batch, 3, 8, 8, dtype=torch.float64))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(evaluate(graph, x), net(x), rtol=1e-12, atol=1e-12)


def test_paths_in_a_graph_may_be_exponentially_many():
    layer = nn.Linear(2, 2)

    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(40):
            x = x + m.layer(x) / 8
        return x

    graph = assert_same(Apply(forward, layer=layer), (2,))
    assert len(graph.nodes) == 1 + 3 * 40


def test_shared_expressions_are_evaluated_once():
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w
        for _ in range(40):
            w = (w + w) / 2
        return x * w

    assert_same(Apply(forward, w=parameter(2)), (2,))


def _orthogonalised(m: Any, x: Tensor) -> Tensor:
    w = m.w / m.w.norm()
    for _ in range(30):  # Bjorck's iteration towards an orthogonal matrix
        w = 1.5 * w - 0.5 * w @ w.mT @ w
    return F.linear(x, w)


def test_long_expressions_deepcopy_and_pickle():
    net = Apply(_orthogonalised, w=parameter(4, 4))
    graph = assert_same(net, (4,))
    x = torch.randn(2, 4, dtype=torch.float64)
    for again in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        torch.testing.assert_close(evaluate(again, x), net(x), rtol=1e-12, atol=1e-12)


def test_batch_norm_in_training_mode_stays_one_node_and_is_not_updated():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()).double().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    graph = trace(net, torch.empty(1, 1, 5, 4, dtype=torch.float64))
    assert [node.op for node in graph.nodes] == ["input", "conv", "batch_norm", "relu"]
    assert graph.batch_norms == [net[1]] and graph.batch_norms[0].training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    x = torch.randn(4, 1, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(evaluate(graph, x), net(x), rtol=1e-12, atol=1e-12)


def test_tracing_on_the_meta_device():
    with torch.device("meta"):
        net = resnet(20)
    graph = trace(net.eval(), torch.empty(1, 3, 32, 32, device="meta"))
    assert graph.nodes[graph.output].shape == (10,)
