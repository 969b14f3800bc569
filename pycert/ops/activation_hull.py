"""Hulls of groups of other activations: functions of two pieces are affine in ``(x, relu(x - kink))``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycert.ops.krelu import krelu_hull
from pycert.ops.relaxation import ActivationLines, activation_lines

#: Far above the roundings of a row (each sum below has fewer than 40 terms), far below what matters.
_ROUNDING = 2.0**-44
_TINY = 1e-300
#: Convex on one side of zero, concave on the other: a kink at zero would bend the wrong way on both.
_S_SHAPED = ("sigmoid", "tanh", "softsign")
#: A bend smaller than this, over the slopes, is none.
_STRAIGHT = 1e-9


def _check(name: str, lower: Tensor, upper: Tensor, A: Tensor, b: Tensor) -> None:
    """Types and shapes, before anything is computed in float64."""
    for number, t in (("lower", lower), ("upper", upper), ("A", A), ("b", b)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {number} must be a tensor, got {type(t).__name__}")
        if t.dtype != lower.dtype or t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: {number} must be float32 or float64 and like lower, got {t.dtype}")
    if lower.dim() != 2 or upper.shape != lower.shape:
        given = f"{list(lower.shape)} and {list(upper.shape)}"
        raise ValueError(f"{name}: lower and upper must be [groups, k] alike, got {given}")
    if A.dim() != 3 or A.shape[::2] != lower.shape or b.shape != A.shape[:2]:
        given = f"{list(A.shape)} and {list(b.shape)}"
        raise ValueError(f"{name}: A and b must be [groups, rows, k] and [groups, rows], got {given}")


class _Pieces(NamedTuple):
    """``constant + slope x + bend relu(x - kink)``, not below (or not above) the activation where ``valid``."""

    constant: Tensor
    slope: Tensor
    bend: Tensor
    valid: Tensor


def activation_hull(
    lower: Tensor,
    upper: Tensor,
    A: Tensor,
    b: Tensor,
    activation: str,
    *,
    identity: Tensor | None = None,
    max_rows: int | None = None,
    pivots: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Linear constraints on ``(x, f(x))`` for groups of up to four neurons with joint bounds.

    Around ``f`` on every interval lie two functions of two pieces, one above and one below, with their kink at zero;
    for sigmoid, tanh and softsign there are two such pairs, with kinks half way to either end; in an interval
    without zero the kink is in the middle. Each is affine in ``x`` and ``relu(x - kink)``, so a row of
    :func:`krelu_hull` for the shifted neurons becomes a row over ``(x, y)``: where a term ``c relu(x - kink)`` has to
    be bounded above, the function that bounds it takes its place. For leaky ReLU both functions are ``f``, and
    pairs are exact.

    Args:
        lower, upper, A, b, identity, max_rows, pivots: as in :func:`krelu_hull`.
        activation, options: as in :func:`activation_lines`: ``"leaky_relu"``, ``"sigmoid"``, ``"tanh"``, ...

    Returns:
        ``(rows, count)``: ``(G, R, 1 + 2 k)`` and ``(G,)`` int64, each row ``(b, a_1..a_k, c_1..c_k)``, meaning
        ``b + a . x + c . f(x) >= 0``. First the lines of every neuron: above, below and, where they are lines of
        their own, the pieces above and below; then the rows of ``krelu_hull`` in its order; both again for a second
        pair of functions. Unused rows are zero.

    Raises:
        ValueError, TypeError: as in both functions.

    Soundness: as ``activation_lines`` and ``krelu_hull``; what rounding moves a row by is added to its ``b``.
    Gradient: none.
    Source: functions of two pieces after Ma et al., "Convex Hull Approximation for Activation Functions" (WraAct),
    OOPSLA 2025.

    Example:
        >>> lower, upper = torch.full((1, 2), -2.0), torch.full((1, 2), 2.0)
        >>> A, b = -octahedral_directions(2, torch.float32)[None], torch.full((1, 8), 2.0)  # |x1| + |x2| <= 2
        >>> rows, count = activation_hull(lower, upper, A, b, "leaky_relu", negative_slope=0.5)
        >>> rows[0, count[0] - 1]  # y1 + y2 <= 1 / 2 + 3 / 4 (x1 + x2)
        tensor([ 1.0000,  1.5000,  1.5000, -2.0000, -2.0000])
    """
    _check("activation_hull", lower, upper, A, b)
    low, high, normals, offsets = (t.detach().double() for t in (lower, upper, A, b))
    same = torch.zeros_like(low, dtype=torch.bool) if identity is None else identity
    largest = torch.maximum(low.abs(), high.abs())
    whole = activation_lines(low, high, activation, **options)
    size = _largest_value(low, high, whole)
    mixed = (low < 0) & (high > 0)
    ends = (low, high) if activation in _S_SHAPED else (torch.zeros_like(low),)
    made, used = [], []
    for end in ends:
        kink = torch.where(same, 0.0, torch.where(mixed, end / 2, low / 2 + high / 2))
        above = _two_pieces(low, kink, high, 1, activation, options)
        below = _two_pieces(low, kink, high, -1, activation, options)
        rows, count = _shifted_hull(
            low, high, normals, offsets, kink, same | ~(above.valid | below.valid), max_rows, pivots
        )
        alone, wanted = _alone(whole, above, below, kink, largest, ~same)
        made += [alone, _replaced(rows, kink, high, above, below, largest, size)]
        used += [wanted, torch.arange(rows.shape[1], device=rows.device) < count[:, None]]
    return _packed(_rounded(torch.cat(made, 1), largest, size, lower.dtype), torch.cat(used, 1))


