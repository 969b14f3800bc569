"""``pycert.profile`` and ``pycert profile``: what is counted, what is reported, and that it switches off again."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import pycert
from pycert import _C, cli
from pycert.profiling import Entry, Roofs


def network(dtype: torch.dtype = torch.float32) -> tuple[pycert.BoundedModule, pycert.LpBall]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5)).to(
        dtype
    )
    return pycert.BoundedModule(net, torch.empty(1, 20, dtype=dtype)), pycert.LpBall(
        torch.rand(3, 20, dtype=dtype), eps=0.3
    )


def build() -> nn.Module:
    """The network of the command-line tests."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def recorded(method: str = "crown", **options) -> pycert.profiling.Profile:
    bm, region = network()
    with torch.no_grad(), pycert.profile() as p:
        bm.bound(region, method=method, **options)
    return p


def test_operations_and_bytes_are_those_of_the_layers():
    """Both products of a batch of 3 through a [30, 20] weight: 4 B N K operations, W and both sides once."""
    entries = {(e.layer, e.kernel): e for e in recorded("ibp", soundness="none").entries}
    first = entries["0 (linear)", "dual_product"]
    assert first.calls == 1 and first.phase == "intervals"
    assert first.flops == 4 * 3 * 30 * 20
    assert first.bytes == 4 * (30 * 20 + 2 * 3 * (20 + 30))


def test_rows_are_counted_with_the_neurons_they_come_from():
    bm, region = network()
    with torch.no_grad():
        lower, upper = bm.layer_bounds(region, method="ibp")["2"]
        unstable = int(((lower < 0) & (upper > 0)).sum())
    targets = {t.layer: t for t in recorded().targets}
    assert targets["2 (linear)"].rows == 2 * unstable and targets["2 (linear)"].neurons == 3 * 40
    assert targets["output"].rows == 2 * 3 * 5


def test_times_add_up():
    p = recorded()
    inside = sum(entry.seconds for entry in p.entries)
    assert 0 < inside <= p.seconds
    assert all(entry.seconds >= 0 for entry in p.entries)
    by_layer = sum(entry.seconds for entry in p.summed("layer"))
    assert by_layer == pytest.approx(inside)
    assert {e.phase for e in p.entries} == {"intervals", "back-substitution"}


def test_gradients_are_seen_outside_layers():
    bm, region = network()
    with pycert.profile() as p:
        bm.bound(region, method="crown-ibp").lower.sum().backward()
    assert any(entry.kernel == "relax_backward" and entry.layer == "" for entry in p.entries)


def test_the_table_names_layers_kernels_and_roofs():
    p = recorded()
    table = p.table()
    for word in (
        "0 (linear)",
        "relax",
        "concretize",
        "bounds of",
        "output",
        "GB/s",
        "% of roof",
        "Roofs of cpu",
    ):
        assert word in table
    assert len(p.table(limit=2).splitlines()) < len(table.splitlines())
    assert p.table(by="layer").splitlines()[0].split()[:2] == ["layer", "calls"]
    with pytest.raises(ValueError, match="keys are 'layer', 'phase' and 'kernel', got 'name'"):
        p.table(by="name")
    found = json.loads(json.dumps(p.as_dict()))
    assert {entry["kernel"] for entry in found["entries"]} == {entry.kernel for entry in p.entries}


def test_share_of_the_roof():
    roofs = Roofs(bandwidth=1e9, rate=1e11)
    by_memory = Entry("a", "b", "c", 1, seconds=2.0, bytes=1e9, flops=1e9)
    assert by_memory.roof_share(roofs) == 0.5
    by_arithmetic = Entry("a", "b", "c", 1, seconds=2.0, bytes=1e6, flops=1e11)
    assert by_arithmetic.roof_share(roofs) == 0.5
    assert Entry("a", "b", "torch", 1, 1.0, 0.0, 0.0).roof_share(roofs) is None


def test_memory_of_a_large_block_is_seen():
    with pycert.profile() as p:
        torch.ones(2**24).sum()
    if p.peak_bytes is None:
        pytest.skip("this system does not say how much memory a process holds")
    assert 2**25 < p.peak_bytes < 2**28


def test_traces_name_the_layers(tmp_path):
    bm, region = network()
    with torch.no_grad(), pycert.profile(trace=tmp_path / "trace.json"):
        bm.bound(region, method="crown")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"0 (linear): intervals", "1 (relu): back-substitution", "pycert::relax_rows"} <= names


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
    path = recorded().picture(tmp_path / "profile.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing was recorded"):
        pycert.profile().picture(tmp_path / "empty.png")


def test_it_switches_off_also_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), pycert.profile():
        raise RuntimeError("inside")
    recorded()
    bm, region = network()
    bm.bound(region, method="crown")  # not recorded
    calls = [[(e.layer, e.kernel, e.calls) for e in _C.profile_stop()[0]] for _ in range(2)]
    assert calls[0] == calls[1]
    with pycert.profile() as p:
        pass
    assert p.entries == []


def test_what_cannot_be_profiled_is_refused():
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        pycert.profile("meta")
    with pytest.raises(TypeError, match="float32 or float64, got torch.float16"):
        pycert.profile(dtype=torch.float16)
    with pycert.profile(), pytest.raises(RuntimeError, match="cannot be nested"), pycert.profile():
        pass
    recorded()  # the inner one changed nothing


@pytest.mark.parametrize("method", ["ibp", "crown", "forward"])
def test_bounds_are_the_same_while_recorded(method):
    bm, region = network(torch.float64)
    with torch.no_grad():
        plain = tuple(bm.bound(region, method=method))
        with pycert.profile():
            seen = tuple(bm.bound(region, method=method))
    assert all(torch.equal(a, b) for a, b in zip(plain, seen))


COMMAND = ["profile", f"{__file__}:build", "--input-shape", "1", "8", "8"]


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
    files = [str(tmp_path / name) for name in ("out.json", "trace.json", "picture.png")]
    command = [*COMMAND, "--eps", "2/255", "--batch", "2"]
    status = cli.main([*command, "--json", files[0], "--trace", files[1], "--plot", files[2], "--gradient"])
    assert status == 0
    printed = capsys.readouterr().out
    assert (
        "0 (conv)" in printed and "unstable by intervals" in printed and "of 288 pre-activations" in printed
    )
    assert json.loads((tmp_path / "out.json").read_text())["roofs"]["bandwidth"] > 0
    for command_line, message in (
        ([*command[:-1], "0"], "must be positive"),
        ([*command, "--input", str(tmp_path / "none.pt")], "none.pt"),
    ):
        assert cli.main(command_line) == 2
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main([*command, "--device", "cuda"]) == 2
        assert "sees no GPU" in capsys.readouterr().err


def test_samples_of_a_file(tmp_path, capsys):
    command = [*COMMAND, "--eps", "0.1", "--method", "ibp"]
    torch.save(torch.rand(4, 1, 8, 8), tmp_path / "x.pt")
    assert cli.main([*command, "--input", str(tmp_path / "x.pt"), "--by", "kernel"]) == 0
    torch.save(torch.rand(4, 8, 8), tmp_path / "wrong.pt")
    assert cli.main([*command, "--input", str(tmp_path / "wrong.pt")]) == 2
    assert "expected a tensor [N >= 1, (1, 8, 8)]" in capsys.readouterr().err
