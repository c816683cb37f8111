"""
Data of the comparison study: sums, word problems and human dialogues, each as it is and with a share of wrong answers.

    python benchmarks/study_data.py --tasks chain_sum --train_size 200 --test_size 84 --output studies/data

writes a folder for each: `<task>`, `<task>_corrupted`, for the control of SFT-GO `<task>_random_groups` and
`<task>_corrupted_random_groups`, tokenized, with a random score for each token, and for PoFT's reference model
`<task>_reference` and `<task>_corrupted_reference`, other rows of the task, as they are. The test split is never
corrupted. Dialogues are those of the package chitchat-dataset: `pip install chitchat-dataset==0.9.0`.
"""

import argparse
import random
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_sft_variants.answers import ANSWER_MARK
from hf_sft_variants.quickstart import build_splits, write_data


TURNS = 6  # of a dialogue: the last one is the response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = ("chain_sum", "gsm_symbolic", "chitchat")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--train_size", type=int, default=2000)
    parser.add_argument("--test_size", type=int, default=500)
    parser.add_argument("--corrupted", type=float, default=0.3, help="share of the training rows (%(default)s)")
    parser.add_argument("--model", default="quickstart/model", help="its tokenizer makes the tokenized folders")
    parser.add_argument("--output", default="studies/data", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for task in options.tasks:
        sizes = 2 * options.train_size, options.test_size
        splits = dialogue_splits(*sizes) if task == "chitchat" else build_splits(task, *sizes)
        splits["train"], others = splits["train"][: options.train_size], splits["train"][options.train_size :]
        corrupted = {**splits, "train": corrupt(splits["train"], options.corrupted)}
        for name, rows in ((task, splits), (f"{task}_corrupted", corrupted)):
            write_data(options.output / name, rows)
            write_data(options.output / f"{name}_reference", {"train": others})
            train = [random_scores(tokenizer, row, random.Random(i)) for i, row in enumerate(rows["train"])]
            write_data(options.output / f"{name}_random_groups", {"train": train})
            print(f"{options.output / name}: {len(rows['train'])} training rows, {len(rows['test'])} test rows")


def dialogue_splits(train_size: int, test_size: int) -> dict[str, list[dict]]:
    """The sixth turn of each dialogue, given the five before it."""
    from chitchat_dataset import Dataset  # needed for these only

    rows = []
    for dialogue in Dataset().values():
        turns = [" ".join(message["text"] for message in turn) for turn in dialogue["messages"][:TURNS]]
        if len(turns) == TURNS and all(turns):
            roles = ("user", "assistant") * (TURNS // 2)
            messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
            rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
    random.Random(0).shuffle(rows)
    if len(rows) < train_size + test_size:
        raise SystemExit(
            f"There are {len(rows)} such dialogues, fewer than {train_size} + {test_size}: ask for fewer."
        )
    return {"train": rows[test_size : test_size + train_size], "test": rows[:test_size]}


def corrupt(rows: list[dict], share: float) -> list[dict]:
    """The same rows, of which a share has the answer (a dialogue: the response) of another one."""
    generator = random.Random(0)
    chosen = set(generator.sample(range(len(rows)), round(share * len(rows))))
    return [with_answer_of(row, rows, generator) if i in chosen else row for i, row in enumerate(rows)]


def with_answer_of(row: dict, rows: list[dict], generator: random.Random) -> dict:
    if "answer" not in row:
        return {**row, "completion": generator.choice([other for other in rows if other is not row])["completion"]}
    wrong = generator.choice([other["answer"] for other in rows if other["answer"] != row["answer"]])
    content = f"{row['reasoning']}\n{ANSWER_MARK} {wrong}"
    return {**row, "completion": [{"role": "assistant", "content": content}], "answer": wrong}


def random_scores(tokenizer: PreTrainedTokenizerBase, row: dict, generator: random.Random) -> dict:
    """The row's tokens as SFTTrainer makes them, with a random score for each."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    input_ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    if input_ids[: len(prompt)] != prompt:
        raise SystemExit("The chat template renders the prompt alone differently: take another model.")
    return {
        "input_ids": input_ids,
        "completion_mask": [0] * len(prompt) + [1] * (len(input_ids) - len(prompt)),
        "random_scores": [round(generator.random(), 6) for _ in input_ids],
    }


if __name__ == "__main__":
    main()