def _shifted_hull(
    low: Tensor,
    high: Tensor,
    normals: Tensor,
    offsets: Tensor,
    kink: Tensor,
    identity: Tensor,
    max_rows: int | None,
    pivots: int | None,
) -> tuple[Tensor, Tensor]:
    """``krelu_hull`` for ``x - kink``."""
    moved = (normals * kink[:, None, :]).abs().sum(-1)
    inf = torch.full_like(low, torch.inf)
    return krelu_hull(
        torch.where(kink != 0, (low - kink).nextafter(-inf), low),
        torch.where(kink != 0, (high - kink).nextafter(inf), high),
        normals,
        offsets + (normals * kink[:, None, :]).sum(-1) + _ROUNDING * (moved > 0) * (offsets.abs() + moved),
        identity=identity,
        max_rows=max_rows,
        pivots=pivots,
    )


def _two_pieces(
    low: Tensor, kink: Tensor, high: Tensor, sign: int, activation: str, options: dict[str, Any]
) -> _Pieces:
    """Lines around the activation on both sides of the kink, joined there; ``sign`` 1 above, -1 below."""
    left, right = (activation_lines(*ends, activation, **options) for ends in ((low, kink), (kink, high)))

    def line(lines: ActivationLines) -> tuple[Tensor, Tensor]:
        return (lines[2], lines[3]) if sign > 0 else (lines[0], lines[1])

    (a1, b1), (a2, b2) = line(left), line(right)
    middle = sign * torch.maximum(sign * (a1 * kink + b1), sign * (a2 * kink + b2))
    slope = (middle - (a1 * low + b1)) / (kink - low)
    bend = ((a2 * high + b2) - middle) / (high - kink) - slope
    constant = torch.full_like(low, -torch.inf)
    for a, b, x in ((a1, b1, low), (a1, b1, kink), (a2, b2, kink), (a2, b2, high)):
        past = torch.clamp(x - kink, min=0)
        missing = a * x + b - slope * x - bend * past
        sizes = (a * x).abs() + b.abs() + (slope * x).abs() + (bend * past).abs()
        constant = torch.maximum(constant, sign * missing + _ROUNDING * sizes + _TINY)
    constant = sign * constant
    valid = (low < kink) & (kink < high) & (constant + slope + bend).isfinite()
    valid &= bend.abs() > _STRAIGHT * (slope.abs() + (slope + bend).abs())
    return _Pieces(constant, slope, bend, valid)


def _largest_value(low: Tensor, high: Tensor, lines: ActivationLines) -> Tensor:
    values = [(a * x + b).abs() for a, b in (lines[:2], lines[2:]) for x in (low, high)]
    return torch.stack(values).amax(0) * (1 + _ROUNDING)


