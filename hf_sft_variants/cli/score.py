"""`hf-sft-variants score`: score a recipe's data ahead of training."""

import argparse
from pathlib import Path

from ..errors import InputError
from .types import share


EXAMPLE = "example: hf-sft-variants score --config recipes/quickstart/poft.yaml --output scores.parquet"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "score",
        help="score a recipe's data ahead of training",
        description="Score a recipe's data as its trainer would, and keep the scores where training finds them. The "
        "weights of the trained model are not loaded. Several processes share the work: torchrun --nproc-per-node 8 "
        "--no-python hf-sft-variants score ... Other flags override the recipe.",
        epilog=EXAMPLE,
        allow_abbrev=False,  # `--output_dir` is a key of the recipe, not an abbreviation
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="recipe of `trl sft`")
    parser.add_argument(
        "--output", metavar="FILE", help="PoFT: also write the scores to FILE (.parquet), for `reference_score_file`"
    )
    parser.add_argument(
        "--keep-top",
        type=share,
        metavar="SHARE",
        help="PoFT: keep the best-scored rows, this share of the training set, 0 to 1",
    )
    parser.add_argument("--kept", metavar="FILE", help="file for the rows that --keep-top keeps (.jsonl)")
    parser.set_defaults(run=run, recipe_flags=[])


def run(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    from ..launch.preparation import load_recipe, prepare

    if (args.keep_top is None) != (args.kept is None):
        raise InputError(
            f"`--keep-top` and `--kept` must both be given, or neither, got {args.keep_top} and {args.kept}."
        )
    if args.output is not None and not args.output.endswith(".parquet"):
        raise InputError(f"`--output` must end in .parquet, got {args.output!r}.")
    recipe = load_recipe(args.config, args.recipe_flags)
    trainer = prepare(recipe)
    if not PartialState().is_main_process:
        return
    scoring = getattr(trainer, "reference_scoring", None)
    if scoring is None or not scoring.scores:
        _require_nothing_to_write(args, recipe)
        print(f"prepared {args.config}: {len(trainer.train_dataset)} training rows")
        return
    for line in scoring.summary():
        print(line)
    _write(args, recipe, scoring)


def _require_nothing_to_write(args, recipe) -> None:
    for flag, value in (("--output", args.output), ("--keep-top", args.keep_top)):
        if value is not None:
            raise InputError(
                f"`{flag}` is {value!r}, but {args.config} does not score with reference models: it needs "
                "`module: hf_sft_variants.poft` and `reference_models`."
            )


def _write(args, recipe, scoring) -> None:
    import pyarrow as pa

    from ..launch.training import load_data
    from ..poft.score_files import keys_of_best, write_score_file

    if args.output:
        write_score_file(pa.concat_tables(scoring.scores.values()), args.output)
        print(f"wrote {args.output}: for `reference_score_file`, see docs/score_file.md")
    if args.kept:
        rows, _ = load_data(recipe.script_args, recipe.dataset_args)
        best = keys_of_best(scoring.scores["train"], args.keep_top)
        kept = rows.select(sorted(row for row, key in scoring.key_of_row["train"].items() if key in best))
        Path(args.kept).parent.mkdir(parents=True, exist_ok=True)
        kept.to_json(args.kept)
        print(f"wrote {args.kept}: the best {len(kept)} of {len(rows)} rows")
