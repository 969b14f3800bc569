"""Pictures of relaxations: the numbers they show, and the page that looks them up."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import pycert
from hulls import directions
from pycert import plot
from pycert.cli import main
from pycert.plot.shapes import corners, faces, outline

TEMPLATE = Path(plot.page.__file__).with_name("relaxation.html")
ENDS = [(-1.0, 1.0), (-1.5, 0.75), (-0.25, 2.0), (-2.0, 0.0), (0.0, 1.0), (0.5, 1.0), (0.0, 0.0)]


def inside(points: np.ndarray, polygon: list, slack: float = 1e-6) -> bool:
    """Whether points lie in a convex polygon given counter-clockwise, with one or two corners too."""
    corner = np.array(polygon)
    low, high = corner.min(0), corner.max(0)
    if not ((points > low - slack) & (points < high + slack)).all():
        return False
    edge = np.roll(corner, -1, 0) - corner
    offset = points[:, None, :] - corner
    return bool((edge[:, 0] * offset[..., 1] - edge[:, 1] * offset[..., 0] > -slack).all())


def samples(lower: float, upper: float) -> np.ndarray:
    z = np.random.default_rng(0).uniform(lower, upper, (2000, 2))
    ends = np.array([[a, b] for a in (lower, upper) for b in (lower, upper)])
    return np.vstack([z, ends]) @ np.array([[1, 1], [1, -1]])


def test_the_numbers_of_one_neuron():
    sets = plot.relaxation_data(-1, 1.5)["neuron"]
    areas = {name: plot.pictures._area(points) for name, points in sets.items()}
    assert areas == pytest.approx({"box": 3.75, "zonotope": 1.5, "crown": 1.25, "triangle": 0.75})
    assert sorted(sets["triangle"]) == pytest.approx(np.array([[-1, 0], [0, 0], [1.5, 1.5]]))


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_sets_hold_what_they_relax_and_lie_in_each_other(ends):
    data = plot.relaxation_data(*ends)
    x = np.linspace(*ends, 50)
    for points in data["neuron"].values():
        assert inside(np.column_stack([x, np.maximum(x, 0)]), points)
    plane, x = data["plane"], samples(*ends)
    for points in plane["before"].values():
        assert inside(x, points)
    for points in plane["sets"].values():
        assert inside(np.maximum(x, 0), points)
    for inner, outer in (("hull", "triangles"), ("triangles", "box")):
        assert inside(np.array(plane["sets"][inner]), plane["sets"][outer])
    for piece in plane["exact"]:
        assert inside(np.array(piece), plane["sets"]["hull"])
    found = np.maximum(x, 0).sum(1).max()
    best = {name: optimum["value"] for name, optimum in plane["optima"].items()}
    assert (
        found - 1e-9 <= best["exact"] <= best["hull"] + 1e-9 <= best["triangles"] + 2e-9 <= best["box"] + 3e-9
    )
    assert best["exact"] == pytest.approx(found, abs=1e-9)  # a corner of the inputs
    for optimum in plane["optima"].values():
        assert sum(optimum["point"]) == pytest.approx(optimum["value"])


def test_the_first_example_of_the_primer():
    """max y1 + y2 over [-1, 1]^2, also as linear programs over the rows themselves."""
    optima = {name: at["value"] for name, at in plot.relaxation_data()["plane"]["optima"].items()}
    assert optima == pytest.approx({"box": 4, "triangles": 3, "hull": 2, "exact": 2})
    linprog = pytest.importorskip("scipy.optimize", reason="compares with linear programs").linprog
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
    net[0].weight.data = torch.tensor([[1.0, 1], [1, -1]])
    region = pycert.Box(-torch.ones(1, 2), torch.ones(1, 2))
    bm = pycert.BoundedModule(net, torch.zeros(1, 2))
    octahedra = [t[0] for t in pycert.krelu.octahedral_bounds(bm, region, "0", torch.tensor([[0, 1]]))]
    for max_rows, value in ((0, 3), (None, 2)):
        rows, count = pycert.ops.krelu_hull(*octahedra, max_rows=max_rows)
        H = rows[0, : count[0]].double().numpy()
        best = linprog([0, 0, -1, -1], A_ub=-H[:, 1:], b_ub=H[:, 0], bounds=(None, None))
        assert -best.fun == pytest.approx(value, abs=1e-5)
    assert float(bm.bound(region, "ibp", spec=torch.ones(1, 2)).upper.detach()) == pytest.approx(4, abs=1e-4)
    assert float(bm.bound(region, "crown", spec=torch.ones(1, 2)).upper.detach()) == pytest.approx(
        3, abs=1e-4
    )


def test_the_image_need_not_be_convex():
    plane = plot.relaxation_data(-1.5, 0.75)["plane"]
    middle = (np.array(plane["sets"]["hull"])[:, None] + np.array(plane["sets"]["hull"])[None]).reshape(
        -1, 2
    ) / 2
    assert not all(any(inside(point[None], piece) for piece in plane["exact"]) for point in middle)


@pytest.mark.parametrize("ends", ENDS[:5], ids=str)
def test_solids_hold_the_graph_and_the_hull_is_smaller(ends):
    data = plot.relaxation_data(*ends)
    x = samples(*ends)
    points = np.column_stack([x, np.maximum(x[:, 0], 0)])
    volume = {}
    for name in ("triangles", "hull"):
        solid = [np.array(face) for face in data["solid"][name]]
        assert all(len(face) > 2 for face in solid)
        middle = np.unique(np.vstack(solid).round(9), axis=0).mean(0)
        volume[name] = 0.0
        for face in solid:
            normal = np.cross(face[1] - face[0], face[2] - face[0])
            normal *= np.sign((middle - face[0]) @ normal)
            assert ((points - face[0]) @ normal > -1e-6).all()
            fan = sum(np.cross(face[i] - face[0], face[i + 1] - face[0]) for i in range(1, len(face) - 1))
            volume[name] += abs((face[0] - middle) @ fan) / 6
    if ends[0] < 0 < ends[1]:
        assert volume["hull"] < volume["triangles"] - 1e-3
    if ends == (-1.0, 1.0):
        assert volume == pytest.approx({"triangles": 16 / 3, "hull": 8 / 3})


def test_shapes_of_a_cube_and_of_flat_things():
    rows = np.vstack([np.column_stack([np.ones(3), s * np.eye(3)]) for s in (1, -1)])
    assert sorted(corners(rows).tolist()) == sorted([list(p) for p in directions(3) if np.abs(p).sum() == 3])
    assert sorted(len(face) for face in faces(rows)) == [4] * 6
    flat = np.vstack([rows, [[0, 0, 0, -1], [0, 0, 0, 1]]])
    assert [len(face) for face in faces(flat)] == [4]
    assert outline(np.array([[0, 0], [2, 2], [1, 1], [0.5, 0.5]])).tolist() == [[0, 0], [2, 2]]
    square = outline(np.array([[0, 0], [1, 0], [0.5, 0], [1, 1], [0, 1], [0.5, 0.5], [0, 0]]))
    assert square.tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("ends", [(1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))], ids=str)
def test_ends_that_make_no_interval_are_refused(ends):
    with pytest.raises(ValueError, match="finite lower <= upper"):
        plot.relaxation_data(*ends)


def test_the_page_holds_its_numbers_and_loads_nothing(tmp_path):
    page, beside = plot.relaxation_page(tmp_path / "r.html", (-1.5, -1), (0.75, 1))
    text = page.read_text()
    embedded = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)
    numbers = json.loads(beside.read_text())
    assert json.loads(embedded[1]) == numbers
    for i, lower in enumerate(numbers["lowers"]):
        for j, upper in enumerate(numbers["uppers"]):
            assert numbers["cells"][i][j] == plot.relaxation_data(lower, upper, digits=6)
    addresses = set(re.findall(r"https?://[^\"' )]+", text)) | set(re.findall(r"\b(?:src|href)=", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which is not loaded
    assert "-0.0," not in text
    for wrong in ((), (1.0, 0.0)):
        with pytest.raises(ValueError, match="lowers must be ascending"):
            plot.relaxation_page(tmp_path / "r.html", wrong, (2.0,))


def numbers_in(value) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in numbers_in(value[key])]
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value]


def test_the_committed_page_shows_what_the_code_computes():
    committed = Path(__file__).parent.parent / "docs" / "relaxation.json"
    if not committed.exists():
        pytest.skip("the documentation is not beside the tests")
    numbers = json.loads(committed.read_text())
    template = re.sub(r"/\*NUMBERS\*/", lambda _: committed.read_text().strip(), TEMPLATE.read_text())
    assert committed.with_suffix(".html").read_text() == template
    for i, lower in list(enumerate(numbers["lowers"]))[::3]:
        for j, upper in list(enumerate(numbers["uppers"]))[::3]:
            computed = plot.relaxation_data(lower, upper, digits=6)
            assert numbers_in(numbers["cells"][i][j]["plane"]) == pytest.approx(
                numbers_in(computed["plane"]), abs=1e-5
            )
            assert numbers_in(numbers["cells"][i][j]["neuron"]) == pytest.approx(
                numbers_in(computed["neuron"]), abs=1e-5
            )


@pytest.mark.parametrize("form", ["png", "svg"])
def test_command_writes_pictures_and_page(tmp_path, capsys, monkeypatch, form):
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")
    monkeypatch.setattr(plot.page.relaxation_page, "__defaults__", ((-1.0,), (1.0,)))
    command = ["plot", "relaxation", "--lower", "-1.5", "--upper", "0.75", "--format", form]
    assert main([*command, "--out", str(tmp_path / "new")]) == 0
    written = capsys.readouterr().out.split()
    assert [path.rsplit("/", 1)[1] for path in written] == [
        f"relaxation_neuron.{form}",
        f"relaxation_plane.{form}",
        f"relaxation_solid.{form}",
        "relaxation.html",
        "relaxation.json",
    ]
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[form]
    for name in written[:3]:
        content = open(name, "rb").read()
        assert content.startswith(start)
        assert len(content) > 5000
    assert main([*command, "--lower", "2", "--out", str(tmp_path / "new")]) == 2
    assert "finite lower <= upper" in capsys.readouterr().err


BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
)


@pytest.mark.slow
def test_a_browser_shows_the_numbers(tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser that can print a page without a display: none of " + ", ".join(BROWSERS))
    page, beside = plot.relaxation_page(tmp_path / "r.html")
    numbers = json.loads(beside.read_text())
    for lower, upper in ((-1.0, 1.0), (-1.5, 0.75), (0.0, 0.0), (-2.0, 0.0)):
        address = f"{page.as_uri()}#lower={lower}&upper={upper}&sweep=60"
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        options += ["--virtual-time-budget=5000", "--dump-dom"]
        shown = subprocess.run(
            [browser, *options, address], capture_output=True, text=True, timeout=120, check=True
        )
        dom = shown.stdout
        cell = numbers["cells"][numbers["lowers"].index(lower)][numbers["uppers"].index(upper)]
        assert f'data-drawn="{lower:g} {upper:g}"' in dom
        optima = cell["plane"]["optima"]
        for name, optimum in optima.items():
            best = re.search(rf'<td id="optimum-{name}">([^<]*)</td>', dom)
            assert float(html.unescape(best[1])) == pytest.approx(optimum["value"], abs=1e-4)
        drawn = re.findall(r'<polygon points="([^"]*)"', dom)
        solid = cell["solid"]
        scene = len(cell["neuron"]) + len(cell["plane"]["before"]) + len(cell["plane"]["sets"])
        graphs = len(cell["plane"]["exact"]) + 2 * len(solid["graph"])
        assert len(drawn) == scene + graphs + len(solid["triangles"]) + len(solid["hull"])
        assert not any("NaN" in points or "Infinity" in points for points in drawn)
        swept = 0.6 * optima["box"]["value"]
        assert dom.count('class="passed"') == sum(swept > o["value"] + 1e-9 for o in optima.values())
