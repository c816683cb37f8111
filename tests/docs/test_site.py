"""The site builds without warnings and names everything public: classes, config fields, metrics."""

import ast
import html
import re
from pathlib import Path

import pytest
from methods import METHODS

import hf_sft_variants


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Each page with the configuration that it describes
CONFIGS = {
    "reference/your_own_variant": hf_sft_variants.AnnotatedSFTConfig,
    **{f"reference/{method}": METHODS[method].config_class for method in METHODS if method != "base"},
}


@pytest.fixture(scope="session")
def site(tmp_path_factory, other_process) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert other_process.run(build, folder) == 0
    return folder / "html"


def build(folder: str) -> None:
    """Broken links are warnings, and warnings are errors."""
    from sphinx.cmd.build import main

    assert main(["-W", "-q", "-d", f"{folder}/doctrees", str(DOCS), f"{folder}/html"]) == 0


def num_words(page: Path) -> int:
    """Number of words on a page, without its menus and formulas."""
    article = re.search(r"<article.*?</article>", page.read_text(), re.DOTALL)[0]
    return len(re.findall(r"\w\S*", html.unescape(re.sub(r"<math.*?</math>|<[^>]*>", " ", article, flags=re.DOTALL))))


def test_public_names(site):
    ids = set(re.findall(r'id="hf_sft_variants\.(\w+)"', "".join(page.read_text() for page in site.rglob("*.html"))))
    assert ids >= set(hf_sft_variants.__all__) - {"__version__"}


def own_fields(config_class):
    """The fields that its parent, another configuration, does not have."""
    return config_class.__dataclass_fields__.keys() - config_class.__mro__[1].__dataclass_fields__.keys()


@pytest.mark.parametrize("page", CONFIGS)
def test_fields(page, site):
    described = set(re.findall(r"<strong>(\w+)</strong>", (site / f"{page}.html").read_text()))
    assert own_fields(CONFIGS[page]) <= described


@pytest.mark.parametrize("page", CONFIGS)
def test_defaults(page):
    """The docstring, from which the page is generated, has the defaults of the config's own fields."""
    config = CONFIGS[page]("out", use_cpu=True, bf16=False)
    for name in own_fields(CONFIGS[page]):
        found = re.search(rf"^ +{name} \(`.+?`, \*optional\*(?:, defaults to `(.+?)`)?\):", config.__doc__, re.M)
        assert found and ast.literal_eval(found[1] or "None") == getattr(config, name), name


def test_every_page_is_reached(site):
    """Sphinx warns of a page in no table of contents; this also catches an excluded page."""
    start = (site / "index.html").read_text()
    for page in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]:
        if "_build" not in page.parts and page.name != "index.md":
            assert f'href="{page.relative_to(DOCS).with_suffix(".html")}"' in start, page


def test_pages_to_read_are_short(site):
    to_look_up = {"_build", "reference", "compatibility.md", "registered.md"}
    pages = [path.relative_to(DOCS) for path in DOCS.rglob("*.md") if not to_look_up & {*path.relative_to(DOCS).parts}]
    assert len(pages) > 20
    lengths = {str(page): num_words(site / page.with_suffix(".html")) for page in pages}
    assert {page: length for page, length in lengths.items() if length >= 1200} == {}


def test_nothing_is_loaded_from_elsewhere(site):
    """The site works offline, including its search."""
    assert (site / "searchindex.js").is_file()
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', page.read_text()), page
