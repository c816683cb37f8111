"""
Data for the studies: problems and human dialogues, clean, with wrong answers, and with responses of other rows.

    python benchmarks/study_data.py --tasks chain_sum --train_size 200 --test_size 84 --output studies/small_data

writes these folders for each task, again as `<task>_corrupted...`, where a share of the training rows ends with the
answer of another row, and as `<task>_noisy...`, where a share has the whole response of another row; the column
`noisy` says which rows these are:

* `<task>`: the rows to train on, validation and test rows. The latter two are never changed.
* `<task>_reference`: as many other, clean rows, for the reference model of PoFT and rho1.
* `<task>_all`: both together, to measure the effect of the reference model's rows alone.

The training rows are also written as tokens, for controls:

* `<task>_random_groups`: with a random score for each token (SFT-GO).
* `<task>_random_mask`: with labels on a random half of the response (rho1).
* `<task>_random_span`: with a random span of the response, as long as the answer, as the key (SFTKey).
* `<task>_content_groups`: with the tokens that are not filler as the important group (SFT-GO; only `filler`), and with
  the weights that SFT-GO with λ = 0.9 would give if that group always had the higher loss.

`filler` is `chain_sum` with sentences around each step that are the same in every response. GSM8K is read from its
folder or from the Hub. The dialogues come from a package: `pip install chitchat-dataset==0.9.0`.
"""

import argparse
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_sft_variants.errors import InputError
from hf_sft_variants.evaluation.answers import ANSWER_MARK
from hf_sft_variants.quickstart import TASKS, build_splits, write_data
from hf_sft_variants.quickstart.data import INSTRUCTION
from hf_sft_variants.text.assistant_turns import RenderedExample, render_conversation


# Sentences that are the same in every response of `filler`
OPENING = "Let us work through this problem carefully, one step at a time."
BEFORE_STEP = "We take the result that we have so far and go on from there:"
CLOSING = "There is nothing left to do, so we can write down the answer."
# Short prompts leave out SmolLM2's own system message and the instructions, a third of a short problem's tokens
LEG_COUNTING = "Your task is to count how many legs there are in total when given a list of animals."
SHORT_INSTRUCTION = {"role": "system", "content": "Work step by step."}

Splits = dict[str, list[dict]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = (*TASKS, "filler", "gsm8k", "chitchat")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=("chain_sum", "gsm_symbolic", "chitchat"))
    parser.add_argument("--train_size", type=int, default=1100)
    parser.add_argument("--validation_size", type=int, default=200, help="rows for choosing the learning rate")
    parser.add_argument("--test_size", type=int, default=500)
    parser.add_argument(
        "--pilot", action="store_true", help="rows for pilots: none of those of the same sizes without"
    )
    parser.add_argument("--corrupted", type=float, default=0.3, help="share of wrong or noisy rows (%(default)s)")
    parser.add_argument("--short_prompts", action="store_true", help="problems with a short instruction")
    parser.add_argument("--turns", type=int, default=6, help="turns of a dialogue, the last is the response")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a dialogue (%(default)s)")
    parser.add_argument("--gsm8k", default="openai/gsm8k", help="folder or id on the Hub (%(default)s)")
    parser.add_argument("--model", default="quickstart/model", help="its tokenizer makes the tokenized folders")
    parser.add_argument("--output", default="studies/data", type=Path)
    options = parser.parse_args()
    try:
        for task in options.tasks:
            write_task(task, options)
    except InputError as error:
        raise SystemExit(str(error)) from error


