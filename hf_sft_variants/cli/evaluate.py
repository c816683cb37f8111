"""`hf-sft-variants evaluate`: held-out likelihood and correct answers of models or adapters."""

import argparse
import json
import os
from itertools import chain
from pathlib import Path
from textwrap import indent

from .types import positive_int


EXAMPLE = "example: hf-sft-variants evaluate quickstart/model quickstart/runs/sft_go"
DATASET, TAGGED_DATASET = "quickstart/data", "quickstart/tagged_data"

# Heading of a table's column -> (name of the figure, its format)
COLUMNS = {
    "held-out NLL": ("held_out_nll", ".4f"),
    "exact match": ("exact_match", ".1%"),
    "last number right": ("last_number_match", ".1%"),
}
TAGGED_COLUMNS = {
    "held-out NLL": ("held_out_nll", ".4f"),
    "accuracy": ("accuracy", ".1%"),
    "format": ("format_rate", ".1%"),
    "score": ("score", ".1%"),
}
# Recipe keys for loading models, as flags
MODEL_KEYS = {
    "model_revision": {},
    "dtype": {"choices": ["auto", "bfloat16", "float16", "float32"]},
    "attn_implementation": {},
    "trust_remote_code": {"action": "store_true"},
    "load_in_4bit": {"action": "store_true"},
    "load_in_8bit": {"action": "store_true"},
    "bnb_4bit_quant_type": {"choices": ["fp4", "nf4"]},
    "use_bnb_nested_quant": {"action": "store_true"},
    "bnb_4bit_quant_storage": {},
}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure models or adapters on held-out data",
        usage="hf-sft-variants evaluate MODEL [MODEL ...] [options]",
        description="Print the negative log-likelihood of held-out completions (nats per token) and the share of "
        "prompts whose answer, the number after the last ####, is exactly right with greedy decoding. Several models "
        "are printed as one table.",
        epilog=EXAMPLE,
    )
    parser.add_argument("model", nargs="+", metavar="MODEL", help="folder or Hub id of a model or of a PEFT adapter")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter to load on MODEL, if there is only one")
    parser.add_argument(
        "--tagged",
        action="store_true",
        help="score <Thinking> and <Answer> blocks: accuracy, format and 0.7 accuracy + 0.3 format",
    )
    for kind in ("thinking", "answer"):
        parser.add_argument(
            f"--{kind}-tags", nargs=2, metavar=("A", "B"), help=f"tags before and after the {kind}, for --tagged"
        )
    parser.add_argument("--dataset", metavar="DATA", help=f"folder or Hub id ({DATASET} or tagged_data)")
    parser.add_argument("--split", default="test", help="split to evaluate (%(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=25, metavar="N", help="rows at once (%(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=128, metavar="N", help="maximum answer length (%(default)s)"
    )
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (the accelerator if there is one)")
    parser.add_argument("--show", type=positive_int, default=0, metavar="N", help="also show the first N answers")
    parser.add_argument("--json", metavar="FILE", help="also write figures and answers to FILE")
    parser.add_argument("--earlier", metavar="FILE", help="JSON of an earlier evaluation, first in the table")
    flags = ", ".join(f"--{key}" for key in list(MODEL_KEYS)[:6])
    how_to_load = parser.add_argument_group("options for loading models, as in a recipe", f"{flags}, ...")
    for key, options in MODEL_KEYS.items():
        how_to_load.add_argument(f"--{key}", f"--{key.replace('_', '-')}", help=argparse.SUPPRESS, **options)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..errors import InputError
    from ..evaluation import check_dataset, check_tagged_dataset
    from ..evaluation.tagged_answers import ANSWER_TAGS, THINKING_TAGS
    from ..launch.loading import load_split

    if args.adapter and len(args.model) > 1:
        raise InputError(
            f"`--adapter` is {args.adapter!r}, which is for one MODEL: pass the adapters themselves as MODELs."
        )
    if (args.thinking_tags or args.answer_tags) and not args.tagged:
        raise InputError("`--thinking-tags` and `--answer-tags` need `--tagged`: add it, or leave them out.")
    if args.json and not _is_writable(Path(args.json)):
        raise InputError(f"`--json` is {args.json!r}, which can't be written: name a file in an existing folder.")
    args.tags = (args.thinking_tags or THINKING_TAGS, args.answer_tags or ANSWER_TAGS)
    args.options = _model_options(args)
    args.dataset = args.dataset or (TAGGED_DATASET if args.tagged else DATASET)
    dataset = load_split(args.dataset, args.split)
    if args.tagged:
        check_tagged_dataset(dataset)
    else:
        check_dataset(dataset, ("prompt", "completion", "answer"))
    earlier = _read_earlier(args, dataset)
    if args.tagged or earlier or len(args.model) > 1:
        results = _print_table(args, dataset, earlier)
    else:
        results = _print_one(args, dataset)
    _print_answers(results, dataset, args.show)


def _is_writable(path: Path) -> bool:
    return not path.is_dir() and path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)


def _model_options(args: argparse.Namespace) -> dict:
    """Keyword arguments of `from_pretrained` from the flags."""
    from trl import ModelConfig

    from ..errors import InputError
    from ..launch.training import model_options

    given = {key: getattr(args, key) for key in MODEL_KEYS if getattr(args, key)}
    trust_remote_code = given.pop("trust_remote_code", False)
    if args.load_in_4bit and args.load_in_8bit:
        raise InputError("`--load_in_4bit` and `--load_in_8bit` exclude each other: give one.")
    # Weights keep the dtype they were saved with, but 4-bit ones are computed with as in a recipe
    defaults = {"model_revision": None} if args.load_in_4bit else {"model_revision": None, "dtype": "auto"}
    return model_options(ModelConfig(**{**defaults, **given}), trust_remote_code)


def _measured_on(args: argparse.Namespace, dataset) -> dict:
    settings = {key: getattr(args, key) for key in ("dataset", "split", "tagged", "max_new_tokens")}
    return {**settings, "rows": len(dataset)}


def _read_earlier(args: argparse.Namespace, dataset) -> list[dict]:
    """Results in the file `--earlier`, which must be of the same rows."""
    from ..errors import InputError, first_line

    if args.earlier is None:
        return []
    try:
        results = json.loads(Path(args.earlier).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"`--earlier` is {args.earlier!r}, which can't be read: {first_line(error)}.") from error
    results = results if isinstance(results, list) else [results]
    wanted = _measured_on(args, dataset)
    for result in results:
        if not isinstance(result, dict) or {key: result.get(key) for key in wanted} != wanted:
            settings = ", ".join(f"{key} {value!r}" for key, value in wanted.items())
            raise InputError(
                f"`--earlier` must be the --json of an evaluation with the same settings ({settings}), got "
                f"{args.earlier!r}: evaluate again, or leave it out."
            )
    return results


def _print_one(args: argparse.Namespace, dataset) -> list[dict]:
    figures = _measure(args, args.model[0], dataset)
    print(f"{_label(args.model[0], args.adapter)} on {args.dataset}, {args.split} split")
    print(f"held-out NLL       {figures['held_out_nll']:.4f} nats per completion token")
    print(f"exact match        {_share(figures['exact_match'], len(dataset))}: the number after the last ####")
    print(f"last number right  {_share(figures['last_number_match'], len(dataset))}: with or without ####")
    _write_json(args, [figures])
    return [figures]


def _print_table(args: argparse.Namespace, dataset, earlier: list[dict]) -> list[dict]:
    """Print each row as soon as it is known: models take long, and a later one may fail to load."""
    columns = TAGGED_COLUMNS if args.tagged else COLUMNS
    labels = [_label(result["model"], result["adapter"]) for result in earlier]
    labels += [_label(model, args.adapter) for model in args.model]
    width = max(map(len, ["model", *labels]))
    print(f"{args.dataset}, {args.split} split, {len(dataset)} rows")
    print("  ".join(["model".ljust(width), *columns]), flush=True)
    results = []
    for result in chain(earlier, (_measure(args, model, dataset) for model in args.model)):
        cells = [format(result[name], spec).rjust(len(head)) for head, (name, spec) in columns.items()]
        print("  ".join([labels[len(results)].ljust(width), *cells]), flush=True)
        results.append(result)
        _write_json(args, results)
    return results


def _print_answers(results: list[dict], dataset, count: int) -> None:
    """Print the first prompts with the models' answers."""
    for i, row in enumerate(dataset.take(min(count, len(dataset)))):
        texts = {"question": row["prompt"][-1]["content"], "right answer": row["answer"]}
        texts |= {
            f"answer of {_label(result['model'], result['adapter'])}": result["answers"][i] for result in results
        }
        print()
        for name, text in texts.items():
            print(f"{name}\n{indent(text, '    ')}")


def _measure(args: argparse.Namespace, name: str, dataset) -> dict:
    from accelerate.utils import release_memory

    from ..launch.loading import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(name, args.adapter, args.device, args.options)
    about = {"model": name, "adapter": args.adapter, **_measured_on(args, dataset)}
    figures = (_tagged_figures if args.tagged else _figures)(args, model, tokenizer, dataset)
    del model
    release_memory()  # before the next model is loaded
    return {**about, **figures}


def _figures(args: argparse.Namespace, model, tokenizer, dataset) -> dict:
    from ..evaluation import exact_match, held_out_nll, last_number_match

    nll = held_out_nll(model, tokenizer, dataset, args.batch_size)
    share, generations = exact_match(model, tokenizer, dataset, args.max_new_tokens, args.batch_size)
    figures = {"held_out_nll": nll, "exact_match": share, "last_number_match": last_number_match(generations, dataset)}
    return {**figures, "answers": generations}


def _tagged_figures(args: argparse.Namespace, model, tokenizer, dataset) -> dict:
    from ..evaluation import generate_answers, held_out_nll, tagged_scores

    nll = held_out_nll(model, tokenizer, dataset, args.batch_size, True, *args.tags)
    generations = generate_answers(model, tokenizer, dataset["prompt"], args.max_new_tokens, args.batch_size)
    scores = tagged_scores(generations, dataset["answer"], *args.tags)
    return {"held_out_nll": nll, **scores, "answers": generations}


def _write_json(args: argparse.Namespace, results: list[dict]) -> None:
    if args.json:
        figures = results if args.earlier or len(args.model) > 1 else results[0]
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _label(model: str, adapter: str | None) -> str:
    return f"{model} with {adapter}" if adapter else model


def _share(share: float, rows: int) -> str:
    return f"{share:.1%} ({round(share * rows)} of {rows})"
