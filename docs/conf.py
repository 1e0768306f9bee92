"""Configuration of the documentation site: `nox -s site` builds docs/ into .build/site.

The site needs no network: fonts and scripts are the theme's own files, and types of torch are named, not linked.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import docstrings  # noqa: E402

from fastbn import __version__  # noqa: E402

project = "fastbn"
copyright = "the fastbn developers, BSD 3-Clause"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_static"]

myst_heading_anchors = 3
# Code that is to be copied has no prompts: `>>>` and what it prints are left out.
copybutton_prompt_text = ">>> "
copybutton_only_copy_prompt_lines = True

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
# Docstrings write code between single backticks.
default_role = "literal"
smartquotes = False
nitpicky = True
# Types of Python and torch, and names inside of fastbn that have no page.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|typing|types|fx|nn|Any|Iterator|Iterable|Callable|Collection|Mapping).*"),
    ("py:.*", r"(Tensor|Model|Schedule|Activation|str|int|float|bool|None|dict|list|tuple|type).*"),
    ("py:.*", r"fastbn\.(nn|ops|autograd|transforms|testing)\..*"),
]

html_theme = "pydata_sphinx_theme"
html_title = f"fastbn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 6,
    "navigation_depth": 3,
    "show_nav_level": 2,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}


def setup(app):
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-process-signature", docstrings.signature)
