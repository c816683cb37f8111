"""`hf-sft-variants inspect`: show the tokens a recipe trains on, their groups and their scores."""

import argparse
import os
import sys
from pathlib import Path

from ..errors import InputError


EXAMPLE = "example: hf-sft-variants inspect --config recipes/quickstart/sft_go.yaml --rows 0:20 --output page.html"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show a recipe's tokens, groups and scores",
        description="Show a recipe's training data as its trainer prepares it: each token, whether it is in the loss, "
        "its group and its score. The weights of the trained model are not loaded; scoring models are, unless their "
        "scores are cached. Other flags override the recipe, e.g. --max_length 256.",
        epilog=EXAMPLE,
        allow_abbrev=False,  # `--output_dir` is a key of the recipe, not an abbreviation
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="recipe of `trl sft`")
    parser.add_argument("--rows", default="0:20", metavar="RANGE", help="rows to show, from:to (%(default)s)")
    parser.add_argument("--format", default="html", choices=("html", "text"), help="page or text (%(default)s)")
    parser.add_argument("--output", metavar="FILE", help="file to write (inspect.html; text goes to the terminal)")
    parser.set_defaults(run=run, recipe_flags=[])


def run(args: argparse.Namespace) -> None:
    from ..inspection import page_settings, parse_range, read_view, render_page, render_text
    from ..launch.preparation import load_recipe, prepare_view

    rows = parse_range(args.rows)
    recipe = load_recipe(args.config, args.recipe_flags)
    settings = page_settings(recipe)  # before `prepare_view` turns packing off
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
    except BrokenPipeError:  # `head` has seen enough; without this, Python would complain again when it exits
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
