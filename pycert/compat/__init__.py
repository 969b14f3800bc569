"""Interfaces of other libraries on top of pycert: :mod:`pycert.compat.auto_LiRPA`."""