def write_task(task: str, options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    splits = splits_of(task, options, tokenizer)
    if options.short_prompts and task != "chitchat":
        splits = {split: [with_short_prompt(row) for row in rows] for split, rows in splits.items()}
    train, others = splits["train"][: options.train_size], splits["train"][options.train_size :]
    held_out = {"test": splits["test"][: options.test_size], "validation": splits["test"][options.test_size :]}
    held_out = {split: rows for split, rows in held_out.items() if rows}
    corrupted = change(train, options.corrupted, with_answer_of if "answer" in train[0] else with_response_of)
    noisy = change(train, options.corrupted, with_response_of)
    for name, rows in ((task, train), (f"{task}_corrupted", corrupted), (f"{task}_noisy", noisy)):
        write_data(options.output / name, {"train": rows, **held_out})
        write_data(options.output / f"{name}_reference", {"train": others})
        write_data(options.output / f"{name}_all", {"train": rows + others})
        for control, add_columns in controls(task).items():
            tokenized = [add_columns(*tokenize(tokenizer, row), random.Random(i)) for i, row in enumerate(rows)]
            write_data(options.output / f"{name}_{control}", {"train": tokenized})
        print(f"{options.output / name}: {len(rows)} training rows, {len(held_out['test'])} test rows")


def splits_of(task: str, options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """
    Twice as many training rows as asked for, and test rows for validation and test. Pilots have the training rows that
    come next, for all of these.
    """
    train_size, test_size = 2 * options.train_size, options.validation_size + options.test_size
    build = {"gsm8k": partial(gsm8k_splits, options.gsm8k), "filler": filler_splits}.get(
        task, partial(build_splits, task)
    )
    if task == "chitchat":
        build = partial(dialogue_splits, tokenizer, options.turns, options.max_length)
    if not options.pilot:
        return build(train_size, test_size)
    unused = build(2 * train_size + test_size, test_size)["train"][train_size:]
    return {"train": unused[test_size:], "test": unused[:test_size]}


def filler_splits(train_size: int, test_size: int) -> Splits:
    splits = build_splits("chain_sum", train_size, test_size)
    return {split: [with_filler(row) for row in rows] for split, rows in splits.items()}


def with_filler(row: dict) -> dict:
    steps = [f"{BEFORE_STEP} {step}." for step in row["reasoning"].splitlines()]
    return with_response(row, "\n".join([OPENING, *steps, CLOSING]), row["answer"])


def with_short_prompt(row: dict) -> dict:
    question = row["prompt"][-1]["content"].removesuffix(INSTRUCTION).removeprefix(LEG_COUNTING).strip()
    return {**row, "prompt": [SHORT_INSTRUCTION, {"role": "user", "content": question}]}


def gsm8k_splits(source: str, train_size: int, test_size: int) -> Splits:
    """Solutions without calculator marks, in random order."""
    sys.path.append(str(Path(__file__).parents[1] / "recipes" / "sftkey"))
    from paper_splits import load_source, prepare_splits

    prepared = prepare_splits("gsm8k", load_source("gsm8k", source), with_completion=True)
    splits = {split: list(prepared[split].rows) for split in ("train", "test")}
    for split, size in (("train", train_size), ("test", test_size)):
        random.Random(0).shuffle(splits[split])
        require_rows(f"GSM8K ({split})", len(splits[split]), size)
    return {"train": splits["train"][:train_size], "test": splits["test"][:test_size]}


def dialogue_splits(
    tokenizer: PreTrainedTokenizerBase, num_turns: int, max_length: int, train_size: int, test_size: int
) -> Splits:
    """A turn of each dialogue, given those before it."""
    from chitchat_dataset import Dataset  # only needed for dialogues

    rows = []
    for dialogue in Dataset().values():
        turns = [" ".join(message["text"] for message in turn) for turn in dialogue["messages"][:num_turns]]
        if len(turns) == num_turns and all(turns):
            roles = ("user", "assistant") * (num_turns // 2)
            messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
            rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
    rows = [row for row in rows if len(render(tokenizer, row).token_ids) <= max_length]
    random.Random(0).shuffle(rows)
    require_rows(f"dialogues of {num_turns} turns and at most {max_length} tokens", len(rows), train_size + test_size)
    return {"train": rows[test_size : test_size + train_size], "test": rows[:test_size]}


def require_rows(what: str, found: int, wanted: int) -> None:
    if found < wanted:
        raise InputError(f"{what}: there are {found} rows, fewer than {wanted}: ask for fewer.")


def change(rows: list[dict], share: float, changed: Callable) -> list[dict]:
    """The same rows, a share of them changed, with a column that says which."""
    generator = random.Random(0)
    chosen = set(generator.sample(range(len(rows)), round(share * len(rows))))
    return [
        {**(changed(row, rows, generator) if i in chosen else row), "noisy": i in chosen} for i, row in enumerate(rows)
    ]


def with_answer_of(row: dict, rows: list[dict], generator: random.Random) -> dict:
    wrong = generator.choice([other["answer"] for other in rows if other["answer"] != row["answer"]])
    return with_response(row, row["reasoning"], wrong)


def with_response_of(row: dict, rows: list[dict], generator: random.Random) -> dict:
    other = generator.choice([other for other in rows if other["completion"] != row["completion"]])
    return {**other, "prompt": row["prompt"]}


def with_response(row: dict, reasoning: str, answer: str) -> dict:
    completion = [{"role": "assistant", "content": f"{reasoning}\n{ANSWER_MARK} {answer}"}]
    return {**row, "completion": completion, "reasoning": reasoning, "answer": answer}


def controls(task: str) -> dict[str, Callable]:
    """What each tokenized folder adds to the rows' tokens and labels."""
    added = {"random_groups": random_scores, "random_mask": random_mask}
    if task != "chitchat":
        added["random_span"] = random_span
    return {**added, "content_groups": content_groups} if task == "filler" else added


def render(tokenizer: PreTrainedTokenizerBase, row: dict) -> RenderedExample:
    return render_conversation(tokenizer, row["prompt"] + row["completion"], first=len(row["prompt"]))


def tokenize(tokenizer: PreTrainedTokenizerBase, row: dict) -> tuple[RenderedExample, dict]:
    """The row's tokens and labels as SFTTrainer makes them."""
    example = render(tokenizer, row)
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    if example.token_ids[: len(prompt)] != prompt:
        raise InputError("the chat template renders the prompt alone differently: take another model.")
    # Not `completion_mask`: without the columns `prompt` and `completion`, SFTTrainer ignores it by default
    labels = [-100] * len(prompt) + example.token_ids[len(prompt) :]
    return example, {"input_ids": example.token_ids, "labels": labels}


def random_scores(example: RenderedExample, tokens: dict, generator: random.Random) -> dict:
    return {**tokens, "random_scores": [round(generator.random(), 6) for _ in example.token_ids]}


def random_mask(example: RenderedExample, tokens: dict, generator: random.Random) -> dict:
    labelled = [i for i, label in enumerate(tokens["labels"]) if label != -100]
    masked = set(generator.sample(labelled, len(labelled) // 2))
    return {**tokens, "labels": [-100 if i in masked else label for i, label in enumerate(tokens["labels"])]}


def random_span(example: RenderedExample, tokens: dict, generator: random.Random) -> dict:
    turn = example.turns[-1]
    answer = example.text.index(ANSWER_MARK, turn.content[0])
    first, last = (example.tokens_in(span)[0] for span in (turn.content, (answer, turn.content[1])))
    length = turn.end_token - last
    start = generator.randint(first, last)
    return {**tokens, "key_mask": [int(start <= i < start + length) for i in range(len(example.token_ids))]}


def content_groups(example: RenderedExample, tokens: dict, generator: random.Random) -> dict:
    """Group 1 for what differs between the responses, the answer and the end of the turn; 0 for filler."""
    filler = set()
    for sentence in (OPENING, BEFORE_STEP, CLOSING):
        start = example.text.find(sentence)
        while start >= 0:
            filler |= {*example.tokens_in((start, start + len(sentence)))}
            start = example.text.find(sentence, start + 1)
    groups = [int(i not in filler) for i in range(len(example.token_ids))]
    supervised = [group for group, label in zip(groups, tokens["labels"], strict=True) if label != -100]
    weights = [0.1 + 0.9 * len(supervised) / sum(supervised) * group for group in groups]
    return {**tokens, "content_groups": groups, "content_weights": weights}


if __name__ == "__main__":
    main()
