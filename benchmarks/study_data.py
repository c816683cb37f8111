"""
Data for the comparison study: sums, word problems and human dialogues, each clean and with a share of wrong answers.

    python benchmarks/study_data.py --tasks chain_sum --train_size 200 --test_size 84 --output studies/small_data

writes these folders for each task, and again as `<task>_corrupted` and `<task>_corrupted_...` for the corrupted rows:

* `<task>`: the rows to train on, validation and test rows. The latter two are never corrupted.
* `<task>_random_groups`: the same training rows, tokenized, with a random score for each token (SFT-GO's control).
* `<task>_reference`: as many other, clean rows, for the reference model of PoFT and rho1.
* `<task>_all`: both together, to measure the effect of the reference model's rows alone.

The dialogues come from the package chitchat-dataset: `pip install chitchat-dataset==0.9.0`.
"""

import argparse
import random
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_sft_variants.errors import InputError
from hf_sft_variants.evaluation.answers import ANSWER_MARK
from hf_sft_variants.quickstart import build_splits, write_data


TURNS = 6  # the last turn of a dialogue is the response
MAX_LENGTH = 512  # as in the recipes; PoFT drops longer rows, other trainers truncate them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = ("chain_sum", "gsm_symbolic", "chitchat")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--train_size", type=int, default=1100)
    parser.add_argument("--validation_size", type=int, default=200, help="rows for choosing the learning rate")
    parser.add_argument("--test_size", type=int, default=500)
    parser.add_argument("--corrupted", type=float, default=0.3, help="share of the training rows (%(default)s)")
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
    sizes = 2 * options.train_size, options.validation_size + options.test_size
    splits = dialogue_splits(*sizes, tokenizer) if task == "chitchat" else build_splits(task, *sizes)
    train, others = splits["train"][: options.train_size], splits["train"][options.train_size :]
    held_out = {"test": splits["test"][: options.test_size], "validation": splits["test"][options.test_size :]}
    held_out = {split: rows for split, rows in held_out.items() if rows}
    for name, rows in ((task, train), (f"{task}_corrupted", corrupt(train, options.corrupted))):
        write_data(options.output / name, {"train": rows, **held_out})
        write_data(options.output / f"{name}_reference", {"train": others})
        write_data(options.output / f"{name}_all", {"train": rows + others})
        scored = [random_scores(tokenizer, row, random.Random(i)) for i, row in enumerate(rows)]
        write_data(options.output / f"{name}_random_groups", {"train": scored})
        print(f"{options.output / name}: {len(rows)} training rows, {len(held_out['test'])} test rows")


def dialogue_splits(train_size: int, test_size: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[dict]]:
    """The sixth turn of each dialogue, given the five before it."""
    from chitchat_dataset import Dataset  # only needed for dialogues

    rows = []
    for dialogue in Dataset().values():
        turns = [" ".join(message["text"] for message in turn) for turn in dialogue["messages"][:TURNS]]
        if len(turns) == TURNS and all(turns):
            roles = ("user", "assistant") * (TURNS // 2)
            messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
            rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
    rows = [row for row in rows if len(token_ids(tokenizer, row)) <= MAX_LENGTH]
    random.Random(0).shuffle(rows)
    if len(rows) < train_size + test_size:
        raise InputError(
            f"there are {len(rows)} dialogues of {TURNS} turns and at most {MAX_LENGTH} tokens, fewer than "
            f"{train_size} + {test_size}: ask for fewer."
        )
    return {"train": rows[test_size : test_size + train_size], "test": rows[:test_size]}


def corrupt(rows: list[dict], share: float) -> list[dict]:
    """The same rows, a share of them with the answer (in dialogues, the response) of another row."""
    generator = random.Random(0)
    chosen = set(generator.sample(range(len(rows)), round(share * len(rows))))
    return [with_answer_of(row, rows, generator) if i in chosen else row for i, row in enumerate(rows)]


def with_answer_of(row: dict, rows: list[dict], generator: random.Random) -> dict:
    if "answer" not in row:
        return {**row, "completion": generator.choice([other for other in rows if other is not row])["completion"]}
    wrong = generator.choice([other["answer"] for other in rows if other["answer"] != row["answer"]])
    content = f"{row['reasoning']}\n{ANSWER_MARK} {wrong}"
    return {**row, "completion": [{"role": "assistant", "content": content}], "answer": wrong}


def token_ids(tokenizer: PreTrainedTokenizerBase, row: dict) -> list[int]:
    return tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]


def random_scores(tokenizer: PreTrainedTokenizerBase, row: dict, generator: random.Random) -> dict:
    """The row's tokens and labels as SFTTrainer makes them, with a random score for each."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    input_ids = token_ids(tokenizer, row)
    if input_ids[: len(prompt)] != prompt:
        raise InputError("the chat template renders the prompt alone differently: take another model.")
    return {
        "input_ids": input_ids,
        # Not `completion_mask`: without the columns `prompt` and `completion`, SFTTrainer ignores it by default
        "labels": [-100] * len(prompt) + input_ids[len(prompt) :],
        "random_scores": [round(generator.random(), 6) for _ in input_ids],
    }


if __name__ == "__main__":
    main()
