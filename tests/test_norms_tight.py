"""How far upper bounds of norms are from the norms, against exact singular values: operators that are hard for them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from pycert.norms import bounds
from pycert.norms.operator import Operator, operator_of
from pycert.ops import masked_norm

#: Small images under large kernels, where a torus is far from zero padding; dilation; strides; groups; transposed.
HARD = [
    (nn.Conv2d(6, 9, 5, padding=2), (6, 7, 7)),
    (nn.Conv2d(6, 9, 5), (6, 9, 9)),
    (nn.Conv2d(9, 6, 3, padding=1, dilation=2), (9, 8, 8)),
    (nn.Conv2d(5, 8, 4, 2, 1), (5, 10, 10)),
    (nn.Conv2d(8, 8, 3, padding=1, groups=2), (8, 7, 7)),
    (nn.ConvTranspose2d(8, 6, 5, padding=1), (8, 5, 5)),
    (nn.ConvTranspose2d(6, 5, 4, 2, 1), (6, 5, 5)),
    (nn.Conv2d(3, 12, 7, 3, 3), (3, 12, 12)),
]


@pytest.fixture(autouse=True)
def nothing_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators this small would be bounded as matrices; larger ones go through frequencies and bands, as here."""
    monkeypatch.setattr(bounds, "_EXPLICIT", 0)


def case_of(number: int) -> tuple[Operator, dict, Tensor]:
    """Weights with a mean in every second case, so that norms are those of smooth images."""
    torch.manual_seed(number)
    layer, shape = HARD[number]
    weight = torch.randn_like(layer.weight) + (0.5 if number % 2 else 0.0)
    names = ["stride", "padding", "dilation", "groups"]
    conv = {name: getattr(layer, name) for name in names} | {"input_shape": shape}
    if isinstance(layer, nn.ConvTranspose2d):
        conv |= {"transposed": True, "output_padding": layer.output_padding}
    operator = operator_of(weight.double(), conv)
    return operator, conv, operator.explicit()


def exact(matrix: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    parts = matrix[None]
    if rows is not None:
        parts = parts * rows.flatten(1).double()[:, :, None]
    if columns is not None:
        parts = parts * columns.flatten(1).double()[:, None, :]
    return torch.linalg.matrix_norm(parts, 2)


def dead_channels(shape: tuple[int, ...], batch: int) -> Tensor:
    """A third of the channels dead, rounded up, chosen at random."""
    order = torch.rand(batch, shape[0]).argsort(1)
    return (order >= -(-shape[0] // 3))[:, :, None, None].expand(batch, *shape)


@pytest.mark.parametrize("number", range(len(HARD)))
def test_global_norms_of_convolutions(number):
    operator, conv, matrix = case_of(number)
    value, norm = masked_norm(operator.weight, conv=conv), exact(matrix, None, None)
    assert (norm <= value).all() and (value <= 1.02 * norm).all(), value / norm


@pytest.mark.parametrize("number", range(len(HARD)))
def test_a_third_of_the_channels_dead(number):
    """On both sides, on one, and with more than half dead."""
    operator, conv, matrix = case_of(number)
    out, inside = operator.output_shape, operator.input_shape
    everywhere = masked_norm(operator.weight, conv=conv)
    rows, columns = dead_channels(out, 3), dead_channels(inside, 3)
    for r, c in ((rows, columns), (rows, None), (None, columns), (rows & dead_channels(out, 3), columns)):
        value, norm = masked_norm(operator.weight, r, c, conv=conv), exact(matrix, r, c)
        assert (norm <= value).all() and (value <= 1.1 * norm + 1e-300).all(), value / norm
        assert (value <= everywhere).all()


@pytest.mark.parametrize("number", range(len(HARD)))
def test_scattered_masks(number):
    """At most the global norm, and tight where the effort is high; real diagonals too."""
    operator, conv, matrix = case_of(number)
    out, inside = operator.output_shape, operator.input_shape
    everywhere = masked_norm(operator.weight, conv=conv)
    for share, real in itertools.product((0.2, 0.7), (False, True)):
        masks = [torch.rand(2, *shape) < share for shape in (out, inside)]
        if real:
            masks = [mask * torch.rand(mask.shape).double() for mask in masks]
        norm = exact(matrix, *masks)
        normal, high = (
            masked_norm(operator.weight, *masks, conv=conv, effort=effort) for effort in ("normal", "high")
        )
        assert (norm <= high).all() and (high <= 1.1 * norm).all(), high / norm
        assert (norm <= normal).all() and (normal <= everywhere).all()


@pytest.mark.parametrize("number", range(len(HARD)))
def test_normal_effort_beyond_its_budget(number, monkeypatch):
    """As for larger operators, whose samples are not factored one by one: channels alone count then."""
    monkeypatch.setitem(bounds.BUDGETS, "normal", (0.0, bounds.BUDGETS["normal"][1]))
    operator, conv, matrix = case_of(number)
    everywhere = masked_norm(operator.weight, conv=conv)
    rows, columns = dead_channels(operator.output_shape, 3), dead_channels(operator.input_shape, 3)
    value, norm = masked_norm(operator.weight, rows, columns, conv=conv), exact(matrix, rows, columns)
    assert (norm <= value).all() and (value <= 1.1 * norm + 1e-300).all(), value / norm
    scattered = torch.rand(3, *operator.input_shape) < 0.5
    value, norm = masked_norm(operator.weight, None, scattered, conv=conv), exact(matrix, None, scattered)
    assert (norm <= value).all() and (value <= everywhere).all()


LINEAR = ["gaussian", "orthogonal", "low rank", "decaying", "positive", "clustered"]


def matrix_of(kind: str, m: int, n: int) -> Tensor:
    weight = torch.randn(m, n)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    sizes = torch.arange(1, min(m, n) + 1).float()
    values = {
        "orthogonal": torch.ones_like(sizes),
        "low rank": (sizes <= 3).float(),
        "decaying": 0.8**sizes,
        "clustered": 1 - 1e-4 * torch.rand_like(sizes),
    }
    return (
        weight.abs() if kind == "positive" else weight if kind == "gaussian" else left * values[kind] @ right
    )


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("m,n", [(60, 200), (200, 60), (90, 90), (1, 50), (50, 1)])
def test_linear_layers(kind, m, n):
    torch.manual_seed(0)
    weight = matrix_of(kind, m, n)
    norm = torch.linalg.matrix_norm(weight.double(), 2)
    value = masked_norm(weight).double()
    assert norm <= value <= 1.02 * norm
    for share in (0.15, 0.5, 0.9):
        rows, columns = torch.rand(4, m) < share, torch.rand(4, n) < share
        for r, c in ((rows, columns), (rows, None), (None, columns), (rows * torch.rand(4, m), columns)):
            value, norms = masked_norm(weight, r, c).double(), exact(weight.double(), r, c)
            assert (norms * (1 - 1e-12) <= value).all() and (value <= 1.05 * norms + 1e-300).all(), (
                value / norms
            )
