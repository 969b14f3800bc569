"""Guaranteed upper bounds of masked operator norms: the least of what is affordable."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

from pycert._flags import refuse_emulation
from pycert.norms.arithmetic import (
    UP,
    bits_of,
    exact_double,
    exponent_of,
    gamma,
    is_nonzero,
    round_up,
    scaled_back,
    times_power,
)
from pycert.norms.band import Band, largest_eigenvalue
from pycert.norms.dense import Downdated, norm_bound
from pycert.norms.frequency import frequency_bound
from pycert.norms.operator import Operator

#: Floating-point operations that one sample, and one operator without masks or with whole channels dead, may cost.
BUDGETS = {"normal": (3e9, 2e11), "high": (4e11, 2e12)}
#: Of a bound over an estimate from below: where frequencies do better nothing more is spent. Without masks, and with
#: channels dropped, which is done for every pattern of channels anew.
_NEAR = (1.01, 1.05)
#: More than underflow takes from a norm, and from one whose square is bounded, of weights and masks of at most about 1:
#: 2^100 sums, of products below 2^-1022.
_LOST, _LOST_SQUARES = 2.0**-900, 2.0**-450
#: An operator with this many elements or fewer is written out as a matrix.
_EXPLICIT = 2**21
#: Patterns of live channels that are bounded each on its own; beyond, unions of several.
_PATTERNS = {"normal": 16, "high": 256}


def column_sums(operator: Operator, rows: Tensor | None, batch: int) -> Tensor:
    """At least ``sum_i r_i |W_ij|`` for every input ``j``; ``[B, *in]``, float64."""
    if rows is None:
        rows = operator.weight.new_ones(1, *operator.output_shape)
    sums = operator.with_weight(operator.weight.abs()).apply_adjoint(rows)
    return (sums * ((1 + gamma(operator.terms() + 3)) * UP)).expand(batch, *operator.input_shape)


def row_sums(operator: Operator, columns: Tensor | None, batch: int) -> Tensor:
    """At least ``sum_j |W_ij| c_j`` for every output ``i``; ``[B, *out]``, float64."""
    if columns is None:
        columns = operator.weight.new_ones(1, *operator.input_shape)
    sums = operator.with_weight(operator.weight.abs()).apply(columns)
    return (sums * ((1 + gamma(operator.terms() + 3)) * UP)).expand(batch, *operator.output_shape)


def largest_sum(
    operator: Operator, rows: Tensor | None, columns: Tensor | None, batch: int, p: float
) -> Tensor:
    """``||D_rows W D_columns||_p`` for p = 1 or infinity, not below it; ``[B]``."""
    if p == 1:
        sums, outer = column_sums(operator, rows, batch), columns
    else:
        sums, outer = row_sums(operator, columns, batch), rows
    if outer is not None:
        sums = sums * outer * UP
    return sums.flatten(1).amax(1)


@dataclasses.dataclass
class Masks:
    """Nonnegative diagonals scaled to about 1 with the powers of two taken out, and the operator likewise."""

    operator: Operator
    rows: Tensor | None  # [B, *out], float64
    columns: Tensor | None  # [B, *in]
    live_rows: Tensor | None  # bool: what was not zero before it was scaled
    live_columns: Tensor | None
    exponent: Tensor  # [B]: results are in units of 2^exponent
    batch: int
    owner: Tensor  # the weight as it was given, for what is kept with it


def _scaled(value: Tensor) -> tuple[Tensor, Tensor]:
    wide = exact_double(value).abs()
    exponent = exponent_of(wide.flatten(1).amax(1))
    return times_power(wide, -exponent.view(-1, *[1] * (wide.dim() - 1))), exponent


def prepare(operator: Operator, rows: Tensor | None, columns: Tensor | None) -> Masks:
    weight = exact_double(operator.weight)
    power = exponent_of(weight.abs().amax()) if weight.numel() else weight.new_zeros((), dtype=torch.int32)
    scaled = operator.with_weight(times_power(weight, -power))
    batch = 1
    exponent = power.reshape(1)
    live_rows, live_columns = (None if mask is None else is_nonzero(mask) for mask in (rows, columns))
    if rows is not None:
        rows, extra = _scaled(rows)
        batch, exponent = rows.shape[0], exponent + extra
    if columns is not None:
        columns, extra = _scaled(columns)
        batch, exponent = columns.shape[0], exponent + extra
    return Masks(
        scaled, rows, columns, live_rows, live_columns, exponent.expand(batch), batch, operator.weight
    )


def _touched(masks: Masks) -> Tensor:
    """Whether any weight that is not zero meets a live row and a live column; ``[B]``."""
    operator = masks.operator
    pattern = operator.with_weight(is_nonzero(masks.owner).double())
    alive = operator.weight.new_ones(1, *operator.input_shape)
    if masks.live_columns is not None:
        alive = masks.live_columns.double()
    reached = pattern.apply(alive)
    if masks.live_rows is not None:
        reached = reached * masks.live_rows
    return (reached.flatten(1) > 0.5).any(1).expand(masks.batch)


def upper_norm(
    operator: Operator, rows: Tensor | None, columns: Tensor | None, p: float, effort: str
) -> Tensor:
    """At least ``||D_rows W D_columns||_p``; ``[B]`` in the dtype of the weight, NaN where something is not finite."""
    refuse_emulation(operator.weight.device)
    masks = prepare(operator, rows, columns)
    bad = ~torch.isfinite(masks.operator.weight).all().expand(masks.batch)
    for mask in (masks.rows, masks.columns):
        if mask is not None:
            bad = bad | ~torch.isfinite(mask).flatten(1).all(1)
    if bool(bad.all()):
        value = torch.full((masks.batch,), torch.nan, dtype=torch.float64, device=bad.device)
    else:
        if p == 2:
            value = _spectral(masks, effort)
        else:
            value = largest_sum(masks.operator, masks.rows, masks.columns, masks.batch, p)
        # What underflowed as weights and masks were scaled and multiplied, or squared.
        value = value + (_LOST_SQUARES if p == 2 else _LOST)
        value = torch.where(_touched(masks), value, torch.zeros_like(value))
        value = scaled_back(value * UP, masks.exponent)
        value = torch.where(bad, torch.full_like(value, torch.nan), value)
    return round_up(value, operator.weight.dtype)


def _spectral(masks: Masks, effort: str) -> Tensor:
    operator, exchanged = masks.operator.plain()
    rows, columns = masks.rows, masks.columns
    if exchanged:
        rows, columns = _dead_border(masks, operator), rows
    ones = largest_sum(operator, rows, columns, masks.batch, 1)
    infinite = largest_sum(operator, rows, columns, masks.batch, torch.inf)
    best = ones.sqrt() * infinite.sqrt() * UP  # Schur: ||A||_2^2 <= ||A||_1 ||A||_inf
    highest = torch.ones_like(best)
    for mask in (rows, columns):
        if mask is not None:
            highest = highest * mask.flatten(1).amax(1)
    everywhere = cached(masks.owner, (operator.geometry, effort), lambda: global_bound(operator, effort))
    best = torch.minimum(best, everywhere * highest * UP)
    if rows is None and columns is None:
        return best
    rows = None if rows is None else rows.flatten(1).expand(masks.batch, -1)
    columns = None if columns is None else columns.flatten(1).expand(masks.batch, -1)
    first, inverse = _distinct(rows, columns, masks.batch)
    some_rows = None if rows is None else rows[first]
    some_columns = None if columns is None else columns[first]
    found = _masked(operator, some_rows, some_columns, best[first], effort, masks.owner)
    return torch.minimum(best, found[inverse])


def _dead_border(masks: Masks, adjoint: Operator) -> Tensor | None:
    """The columns' mask as rows of the adjoint, which has more of them with an output padding of the stride or more."""
    wanted, given = adjoint.output_shape, masks.operator.input_shape
    if wanted == given:
        return masks.columns
    mask = masks.operator.weight.new_ones(1, *given) if masks.columns is None else masks.columns
    return torch.nn.functional.pad(mask, (0, wanted[2] - given[2], 0, wanted[1] - given[1]))


