"""Linear and mixed-integer programs of a ReLU network in Gurobi, as ``build_solver_module`` gives them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycert.compat.auto_LiRPA._triangle import Block, Triangle, block_of, triangles_before
from pycert.compat.auto_LiRPA.operators import grb
from pycert.compat.auto_LiRPA.perturbations import PerturbationLpNorm
from pycert.graph import Graph


def build(
    graph: Graph,
    target: int,
    boxes: dict[int, tuple[Tensor, Tensor]],
    value: Tensor,
    ptb: Any,
    model_type: str,
    rows: Tensor | None,
) -> tuple[Any, list[Any]]:
    """A Gurobi model of the first sample and the variables of a node (or of ``rows`` of it).

    Args:
        graph: a ReLU network of one input.
        target: number of the node whose variables are wanted.
        boxes: bounds of pre-activations, by node number.
        value, ptb: the input ``[1, *in]`` and its perturbation; norms inf, 2 and 1.
        model_type: ``"lp"``: triangles; ``"mip"``: exact ReLUs by binary variables.
        rows: ``[S, n]`` applied to the node, or None.

    Returns:
        The model, and nested lists of variables in the node's shape (``[S]`` with ``rows``).

    Raises:
        ImportError: gurobipy is not installed.
        ValueError: an unknown ``model_type``.
        NotImplementedError: a perturbation that is no l_p ball.
        UnsupportedOperator: another operator than ReLU and affine ones.
    """
    if grb is None:
        raise ImportError("build_solver_module needs the package gurobipy (pip install gurobipy)")
    if model_type not in ("lp", "mip"):
        raise ValueError(f"build_solver_module: model_type must be 'lp' or 'mip', got {model_type!r}")
    model = grb.Model()
    model.setParam("OutputFlag", 0)
    entry = next(number for number, node in enumerate(graph.nodes) if node.op == "input")
    variables = {entry: _input(model, value, ptb)}
    for triangle in triangles_before(graph, target, boxes, 0):
        variables[triangle.node] = _relu(model, triangle, variables, model_type == "mip")
    block = block_of(graph, target)
    if rows is not None:
        rows = rows.detach().double().cpu()
        block = Block(rows @ block.constant, {s: rows @ matrix for s, matrix in block.matrices.items()})
    result = model.addMVar(len(block.constant), lb=-math.inf, name="out")
    model.addConstr(result == _expression(block, variables))
    model.update()
    shape = graph.nodes[target].shape if rows is None else (len(rows),)
    return model, np.array(result.tolist(), dtype=object).reshape(shape).tolist()


def _input(model: Any, value: Tensor, ptb: Any) -> Any:
    if not isinstance(ptb, PerturbationLpNorm) or ptb.norm not in (1, 2, math.inf):
        raise NotImplementedError(
            f"build_solver_module: perturbations must be l_1, l_2 or l_inf, got {ptb!r}"
        )
    # the ends that are given cut balls, too: in the program, unlike in the bounds, both hold
    lower = value - ptb.eps if ptb.x_L is None else ptb.x_L
    upper = value + ptb.eps if ptb.x_U is None else ptb.x_U
    lower, upper = (end.detach().double().cpu().flatten().numpy() for end in (lower, upper))
    variables = model.addMVar(len(lower), lb=lower, ub=upper, name="inp")
    if ptb.norm == math.inf:
        return variables
    centre, eps = value.detach().double().cpu().flatten().numpy(), float(torch.as_tensor(ptb.eps))
    shift = model.addMVar(len(lower), lb=-math.inf, name="delta")
    model.addConstr(shift == variables - centre)
    if ptb.norm == 2:
        model.addConstr(shift @ shift <= eps**2)
        return variables
    size = model.addMVar(len(lower), lb=0.0, name="size")
    model.addConstr(size >= shift)
    model.addConstr(size >= -shift)
    model.addConstr(size.sum() <= eps)
    return variables


def _expression(block: Block, variables: dict[int, Any]) -> Any:
    total: Any = block.constant.numpy()
    for source, matrix in block.matrices.items():
        total = total + matrix.numpy() @ variables[source]
    return total


def _relu(model: Any, triangle: Triangle, variables: dict[int, Any], exact: bool) -> Any:
    upper = triangle.upper.clamp(min=0).numpy()
    result = model.addMVar(len(upper), lb=0.0, ub=upper, name=f"relu{triangle.node}")
    active = triangle.active.nonzero().flatten().numpy()
    unstable = (~triangle.active & ~triangle.dead).nonzero().flatten().numpy()

    def before(chosen: Any) -> Any:
        part = Block(
            triangle.block.constant[chosen],
            {source: matrix[chosen] for source, matrix in triangle.block.matrices.items()},
        )
        return _expression(part, variables)

    if len(active):
        model.addConstr(result[active] == before(active))
    if not len(unstable):
        return result
    inner, low, high = before(unstable), triangle.lower.numpy()[unstable], upper[unstable]
    model.addConstr(result[unstable] >= inner)
    if exact:
        switch = model.addMVar(len(unstable), vtype=grb.GRB.BINARY, name=f"a{triangle.node}")
        model.addConstr(result[unstable] <= inner - low + low * switch)
        model.addConstr(result[unstable] <= high * switch)
        return result
    slope = triangle.slope.numpy()[unstable]
    finite = np.isfinite(slope) & np.isfinite(low)
    lines = slope[finite] * (before(unstable[finite]) - low[finite])
    model.addConstr(result[unstable[finite]] <= lines)
    return result
