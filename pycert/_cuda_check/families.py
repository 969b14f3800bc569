"""Cases of the kernels of norms, ball and box, and k-ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from .judging import OPS, Check, WrongResult, named_cases

CASES, case = named_cases()

_POWER = ([2, 3, 9, 9], [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def _power(check: Check, masks: tuple[Tensor | None, Tensor | None], steps: int, results: int) -> None:
    weight = check.draw(4, 3, 3, 2, seed=1)
    arguments = (weight, *masks, None, steps, 5, True, *_POWER)
    expected = OPS.masked_power(*arguments)
    found = check.there(OPS.masked_power, *arguments)
    # a few steps of an iteration that is not contracting: roundings grow
    order = slice(1, 2) if results == 1 else slice(0, 2)
    check.agree(expected[order], found[order], 64 if steps == 0 else 65536)


@case("mix_signs")
def _mix_signs(check: Check) -> None:
    _power(check, (None, None), 0, 1)


@case("mask_scale")
def _mask_scale(check: Check) -> None:
    _power(check, (None, None), 2, 2)
    weights = (check.draw(2, 4, 7, 8, seed=2).abs(), check.draw(2, 3, 9, 9, seed=3).abs())
    _power(check, weights, 2, 2)


@case("pack_bits")
def _pack_bits(check: Check) -> None:
    _power(check, (check.draw(2, 4, 7, 8, seed=2) > 0, check.draw(2, 3, 9, 9, seed=3) > 0), 2, 2)


def _ball_box_inputs(check: Check) -> list[Tensor]:
    shapes = ((6, 5, 2, 3), (3, 5, 2, 3), (3,), (5,), (5, 2, 3))
    values = [check.draw(*shape, seed=5 + i) for i, shape in enumerate(shapes)]
    return [values[0], *(t.abs() for t in values[1:])]


@case("ball_box")
def _ball_box(check: Check) -> None:
    check.same(OPS.ball_box_relu, *_ball_box_inputs(check), close=4)


@case("ball_box_backward")
def _ball_box_backward(check: Check) -> None:
    def run(*given: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in given]
        out, spread, *_ = OPS.ball_box_relu(*leaves)
        ((out * out).sum() + (spread * spread).sum()).backward()
        return [t.grad for t in leaves if t.grad is not None]

    with torch.enable_grad():
        check.same(run, *_ball_box_inputs(check))


@case("ball_box_maximum")
def _ball_box_maximum(check: Check) -> None:
    lower, upper = -check.draw(3, 40, seed=8).abs(), check.draw(3, 40, seed=9).abs()
    reach = torch.tensor([0.0, 0.7, 1e6], dtype=check.dtype)
    arguments = (check.draw(3, 4, 40, seed=10), lower, upper, reach)
    check.agree(OPS.ball_box_maximum(*arguments)[:1], check.there(OPS.ball_box_maximum, *arguments)[:1], 1024)


@case("krelu_hull")
def _krelu_hull(check: Check) -> None:
    """Rows are limits of the points (x, relu x) of octahedra: none may cut one off, and the base rows are there."""
    from pycert.ops import krelu_hull, octahedral_directions

    for k in (1, 2, 3):
        directions = -octahedral_directions(k, check.dtype)
        points = check.draw(4, 200, k, seed=k).double()
        A = directions.expand(4, -1, -1)
        b = (-(A.double() @ points.transpose(1, 2))).amax(2).to(check.dtype) * 1.001 + 0.01
        lower, upper = (points.amin(1) - 0.02).to(check.dtype), (points.amax(1) + 0.02).to(check.dtype)
        expected, _ = krelu_hull(lower, upper, A, b)
        found = check.there(krelu_hull, lower, upper, A, b)
        rows, count = found[0], found[1]
        assert rows is not None and count is not None
        base = directions.shape[0]
        check.agree((expected[:, :base],), (rows[:, :base],))
        lifted = torch.cat([torch.ones(4, 200, 1, dtype=torch.float64), points, points.relu()], 2)
        check.holds(None, -(lifted @ rows.double().transpose(1, 2)), torch.zeros(()))
        if not bool((count > base).all()):
            raise WrongResult("rows are missing")
