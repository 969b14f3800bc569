"""benchmarks/gpu_suite.py without a GPU: what it would run, what it writes when nothing was measured."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

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


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_that_runs_out_of_time_ends_with_all_it_started(tmp_path):
    """A compiler or a sanitizer's target would hold the output open, and the card."""
    command = ["sh", "-c", f"sh -c 'sleep 2; touch {tmp_path}/alive' & echo started; sleep 30"]
    stage = gpu_suite.run_stage("sleep", command, 1, tmp_path / "log")
    assert stage["status"] == 124 and stage["seconds"] < 2 and stage["output"] == ["started"]
    time.sleep(2.5 - stage["seconds"])
    assert not (tmp_path / "alive").exists()


def test_stages_go_on_and_keep_what_they_found(tmp_path, monkeypatch, capsys):
    """Failing, too slow, missing, not to be started: the others run, and all that was said is kept."""
    name = next(iter(gpu_cases.FIGURES))
    figures = tmp_path / "gpu_figures.jsonl"
    lines = [
        json.dumps({"about": {"device": {"name": "none"}}}),
        json.dumps(gpu_cases.figure(name, 0.5, "x")),
        '{"fig',
    ]
    noise = "print('noise\\n' * 100)"
    planned = {
        "build": [python(f"{noise}; print('error: number %d' % 7); {noise}")],
        "check": [python(f"{noise}; print('error: number %d' % 7); {noise}; raise SystemExit(5)")],
        "tests": [python("import time; print('first', flush=True); time.sleep(60)")],
        "sanitizer": [],
        "choices": [["/no/such/program"], python("print(1)")],
        "benchmarks": [python(f"open({str(figures)!r}, 'w').write({chr(10).join(lines)!r})")],
    }
    monkeypatch.setattr(gpu_suite, "commands", lambda figures, peers: planned)
    monkeypatch.setattr(gpu_suite, "STAGES", {**gpu_suite.STAGES, "tests": (1, False)})
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    statuses = [(stage["stage"], stage["status"]) for stage in written["stages"]]
    expected = [("build", 0), ("check", 5), ("tests", 124), ("sanitizer", "missing"), ("choices", 127), ("choices", 0), ("benchmarks", 0)]  # fmt: skip
    assert statuses == expected
    assert written["table"][0]["measured"] == "0.50x" and written["about"]["device"] == {"name": "none"}
    assert {"numpy", "ninja", "nvcc", "card"} <= set(written["about"]["machine"])
    printed = capsys.readouterr().out
    assert printed.count("error: number 7") == 1 and printed.count("noise") < 40
    log = (tmp_path / "gpu.log").read_text()
    assert log.count("error: number 7") == 2 and log.count("noise\n") == 400 and "first" in log


def test_a_failed_build_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "commands", lambda *_: {"build": [["false"]], "check": [["true"]]})
    stages = gpu_suite.run_stages(["build", "check"], 1.0, tmp_path, [])
    assert [stage["status"] for stage in stages] == [1]


def test_without_time_stages_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "commands", lambda *_: {"check": [["true"]], "sanitizer": []})
    gpu_suite.run_stages(["check", "sanitizer"], 0.1, tmp_path, [])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [stage["status"] for stage in stages] == ["left out", "missing"]


def test_commands_find_this_checkout_and_this_python(monkeypatch):
    """Beside what the caller brings: packages in folders of its own, another architecture."""
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    found = gpu_suite.environment()
    assert found["PYTHONPATH"] == f"{gpu_suite.ROOT}:/elsewhere" and found["TORCH_CUDA_ARCH_LIST"] == "8.6"
    assert found["PATH"].startswith(f"{pathlib.Path(sys.executable).parent}:")
    for said, wanted in (("9.0", "9.0"), ("12.1", "9.0+PTX"), ("FileNotFoundError", "9.0+PTX")):
        monkeypatch.setattr(gpu_suite, "said_by", lambda _, said=said: said)
        assert gpu_suite.architecture() == wanted


