"""Convex hulls of groups of ReLUs: the ``krelu`` family."""

from __future__ import annotations

import torch
from torch import Tensor

from pycert import _C

#: Rays and steps of the simplex method per group and sign, where ``pivots`` is not given: groups whose lifted points
#: have more than four dimensions are not enumerated but sampled.
DEFAULT_PIVOTS = {1: 0, 2: 0, 3: 240, 4: 1400}
#: Rows beyond the octahedron and the triangles, where ``max_rows`` is not given: more than the default ``pivots`` find.
DEFAULT_ROWS = {1: 0, 2: 64, 3: 160, 4: 640}


def octahedral_directions(k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The ``3 ** k - 1`` directions of an octahedron, ``[3 ** k - 1, k]``.

    In the order of ``itertools.product((-1, 0, 1), repeat=k)``, without zero.

    Raises:
        ValueError: ``k`` is not 1, 2, 3 or 4.
    """
    if k not in DEFAULT_ROWS:
        raise ValueError(f"octahedral_directions: k must be 1, 2, 3 or 4, got {k}")
    every = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=dtype)] * k).reshape(-1, k)
    return every[every.abs().sum(1) > 0]


def krelu_hull(
    lower: Tensor,
    upper: Tensor,
    A: Tensor,
    b: Tensor,
    *,
    identity: Tensor | None = None,
    points: Tensor | None = None,
    max_rows: int | None = None,
    pivots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear constraints on ``(x, relu(x))`` for groups of up to four neurons with joint bounds.

    Every row holds for all ``x`` with ``lower <= x <= upper`` and ``b + A x >= 0``. In this order: the
    octahedral rows, as given or from the box, in the order of :func:`octahedral_directions` (negated, so
    ``limit - c . x >= 0``); for each neuron in turn ``y >= 0``, ``y >= x`` and the upper line of the
    triangle, or two rows for ``y = x`` or ``y = 0`` where it is stable, none where it is an identity; then
    the rows that couple neurons. For ``k = 2`` these are all facets of the convex hull (exact up to
    rounding); for ``k = 3`` and ``4`` a selection of its facets. Rows that would not be finite are left out.

    Args:
        lower: ``(G, k)``, ``k`` from 1 to 4, float32 or float64, in the units of the pre-activations.
        upper: like ``lower``. Groups with fewer than ``k`` neurons are filled up with ``lower = upper = 0``.
        A: ``(G, m, k)`` with elements -1, 0 and 1: any subset of the octahedral directions, in any order; rows of
            zeros are ignored. Directions that are missing follow from the box.
        b: ``(G, m)``, the offsets that go with ``A``.
        identity: ``(G, k)`` bool: coordinates with ``y = x``, such as a skip connection beside the
            neurons. Their columns of ``c`` are zero.
        points: ``(G, J, 2 k)``: points ``(x, y)`` that should be cut off if they are outside the hull. The
            facet towards each is among the rows; and where there are more rows than ``max_rows``
            allows, those that cut deepest at one of them are kept (without ``points``: in the
            middle of the triangles).
        max_rows: how many rows may be added to octahedron and triangles; 0, 64, 160, 640 for k = 1, 2, 3, 4
            unless given.
        pivots: rays and steps of the simplex method per group for ``k = 3`` and ``4``: more find more facets. 240 and
            1400 unless given.

    Returns:
        ``(rows, count)``: ``(G, R, 1 + 2 k)`` with ``R = 3 ** k - 1 + 3 k + max_rows``, each row ``(b, a_1..a_k,
        c_1..c_k)``, meaning ``b + a . x + c . relu(x) >= 0``, and ``(G,)`` int64. Unused rows are zero.

    Raises:
        ValueError: a shape or device does not fit, or ``A`` holds other numbers.
        TypeError: the dtypes differ or are neither float32 nor float64; ``identity`` is not bool; no tensor; a
            count is no integer.

    Soundness: outward rounded. Normals are found in plain arithmetic; each offset is then proved by weak
    duality with a bound on its rounding (``csrc/core/krelu.h``), whatever was found before.
    Gradient: none; differentiate through the bound that uses the rows.
    Source: Singh et al., "Beyond the Single Neuron Convex Barrier for Neural Network Certification", NeurIPS 2019
    (k-ReLU); Roth, "A Primer on Multi-Neuron Relaxation-based Adversarial Robustness Certification", 2021.

    Example:
        >>> lower, upper = torch.full((1, 2), -2.0), torch.full((1, 2), 2.0)
        >>> A, b = -octahedral_directions(2, torch.float32)[None], torch.full((1, 8), 2.0)
        >>> rows, count = krelu_hull(lower, upper, A, b)  # |x1| + |x2| <= 2
        >>> rows[0, 14 : count[0]]  # y1 + y2 <= 1 + (x1 + x2) / 2
        tensor([[ 1.0000,  0.5000,  0.5000, -1.0000, -1.0000]])
    """
    for name, value in (("lower", lower), ("upper", upper), ("A", A), ("b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"krelu_hull: {name} must be a tensor, got {type(value).__name__}")
    for name, number in (("max_rows", max_rows), ("pivots", pivots)):
        if number is not None and not isinstance(number, int):
            raise TypeError(f"krelu_hull: {name} must be an integer, got {number!r}")
    k = lower.shape[-1] if lower.dim() == 2 else 0
    if max_rows is not None and max_rows < 0:
        raise ValueError(f"krelu_hull: max_rows must not be negative, got {max_rows}")
    extra = DEFAULT_ROWS.get(k, 0) if max_rows is None else max_rows
    steps = DEFAULT_PIVOTS.get(k, 0) if pivots is None else pivots
    rows = 3**k - 1 + 3 * k + extra
    return torch.ops.pycert.krelu_hull.default(lower, upper, A, b, identity, points, rows, steps)


def octahedron_hull(octahedron: Tensor, *, max_rows: int | None = None, pivots: int | None = None) -> Tensor:
    """:func:`krelu_hull` of one group on the processor, in the row format of cdd, ELINA and WraLU.

    For programs that pass groups one by one: this call costs a few microseconds beside the hull, that of a batch
    several times the hull of a pair.

    Args:
        octahedron: ``(m, 1 + k)``, rows ``(b, a_1..a_k)`` that mean ``b + a . x >= 0``, with every ``a_i`` -1, 0 or 1,
            in any order; among them both ends of every neuron. float32 or float64. A NumPy array comes in through
            ``torch.from_numpy``.
        max_rows, pivots: as in :func:`krelu_hull`.

    Returns:
        ``(R, 1 + 2 k)``: the rows that are used, in the order of :func:`krelu_hull`.

    Raises:
        ValueError: the shape does not fit, a neuron has no finite end on one side, an element is none of -1, 0 and 1,
            or the octahedron is not on the processor.
        TypeError: the dtype is neither float32 nor float64; no tensor; a count is no integer.

    Soundness: as :func:`krelu_hull`. Gradient: none; the result does not require one.

    Example:
        >>> octahedron = torch.cat([torch.full((8, 1), 2.0), -octahedral_directions(2, torch.float32)], 1)
        >>> octahedron_hull(octahedron)[14:]
        tensor([[ 1.0000,  0.5000,  0.5000, -1.0000, -1.0000]])
    """
    if not isinstance(octahedron, Tensor):
        raise TypeError(f"octahedron_hull: octahedron must be a tensor, got {type(octahedron).__name__}")
    for name, number in (("max_rows", max_rows), ("pivots", pivots)):
        if number is not None and not isinstance(number, int):
            raise TypeError(f"octahedron_hull: {name} must be an integer, got {number!r}")
    k = octahedron.shape[-1] - 1 if octahedron.dim() > 0 else 0
    room = DEFAULT_ROWS.get(k, 0) if max_rows is None else max_rows
    rows: Tensor = _C.octahedron_hull(
        octahedron, room, DEFAULT_PIVOTS.get(k, 0) if pivots is None else pivots
    )
    return rows


@torch.library.register_fake("pycert::krelu_hull")
def _(lower, upper, A, b, identity, points, rows, pivots):  # type: ignore[no-untyped-def]
    groups, k = lower.shape
    return lower.new_empty(groups, rows, 1 + 2 * k), lower.new_empty(groups, dtype=torch.int64)


@torch.library.register_fake("pycert::maximum_hull")
def _(lower, upper, A, b, rows, pivots):  # type: ignore[no-untyped-def]
    groups, k = lower.shape
    return lower.new_empty(groups, rows, 2 + k), lower.new_empty(groups, dtype=torch.int64)
