"""The command line: results, resuming, reports, and the messages for wrong input."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import pycert
from pycert.cli import certify, demo, main, records
from pycert.options import Options

MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

def wrong():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a network's module, other weights, and data of 23 samples, as the present folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clinet.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "clinet", raising=False)
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (23, 1, 2, 3)).astype(np.uint8)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    y = net(torch.from_numpy(x).float() / 255).argmax(1).numpy()
    y[:2] = (y[:2] + 1) % 3
    torch.save(net.state_dict(), "weights.pt")
    np.savez("data.npz", x=x, y=y)
    return tmp_path


DATA = "clinet:make --weights weights.pt --data data.npz --scale 255"
COMMAND = f"certify {DATA} --clip 0 1 --out r.jsonl --batch-size 5"
FULL = f"{COMMAND} --eps 0.01 8/255 --method ibp crown --attack --attack-steps 5 --attack-restarts 1 --no-plot".split()


def results(path="r.jsonl"):
    """The records of a file without their times."""
    return [{key: row[key] for key in row if key != "seconds"} for row in records.read(path)[1]]


def test_certify_writes_what_the_library_says(folder, capsys):
    assert main(FULL) == 0
    rows = results(folder / "r.jsonl")
    assert len(rows) == 3 * 2 * 23
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    net.load_state_dict(torch.load("weights.pt", weights_only=True))
    file = np.load("data.npz")
    x, y = torch.from_numpy(file["x"]).float() / 255, torch.from_numpy(file["y"])
    expected = pycert.certify(
        pycert.BoundedModule(net, x[:1]), x, y, eps=8 / 255, method="crown", clip=(0, 1)
    )
    found = [row for row in rows if row["method"] == "crown" and row["eps"] == 8 / 255]
    assert [row["certified"] for row in found] == expected.certified.tolist()
    assert [row["correct"] for row in found] == expected.correct.tolist()
    assert sum(row["correct"] for row in found) == 21
    broken = {
        row["sample"]
        for row in rows
        if row["method"] == "pgd" and row["eps"] == 8 / 255 and not row["robust"]
    }
    assert not broken & {row["sample"] for row in found if row["certified"]}
    text = capsys.readouterr().out
    assert "clean accuracy 91.3% on 23 samples" in text
    assert "crown" in text


@pytest.mark.parametrize(("p", "eps"), [("inf", "0.08"), ("2", "0.25"), ("1", "0.5")])
def test_what_is_certified_is_not_broken(folder, p, eps):
    assert main([*FULL, "--quiet", "--eps", eps, "--p", p, "--attack-steps", "30"]) == 0
    rows = results()
    proved = {row["sample"] for row in rows if row.get("certified")}
    broken = {row["sample"] for row in rows if row["method"] == "pgd" and not row["robust"]}
    assert proved
    assert len(broken) > 2
    assert not proved & broken


@pytest.mark.parametrize("method", ["krelu", "lp"])
def test_methods_with_groups_of_neurons(folder, method, capsys):
    if method == "lp":
        pytest.importorskip("highspy", reason="method 'lp' needs highspy")
    command = (
        f"{COMMAND} --eps 0.05 --no-plot --samples 6 --k 2 --ns 12 --rows 4 --iterations 5 --method".split()
    )
    assert main([*command, "alpha-crown", method]) == 0
    margins = {row["method"]: {} for row in results()}
    for row in results():
        margins[row["method"]][row["sample"]] = row["margin"]
    for sample, margin in margins[method].items():
        if margin is not None and margin < 0:
            assert margin >= margins["alpha-crown"][sample] - 1e-6
    capsys.readouterr()
    assert main([*command, "crown"]) == 2
    assert "--iterations is of --method alpha-crown, krelu, lp" in capsys.readouterr().err


def test_every_option_of_bound_is_one_of_the_command(folder, capsys):
    options = {field.name for field in dataclasses.fields(Options)}
    assert options - set(certify.SOME_OPTIONS) == {
        "side",
        "intersect",
        "soundness",
        "memory",
        "cuts",
        "norms",
    }
    assert set(certify.SOME_OPTIONS) <= options
    command = f"{COMMAND} --eps 0.4 --no-plot --samples 6 --method crown".split()
    assert main([*command, "--slope", "zero", "--pooling", "constant", "--precision", "fast"]) == 0
    margins = [row["margin"] for row in results() if row["margin"] is not None]
    assert main([*command, "--overwrite"]) == 0
    assert margins != [row["margin"] for row in results() if row["margin"] is not None]
    header, _ = records.read(folder / "r.jsonl")
    assert header["run"]["options"]["of_methods"] == {"crown": {}}
    capsys.readouterr()
    assert main([*command, "--threshold", "0.5"]) == 2
    assert "--threshold is of --method alpha-crown, krelu, lp" in capsys.readouterr().err


def test_the_report_stands_alone_and_names_what_it_rests_on(folder):
    assert main([*FULL[:-1], "--report", "page.html", "--quiet", "--soundness", "none"]) == 0
    page = (folder / "page.html").read_text()
    header, _ = records.read(folder / "r.jsonl")
    run = header["run"]
    for value in (
        run["weights"],
        run["inputs"],
        run["library"]["build"],
        "clinet:make",
        "data:image/png;base64,",
    ):
        assert value in page
    assert "prove nothing in the strict sense" in page
    assert "http" not in page


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.55, 0.999])
def test_a_file_cut_anywhere_is_continued_to_the_same_results(folder, share):
    assert main([*FULL, "--quiet"]) == 0
    whole, path = results(), folder / "r.jsonl"
    content = path.read_bytes()
    header = content.index(b"\n") + 1
    path.write_bytes(content[: header + int(share * (len(content) - header))])
    assert main([*FULL, "--quiet"]) == 0
    assert results() == whole
    assert path.read_bytes().count(b'"format"') == 1


def test_ctrl_c_leaves_a_file_that_goes_on(folder, monkeypatch, capsys):
    calls, original = [], certify.pycert.certify

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    command = f"{COMMAND} --eps 0.02 --method ibp --no-plot".split()
    with monkeypatch.context() as patch:
        patch.setattr(certify.pycert, "certify", interrupted)
        assert main([*command, "--quiet"]) == 130
    assert "15 of 23 results are in r.jsonl; run the same command again" in capsys.readouterr().err
    assert len(results()) == 15
    assert main([*command, "--quiet"]) == 0
    parts = results()
    assert main([*command, "--quiet", "--overwrite"]) == 0
    assert results() == parts
    assert len(parts) == 23


def test_a_finished_run_computes_nothing_again(folder, monkeypatch):
    assert main([*FULL, "--quiet"]) == 0
    monkeypatch.setattr(certify.pycert, "certify", None)
    assert main([*FULL, "--quiet"]) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--eps", "0.3"], "options eps"),
        (["--soundness", "real"], "options soundness deployed -> real"),
        (["--weights", "other.pt"], "weights"),
        (["--data", "other.npz"], "inputs"),
        (["--samples", "20"], "samples 23 -> 20"),
    ],
)
def test_results_of_another_run_are_not_continued(folder, change, named, capsys):
    torch.save(
        nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).state_dict(), "other.pt"
    )
    file = np.load("data.npz")
    np.savez("other.npz", x=file["x"][::-1], y=file["y"])
    assert main([*FULL, "--quiet"]) == 0
    before = (folder / "r.jsonl").read_bytes()
    assert main([*FULL, "--quiet", *change]) == 2
    message = capsys.readouterr().err
    assert "holds results of another run" in message
    assert named in message
    assert "--overwrite" in message
    assert (folder / "r.jsonl").read_bytes() == before


def test_json_is_all_that_stands_on_standard_output(folder, capsys):
    assert main([*FULL, "--json", "--quiet"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == 23
    assert {row["method"] for row in summary["rows"]} == {"pgd", "ibp", "crown"}
    assert all(0 <= row["accuracy"] <= summary["clean"] for row in summary["rows"])


def test_normalisation_stands_in_front_of_the_network(folder):
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    net.load_state_dict(torch.load("weights.pt", weights_only=True))
    with torch.no_grad():  # (x - 0.5) / 0.25 before net[1] is undone by its weights
        net[1].bias += net[1].weight.sum(1) * 0.5
        net[1].weight *= 0.25
    torch.save(net.state_dict(), "folded.pt")
    command = f"{COMMAND} --eps 0.02 --no-plot --quiet".split()
    assert main(command) == 0
    plain = results()
    assert main([*command, "--weights", "folded.pt", "--mean", "0.5", "--std", "0.25", "--overwrite"]) == 0
    for a, b in zip(plain, results(), strict=True):
        assert a["margin"] == pytest.approx(b["margin"], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "missing.npz"], "missing.npz"),
        (["--x-key", "z"], "no array 'z', it holds x, y"),
        (["--weights", "data.npz"], "not a file of plain tensors"),
        (["--weights", "evil.pt"], "not a file of plain tensors"),
        (["--weights", "small.pt"], "does not fit the network"),
        (["--shape", "7"], "does not fit samples of shape [1, 2, 3]"),
        (["--shape", "3", "1", "2", "--eps", "-1"], "--eps must be finite and not negative"),
        (["--p", "3"], "--p must be 1, 2 or inf, got 3"),
        (["--clip", "1", "0"], "--clip LO HI needs LO < HI"),
        (["--samples", "24"], "between 1 and the 23 samples"),
        (["--mean", "0.5"], "--mean and --std must be given together"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--x-key", "w"], "--x-key and --y-key name the inputs and the classes"),
        (["--memory", "lots"], "memory must be bytes or text such as '2GiB'"),
        (["--device", "abacus"], "--device must be cpu or cuda, got 'abacus'"),
        (["--data", "classes.npz"], "y holds class 7, but the network has 3 outputs"),
        (["--data", "pickled.npz"], "not a .npz file of plain arrays"),
    ],
)
def test_wrong_input_is_named(folder, change, message, capsys):
    file = np.load("data.npz")
    np.savez("classes.npz", x=file["x"], y=file["y"] * 0 + 7)
    np.savez("pickled.npz", x=np.array([{}] * 23, dtype=object), y=file["y"])
    torch.save({"0.weight": torch.zeros(2)}, "small.pt")
    torch.save(nn.Linear(2, 2), "evil.pt")
    assert main([*FULL, "--quiet", *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pycert certify: error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("clinet", "expected MODULE:FUNCTION"),
        ("nowhere:make", "No module named 'nowhere'"),
        ("clinet:nothing", "module clinet has no function nothing"),
        ("clinet:wrong", "must return a torch.nn.Module, got int"),
        ("missing.py:make", "there is no file missing.py"),
    ],
)
def test_a_wrong_network_is_named(folder, network, message, capsys):
    assert main(["certify", network, "--data", "data.npz", "--eps", "0.1", "--scale", "255"]) == 2
    assert message in capsys.readouterr().err


def test_pixels_are_scaled_only_when_asked(folder, capsys):
    assert main("certify clinet.py:make --data data.npz --eps 1 --samples 2 --quiet --no-plot".split()) == 2
    assert "say --scale 255 to divide it by 255, or --scale 1" in capsys.readouterr().err
    command = "certify clinet.py:make --data data.npz --eps 1 --samples 2 --quiet --no-plot --scale 1"
    assert main(command.split()) == 0


def test_broken_results_are_not_taken_for_results(folder, capsys):
    (folder / "r.jsonl").write_text("hello\n")
    assert main(FULL) == 2
    assert "not a results file" in capsys.readouterr().err


def test_without_matplotlib_results_and_report_are_still_written(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(certify.importlib.util, "find_spec", lambda name: None)
    command = f"{COMMAND} --eps 0.02 --quiet --report new/page.html".split()
    assert main(command) == 0
    assert "no plot: matplotlib is not installed" in capsys.readouterr().err
    assert "<img" not in (folder / "new" / "page.html").read_text()
    assert main([*command, "--plot", "p.png"]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_plot_draws_unfinished_results(folder, capsys):
    assert main([*FULL, "--quiet"]) == 0
    content = (folder / "r.jsonl").read_bytes()
    (folder / "r.jsonl").write_bytes(content[: len(content) * 2 // 3])
    assert main(["plot", "r.jsonl", "--out", "p.svg"]) == 0
    assert "certified by ibp" in (folder / "p.svg").read_text()
    (folder / "x.json").write_text("{}")
    assert main(["plot", "x.json"]) == 2
    assert "rows and clean are missing" in capsys.readouterr().err


def test_the_demo_runs_and_its_command_too(folder, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="the demo trains on scikit-learn's digits")
    monkeypatch.setattr(demo, "RADII", (0.0, 0.1))
    assert main("demo --epochs 2 --samples 20 --quiet --out demo".split()) == 0
    output = capsys.readouterr().out
    assert "proved robust" in output
    found = json.loads((folder / "demo" / "results.json").read_text())
    assert {row["method"] for row in found["rows"]} == {"pgd", *demo.METHODS}
    assert (folder / "demo" / "certified.png").stat().st_size > 10_000
    command = output[output.index("pycert certify") :].replace("\\\n", " ").split()[1:]
    assert main([*command, "--quiet"]) == 0
    assert (folder / "demo" / "report.html").exists()


def test_train_writes_weights_that_certify_reads(folder, capsys):
    command = (
        "train --network clinet:make --data data.npz --scale 255 --mean 0.5 --std 0.5 --epochs 4 --quiet"
    )
    assert main([*command.split(), "--out", "trained.pt", "--history", "h.jsonl"]) == 0
    assert "certified" in capsys.readouterr().out
    assert len((folder / "h.jsonl").read_text().splitlines()) == 4
    command = (
        "certify clinet:make --weights trained.pt --data data.npz --scale 255 --mean 0.5 --std 0.5 --eps 0.01"
    )
    assert main([*command.split(), "--quiet", "--no-plot"]) == 0


def test_bench_needs_a_checkout(folder, monkeypatch, capsys):
    from pycert.cli import bench

    monkeypatch.setattr(bench, "__file__", str(folder / "a" / "b" / "bench.py"))
    assert main(["bench", "engine"]) == 2
    assert "from the root of a clone" in capsys.readouterr().err


def test_bench_runs_where_the_user_is(folder, monkeypatch):
    """So that ``--out`` and ``--peer`` may be relative paths."""
    from pycert.cli import bench

    calls = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(bench, "checkout", lambda: folder / "clone")
    monkeypatch.setattr(
        bench.subprocess, "run", lambda *a, **k: calls.append((a, k)) or subprocess.CompletedProcess(a, 3)
    )
    assert main(["bench", "engine", "--out", "here"]) == 3
    (command,), options = calls[0]
    assert command[1:] == ["-m", "benchmarks", "engine", "--out", "here"]
    assert "cwd" not in options
    assert options["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(folder / "clone")


def test_a_missing_file_is_named_without_the_number_of_the_error(folder, capsys):
    command = "certify clinet:make --weights none.pt --data data.npz --scale 255 --eps 0.01"
    assert main(command.split()) == 2
    assert capsys.readouterr().err == "pycert certify: error: none.pt: No such file or directory\n"


@pytest.mark.parametrize("command", ["train", "demo", "profile clinet:make --input-shape 1 2 3 --eps 0.1"])
def test_threads_are_checked_by_every_command(folder, command, capsys):
    assert main([*command.split(), "--threads", "0"]) == 2
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err


def test_help_lists_the_commands_and_warns_of_code(capsys):
    for arguments, words in ((["--help"], ["certify", "doctor"]), (["certify", "--help"], ["runs the code"])):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        output = " ".join(capsys.readouterr().out.split())
        assert all(word in output for word in words)