def _replaced(
    rows: Tensor, kink: Tensor, high: Tensor, above: _Pieces, below: _Pieces, largest: Tensor, size: Tensor
) -> Tensor:
    """Rows over ``(x - kink, relu(x - kink))`` as rows over ``(x, y)``; ``largest``, ``size``: of ``|x|``, ``|y|``."""
    k = kink.shape[1]
    b, a, c = rows[..., 0], rows[..., 1 : 1 + k], rows[..., 1 + k :]
    kink, largest, size, top = (t[:, None, :] for t in (kink, largest, size, torch.clamp(high - kink, min=0)))
    above, below = (_Pieces(*(t[:, None, :] for t in pieces)) for pieces in (above, below))
    # y <= above and a bend upward: relu is at least (y - ...) / bend, which is what c < 0 needs; and so on.
    use_above = torch.where(c < 0, above.bend > 0, above.bend < 0) & above.valid
    use_below = torch.where(c < 0, below.bend < 0, below.bend > 0) & below.valid
    use_above &= ~use_below | (above.bend.abs() >= below.bend.abs())
    constant, slope, bend = (torch.where(use_above, p, q) for p, q in zip(above[:3], below[:3]))
    usable = (use_above | use_below) & (c != 0)
    factor = torch.where(usable, c / bend, 0.0)
    constant, slope = torch.where(usable, constant, 0.0), torch.where(usable, slope, 0.0)
    free = torch.where(usable, 0.0, torch.clamp(c, min=0) * top)  # relu lies between 0 and this end
    parts = a.abs() * (kink.abs() + largest) + factor.abs() * (size + constant.abs() + slope.abs() * largest)
    touched = ((factor != 0) | (kink != 0) | (free != 0)).any(-1)
    charge = _ROUNDING * (b.abs() + (parts + free).sum(-1)) + _TINY
    made = b - (a * kink).sum(-1) - (factor * constant).sum(-1) + free.sum(-1) + touched * charge
    return torch.cat([made[..., None], a - factor * slope, factor], -1)


