"""`hf-sft-variants inspect`: look at the tokens a recipe trains on, their groups and their scores."""

import argparse
import os
import sys
from pathlib import Path

from ..errors import InputError


EXAMPLE = "example: hf-sft-variants inspect --config recipes/quickstart/sft_go.yaml --rows 0:20 --output page.html"


def add_parser(subparsers) -> None:
    """Adds the subcommand's parser."""
    description = (
        "Show a recipe's training data as its trainer prepares it: each token, whether it is in the loss, its group "
        "and its score. The trained model's weights are not loaded; scoring models are, where nothing is cached. "
        "Other flags override the recipe, e.g. --max_length 256."
    )
    parser = subparsers.add_parser(
        "inspect",
        help="look at a recipe's tokens, groups and scores",
        description=description,
        epilog=EXAMPLE,
        allow_abbrev=False,  # `--output_dir` is a key of the recipe, not short for anything
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="recipe of `trl sft`")
    parser.add_argument("--rows", default="0:20", metavar="RANGE", help="rows to show, from:to (%(default)s)")
    parser.add_argument("--format", default="html", choices=("html", "text"), help="page or text (%(default)s)")
    parser.add_argument("--output", metavar="FILE", help="file to write (inspect.html; text goes to the terminal)")
    parser.set_defaults(run=run, recipe_flags=[])


def run(args: argparse.Namespace) -> None:
    """Writes the page or the text."""
    from ..inspection import load_recipe, page_settings, parse_range, prepare_view, read_view, render_page, render_text

    rows = parse_range(args.rows)
    recipe = load_recipe(args.config, args.recipe_flags)
    settings = page_settings(recipe)  # before the view's own, such as no packing, replace them
    view = read_view(prepare_view(recipe), rows)
    if args.format == "html":
        _write(args.output or "inspect.html", render_page(view, recipe, settings), view.title())
    elif args.output:
        _write(args.output, render_text(view, styled=False), view.title())
    else:
        _print(render_text(view, styled=sys.stdout.isatty()))


def _print(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # `head` has seen enough; without this, Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(name: str, content: str, title: str) -> None:
    path = Path(name)
    verb = "replaced" if path.exists() else "wrote"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"`--output` is {name!r}, which can't be written: {error.strerror}.") from error
    print(f"{verb} {path}: {title}")
