"""How good a model is on held-out prompts and completions: their likelihood, and the answers it gives itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .answers import extract_answer, extract_last_number, normalize_number
from .errors import InputError
from .loading import check_dataset


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
    # Some templates render the prompt alone differently: the completion starts where the two part
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False))
    return ids, len(list(same))


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
