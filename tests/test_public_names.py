"""The names that programs outside the repository call, and how: a change here breaks them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

import pycert

#: What may be given by position, in this order, and by which keywords. Options of methods have tests of their own.
SIGNATURES = {
    "BoundedModule": "net example",
    "BoundedModule.bound": "self region method | spec return_linear",
    "BoundedModule.layer_bounds": "self region method",
    "BoundedModule.estimate": "self region method | spec",
    "LpBall": "x eps p clip",
    "Box": "lower upper",
    "margins": "bm region y method",
    "certify": "bm x y eps p method clip | cascade",
    "profile": "",
    "load_onnx": "path",
    "attacks.pgd": "model region y | steps step_size restarts",
    "lipschitz.local_bound": "bm region p method",
    "lipschitz.global_bound": "bm p",
    "nn.Normalize": "mean std",
    "ops.interval_linear": "lower upper weight bias",
    "ops.interval_conv2d": "lower upper weight bias stride padding dilation groups",
    "ops.relu_relaxation": "lower upper slope",
    "ops.concretize": "A c region side",
    "ops.masked_norm": "weight row_mask col_mask p method effort conv",
    "ops.krelu_hull": "lower upper A b",
}
FIELDS = {
    "Bounds": "lower upper linear",
    "LinearBounds": "A_lower c_lower A_upper c_upper",
    "CertifyResult": "certified correct margin seconds",
}
PACKAGES = ("train", "analysis", "plot", "nn", "compat.auto_LiRPA")


def find(name: str):
    found = pycert
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_keep_their_names_and_order(name):
    positional, _, keywords = SIGNATURES[name].partition("|")
    parameters = inspect.signature(find(name)).parameters
    by_position = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position[: len(positional.split())] == positional.split()
    assert set(keywords.split()) <= {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", FIELDS)
def test_results_keep_their_fields(name):
    fields = [field.name for field in dataclasses.fields(find(name))]
    assert fields[: len(FIELDS[name].split())] == FIELDS[name].split()


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_can_be_imported(name):
    assert importlib.import_module(f"pycert.{name}").__doc__


@pytest.mark.parametrize("name", ["", "krelu", "lipschitz", "ops", "plot", "train"])
def test_what_is_exported_is_there_and_has_a_docstring(name):
    module = find(name) if name else pycert
    assert len(set(module.__all__)) == len(module.__all__)
    for exported in module.__all__:
        value = getattr(module, exported)
        assert not callable(value) or (value.__doc__ or "").strip(), exported
