"""Plots of results and of relaxations. Pictures need matplotlib, and no display; the page needs neither."""

from pycert.plot.page import relaxation_page
from pycert.plot.pictures import relaxation_neuron, relaxation_plane, relaxation_solid
from pycert.plot.relaxations import relaxation_data
from pycert.plot.results import STYLES, certified_accuracy, profile_picture

__all__ = [
    "STYLES",
    "certified_accuracy",
    "profile_picture",
    "relaxation_data",
    "relaxation_neuron",
    "relaxation_page",
    "relaxation_plane",
    "relaxation_solid",
]
