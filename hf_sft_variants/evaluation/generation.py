"""Greedy decoding of prompts in batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..scoring import has_virtual_tokens, input_device


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    prompts: Sequence[list[dict] | str],
    max_new_tokens: int = 128,
    batch_size: int = 25,
    device: torch.device | str | None = None,
    show_progress: bool = True,
) -> list[str]:
    """
    Generate answers to prompts by greedy decoding. Draws no random numbers and does not change the model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, in training or evaluation mode, on any device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Its tokenizer, or a trainer's `processing_class`. Its `padding_side` makes no difference.
        prompts (`Sequence[list[dict] | str]`):
            Conversations, to which the chat template is applied, or texts, which are used unchanged.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Maximum length of an answer in tokens.
        batch_size (`int`, *optional*, defaults to `25`):
            Number of prompts per batch.
        device (`torch.device` or `str`, *optional*):
            Device of the inputs. Defaults to that of the model's embeddings.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar on a terminal.

    Returns:
        `list[str]`: Generated text for each prompt, without special tokens.
    """
    device = device or input_device(model)
    rows = [prompt_token_ids(tokenizer, prompt) for prompt in prompts]
    tokenizer = _text_tokenizer(tokenizer)
    generations = [""] * len(rows)
    with evaluation_mode(model):
        for batch in batches([len(ids) for ids in rows], batch_size, "Greedy answers", show_progress):
            # Padding must not separate virtual tokens from the prompt
            by_length = groupby(batch, key=lambda i: len(rows[i]) if has_virtual_tokens(model) else None)
            for group in (list(group) for _, group in by_length):
                texts = _generate(model, tokenizer, [rows[i] for i in group], max_new_tokens, device)
                for i, text in zip(group, texts, strict=True):
                    generations[i] = text
    return generations


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, prompt: list[dict] | str) -> list[int]:
    """Tokenize a prompt. A conversation is followed by the generation prompt."""
    text_tokenizer = _text_tokenizer(tokenizer)
    if isinstance(prompt, str):
        return text_tokenizer(prompt)["input_ids"]
    # A processor may have a chat template that its tokenizer lacks
    template = {} if text_tokenizer is tokenizer else {"chat_template": tokenizer.chat_template}
    return text_tokenizer.apply_chat_template(
        prompt, tokenize=True, return_dict=True, add_generation_prompt=True, **template
    )["input_ids"]


def batches(lengths: list[int], batch_size: int, description: str, show_progress: bool = True) -> Iterator[list[int]]:
    """Yield batches of row numbers, longest first: there is little padding, and running out of memory shows early."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # disable=None hides the bar unless the output is a terminal; leave=False clears it, so that a table stays whole
    disable = None if show_progress else True
    with tqdm(total=len(order), desc=description, unit="row", disable=disable, leave=False) as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            yield batch
            progress.update(len(batch))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients; restores the mode of every module afterwards."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Not `inference_mode`: tensors that a model caches, e.g. rotary frequencies, would be unusable in training
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


def _text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    return getattr(processing_class, "tokenizer", processing_class)


def _generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    device: torch.device | str,
) -> list[str]:
    ids = [torch.tensor(prompt, device=device) for prompt in prompts]
    input_ids = pad_sequence(ids, batch_first=True, padding_side="left", padding_value=tokenizer.eos_token_id)
    attention_mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    # Options that are not set here come from the model's own generation config, which may set sampling or penalties
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=_end_token_ids(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id,
    )
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=generation_config)
    return tokenizer.batch_decode(output[:, input_ids.size(1) :], skip_special_tokens=True)


def _end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that stop generation: a chat model may end its turn with a token other than the tokenizer's EOS token."""
    from_model = model.generation_config.eos_token_id
    from_model = from_model if isinstance(from_model, list) else [from_model]
    return sorted({tokenizer.eos_token_id, *from_model} - {None})
