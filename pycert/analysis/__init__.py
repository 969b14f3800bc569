"""Experiments about bounds, each a program of its own: ``python -m pycert.analysis.NAME --help``."""
