"""Converts docstrings in TRL's style, which is Markdown, to the reStructuredText that Sphinx reads."""

import inspect
import re

from sphinx.application import Sphinx
from trl import SFTConfig


def to_restructured_text(text: str) -> str:
    text = re.sub(r"^( *)```(\w+)\n(.*?)\n *```$", _as_code_block, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^( *)\$\$ (.*?) \$\$", _as_math_block, text, flags=re.DOTALL | re.MULTILINE)
    # Headings of groups of parameters: Sphinx only knows "Parameters"
    text = re.sub(r"^( *)(Parameters .*):$", r"\1**\2**\n\n\1Parameters:", text, flags=re.MULTILINE)
    text = re.sub(r"\\\\\( (.*?) \\\\\)", r":math:`\1`", text, flags=re.DOTALL)
    text = re.sub(r"\[`~?hf_sft_variants\.([\w.]+)`\]", r":py:obj:`~hf_sft_variants.\1`", text)
    text = re.sub(r"\[`([A-Z]\w+(?:\.\w+)?)`\]", r":py:obj:`~hf_sft_variants.\1`", text)
    text = re.sub(r"\[`~?([\w.]+)`\]", _as_last_name, text)
    # Sphinx drops backslashes in code between single backticks, including those of regular expressions
    text = re.sub(r"(?<![:`\w])`([^`\n]*\\[^`\n]*)`", r"``\1``", text)
    return re.sub(r"\[([^\]`]+)\]\((http[^)]+)\)", r"`\1 <\2>`__", text)


def _as_code_block(match: re.Match) -> str:
    indent, language, code = match.groups()
    lines = [f"{indent}.. code-block:: {language}", "", *(f"    {line}" if line else "" for line in code.split("\n"))]
    return "\n".join(lines)


def _as_math_block(match: re.Match) -> str:
    indent, formula = match.groups()
    return f"{indent}.. math:: {' '.join(formula.split())}"


def _as_last_name(match: re.Match) -> str:
    """Names from other packages, without a link: their documentation has no index to look up offline."""
    return f"`{match.group(1).split('.')[-1]}`"


def convert(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    lines[:] = to_restructured_text("\n".join(lines)).split("\n")


def own_fields(app: Sphinx, what: str, name: str, obj, options, signature: str, return_annotation) -> tuple | None:
    """The signature of a config, without the hundred fields of `SFTConfig`."""
    if what != "class" or not issubclass(obj, SFTConfig):
        return None
    parameters = inspect.signature(obj).parameters.values()
    own = [parameter for parameter in parameters if parameter.name not in SFTConfig.__dataclass_fields__]
    return f"(..., {', '.join(str(parameter.replace(annotation=parameter.empty)) for parameter in own)})", None


def setup(app: Sphinx) -> dict:
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", convert, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", own_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
