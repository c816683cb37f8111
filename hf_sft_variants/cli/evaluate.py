"""`hf-sft-variants evaluate`: held-out likelihood and exact match of a model or an adapter."""

import argparse
import json
from pathlib import Path


EXAMPLE = "example: hf-sft-variants evaluate quickstart/runs/sft_go"


def add_parser(subparsers) -> None:
    """Adds the subcommand's parser."""
    description = (
        "Print how likely a model finds held-out completions (nats per token), and the share of prompts whose answer, "
        "the number behind the last ####, it gets exactly right when decoding greedily."
    )
    parser = subparsers.add_parser(
        "evaluate", help="measure a model or an adapter on held-out data", description=description, epilog=EXAMPLE
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a model, or folder of a PEFT adapter")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter to load on MODEL")
    parser.add_argument("--dataset", default="quickstart/data", metavar="DATA", help="folder or Hub id (%(default)s)")
    parser.add_argument("--split", default="test", help="split to evaluate (%(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=25, metavar="N", help="rows at once (%(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="length of an answer (%(default)s)"
    )
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (the accelerator if there is one)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluates, and prints the figures."""
    from ..evaluation import exact_match, held_out_nll, last_number_match
    from ..loading import check_dataset, load_model_and_tokenizer, load_split

    dataset = load_split(args.dataset, args.split)
    check_dataset(dataset, ("prompt", "completion", "answer"))
    model, tokenizer = load_model_and_tokenizer(args.model, args.adapter, args.device)
    nll = held_out_nll(model, tokenizer, dataset, args.batch_size)
    share, generations = exact_match(model, tokenizer, dataset, args.max_new_tokens, args.batch_size)
    figures = {
        "model": args.model,
        "adapter": args.adapter,
        "dataset": args.dataset,
        "split": args.split,
        "rows": len(dataset),
        "held_out_nll": nll,
        "exact_match": share,
        "last_number_match": last_number_match(generations, dataset),
    }
    print(f"{args.model}{f' with {args.adapter}' if args.adapter else ''} on {args.dataset}, {args.split} split")
    print(f"held-out NLL       {nll:.4f} nats per completion token")
    print(f"exact match        {_share(figures['exact_match'], len(dataset))}: the number behind the last ####")
    print(f"last number right  {_share(figures['last_number_match'], len(dataset))}: with or without ####")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


def _share(share: float, rows: int) -> str:
    return f"{share:.1%} ({round(share * rows)} of {rows})"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
