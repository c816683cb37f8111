"""The `hf-sft-variants` command. Each subcommand is a module with `add_parser` and `run`."""

import argparse
import sys

from .. import __version__
from ..errors import InputError
from ..launch.third_party_warnings import hide_third_party_warnings
from . import compare, evaluate, inspect, quickstart, score


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-sft-variants",
        description="Tools for the trainers of hf_sft_variants. To train: trl sft --config RECIPE",
        epilog="example: hf-sft-variants quickstart",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (quickstart, inspect, score, evaluate, compare):
        module.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Run the command. Returns the exit status: 0, 1 if runs of a study failed, 2 for input that can't be used, or 130 if
    a study was interrupted.
    """
    hide_third_party_warnings()
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    if "recipe_flags" in args:  # the recipe's own parser knows them
        args.recipe_flags = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        return args.run(args) or 0
    except InputError as error:
        print(f"hf-sft-variants: error: {error}", file=sys.stderr)
        return 2
