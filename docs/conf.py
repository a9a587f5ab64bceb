"""The site, `make docs`: its sources are the Markdown files of docs/ and benchmarks/, as GitHub shows them."""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configuration_fas import __version__  # noqa: E402


project = "FAS"
author = "the authors of FAS"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "benchmarks/*.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".venv*", ".git", "build", "tests", "training"]
language = "en"
nitpicky = False
default_role = "code"  # docstrings are Markdown where they quote names

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
copybutton_exclude = ".linenos, .gp, .go"
suppress_warnings = ["myst.header"]  # a page of records may begin with a lower heading

autodoc_typehints = "none"  # in the signatures' words under Args
autodoc_member_order = "bysource"
napoleon_custom_sections = ["Source"]
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"FAS {__version__}"
html_extra_path = ["site"]  # index.html, which leads to the first page
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
