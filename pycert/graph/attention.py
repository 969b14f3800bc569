"""Lowering of attention: matrix products of values around a softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pycert.graph.elementwise import add, mul
from pycert.graph.joining import masked_fill
from pycert.graph.parts import indices
from pycert.graph.products import linear, of_values
from pycert.graph.reduction import reduce
from pycert.graph.softmax import softmax
from pycert.graph.tracer import Traced, Tracer, lowers

#: An execution may scale query and key before their product, each by a rounded root of the scale.
_SCALING = 8.0
#: Fused attention rescales its sums block by block and divides by the sum of exponentials at the end.
_RESCALING = 32.0


@lowers("scaled_dot_product_attention")
def attention(tracer: Tracer, query: Any, key: Any, value: Any, attn_mask: Tensor | None = None,
              dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
              enable_gqa: bool = False) -> Traced:  # fmt: skip
    """``softmax(scale * query @ key^T + mask) @ value`` of values ``[batch, *heads, length, features]``."""
    if not all(isinstance(part, Traced) for part in (query, key, value)):
        tracer.refuse("attention with constant query, key or value", "write it with matmul and softmax")
    if dropout_p != 0 or enable_gqa:
        tracer.refuse("attention with dropout_p or enable_gqa", "set dropout_p=0, repeat key and value")
    if isinstance(attn_mask, Traced):
        tracer.refuse("attention with a mask that depends on the input", "masks must be constants")
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device="cpu").tril()
        attn_mask = allowed if attn_mask is None else attn_mask
    return of_values(tracer, _shares(tracer, query, key, scale, attn_mask), value, _RESCALING)


def _shares(tracer: Tracer, query: Traced, key: Traced, scale: float | None, mask: Tensor | None) -> Traced:
    """``softmax(scale * query @ key^T + mask)``, scale ``1 / sqrt(features)`` by default."""
    swapped = indices(key)[0].transpose(-1, -2)
    transposed = tracer.wrap(tracer.gather(tracer.node(key), swapped, tuple(swapped.shape)), key.dtype)
    scores = of_values(tracer, query, transposed, _SCALING)
    scores = mul(tracer, scores, 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale))
    return softmax(tracer, scores if mask is None else _masked(tracer, scores, mask), -1)


def _masked(tracer: Tracer, scores: Traced, mask: Tensor) -> Traced:
    """Scores where a mask is True, or plus a mask of numbers; -inf hides elements."""
    tracer.pin(mask, "an attention mask")
    mask = mask.detach().cpu()
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
    if mask.dtype != torch.bool:
        scores = add(tracer, scores, mask.masked_fill(hidden, 0).to(scores.dtype))
    if not bool(hidden.any()):
        return scores
    return masked_fill(tracer, scores, hidden.expand(scores.shape), -math.inf)


def multi_head(
    tracer: Tracer,
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Traced, Traced | None]:
    """nn.MultiheadAttention with the batch first and without dropout, padding mask or added keys."""
    if not module.batch_first:
        tracer.refuse("batch_first=False", "use batch_first=True: samples must stay apart")
    if key_padding_mask is not None or module.bias_k is not None or module.add_zero_attn:
        tracer.refuse("key_padding_mask, add_bias_kv or add_zero_attn", "leave them out")
    if module.dropout and module.training:
        tracer.refuse("dropout in training mode", "call .eval()")
    tracer.needs_eval()
    heads, size = module.num_heads, module.embed_dim
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases: Any = (None, None, None)
    if module.in_proj_weight is not None:
        weights = tracer.compute(torch.Tensor.chunk, module.in_proj_weight, 3)
    if module.in_proj_bias is not None:
        biases = tracer.compute(torch.Tensor.chunk, module.in_proj_bias, 3)
    parts = []
    for part, weight, bias in zip((query, key, value), weights, biases):
        projected = linear(tracer, part, weight, bias)
        shape = (part.shape[1], heads, size // heads)
        moved = torch.arange(math.prod(shape), device="cpu").reshape(shape).transpose(0, 1)
        node = tracer.gather(tracer.node(projected), moved, tuple(moved.shape))
        parts.append(tracer.wrap(node, projected.dtype))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~tracer.pin(attn_mask, "an attention mask")  # here True hides
    if attn_mask is not None and attn_mask.dim() != 2:
        tracer.refuse("a mask that differs from sample to sample", "use one mask [length, length]")
    shares = _shares(tracer, parts[0], parts[1], None, attn_mask)
    merged = indices(mixed := of_values(tracer, shares, parts[2], _RESCALING))[0].transpose(0, 1)
    node = tracer.gather(tracer.node(mixed), merged, (query.shape[1], size))
    result = linear(tracer, tracer.wrap(node, mixed.dtype), module.out_proj.weight, module.out_proj.bias)
    if not need_weights:
        return result, None
    return result, reduce(tracer, "mean", shares, 1, False, mean=True) if average_attn_weights else shares
