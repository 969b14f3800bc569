"""Operator norms that are guaranteed from above in floating point; public through :mod:`pycert.ops`.

Derivations: docs/lipschitz.md. Everything here computes in float64, without gradient.
"""
