"""Tracing of torch modules into the flat programs that pycert bounds."""

from pycert.graph.ir import ACTIVATIONS, AFFINE, Constant, Expression, Graph, Node, Pin, Slot
from pycert.graph.trace import trace

__all__ = ["ACTIVATIONS", "AFFINE", "Constant", "Expression", "Graph", "Node", "Pin", "Slot", "trace"]
