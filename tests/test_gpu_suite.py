"""benchmarks/gpu_suite.py without a GPU: what it would run, what it writes when nothing was measured."""

from __future__ import annotations

import json

import pytest
import torch

import host_kernels
import pycert
from benchmarks import gpu_cases, gpu_suite
from pycert import _C, _choices


def test_without_a_gpu_nothing_is_measured_or_made_up(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status = gpu_suite.main(["--only", "benchmarks", "--out", str(tmp_path)])
    assert status == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["status"] for stage in written["stages"]] == [3]
    assert {row["measured"] for row in written["table"]} == {gpu_suite.NOT_MEASURED}
    assert {row["figure"] for row in written["table"]} == set(gpu_cases.FIGURES)
    assert (tmp_path / "gpu.md").read_text().count(gpu_suite.NOT_MEASURED) >= len(gpu_cases.FIGURES)


def test_figures_reach_the_table():
    name = next(iter(gpu_cases.FIGURES))
    rows = gpu_suite.table([gpu_cases.figure(name, 0.75, "x", plain=1.0), {"failed": "RuntimeError: no"}])
    assert rows[0] == {"figure": name, "must reach": "not slower", "measured": "0.75x"}
    assert rows[1]["measured"] == gpu_suite.NOT_MEASURED


def test_a_stage_that_runs_out_of_time_is_reported():
    stage = gpu_suite.run_stage("sleep", ["sleep", "20"], 0.2)
    assert stage["status"] == 124 and stage["seconds"] < 10


def test_stages_fit_ten_minutes_together():
    """The limits are upper ends; the sum of what is essential and the tests leaves room for the figures."""
    limits = {name: limit for name, (limit, _) in gpu_suite.STAGES.items()}
    assert max(limits.values()) < 9.5 * 60
    assert gpu_suite.STAGES["build"][1], "without a build the rest is meaningless"


@pytest.mark.slow
def test_the_small_cases_run_through_the_kernels_on_the_host():
    """What the sanitizers will see on the GPU runs to its end on the same kernel bodies."""
    with host_kernels.replaced():
        assert gpu_cases.small_cases("cpu") == 60


def test_the_cases_of_other_families_run_through_the_kernels_on_the_host():
    with host_kernels.replaced():
        assert gpu_cases.family_cases("cpu") == 11


def test_choices_are_kept_for_the_card_they_were_measured_on(tmp_path):
    path = tmp_path / "choices.json"
    assert _choices.ways("card", path) == [], "nothing was measured: pycert's own kernels"
    one = {"operator": "product", "dtype": "float64", "shape": [4, 5, 6], "own": 2.0, "other": 1.0}
    _choices.save("card", [one], path)
    assert _choices.ways("card", path) == [("product", True, (4, 5, 6), 2.0, 1.0)]
    assert _choices.ways("another", path) == []


def test_error_bounds_cover_both_ways_where_a_product_may_go_either():
    """A row so long that the library's blocks are the longer chain: the charge grows, and the bound stays sound."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2000), torch.nn.ReLU(), torch.nn.Linear(2000, 1))  # fmt: skip
    bm, x = pycert.BoundedModule(net, torch.zeros(1, 3)), torch.rand(1, 3)
    region = pycert.LpBall(x, eps=0.1)
    with torch.no_grad(), host_kernels.replaced():
        own = bm.bound(region, method="crown")
        try:
            _C.set_choices("cpu", [("product", False, (1, 2000, 4), 2.0, 1.0), ("dual_product", False, (9, 9, 9), 2.0, 1.0)])  # fmt: skip
            either = bm.bound(region, method="crown")
        finally:
            _C.set_choices("cuda", [])
    assert (either.upper - either.lower > own.upper - own.lower).all()
    torch.testing.assert_close(either.lower, own.lower, rtol=1e-2, atol=1e-2)
