"""The benchmark of hulls: its groups, and a row of its figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import bench_krelu_hull as bench


def test_groups_are_the_same_every_time_and_unstable():
    first, again = bench.groups(3, 6), bench.groups(3, 6)
    for limit, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(limit, same)
        lower, upper = bench.box_of(np.column_stack([limit, -bench.directions(3)]))
        assert (lower < 0).all() and (upper > 0).all()


def test_figures_of_pairs():
    pytest.importorskip("scipy.optimize", reason="gaps are optima of linear programs")
    threads = torch.get_num_threads()
    (row,) = bench.figures(threads, [], "pycert", 2, 4)
    assert row["gap left"] == 0
    assert row["largest violation"] < 1e-15
    assert 0 < row["us in a batch"]
    assert 0 < row["p10"] <= row["us a group"] <= row["p90"]


def test_rows_of_one_group_as_other_programs_ask_for_them():
    limit = bench.groups(3, 4)[3]
    octahedron = np.column_stack([limit, -bench.directions(3)])
    rows = bench.octahedron_rows(octahedron)
    assert rows.dtype == np.float64
    assert rows.shape[1] == 7
    np.testing.assert_array_equal(rows[:26, :4], octahedron)
    vertices = bench.exact_vertices(limit)
    assert (rows[:, :1] + rows[:, 1:] @ vertices.T).min() > -1e-12
