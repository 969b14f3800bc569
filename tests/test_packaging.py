"""The package around the library: build check, doctor, metadata, and what README and documentation say."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pycert
from pycert import _C, _build_check, _build_info
from pycert._flags import nnpack_enabled
from pycert.cli import COMMANDS, doctor, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_module_was_built_against_this_torch():
    assert torch.__version__ == _build_info.TORCH_VERSION
    _build_check.check_build()


def test_another_torch_is_refused_with_the_command_to_run(monkeypatch):
    monkeypatch.setattr(_build_info, "TORCH_VERSION", "2.6.0+other")
    with pytest.raises(ImportError) as raised:
        _build_check.check_build()
    message = str(raised.value)
    assert "\n" not in message
    assert "built against torch 2.6.0+other" in message
    assert f"torch {torch.__version__} is installed" in message
    assert message.endswith(_build_check.rebuild_command())


def test_a_missing_build_is_refused_with_the_command_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycert._build_info", None)
    with pytest.raises(ImportError, match=r"compiled module is missing; build it with: pip install"):
        _build_check.check_build()


def test_check_comes_before_the_compiled_module_is_loaded(tmp_path):
    """A wrong torch must give the sentence, not an undefined symbol: the module is never touched."""
    package = tmp_path / "pycert"
    package.mkdir()
    for name in ("__init__.py", "_build_check.py", "_version.py"):
        (package / name).write_text((ROOT / "pycert" / name).read_text())
    (package / "_build_info.py").write_text('TORCH_VERSION = "0.0"\nCUDA_VERSION = None\n')
    (package / "_C.py").write_text('raise ImportError("undefined symbol")\n')
    done = subprocess.run(
        [sys.executable, "-c", "import pycert"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "built against torch 0.0" in done.stderr.splitlines()[-1]


def test_version_is_the_same_everywhere():
    assert f"\nversion: {pycert.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_doctor_reports_and_succeeds(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for expected in (pycert.__version__, torch.__version__, _C.isa(), "threads", "GPU", "scikit-learn"):
        assert expected in text


def test_doctor_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["state"] for finding in findings} <= {"ok", "note", "missing"}
    assert findings[-1]["name"] == "bounds contain outputs"


def test_doctor_says_how_to_get_a_missing_package(monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL_PACKAGES", (("no_such_module", "no-such-package", "nothing"),))
    text = doctor.as_text(doctor.report())
    assert "pip install no-such-package" in text


def test_doctor_notes_flags_that_deployed_does_not_cover():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        finding = next(f for f in doctor.report() if f.name == "oneDNN float32 precision")
    finally:
        torch.set_float32_matmul_precision(before)
    assert finding.state == "note"
    assert "medium" in finding.value


def test_doctor_does_not_warn_of_a_gpu_that_torch_cannot_use():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    finding = next(f for f in doctor.report() if f.name == "TF32 (GPU)")
    assert torch.backends.cudnn.allow_tf32
    assert finding.state == "ok"


def test_doctor_fails_when_bounds_are_wrong(monkeypatch):
    def wrong(self, region, method):
        bounds = correct(self, region, method=method)
        return type(bounds)(lower=bounds.upper, upper=bounds.upper)

    correct = pycert.BoundedModule.bound
    monkeypatch.setattr(pycert.BoundedModule, "bound", wrong)
    assert doctor.run(doctor.argparse.Namespace(json=False)) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            found = (page.parent / target).resolve()
            assert found.exists(), f"{page.name} links to {target}"
            assert page.parent == ROOT or found.parent == page.parent, (
                f"{target}: not a page of the documentation"
            )


def python_blocks(page: Path) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    return blocks


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_examples_run(page):
    blocks = python_blocks(ROOT / page)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, page, "exec"), names)
        if number == 0:  # later blocks train the network further
            bounds, outputs = names["bounds"], names["net"](names["x"])
            assert ((bounds.lower <= outputs) & (outputs <= bounds.upper)).all()


#: Pages whose blocks speak of a network and a region that the reader has, and what they need.
ABOUT_YOUR_NETWORK = {
    "auto_lirpa.md": (),
    "cuda.md": (),
    "krelu.md": ("highspy",),
    "lipschitz.md": (),
    "onnx.md": ("onnx",),
    "performance.md": ("matplotlib",),
    "troubleshooting.md": (),
}


@pytest.fixture
def global_flags():
    """torch's settings that an example changes."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()
    with torch.backends.nnpack.flags(enabled=nnpack_enabled()):
        yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def write_onnx(path: Path, inputs: int) -> None:
    """A linear network."""
    from onnx import TensorProto, helper, numpy_helper, save

    weight = numpy_helper.from_array(torch.ones(3, inputs).numpy(), "weight")
    node = helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["batch", inputs]), ("y", None))
    ]
    graph = helper.make_graph([node], "linear", ends[:1], ends[1:], [weight])
    save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)