def _alone(
    whole: ActivationLines, above: _Pieces, below: _Pieces, kink: Tensor, largest: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """The lines of every neuron, ``[G, 6 k, 1 + 2 k]``, and which of them count."""
    groups, k = kink.shape
    made = kink.new_zeros(groups, k, 6, 1 + 2 * k)
    use = wanted[..., None].repeat(1, 1, 6)
    lines = [(1, whole.upper_slope, whole.upper_intercept), (-1, whole.lower_slope, whole.lower_intercept)]
    for sign, pieces in ((1, above), (-1, below)):
        lines.append((sign, pieces.slope, pieces.constant))
        shift = pieces.bend * kink
        charge = _ROUNDING * (
            pieces.constant.abs() + shift.abs() + (pieces.slope.abs() + pieces.bend.abs()) * largest
        )
        lines.append((sign, pieces.slope + pieces.bend, pieces.constant - shift + sign * (charge + _TINY)))
        place = len(lines) - 2
        use[..., place : place + 2] &= (pieces.valid & (sign * pieces.bend < 0))[..., None]
    for number, (sign, slope, intercept) in enumerate(lines):
        made[:, :, number, 0] = sign * intercept
        for i in range(k):
            made[:, i, number, 1 + i] = sign * slope[:, i]
            made[:, i, number, 1 + k + i] = -sign
    return made.flatten(1, 2), use.flatten(1, 2)


def _rounded(rows: Tensor, largest: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in ``dtype``: coefficients to nearest, and what that may take is added to ``b``, rounded up."""
    if dtype == torch.float64:
        return rows
    made = rows.to(dtype)
    off = (made.double() - rows)[..., 1:].abs() * torch.cat([largest, size], 1)[:, None, :]
    b = (
        rows[..., 0]
        + off.sum(-1) * (1 + _ROUNDING)
        + (off.sum(-1) > 0) * (_ROUNDING * rows[..., 0].abs() + _TINY)
    )
    nearest = b.to(dtype)
    made[..., 0] = torch.where(
        nearest.double() < b, nearest.nextafter(torch.full_like(nearest, torch.inf)), nearest
    )
    return made


def _packed(rows: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that count, first and in their order."""
    used = used & rows.isfinite().all(-1) & (rows[..., 1:] != 0).any(-1)
    order = (~used).to(torch.uint8).argsort(dim=1, stable=True)
    rows = torch.where(used[..., None], rows, torch.zeros_like(rows))
    return rows.gather(1, order[..., None].expand_as(rows)), used.sum(1)


#: Facets beyond the base rows, and rays and steps of the simplex method, of maxima of three and four.
_MAXIMUM_ROWS = {3: 128, 4: 256}
_MAXIMUM_PIVOTS = {3: 0, 4: 600}


def maximum_hull(
    lower: Tensor,
    upper: Tensor,
    A: Tensor,
    b: Tensor,
    *,
    max_rows: int | None = None,
    pivots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear constraints on ``(x, max x_i)`` for groups of two to four values with joint bounds.

    All facets of the convex hull for pairs and triples, up to rounding. *Pairs*: with ``s = x1 + x2`` and
    ``d = x1 - x2`` the octahedron is one again, and ``max(x1, x2) = x2 + relu(d)``: :func:`krelu_hull` with ``s`` as
    an identity coordinate. *Three and four*: the maximum is convex, so below it are ``y >= x_i`` alone; above, facets
    of the hull of the octahedron's lifted vertices are found as those of ``krelu_hull`` are, all of three, of four
    those that rays meet. Maxima of more values are made of these, one after another.

    Args:
        lower, upper, A, b: as in :func:`krelu_hull`, with ``k`` from 2 to 4.
        max_rows: of the hull, beyond those of the octahedron and of single values; 64, 128, 256 for k = 2, 3, 4
            unless given.
        pivots: rays and steps of the simplex method for ``k = 4``; 600 unless given.

    Returns:
        ``(rows, count)``: ``(G, R, 2 + k)`` and ``(G,)`` int64, each row ``(b, a_1..a_k, c)``, meaning
        ``b + a . x + c max(x) >= 0``. Pairs in the order of ``krelu_hull``; for three and four the octahedral rows, as
        given or from the box, ``y >= x_i`` in turn, ``y <= max(upper)``, then the facets above, or those that cut
        deepest in the middle of the box. Unused rows are zero.

    Raises:
        ValueError: ``k`` is not 2, 3 or 4; as in ``krelu_hull``.

    Soundness: as ``krelu_hull``: offsets are proved by weak duality.
    Gradient: none. Three and four are worked on by the processor, whatever the device of the tensors.

    Example:
        >>> lower, upper = torch.zeros(1, 2), torch.ones(1, 2)
        >>> rows, count = maximum_hull(lower, upper, torch.zeros(1, 0, 2), torch.zeros(1, 0))
        >>> rows[0, count[0] - 1]  # the maximum is at most 1
        tensor([ 1.,  0.,  0., -1.])
    """
    _check("maximum_hull", lower, upper, A, b)
    k = lower.shape[1]
    if not 2 <= k <= 4:
        raise ValueError(
            f"maximum_hull: lower must be [groups, k] with k from 2 to 4, got {list(lower.shape)}"
        )
    for name, value in (("max_rows", max_rows), ("pivots", pivots)):
        if value is not None and value < 0:
            raise ValueError(f"maximum_hull: {name} must not be negative, got {value}")
    if k == 2:
        return _maximum_of_pairs(lower, upper, A, b, max_rows)
    rows = 3**k - 1 + k + 1 + (_MAXIMUM_ROWS[k] if max_rows is None else max_rows)
    made, count = torch.ops.pycert.maximum_hull.default(
        *(t.detach().cpu() for t in (lower, upper, A, b)),
        rows,
        _MAXIMUM_PIVOTS[k] if pivots is None else pivots,
    )
    return made.to(lower.device), count.to(lower.device)


def _maximum_of_pairs(
    lower: Tensor, upper: Tensor, A: Tensor, b: Tensor, max_rows: int | None
) -> tuple[Tensor, Tensor]:
    """Rows over ``(x1, x2, max(x1, x2))`` from those over ``(s, d, s, relu(d))``."""
    low, high, normals, offsets = (t.detach().double() for t in (lower, upper, A, b))
    largest = torch.maximum(low.abs(), high.abs())
    box = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64, device=low.device)
    normals = torch.cat([normals, box.expand(len(low), -1, -1)], 1)
    offsets = torch.cat([offsets, -low, high], 1)
    turned = torch.stack([normals.sum(-1), normals[..., 0] - normals[..., 1]], -1) / 2
    single = (turned.abs() == 0.5).any(-1)
    turned, offsets = (
        torch.where(single[..., None], 2 * turned, turned),
        torch.where(single, 2 * offsets, offsets),
    )
    ends = (
        torch.stack([high.sum(1), high[:, 0] - low[:, 1]], 1),
        torch.stack([low.sum(1), low[:, 0] - high[:, 1]], 1),
    )
    inf = torch.full_like(low, torch.inf)
    identity = torch.tensor([True, False], device=low.device).expand(len(low), 2)
    rows, count = krelu_hull(
        ends[1].nextafter(-inf), ends[0].nextafter(inf), turned, offsets, identity=identity, max_rows=max_rows
    )
    b, of_s, of_d, c = rows[..., 0], rows[..., 1], rows[..., 2], rows[..., 4]
    size = largest.sum(1, keepdim=True)
    charge = _ROUNDING * (of_s.abs() + of_d.abs() + c.abs()) * size
    made = torch.stack([b + charge, of_s + of_d, of_s - of_d - c, c], -1)
    used = torch.arange(rows.shape[1], device=rows.device) < count[:, None]
    return _packed(_rounded(made, largest, largest.amax(1, keepdim=True), lower.dtype), used)
