"""How good a model is on held-out prompts and completions: their likelihood, and the answers it gives itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from peft import PeftConfig, PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.data_utils import common_prefix_length

from .answers import extract_answer, extract_last_number, normalize_number
from .errors import InputError


def load_model_and_tokenizer(
    model: str, adapter: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """
    Loads a causal language model, with a PEFT adapter if there is one.

    Args:
        model (`str`):
            Folder or Hub id of a model. A folder that holds a PEFT adapter is loaded on the base model it names.
        adapter (`str`, *optional*):
            Folder of a PEFT adapter to load on `model`.
        device (`str`, *optional*):
            Where to put the model, e.g. `"cpu"` or `"cuda:1"`. By default the accelerator if there is one, else
            the CPU.

    Returns:
        `tuple`: The model in evaluation mode, and its tokenizer.

    Raises:
        InputError: If the model or the adapter cannot be loaded, the tokenizer has no chat template or torch does not
            know the device.
    """
    target = _torch_device(device)
    if adapter is None and _is_adapter(model):
        model, adapter = PeftConfig.from_pretrained(model).base_model_name_or_path, model
    elif adapter is not None and not _is_adapter(adapter):
        raise InputError(f"`adapter` is {adapter!r}, which has no adapter_config.json: pass a folder that PEFT saved.")
    try:
        # The tokenizer that was trained with stands beside the adapter
        tokenizer = AutoTokenizer.from_pretrained(adapter if adapter and _has_tokenizer(adapter) else model)
        loaded = AutoModelForCausalLM.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(
            f"`model` is {model!r}, which could not be loaded ({str(error).splitlines()[0]}): pass a folder that holds "
            "a saved model, or an id on the Hub; for an adapter whose base model has moved, pass the base model as "
            "`model` and the adapter's folder as `adapter`."
        ) from error
    if tokenizer.chat_template is None:
        raise InputError(f"`model` is {model!r}, whose tokenizer has no chat template: pass a chat model.")
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.to(target).eval(), tokenizer


def load_split(dataset: str, split: str = "test") -> Dataset:
    """
    Loads one split of a data set.

    Args:
        dataset (`str`):
            Folder with data files, or Hub id.
        split (`str`, *optional*, defaults to `"test"`):
            Name of the split.

    Returns:
        `Dataset`: The rows.

    Raises:
        InputError: If there is no such data set or split, or it is empty.
    """
    try:
        rows = load_dataset(dataset, split=split)
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"`dataset` {dataset!r} with `split` {split!r} could not be loaded ({str(error).splitlines()[0]}): pass a "
            "folder that holds one file per split, e.g. test.jsonl (`hf-sft-variants quickstart` writes one), or an id "
            "on the Hub."
        ) from error
    if len(rows) == 0:
        raise InputError(f"`split` {split!r} of `dataset` {dataset!r} is empty: choose another split.")
    return rows


def held_out_nll(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, batch_size: int = 25
) -> float:
    """
    Negative log-likelihood of the completions, in nats per token, as a mean over all their tokens.

    The tokens are those that [`~trl.SFTTrainer`] supervises: everything behind the prompt and the generation prompt,
    with the end of the turn.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        dataset (`Dataset`):
            Rows with the conversations `prompt` and `completion`.
        batch_size (`int`, *optional*, defaults to `25`):
            Rows per forward pass. It changes speed and memory only.

    Returns:
        `float`: The mean negative log-likelihood.

    Raises:
        InputError: If the data set is empty, lacks a column or has no conversations.
    """
    check_dataset(dataset, ("prompt", "completion"))
    rows = [_tokenize(tokenizer, row) for row in dataset]
    total, count = 0.0, 0
    with _evaluation_mode(model):
        for batch in _batches(rows, [len(ids) for ids, _ in rows], batch_size, "Held-out NLL"):
            batch_total, batch_count = _summed_nll(model, [rows[i] for i in batch])
            total, count = total + batch_total, count + batch_count
    return total / count


def exact_match(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int = 128,
    batch_size: int = 25,
) -> tuple[float, list[str]]:
    """
    Share of the prompts that the model answers right by itself, decoding greedily.

    An answer is the number behind the last `####` ([`~hf_sft_variants.answers.extract_answer`]). It is right if it
    equals the row's `answer` exactly; only the way a number is written (`36.0`, `1,036`) makes no difference.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a chat template.
        dataset (`Dataset`):
            Rows with the conversation `prompt` and the string `answer`.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Where a generation is cut. An answer that comes later does not count.
        batch_size (`int`, *optional*, defaults to `25`):
            Prompts that are answered at once.

    Returns:
        `tuple[float, list[str]]`: The share, and what the model wrote for each row.

    Raises:
        InputError: If the data set is empty, lacks a column, has no conversations or has an answer that is no number.
    """
    check_dataset(dataset, ("prompt", "answer"))
    _row_answers(dataset)  # what is wrong with them shows before the long step
    prompts = [_token_ids(tokenizer, prompt, add_generation_prompt=True) for prompt in dataset["prompt"]]
    generations = [""] * len(prompts)
    with _evaluation_mode(model):
        for batch in _batches(prompts, [len(ids) for ids in prompts], batch_size, "Greedy answers"):
            texts = _generate(model, tokenizer, [prompts[i] for i in batch], max_new_tokens)
            for i, text in zip(batch, texts, strict=True):
                generations[i] = text
    return _share_right(generations, dataset, extract_answer), generations


def last_number_match(generations: list[str], dataset: Dataset) -> float:
    """
    Share of generated texts whose last number is the answer, marked with `####` or not.

    A model that was never taught the mark has no exact match at all. This is the fairer figure for it.

    Args:
        generations (`list[str]`):
            What a model wrote for each row, as [`exact_match`] returns it.
        dataset (`Dataset`):
            The rows, with the string `answer`.

    Returns:
        `float`: The share.

    Raises:
        InputError: If an answer is no number.
    """
    return _share_right(generations, dataset, extract_last_number)


def check_dataset(dataset: Dataset, columns: Sequence[str]) -> None:
    """
    Checks that a data set can be evaluated.

    Args:
        dataset (`Dataset`):
            The data set.
        columns (`Sequence[str]`):
            Columns it must have; `prompt` and `completion` must be conversations.

    Raises:
        InputError: If the data set is empty, lacks a column or has no conversations.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise InputError(
            f"`dataset` has no column {', '.join(map(repr, missing))}, only "
            f"{', '.join(map(repr, dataset.column_names))}: rename or add what is missing."
        )
    if len(dataset) == 0:
        raise InputError("`dataset` is empty: pass at least one row.")
    for column in columns:
        value = dataset[0][column]
        if column != "answer" and not isinstance(value, list):
            raise InputError(
                f"Column {column!r} of `dataset` holds {value!r}: pass conversations, i.e. lists of "
                "{'role': ..., 'content': ...}."
            )


