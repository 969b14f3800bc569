"""Ball-and-box propagation with power-iteration norms, differentiable: the bound that training goes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pycert.nn import ClippedMaxMin, MaxMin, ReLUTheta
from pycert.norms.operator import Geometry, Operator
from pycert.ops.norm import _power

BOUNDS = ("local", "global")


@dataclasses.dataclass
class Reach:
    """Where the last hidden value is.

    centre, lower, upper: ``[B, n]``, its value at the input and its box. radius: ``[B]``, of the ball around
    it. starts: vectors for the next power iterations, one tensor per layer. live: share of neurons that may
    vary, per layer. sparsity: the penalty of :func:`pycert.train.losses.worst_logits`, where asked for.
    """

    centre: Tensor
    lower: Tensor
    upper: Tensor
    radius: Tensor
    starts: list[Tensor]
    live: list[Tensor]
    sparsity: Tensor | None


@dataclasses.dataclass
class _State:
    centres: Tensor  # [2 B, ...]: value at the input, centre of the box; [B, ...] where both are the same
    spread: Tensor  # [B, ...]: half width of the box
    radius: Tensor  # [B]
    live: Tensor | None  # bits, or bool, of what feeds the next layer; None: all

    def box(self) -> tuple[Tensor, Tensor, Tensor]:
        batch = self.spread.shape[0]
        middle = self.centres[-batch:]
        return self.centres[:batch], middle - self.spread, middle + self.spread


def layers_of(net: nn.Module) -> list[nn.Module]:
    """The layers of a sequential network, nested ones unfolded.

    Raises:
        ValueError: the network is no sequence of the layers that training covers.
    """

    def unfold(module: nn.Module) -> Iterator[nn.Module]:
        if isinstance(module, nn.Sequential):
            for child in module:
                yield from unfold(child)
        elif not isinstance(module, nn.Identity):
            yield module

    layers = list(unfold(net))
    known = (nn.Conv2d, nn.Linear, nn.ReLU, ReLUTheta, MaxMin, ClippedMaxMin, nn.Flatten)
    for layer in layers:
        if not isinstance(layer, known):
            raise ValueError(
                f"training by Lipschitz bounds takes a sequence of {', '.join(k.__name__ for k in known)}, "
                f"got {type(layer).__name__}"
            )
    if not layers or not isinstance(layers[-1], nn.Linear):
        raise ValueError("training by Lipschitz bounds needs a network that ends in a Linear layer")
    return layers


def _operator(layer: nn.Module, shape: torch.Size) -> Operator:
    weight: Any = layer.weight
    if isinstance(layer, nn.Linear):
        return Operator(weight, None)
    assert isinstance(layer, nn.Conv2d)
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError("training by Lipschitz bounds needs convolutions with zero padding given as numbers")
    stride, padding, dilation = (
        (int(pair[0]), int(pair[1])) for pair in (layer.stride, layer.padding, layer.dilation)
    )
    geometry = Geometry((shape[1], shape[2], shape[3]), stride, padding, dilation, layer.groups)
    return Operator(weight, geometry)


def warm_start_shapes(net: nn.Module, example: Tensor) -> list[tuple[int, ...]]:
    """Shapes, without batch, of the vectors that :func:`propagate` starts from and returns."""
    shapes, x = [], example[:1]
    with torch.no_grad():
        for layer in layers_of(net)[:-1]:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                shapes.append(tuple(x.shape[1:]))
            x = layer(x)
    return shapes


def propagate(
    net: nn.Module,
    x: Tensor,
    eps: Tensor,
    bound: str,
    steps: int,
    starts: list[Tensor] | None,
    sparsity: float | None = None,
    local_layers: Sequence[int] | None = None,
) -> Reach:
    """Ball and box of the last hidden value, for l2 balls of radius ``eps`` ``[B]`` around ``x``."""
    layers = layers_of(net)
    state = _State(x, eps.view(-1, *[1] * (x.dim() - 1)), eps, None)
    kept: list[Tensor] = []
    shares: list[Tensor] = []
    penalty = None if sparsity is None else x.new_zeros(())
    position = 0
    while position < len(layers) - 1:
        layer = layers[position]
        if isinstance(layer, nn.Flatten):
            state.centres, state.spread = state.centres.flatten(1), state.spread.flatten(1)
            position += 1
            continue
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            raise ValueError(
                f"training by Lipschitz bounds needs an affine layer before {type(layer).__name__}"
            )
        activation = layers[position + 1]
        operator = _operator(layer, state.centres.shape)
        before = state.live
        state, pre = _layer(layer, activation, state, sparsity is not None)
        if penalty is not None and pre is not None and sparsity is not None:
            penalty = penalty + _penalty(activation, *pre, sparsity)
        everywhere = bound == "global" or (local_layers is not None and len(kept) not in local_layers)
        rows = state.live if isinstance(activation, (nn.ReLU, ReLUTheta)) and not everywhere else None
        start = None if starts is None else starts[len(kept)]
        batch = 1 if everywhere else x.shape[0]
        columns = None if everywhere else before
        sigma, vector = _power(operator, rows, columns, batch, start, steps)
        kept.append(vector)
        state.radius = state.radius * sigma
        if state.live is not None:
            shares.append(_share(state.live, state.spread[0].numel()))
        position += 2
    centre, lower, upper = state.box()
    return Reach(centre, lower, upper, state.radius, kept, shares, penalty)


def _share(live: Tensor, count: int) -> Tensor:
    """Of ones among bits or bools, without gradient."""
    if live.dtype == torch.bool:
        return live.float().mean()
    table = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.float32)
    return table[live.long()].sum() / (live.shape[0] * count)


def _affine(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    assert isinstance(layer, nn.Conv2d)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _layer(
    layer: nn.Module, activation: nn.Module, state: _State, keep_box: bool
) -> tuple[_State, tuple[Tensor, Tensor] | None]:
    """One affine layer and its activation; also the box between them, where it is asked for."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    centres = _affine(layer, state.centres, weight, bias)
    batch = state.radius.shape[0]
    if state.spread[0].numel() == 1 and state.centres[0].numel() > 1:  # the same half width everywhere
        ones = state.centres.new_ones(1, *state.centres.shape[1:])
        spread = state.spread.view(-1, *[1] * (centres.dim() - 1)) * _affine(layer, ones, weight.abs(), None)
    else:
        spread = _affine(layer, state.spread, weight.abs(), None)
    row_norm = weight.flatten(1).norm(dim=1)
    pre = None
    if keep_box or not isinstance(activation, (nn.ReLU, ReLUTheta)):
        value, middle = centres[:batch], centres[-batch:]
        ball = state.radius.view(-1, *[1] * (value.dim() - 1)) * row_norm.view(-1, *[1] * (value.dim() - 2))
        pre = torch.maximum(middle - spread, value - ball), torch.minimum(middle + spread, value + ball)
    if isinstance(activation, (nn.ReLU, ReLUTheta)):
        theta: Tensor | None = None
        if isinstance(activation, ReLUTheta):
            theta = activation.theta.expand(centres.shape[1:])
        out, width, live, _ = torch.ops.pycert.ball_box_relu(centres, spread, state.radius, row_norm, theta)
        return _State(out, width, state.radius, live), pre
    assert pre is not None and isinstance(activation, (MaxMin, ClippedMaxMin))
    lower, upper = activation(pre[0]), activation(pre[1])
    live = None
    if isinstance(activation, ClippedMaxMin):
        live = activation.varying(lower.detach(), upper.detach())
    centres = torch.cat([activation(centres[:batch]), (lower + upper) / 2])
    return _State(centres, (upper - lower) / 2, state.radius, live), pre


def _penalty(activation: nn.Module, lower: Tensor, upper: Tensor, weight: float) -> Tensor:
    """Hinges that push bounds past where the neuron is constant (Huang et al. 2021, section 4)."""
    if isinstance(activation, ReLUTheta):
        return F.relu(upper).mean() + weight * F.relu(activation.theta - lower).mean()
    if isinstance(activation, ClippedMaxMin):
        half = lower.shape[1] // 2
        sorted_lower = torch.maximum(lower[:, :half], lower[:, half:])
        sorted_upper = torch.minimum(upper[:, :half], upper[:, half:])
        return F.relu(activation.high - sorted_lower).mean() + F.relu(sorted_upper - activation.low).mean()
    return F.relu(upper).mean() if isinstance(activation, nn.ReLU) else upper.new_zeros(())
