"""Self-contained HTML pages, from a Jinja template `page.html` in the package that makes them."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(package: str, **values: Any) -> str:
    """Render the template of `package` with `values`, which are escaped."""
    pages = Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("page.html").render(**values)
