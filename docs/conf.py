"""The documentation site: `make docs` builds it into docs/_build/html."""

import sys
from pathlib import Path

import hf_sft_variants


sys.path.insert(0, str(Path(__file__).parent / "_ext"))


project = "hf_sft_variants"
author = "the hf_sft_variants developers"
project_copyright = f"2026, {author}"
release = hf_sft_variants.__version__

extensions = ["docstrings", "mathml", "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
nitpicky = False
default_role = "code"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks; the site shows the outputs of a full run

html_theme = "furo"
html_title = "hf_sft_variants"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have the types
napoleon_numpy_docstring = False
napoleon_use_rtype = False
