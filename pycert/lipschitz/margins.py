"""Bounds of linear functions of the outputs: their values at the centre, less what ball and box allow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycert.bounded import BoundedModule
from pycert.lipschitz.bounds import last_layer, radius_of, walk_over
from pycert.lipschitz.states import ThreeState
from pycert.lipschitz.walk import Settings
from pycert.norms.arithmetic import SMALLEST, UP, dual_norm, exact_double, gamma, with_gradient
from pycert.regions import Box, Region

Rows = tuple[Tensor, Tensor | None, int]


def ball_box_bound(weight: Tensor, lower: Tensor, upper: Tensor, radius: Tensor) -> Tensor:
    """At least ``max w.d`` over ``||d||_2 <= r``, ``lower <= d <= upper``, with ``lower <= 0 <= upper``.

    For any multiplier ``m >= 0`` the Lagrangian ``w.d + m (r^2 - ||d||^2) / 2`` is at least ``w.d`` on
    the ball, so that its maximum over the box bounds the one wanted; per coordinate that is
    ``w end - m end^2 / 2`` where the parabola's top lies beyond the end, and never more than its top
    ``w^2 / (2 m)``. The best ``m`` is ``1 / t`` with ``d = clip(t w)`` of norm ``r``, found by sorting;
    the bound holds for whatever number came out.

    Args:
        weight: ``[B, S, n]`` float64. lower, upper: ``[B, n]``. radius: ``[B]``.

    Returns:
        ``[B, S]``, rounded up.

    Source: the projection of Lee et al., "Lipschitz-certifiable training with a tight outer bound", NeurIPS
    2020, in closed form.
    """
    with torch.no_grad():  # at the best multiplier the derivative with respect to it is 0
        _, t = torch.ops.pycert.ball_box_maximum(weight, lower, upper, radius)
    end = torch.where(weight > 0, upper[:, None, :], lower[:, None, :])
    whole = weight * end  # at least 0
    count = weight.shape[-1]
    charge = (1 + gamma(count + 16)) * UP
    slack = count * 4 * SMALLEST
    box = torch.where(weight == 0, torch.zeros_like(whole), whole).sum(-1) * charge + slack
    ball = dual_norm(weight, 2.0) * radius[:, None] * UP
    best = torch.minimum(box, torch.where(torch.isnan(ball), box, ball))
    multiplier = (1 / torch.where((t > 0) & torch.isfinite(t), t, torch.ones_like(t)))[..., None]
    # Certainly beyond the end: then the parabola rises up to it. Errors of this comparison are far below its slack.
    beyond = end.abs() * multiplier <= weight.abs() * (1 - 1e-10)
    top = torch.where(beyond, torch.zeros_like(weight), weight).square() / multiplier / 2
    clipped = whole - multiplier * end.square() / 2
    parts = torch.where(
        beyond, torch.minimum(clipped * (1 + 8 * 2.0**-53) + whole * 8 * 2.0**-53, whole), top
    )
    parts = torch.where(weight == 0, torch.zeros_like(parts), parts)
    dual = (multiplier[..., 0] * radius[:, None].square() / 2 + parts.sum(-1)) * charge + slack
    return torch.where(torch.isfinite(dual), torch.minimum(best, dual), best)


def bounds_of_rows(
    bm: BoundedModule, regions: Region | tuple[Region, ...], rows: Rows | None, options: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Lower and upper bounds of ``C f(x)``; ``rows`` as in ``BoundedModule._bound``, None for the outputs themselves.

    ``f(x) = f(c) + W d`` with ``d`` the change of the last hidden value, which lies in its box less its value at the
    centre, and in the ball of radius ``K r``.
    """
    given = regions if isinstance(regions, tuple) else (regions,)
    p = _norm_of(given)
    deployed = options.soundness == "deployed"
    settings = Settings(p, options.norms, options.effort, deployed, False)
    graph = bm.graph
    hidden, weight = last_layer(bm)
    soundness = "deployed" if deployed else "real"
    walk = walk_over(bm, regions, settings, graph.output, soundness)
    box, around = walk.boxes[hidden], walk.centres[hidden]
    assert box is not None and around is not None and walk.radius is not None
    batch = walk.batch
    low = (box[0].double() - around[1].double()).flatten(1)
    high = (box[1].double() - around[0].double()).flatten(1)
    low = torch.minimum(low - low.abs() * 2.0**-52, torch.zeros_like(low))
    high = torch.maximum(high + high.abs() * 2.0**-52, torch.zeros_like(high))
    value = walk.lengths(hidden)
    reach = value.lengths[:, 0] * walk.radius * UP
    table, count = _table(bm, rows, batch)
    centre: list[Region] = [Box(point, point) for point, _ in (radius_of(one, p) for one in given)]
    # The real network's value: how far an execution may be from it, there and elsewhere, is in the second lengths.
    at_centre = bm._point_bounds(centre, rows, "real")
    through, rounding = _through(table, weight)
    if p == 2:
        change = [ball_box_bound(sign * through, low, high, reach) for sign in (-1, 1)]
    else:
        ball = dual_norm(through, p) * reach[:, None] * UP
        change = [torch.minimum(ball, _box_maximum(sign * through, low, high)) for sign in (-1, 1)]
    # |C (f(x) - f(c))| is also at most K_C r with the three-state constant of the row, rounding of C W included.
    whole = ThreeState(walk).of_rows(table) * walk.radius[:, None] * UP
    change = [torch.minimum(part, whole) for part in change]
    size = dual_norm(through, p)
    extra = rounding * reach[:, None] + size * value.lengths[:, 1:] * UP
    if deployed:
        noise = walk._affine_noise(graph.output).flatten(1) if weight is not None else None
        if noise is not None:
            extra = extra + (table.abs() * noise[:, None, :]).sum(-1) * (1 + gamma(table.shape[-1] + 4)) * UP
    dtype = box[0].dtype
    sides = []
    for sign, grown, ends in zip((-1, 1), change, at_centre):
        total = ends.double().reshape(batch, count) + sign * (grown + extra) * UP
        sides.append(_step_out(total, sign, dtype))
    shape = (batch, *graph.nodes[graph.output].shape) if rows is None else (batch, count)
    lower, upper = (side.view(shape) for side in sides)
    return (lower if options.side != "upper" else None), (upper if options.side != "lower" else None)