def test_only_one_file_has_tests_for_a_gpu():
    """The suite names it: pytest would stop at another file that it cannot import."""
    marked = [
        path.name for path in (gpu_suite.ROOT / "tests").glob("test_*.py") if "mark.cuda" in path.read_text()
    ]
    assert sorted(marked) == ["test_cuda.py", "test_gpu_suite.py"]
    assert gpu_suite.test_command()[-1] == "tests/test_cuda.py"


@pytest.fixture()
def small_on_the_host(monkeypatch):
    """Everything that is measured, small, on kernel bodies on the host; a call takes a millisecond."""
    tiny, once = gpu_cases.nets.make, []

    def seconds(call, budget=2.0):
        once.append(call())
        return 1e-3

    monkeypatch.setattr(gpu_cases, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_cases, "SHAPES", [(3, 5, 4)])
    monkeypatch.setattr(gpu_cases, "WINDOWS", [(3, 4, 2, 3)])
    sizes = {"linear": (2, 4), "convolution": (2, 2, 4), "bandwidth": (8,), "rows": (3, 4), "windows": (3, 4, 2, 3), "groups": (3,), "power": (2, 2, 4)}  # fmt: skip
    assert set(sizes) == set(gpu_cases.SIZES)
    monkeypatch.setattr(gpu_cases, "SIZES", sizes)
    monkeypatch.setattr(gpu_cases, "seconds", seconds)
    monkeypatch.setattr(gpu_cases.nets, "make", lambda name, batch: tiny("mlp_tiny", 2))
    monkeypatch.setattr(pycert.profiling, "measured_roofs", lambda *_: pycert.profiling.Roofs(1e9, 1e9))
    monkeypatch.setattr(gpu_cases, "about_device", lambda: {"name": "host"})
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32  # which `measure` changes
    with host_kernels.replaced():
        yield once
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_every_figure_can_be_measured(small_on_the_host, tmp_path):
    path = tmp_path / "figures"
    gpu_cases.measure(path, [])
    found, about = gpu_suite.read_figures(path, {})
    assert about["device"] == {"name": "host"}
    assert [row for row in found if "failed" in row] == []
    assert {row["figure"] for row in found} == set(gpu_cases.FIGURES)


def test_what_a_peer_cannot_do_leaves_our_own_time():
    def fails() -> float:
        raise MemoryError("too much\nof it")

    assert gpu_cases.against_peer("x", 0.5, lambda: 2.0)["text"] == "4.00x"
    assert gpu_cases.against_peer("x", 0.5, None)["text"] == "0.5 s (no auto_LiRPA there)"
    assert "MemoryError: too much" in gpu_cases.against_peer("x", 0.5, fails)["text"]


def test_both_ways_of_every_product_are_timed_and_kept_one_by_one(small_on_the_host, tmp_path, monkeypatch):
    monkeypatch.setattr(_choices, "load", lambda: None)
    monkeypatch.setattr(_choices, "PATH", tmp_path / "choices.json")
    kept, save = [], _choices.save
    monkeypatch.setattr(_choices, "save", lambda card, found: (kept.append(len(found)), save("host", found, _choices.PATH)))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "host")
    gpu_cases.choose()
    assert kept == list(range(1, 9)) and len(_choices.ways("host", _choices.PATH)) == 8
    assert {name for name, *_ in _choices.ways("host", _choices.PATH)} == {"product", "dual_product", "relax_product", "relax_convolution"}  # fmt: skip
    own, other = small_on_the_host[-2:]
    torch.testing.assert_close(own[1], other[1])  # sums of one pass and of two


def test_stages_fit_ten_minutes_together():
    """The limits are upper ends; the sum of what is essential and the tests leaves room for the figures."""
    limits = {name: limit for name, (limit, _) in gpu_suite.STAGES.items()}
    assert max(limits.values()) < 9.5 * 60
    assert gpu_suite.STAGES["build"][1], "without a build the rest is meaningless"


@pytest.mark.slow
def test_the_tests_for_a_gpu_run_on_the_host():
    """Their arguments, shapes and judgements, on the kernels' bodies; all but what only a card has."""
    command = [*gpu_suite.test_command(), "-k", "not methods_match"]
    environment = {**gpu_suite.environment(), "PYCERT_TEST_ON_HOST": "1"}
    done = subprocess.run(command, cwd=gpu_suite.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


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
