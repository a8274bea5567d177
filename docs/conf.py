"""Sphinx: `make venv EXTRAS=docs`, then `.venv/bin/python -m sphinx docs build/site`."""

import re

project = "jaxsparse"
copyright = "the jaxsparse authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "jaxsparse"
nb_execution_mode = "off"  # the test suite runs every code block and notebook
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # files outside docs/; the test suite follows all links
default_role = "code"  # docstrings are plain text with `code`, not reStructuredText
autodoc_typehints = "none"
napoleon_use_ivar = True


def setup(app):
    """Take | and * in docstrings for what they are: |w| is no substitution."""

    def escape(app, what, name, obj, options, lines):
        lines[:] = [
            line if line.lstrip().startswith((">>>", "...")) else re.sub(r"([|*])", r"\\\1", line)
            for line in lines
        ]

    app.connect("autodoc-process-docstring", escape, priority=400)