@pytest.mark.parametrize("page", ABOUT_YOUR_NETWORK)
def test_examples_about_your_network_run(page, tmp_path, monkeypatch, global_flags):
    if page == "cuda.md" and not (torch.cuda.is_available() and _C.has_cuda()):
        pytest.skip("needs a CUDA build and a GPU")
    for package in ABOUT_YOUR_NETWORK[page]:
        pytest.importorskip(package, reason=f"an example of {page} uses it")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = {"fc1": torch.nn.Linear(4, 8), "relu": torch.nn.ReLU(), "fc2": torch.nn.Linear(8, 3)}
    net = torch.nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    x = torch.rand(2, 4)
    names = {"torch": torch, "pycert": pycert, "net": net, "x": x, "example": x[:1], "y": net(x).argmax(1)}
    names |= {"bm": pycert.BoundedModule(net, x[:1]), "region": pycert.LpBall(x, eps=0.01)}
    names |= {"P_y": torch.eye(8), "P_x": torch.zeros(8, 8), "P_c": torch.zeros(8)}  # relu(z) >= 0
    if page == "onnx.md":
        write_onnx(tmp_path / "mnist-net_256x2.onnx", 4)
    for number, block in enumerate(python_blocks(ROOT / "docs" / page)):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def commands_of(page: Path) -> list[list[str]]:
    """Words of every ``pycert COMMAND ...`` in the page's blocks and lines."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^pycert .*$", text, re.MULTILINE) + re.findall(r"`(pycert [a-z]+[^`\n]*)`", text)
    words = [line.partition("#")[0].split() for line in found]
    return [line for line in words if line[1] in COMMANDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_pages_commands_exist(page, capsys):
    for _, command, *words in commands_of(page):
        if command != "bench":  # its options are the benchmarks' own
            with pytest.raises(SystemExit):
                main([command, "--help"])
            known = set(re.findall(r"(?<![\w-])--[a-z-]+", capsys.readouterr().out))
            assert {word for word in words if word.startswith("--")} <= known, f"{page.name}: {command}"


def test_commands_are_found_in_the_pages():
    found = {words[1] for page in PAGES for words in commands_of(page)}
    assert {"certify", "profile", "plot", "doctor", "bench"} <= found


def test_every_page_with_examples_is_run():
    pages = {page.name for page in (ROOT / "docs").glob("*.md") if "```python\n" in page.read_text("utf-8")}
    assert pages == {"index.md", *ABOUT_YOUR_NETWORK}


def test_architecture_names_every_folder_and_only_files_that_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Files")[2]
    rows = re.findall(r"^\| (`[^|]+`) \| (.*) \|$", text, re.MULTILINE)
    named = set()
    for folders, content in rows:
        folders = [ROOT / folder for folder in re.findall(r"`([^`]+)/`", folders)]
        named |= set(folders)
        for file in re.findall(r"`([\w*]+\.(?:h|cpp|cuh|py))`", content):
            assert any(list(folder.glob(file)) for folder in folders), file
    sources = [path for path in ROOT.glob("csrc/*") if path.is_dir()]
    sources += [path.parent for path in ROOT.glob("pycert/*/__init__.py") if path.parent.name != "compat"]
    assert set(sources) <= named


def test_every_page_of_the_documentation_is_in_its_table_of_contents():
    listed = re.findall(r"^(\w+)$", (ROOT / "docs" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= set(listed)


@pytest.mark.parametrize("extra", ["build", "onnx", "demo", "test", "lint", "docs", "dist"])
def test_make_finds_the_requirements_of_every_extra(extra):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        extras = importlib.import_module("extras")
    finally:
        sys.path.remove(str(ROOT / "tools"))
    names = extras.requirements(extra, (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert names
    assert all(re.fullmatch(r"[A-Za-z0-9-]+([=>]=[0-9.]+)?", name) for name in names)
