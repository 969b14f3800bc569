"""The benchmark runner works and its figures survive writing; no time is asserted."""

from __future__ import annotations

import math
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

benchmarks = pytest.importorskip("benchmarks", reason="the benchmarks are not part of an installed package")
from benchmarks import __main__ as runner  # noqa: E402
from benchmarks import isolate, libraries, nets, results, timing  # noqa: E402


@pytest.mark.slow
def test_quick_engine_run_measures_every_library_and_writes_what_it_printed(tmp_path, capsys):
    arguments = ["engine", "--quick", "--threads", "1", "--out", str(tmp_path)]
    arguments += ["--libraries", "pycert,pycert_none,torch_ibp"]
    assert runner.main(arguments) == 0
    found = results.load("engine", tmp_path)
    assert [row["pass"] for row in found["rows"]] == [
        "bounds",
        "gradients",
        "step",
    ]  # no loss of one row by ibp
    for row in found["rows"]:
        assert {"forward", "pycert", "pycert_none", "torch_ibp"} <= set(row["seconds"]), row
        assert row["failed_calls"] == {}
        assert row["errors"] == {}
        assert all(0 < each["low"] <= each["median"] <= each["high"] for each in row["seconds"].values())
    assert max(found["rows"][0]["looser_and_tighter"]["torch_ibp"]) < 1e-5  # the same intervals
    assert found["about"]["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in found["about"]["command"]  # no folder of this machine in a published file
    page = (tmp_path / "engine.md").read_text()
    assert page == results.markdown("engine", found)
    assert "| mlp_tiny | 1 | ibp |" in page
    assert "| mlp_tiny | 1 | ibp |" in capsys.readouterr().out


def test_results_round_trip(tmp_path):
    made = {"title": "t", "columns": ["net", "value", "nothing"], "rows": [{"net": "a|b", "value": 0.12345}]}
    about = {
        "command": "c",
        "date": "2026-01-01",
        "commit": "0",
        "machine": {"cores": 2},
        "versions": {"torch": "2"},
    }
    result = {"about": about, "tables": [made], "notes": ["said"], "rows": [{"x": math.pi}]}
    _, page = results.save("subject", result, tmp_path)
    assert results.load("subject", tmp_path) == result
    assert "| a\\|b | 0.123 |  |" in page.read_text()
    assert page.read_text().endswith("said\n")


def test_a_failing_case_keeps_the_rows_before_it_and_says_why(tmp_path, monkeypatch):
    body = 'def rows(threads):\n    yield {"row": threads}\n    raise MemoryError("too much")\n'
    (tmp_path / "failing_case.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = isolate.run_case("failing_case:rows", {"threads": 1}, 60)
    assert rows == [{"row": 1}, {"failed": "MemoryError: too much"}]


def test_alternate_takes_turns_and_ratio_follows_the_work():
    order = []
    times = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.01)
    assert set(times) == {"a", "b"}
    assert len(times["a"].rounds) == len(times["b"].rounds) >= 3
    first_a = len(order) - 1 - order[::-1].index("a")
    assert order.index("b") < first_a  # not all of one before the other
    doubled = timing.Timing(2.0, 2.0, 2.0, 2.0, 3, [2.0, 2.0, 4.0])
    single = timing.Timing(1.0, 1.0, 1.0, 1.0, 3, [1.0, 1.0, 1.0])
    assert timing.ratio(doubled, single) == (2.0, 2.0, 3.0)


def test_peak_memory_sees_what_a_call_allocates():
    size = 64 * 2**20
    peak = timing.peak_memory(lambda: torch.ones(size, dtype=torch.uint8).max())
    assert peak is None or 0.9 * size < peak < 2 * size


def test_margin_rows_are_label_minus_every_other_class():
    rows = libraries.margin_rows(torch.tensor([1]), classes=3)
    assert rows.tolist() == [[[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]]


@pytest.mark.parametrize("name", ["mlp_tiny", "resnet2b"])
def test_eager_intervals_contain_the_corners(name):
    net, x, eps = nets.make(name, 2, torch.float64)
    eager = libraries.TorchIbp(net, x, "ibp")
    lower, upper = eager.bounds(x, eps)
    labels = torch.tensor([0, 3])
    margins = eager.margins(x, eps, labels)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        signs = torch.randint(0, 2, x.shape, generator=generator).double() * 2 - 1
        y = net(x + eps * signs)
        assert (lower <= y).all()
        assert (y <= upper).all()
        differences = (libraries.margin_rows(labels, 10).double() @ y.unsqueeze(-1)).squeeze(-1)
        assert (margins <= differences + 1e-12).all()


@pytest.mark.parametrize("text", ["auto_LiRPA", "other=.", "auto_LiRPA=no/such/folder"])
def test_a_wrong_peer_argument_is_refused_by_name(text, capsys):
    with pytest.raises(SystemExit):
        runner.main(["engine", "--quick", "--peer", text])
    assert "--peer" in capsys.readouterr().err
