"""Configuration of the documentation site: `nox -s site` builds docs/ into .build/site.

The site needs no network: fonts and scripts are the theme's own files, and types of torch are named, not linked.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import docstrings  # noqa: E402
from docutils import nodes  # noqa: E402
from sphinx import addnodes  # noqa: E402

from fastbn import __version__  # noqa: E402

project = "fastbn"
copyright = "the fastbn developers, BSD 3-Clause"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
linkcheck_retries = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_static"]

myst_heading_anchors = 3
highlight_language = "none"  # of blocks that name no language: formulas and drawings
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
    ("py:.*", r"fastbn\.(nn|ops|autograd|transforms|testing|inspect|backends)\..*"),
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


def link_pages(app, doctree):
    """Link the pages that a page names as files, `docs/design.md` or `design.md`."""
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext().removeprefix("docs/").lower()
        if name.endswith(".md") and (DOCS / name).is_file() and not isinstance(literal.parent, nodes.reference):
            target = {"refdomain": "std", "reftype": "doc", "reftarget": f"/{name.removesuffix('.md')}"}
            link = addnodes.pending_xref("", refexplicit=True, refwarn=True, refdoc=app.env.docname, **target)
            literal.replace_self(link)
            link += literal


def setup(app):
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-process-signature", docstrings.signature)
    app.connect("doctree-read", link_pages)