def _distinct(rows: Tensor | None, columns: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """Samples with masks of their own, and which of them every sample equals."""
    seen: dict[bytes, int] = {}
    first: list[int] = []
    inverse: list[int] = []
    for b in range(batch):
        key = b"".join(m[b].cpu().numpy().tobytes() for m in (rows, columns) if m is not None)
        if key not in seen:
            seen[key] = len(first)
            first.append(b)
        inverse.append(seen[key])
    return torch.tensor(first), torch.tensor(inverse)


def _masked(
    operator: Operator,
    rows: Tensor | None,
    columns: Tensor | None,
    best: Tensor,
    effort: str,
    owner: Tensor,
) -> Tensor:
    if operator.geometry is None:
        return _linear_norms(operator.weight, rows, columns, best, BUDGETS[effort][0], owner)
    out, inside = operator.output_shape, operator.input_shape
    size = best.new_tensor([1.0])
    for n in (*out, *inside):
        size = size * n
    if float(size) <= _EXPLICIT:
        return _matrix_norms(operator.explicit(), rows, columns, best, BUDGETS[effort][0])
    batch = best.shape[0]
    r = best.new_ones(batch, *out) if rows is None else rows.view(batch, *out)
    c = best.new_ones(batch, *inside) if columns is None else columns.view(batch, *inside)
    best = torch.minimum(best, _channel_bounds(operator, r, c, effort))
    for b in range(batch):
        found = _band_bound(operator, r[b], c[b], BUDGETS[effort][0])
        if found is not None:
            best[b] = torch.minimum(best[b], found)
    return best


def _band_bound(operator: Operator, rows: Tensor, columns: Tensor, budget: float) -> Tensor | None:
    """By block tridiagonal factorisations, one for every group, blocks of the operator; None beyond the budget.

    rows, columns: ``[O, H', W']`` and ``[C, H, W]``.
    """
    geometry = operator.geometry
    assert geometry is not None
    channels, height, width = geometry.input_shape
    alone = dataclasses.replace(geometry, groups=1, input_shape=(channels // geometry.groups, height, width))
    chosen, total = [], 0.0
    groups = geometry.groups
    for weight, *masks in zip(operator.weight.chunk(groups), rows.chunk(groups), columns.chunk(groups)):
        bands = [Band(Operator(weight, alone), inputs) for inputs in (False, True)]
        costs = [band.cost(*masks) for band in bands]
        total += min(costs)
        chosen.append((bands[costs.index(min(costs))], masks))
    if total > budget:
        return None
    return torch.stack([band.bound(*masks) for band, masks in chosen]).amax()


def _near(operator: Operator, bound: Tensor, factor: float) -> bool:
    """Whether an estimate of the norm from below is so close that no better bound need be looked for."""

    def times(flat: Tensor) -> Tensor:
        return operator.apply_adjoint(operator.apply(flat.view(1, *operator.input_shape))).flatten()

    count = 1
    for n in operator.input_shape:
        count *= n
    estimate = max(largest_eigenvalue(times, count, operator.weight.device), 0.0) ** 0.5
    return bool(bound <= factor * estimate)


def _unmasked(operator: Operator, bound: Tensor, budget: float, near: float) -> Tensor:
    """The bound, or where it is loose a better one that the budget allows; small images under large kernels need it."""
    if _near(operator, bound, near):
        return bound
    rows, columns = (
        operator.weight.new_ones(*shape) for shape in (operator.output_shape, operator.input_shape)
    )
    found = _band_bound(operator, rows, columns, budget)
    return bound if found is None else torch.minimum(bound, found)


def _linear_norms(
    weight: Tensor, rows: Tensor | None, columns: Tensor | None, best: Tensor, budget: float, owner: Tensor
) -> Tensor:
    """By a Gram matrix that is kept with the weight where the columns' mask removes less than half, else anew."""
    if weight.shape[0] > weight.shape[1]:
        weight, rows, columns = weight.t(), columns, rows
    if weight.shape[0] ** 3 > budget:
        return _matrix_norms(weight, rows, columns, best, budget)
    kept = Downdated(weight, cached(owner, "gram matrix", lambda: weight @ weight.t()))
    best = best.clone()
    for b in range(best.shape[0]):
        row, column = (
            weight.new_ones(size) if mask is None else mask[b]
            for size, mask in zip(weight.shape, (rows, columns))
        )
        found = kept.bound(row, column)
        if found is None:
            found = _matrix_norms(weight, row[None], column[None], best[b : b + 1], budget)[0]
        best[b] = torch.minimum(best[b], found)
    return best


def _matrix_norms(
    weight: Tensor, rows: Tensor | None, columns: Tensor | None, best: Tensor, budget: float
) -> Tensor:
    """Live rows and columns alone, sample by sample."""
    best = best.clone()
    for b in range(best.shape[0]):
        part = weight
        if columns is not None:
            live = columns[b].nonzero().flatten()
            part = part[:, live] * columns[b, live]
        if rows is not None:
            live = rows[b].nonzero().flatten()
            part = part[live] * rows[b, live, None]
        small, large = sorted(part.shape)
        if small * small * (2.0 * large + 3 * small) > 4 * budget:
            continue
        # Elements are rounded twice.
        rounding = gamma(4) * part.abs().amax() * (part.numel() ** 0.5) * UP if part.numel() else 0.0
        best[b] = torch.minimum(best[b], (norm_bound(part[None])[0] + rounding) * UP)
    return best


def _channel_bounds(operator: Operator, rows: Tensor, columns: Tensor, effort: str) -> Tensor:
    """The kernel with every channel scaled by its largest mask value, dead channels dropped, on all frequencies.

    Norms grow with every element of a mask, so that raising it to its channel's maximum is an upper bound, and so is
    the elementwise maximum of several samples' masks.
    """
    geometry = operator.geometry
    assert geometry is not None
    patterns = torch.cat([rows.flatten(2).amax(2), columns.flatten(2).amax(2)], 1)  # [B, O + C]
    distinct, inverse = torch.unique(patterns, dim=0, return_inverse=True)
    limit = _PATTERNS[effort]
    if distinct.shape[0] > limit:
        order = (distinct > 0).sum(1).argsort()
        groups = torch.empty_like(order)
        groups[order] = torch.arange(len(order)) * limit // len(order)
        unions = distinct.new_zeros(limit, distinct.shape[1])
        unions.scatter_reduce_(0, groups[:, None].expand_as(distinct), distinct, "amax")
        distinct, inverse = unions, groups[inverse]
    budget = BUDGETS[effort][1] / len(distinct)
    found = [_channel_bound(operator, pattern, budget) for pattern in distinct]
    return torch.stack(found)[inverse]


def _channel_bound(operator: Operator, pattern: Tensor, budget: float) -> Tensor:
    geometry = operator.geometry
    assert geometry is not None
    weight = operator.weight
    out = pattern[: weight.shape[0]]
    inside = pattern[weight.shape[0] :]
    per_group = weight.shape[0] // geometry.groups
    expanded = inside.view(geometry.groups, 1, -1).expand(-1, per_group, -1).reshape(weight.shape[0], -1)
    if geometry.groups == 1:  # dropping keeps one group whole; several need equal sizes
        live_out, live_in = out.nonzero().flatten(), inside.nonzero().flatten()
        if min(live_out.numel(), live_in.numel()) == 0:
            return weight.new_zeros(())
        scaled = (
            weight[live_out][:, live_in]
            * (out[live_out, None] * expanded[live_out][:, live_in])[..., None, None]
        )
        geometry = dataclasses.replace(
            geometry, input_shape=(live_in.numel(), geometry.input_shape[1], geometry.input_shape[2])
        )
    else:
        scaled = weight * (out[:, None] * expanded)[..., None, None]
    bound = _unmasked(
        Operator(scaled, geometry), frequency_bound(Operator(scaled, geometry)), budget, _NEAR[1]
    )
    # Weights are rounded twice: by gamma_4 |W|, whose operator norm is at most sqrt(||.||_1 ||.||_inf) of |W|.
    again = Operator(scaled, geometry)
    schur = (
        largest_sum(again, None, None, 1, 1).sqrt() * largest_sum(again, None, None, 1, torch.inf).sqrt()
    )[0]
    return (bound + gamma(4) * schur * UP) * UP


# ---- mask-free norms, kept as long as the weight stays as it is ----------------------------------------

_CACHE: dict[int, tuple[Any, dict[Any, tuple[Tensor, Tensor]]]] = {}


def cached(owner: Tensor, key: Any, compute: Any) -> Tensor:
    """``compute()`` for this tensor's present values; kept until they change.

    The kept copy of the values is compared: a version counter misses changes through ``.data``.
    """
    entry = _CACHE.get(id(owner))
    if entry is None or entry[0]() is not owner:
        number = id(owner)
        entry = (weakref.ref(owner, lambda _: _CACHE.pop(number, None)), {})
        _CACHE[number] = entry
    found = entry[1].get(key)
    if found is not None and found[0].shape == owner.shape and torch.equal(bits_of(found[0]), bits_of(owner)):
        return found[1]
    with torch.no_grad():
        value: Tensor = compute()
    entry[1][key] = (owner.detach().clone(), value)
    return value


def global_bound(operator: Operator, effort: str) -> Tensor:
    """An upper bound of ``||W||_2`` for weights of about 1; a float64 number."""
    weight, geometry = operator.weight, operator.geometry
    if geometry is None:
        return norm_bound(weight[None])[0]
    size = 1.0
    for n in (*operator.output_shape, *operator.input_shape):
        size *= n
    if size <= _EXPLICIT:
        return norm_bound(operator.explicit()[None])[0]
    best = frequency_bound(operator)
    for extra in range(1, 4) if effort == "high" else ():
        best = torch.minimum(best, frequency_bound(operator, extra))
    return _unmasked(operator, best, BUDGETS[effort][1], _NEAR[0])
