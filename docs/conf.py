"""The documentation site: `make docs` builds it into docs/_build/html."""

import re
import sys
from pathlib import Path

import hf_sft_variants


sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from docstrings import to_restructured_text


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
nb_execution_mode = "off"  # the tests run the notebooks; the site shows what a real run printed

html_theme = "furo"
html_title = "hf_sft_variants"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have them
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Headings of groups of fields, such as "Parameters that define the loss"
_HEADING = re.compile(r"^ *(Parameters .*):$", re.MULTILINE)
_docstrings = [to_restructured_text(getattr(hf_sft_variants, name).__doc__) for name in hf_sft_variants.__all__]
napoleon_custom_sections = [(heading, "params_style") for text in _docstrings for heading in _HEADING.findall(text)]