def _is_adapter(folder: str) -> bool:
    return Path(folder, "adapter_config.json").is_file()


def _has_tokenizer(folder: str) -> bool:
    return Path(folder, "tokenizer_config.json").is_file()


def _torch_device(device: str | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"`device` is {device!r}, which torch does not know: pass e.g. cpu or cuda:0.") from error


def _share_right(generations: list[str], dataset: Dataset, extract: Callable[[str], str | None]) -> float:
    answers = _row_answers(dataset)
    return sum(extract(text) == answer for text, answer in zip(generations, answers, strict=True)) / len(answers)


def _row_answers(dataset: Dataset) -> list[str]:
    answers = []
    for i, answer in enumerate(dataset["answer"]):
        try:
            answers.append(normalize_number(str(answer)))
        except ValueError as error:
            raise InputError(f"`answer` of row {i} is {answer!r}, not a number: pass numbers only.") from error
    return answers


def _token_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )["input_ids"]


def _tokenize(tokenizer: PreTrainedTokenizerBase, row: dict) -> tuple[list[int], int]:
    """Token ids of a row, and how many of them are the prompt's; both as SFTTrainer finds them."""
    prompt_ids = _token_ids(tokenizer, row["prompt"], add_generation_prompt=True)
    ids = _token_ids(tokenizer, row["prompt"] + row["completion"], add_generation_prompt=False)
    return ids, common_prefix_length(prompt_ids, ids)


def _batches(rows: Sequence, lengths: list[int], batch_size: int, description: str) -> Iterator[list[int]]:
    """Row numbers, longest rows first: little padding, and memory that does not suffice is noticed at once."""
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    # disable=None: no bar where the output is not a terminal
    with tqdm(total=len(rows), desc=description, unit="row", disable=None) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            yield batch
            progress.update(len(batch))


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _summed_nll(model: torch.nn.Module, rows: list[tuple[list[int], int]]) -> tuple[float, int]:
    ids = [torch.tensor(ids, device=model.device) for ids, _ in rows]
    input_ids = pad_sequence(ids, batch_first=True)
    labels = pad_sequence(ids, batch_first=True, padding_value=-100)
    attention_mask = (labels != -100).long()
    for row_labels, (_, prompt_length) in zip(labels, rows, strict=True):
        row_labels[:prompt_length] = -100
    # Logits only where a label follows: the positions before every completion cost the most memory
    first = max(min(prompt_length for _, prompt_length in rows), 1)
    positions = torch.arange(first - 1, input_ids.size(1) - 1, device=model.device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=positions).logits
    targets = labels[:, first:]
    total = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return total.item(), (targets != -100).sum().item()


def _generate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    ids = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    input_ids = pad_sequence(ids, batch_first=True, padding_side="left", padding_value=tokenizer.eos_token_id)
    attention_mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=_end_token_ids(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config)
    return tokenizer.batch_decode(output[:, input_ids.size(1) :], skip_special_tokens=True)


def _end_token_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A chat model may end its turn with another token than the tokenizer's end of text: either stops it."""
    from_model = model.generation_config.eos_token_id
    from_model = from_model if isinstance(from_model, list) else [from_model]
    return sorted({tokenizer.eos_token_id, *from_model} - {None})
