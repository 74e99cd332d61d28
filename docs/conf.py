"""Sphinx configuration. `make docs` builds offline and treats warnings as errors."""

import os
from importlib.metadata import version as installed_version

from sphinx.ext.napoleon import NumpyDocstring

project = "neurst"
author = "The neurst developers"
copyright = "2026, The neurst developers"
release = version = installed_version("neurst-spatial")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.bibtex",
]
# Of the tutorials, which `tutorials` links to, the pages are those of the list of contents; the others are scripts for the command line.
exclude_patterns = ["_build", "**.ipynb_checkpoints", "conf.py", "tutorials/demo.py", "tutorials/imaging_neurtv.py"]

html_theme = "sphinx_book_theme"
html_title = "neurst"

# Tutorials are scripts, which a build executes.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars and advice on how to search further
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"  # types stand in the signature only, so the docs take them from there
napoleon_google_docstring = False
napoleon_use_rtype = False

# Links into other projects need the network, so only the published build resolves them.
intersphinx_mapping = {}
if "READTHEDOCS" in os.environ:
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "squidpy": ("https://squidpy.readthedocs.io/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }


def _returns_as_prose(docstring: NumpyDocstring, section: str) -> list[str]:
    # napoleon reads the first line of `Returns` as a type; ours stands in the signature, and the section is prose
    return docstring._format_block(":returns: ", docstring._dedent(docstring._consume_to_next_section()))


NumpyDocstring._parse_returns_section = _returns_as_prose
