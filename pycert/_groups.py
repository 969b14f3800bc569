"""Which neurons are grouped: by area, as a sliding window or a sparse cover."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from pycert.ops.krelu import DEFAULT_ROWS

COVERS = ("sparse", "window")
#: Members of a block of the sparse cover at most, for each k: all subsets of a block are looked at.
LARGEST_BLOCK = {1: 100000, 2: 1000, 3: 200, 4: 80}


@functools.lru_cache(maxsize=64)
def sparse_cover(count: int, k: int, s: int) -> Tensor:
    """Groups of ``k`` of ``count`` items of which no two share more than ``s``.

    The subsets in lexicographic order, each taken if it fits to those before.

    Args:
        count: items, at most ``LARGEST_BLOCK[k]`` (all subsets are looked at).
        k: members of a group. s: from 0 to ``k - 1``.

    Returns:
        ``[G, k]`` int64, ascending within a group; not to be written to, it is kept for the next call.

    Source: Mueller et al. (PRIMA), POPL 2022, section 6.
    """
    taken: list[tuple[int, ...]] = []
    if s + 1 == k:
        taken = list(itertools.combinations(range(count), k))
    elif s == 0:
        taken = [tuple(range(a, a + k)) for a in range(0, count - k + 1, k)]
    else:
        used: set[tuple[int, ...]] = set()  # subsets of s + 1 members that a group has: two groups share none
        for group in itertools.combinations(range(count), k):
            parts = list(itertools.combinations(group, s + 1))
            if used.isdisjoint(parts):
                used.update(parts)
                taken.append(group)
    return torch.tensor(taken, dtype=torch.int64).reshape(-1, k)


def select_groups(
    lower: Tensor,
    upper: Tensor,
    k: int = 3,
    ns: int = 70,
    s: int = 1,
    least: float = 0.0,
    cover: str = "sparse",
) -> Tensor:
    """Groups of unstable neurons, those of largest area first.

    Args:
        lower, upper: ``[n]``, bounds of the pre-activations of one sample.
        k: neurons in a group.
        ns: neurons in a block; groups are formed inside of blocks.
        s: neurons that two groups of a block may share, less than ``k``.
        least: neurons whose area ``-lower * upper`` is not larger are left alone.
        cover: ``"sparse"``, as many groups of a block as the greedy cover finds (about ``ns ** 2 / 6`` for
            k = 3 and s = 1), or ``"window"``, a window that slides by ``k - s`` (O(n)).

    Returns:
        ``[G, k]`` int64; a block of fewer than ``k`` neurons gives none.

    Raises:
        ValueError: ``k``, ``ns``, ``s`` or ``cover`` out of range.

    Source: the area rule and the cover of Singh et al. 2019 and Mueller et al. 2022 (there k = 3, s = 1, ns = 70
    and areas above 0.05); the window of Ma et al. (WraLU), POPL 2024.
    """
    check_selection(k, ns, s, cover)
    area = torch.where((lower < 0) & (upper > 0), -lower * upper, lower.new_zeros(()))
    area = torch.where(torch.isfinite(area), area, lower.new_zeros(()))
    order = area.argsort(descending=True, stable=True)
    order = order[area[order] > least]
    groups = []
    for block in order.split(ns):
        if len(block) < k:
            continue
        if cover == "window":
            within = torch.arange(0, len(block) - k + 1, k - s)[:, None] + torch.arange(k)
        else:
            within = sparse_cover(len(block), k, s)
        groups.append(block[within.to(block.device)])
    return torch.cat(groups) if groups else order.new_empty(0, k)


def check_selection(k: int, ns: int, s: int, cover: str) -> None:
    """Raises ValueError where the options of :func:`select_groups` make no sense."""
    if k not in DEFAULT_ROWS or not 0 <= s < k:
        raise ValueError(f"select_groups: k must be 1 to 4 and s from 0 to k - 1, got k = {k}, s = {s}")
    if cover not in COVERS:
        raise ValueError(f"select_groups: cover must be one of {', '.join(map(repr, COVERS))}, got {cover!r}")
    if not k <= ns <= LARGEST_BLOCK[k]:
        raise ValueError(f"select_groups: ns must be from k to {LARGEST_BLOCK[k]} for k = {k}, got {ns}")
