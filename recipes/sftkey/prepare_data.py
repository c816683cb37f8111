"""Write a data set of the SFTKey paper to a folder for its recipes."""

import argparse
from pathlib import Path
from shlex import quote

from paper_splits import load_source, prepare_splits

from hf_sft_variants.errors import InputError
from hf_sft_variants.quickstart import write_data


EXAMPLE = "example: python recipes/sftkey/prepare_data.py gsm8k --output data/gsm8k"

# Data set -> the recipe that trains on it
RECIPES = {
    "gsm8k": "recipes/sftkey/qwen3-8b_gsm8k.yaml",
    "openr1-math": "recipes/sftkey/qwen3-8b_openr1-math.yaml",
    "cot-collection": "recipes/sftkey/qwen2.5-7b_cot-collection.yaml",
    "openbookqa": "recipes/sftkey/smollm3-3b_openbookqa.yaml",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a data set of the SFTKey paper as JSON Lines, one file per split, with prompt, reasoning "
        "and answer. Rows that lack one of them, or contain a tag, are dropped and counted.",
        epilog=EXAMPLE,
    )
    parser.add_argument("data", choices=RECIPES, metavar="DATA", help=f"data set of the paper: {', '.join(RECIPES)}")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--source", metavar="DATA", help="folder, file or Hub id with such rows (the paper's)")
    parser.add_argument("--subset", metavar="NAME", help="subset on the Hub, e.g. all for openr1-math")
    parser.add_argument("--limit", type=int, metavar="N", help="number of rows of each split, drawn at random (all)")
    parser.add_argument("--test-size", type=int, metavar="N", help="draw a test split, if there is none")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random draws (%(default)s)")
    parser.add_argument("--completion", action="store_true", help="add an untagged completion, for plain SFT")
    parser.add_argument("--overwrite", action="store_true", help="replace data made with other settings")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    try:
        prepare(parser.parse_args(argv))
    except InputError as error:
        parser.error(str(error))


def prepare(args: argparse.Namespace) -> None:
    folder = Path(args.output)
    splits = load_source(args.data, args.source, args.subset)
    _refuse_other_splits(folder, {*splits, *(["test"] if args.test_size else [])})
    prepared = prepare_splits(args.data, splits, args.limit, args.test_size, args.seed, args.completion)
    written = write_data(folder, {split: rows for split, (rows, _) in prepared.items()}, overwrite=args.overwrite)
    for split, (rows, dropped) in prepared.items():
        print(f"{'wrote' if written else 'kept '} {folder / split}.jsonl  ({len(rows)} rows)")
        for reason, count in dropped.most_common():
            print(f"      dropped {count}: {reason}")
    print(f"next: trl sft --config {RECIPES[args.data]} --dataset_name {quote(str(folder))}")


def _refuse_other_splits(folder: Path, splits: set[str]) -> None:
    """A split drawn with other settings may share rows with these."""
    others = sorted(path for path in folder.glob("*.jsonl") if path.stem not in splits)
    if others:
        raise InputError(
            f"`--output` holds {str(others[0])!r}, which these settings do not write but a recipe would load: "
            "remove it or choose another folder."
        )


if __name__ == "__main__":
    main()
