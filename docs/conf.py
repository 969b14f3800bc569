"""Sphinx configuration: Markdown pages beside API documentation from the docstrings (``make docs``)."""

from pycert._version import __version__

project = "pycert"
author = "The pycert authors"
copyright = "The pycert authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
suppress_warnings = ["intersphinx.fetch"]  # the pages build without a network, only without links to torch's

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Soundness", "notes_style"), ("Gradient", "notes_style"), ("Source", "notes_style")]

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
}
intersphinx_timeout = 10

html_theme = "furo"
html_title = f"pycert {release}"
