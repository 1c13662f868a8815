"""Sphinx configuration of halfbyte's documentation."""

from halfbyte._version import __version__

project = "halfbyte"
author = "The halfbyte authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"halfbyte {__version__}"
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # reports of the doctor are included as it writes them
