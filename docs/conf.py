"""Sphinx configuration: Markdown pages beside API documentation from the docstrings (``make docs``)."""

from pycert._version import __version__

project = "pycert"
author = "The pycert authors"
copyright = "The pycert authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {
    "members": True,
    "exclude-members": "extra_repr",
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_typehints = "description"
autodoc_type_aliases = {
    "BoundedModule": "pycert.BoundedModule"
}  # where the import is for type checkers alone
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes once, in the docstring of their class
napoleon_custom_sections = [
    ("Soundness", "notes_style"),
    ("Gradient", "notes_style"),
    ("Source", "notes_style"),
]

html_theme = "furo"
html_title = f"pycert {release}"
