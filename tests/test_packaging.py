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
from pycert.cli import doctor, main

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
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, page, "exec"), names)
        if number == 0:  # later blocks train the network further
            bounds, outputs = names["bounds"], names["net"](names["x"])
            assert ((bounds.lower <= outputs) & (outputs <= bounds.upper)).all()


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