def _norm_of(regions: tuple[Region, ...]) -> float:
    """The norm that the regions are balls of; 2 for boxes."""
    norms = {getattr(region, "p", 2.0) for region in regions}
    return norms.pop() if len(norms) == 1 else 2.0


def _table(bm: BoundedModule, rows: Rows | None, batch: int) -> tuple[Tensor, int]:
    """``C`` for every sample, ``[B, S, n_out]`` float64, and S."""
    outputs = bm.graph.numel(bm.graph.output)
    if rows is None:
        return torch.eye(outputs, dtype=torch.float64).expand(batch, outputs, outputs), outputs
    table, source, count = rows
    chosen = table if source is None else table[source]
    return chosen.double().view(batch, count, outputs), count


def _through(table: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """``C W`` and a bound of the 2-norm (thus 1e0 of every dual norm) of what rounding changed in each of its rows."""
    if weight is None:
        return table, table.new_zeros(table.shape[:2])
    wide = exact_double(weight)
    product = table @ wide
    error = (table.abs() @ wide.abs()) * gamma(table.shape[-1] + 4)
    return product, error.sum(-1) * UP  # the 1-norm, which every dual norm is below


def _box_maximum(weight: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    end = torch.where(weight > 0, upper[:, None, :], lower[:, None, :])
    parts = torch.where(weight == 0, torch.zeros_like(end), weight * end)
    return parts.sum(-1) * ((1 + gamma(weight.shape[-1] + 4)) * UP) + weight.shape[-1] * SMALLEST


def _step_out(value: Tensor, sign: int, dtype: torch.dtype) -> Tensor:
    """To ``dtype`` and one step outward, past the rounding of the sum and of the conversion; NaN says nothing."""
    end = torch.full((), sign * math.inf, dtype=torch.float64)
    value = value + sign * value.abs() * 2.0**-50
    value = torch.where(torch.isnan(value), end, value)
    value = value.to(dtype)
    return with_gradient(torch.nextafter(value.detach(), end.to(dtype)), value)
