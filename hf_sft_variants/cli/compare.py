"""`hf-sft-variants compare`: train and evaluate the arms of a study, and report how they differ."""

import argparse
import sys

from .types import positive_int


EXAMPLE = "example: hf-sft-variants compare --config studies/quickstart.yaml"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="compare recipes over seeds, with intervals",
        description="Train every arm of a study with every seed on every data set, evaluate them in the same way, and "
        "write results.json and report.html to the study's output_dir. Finished runs are kept: run it again after an "
        "interruption, or after adding an arm or a seed. docs/compare.md explains the study file. Other flags are "
        "recipe keys for every arm that does not set them, e.g. --model_name_or_path MODEL --use_cpu false.",
        epilog=EXAMPLE,
        allow_abbrev=False,  # `--config_name` or the like is a key of the recipe, not an abbreviation
    )
    parser.add_argument("--config", required=True, metavar="STUDY", help="YAML file of the study")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs at once (%(default)s)")
    several.add_argument("--devices", nargs="+", metavar="ID", help="GPUs to use, one run on each, e.g. 0 1 2 3")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds in place of the study's own")
    parser.set_defaults(run=run, recipe_flags=[])


def run(args: argparse.Namespace) -> int:
    """Returns 1 if a run failed, 130 if the study was interrupted."""
    from ..comparison import compare_study

    try:
        devices = args.devices or [None] * args.jobs
        failures, report = compare_study(args.config, devices, args.seeds, args.recipe_flags)
    except KeyboardInterrupt:
        print("stopped; the same command continues where it left off", file=sys.stderr)
        return 130
    for failed, reason in failures.items():
        print(f"{failed} failed: {reason}", file=sys.stderr)
    print(f"wrote {report.parent / 'results.json'} and {report}")
    if failures:
        print(f"{len(failures)} runs failed; the same command retries them", file=sys.stderr)
    return 1 if failures else 0
