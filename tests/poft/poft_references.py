"""Tiny reference models with tokenizers and templates of their own, and slow scores of what is rendered by hand."""

import copy
from functools import cache

import torch
from fixtures.small_tokenizers import byte_fallback, byte_level, unigram
from helpers import padded_document_log_probs
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('No ' + message.role + ' role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n{{ message.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def pieces_of(messages, start, end, after="\n", trims=False, assistant="assistant"):
    """A conversation as pieces of text, with what is scored: "words", "end" or nothing."""
    for message in messages:
        role, words, ending = message["role"], None, None
        if role == "assistant":
            role, words, ending = assistant, "words", "end"
        yield start.format(role), None
        yield message["content"].strip() if trims else message["content"], words
        yield end, ending
        if after:
            yield after, None


def chatml(messages, tokenizer):
    return pieces_of(messages, "<|im_start|>{}\n", "<|im_end|>")


def llama_3(messages, tokenizer):
    start = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return [(tokenizer.bos_token, None), *pieces_of(messages, start, "<|eot_id|>", after="", trims=True)]


def zephyr(messages, tokenizer):
    return pieces_of(messages, "<|{}|>\n", tokenizer.eos_token)


def no_system(messages, tokenizer):
    if messages[0]["role"] == "system":
        merged = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages = [{"role": "user", "content": merged}, *messages[2:]]
    yield tokenizer.bos_token, None
    yield from pieces_of(messages, "<start_of_turn>{}\n", "<end_of_turn>", trims=True, assistant="model")


# Tokenizer, special tokens, template, the same by hand
FAMILIES = {
    "chatml": (byte_level, ["<|im_start|>", "<|im_end|>"], CHATML, chatml),
    "llama_3": (byte_fallback, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], LLAMA_3, llama_3),
    "zephyr": (unigram, [], ZEPHYR, zephyr),
    "no_system": (byte_fallback, ["<start_of_turn>", "<end_of_turn>"], NO_SYSTEM, no_system),
}


def save_reference(family, folder, seed=0, max_positions=512):
    """Write a tiny model of a family of templates, with a tokenizer of that family's kind."""
    make_tokenizer, special_tokens, template, _ = FAMILIES[family]
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=max_positions, initializer_range=0.3,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@cache
def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def slow_score(folder, pieces, end_of_turn=True):
    """Summed log-probability and number of the scored tokens, of a text in pieces, and the text of these tokens."""
    model, tokenizer = load(folder)
    spans, text = [], ""
    for piece, scored in pieces:
        if scored == "words" or (scored == "end" and end_of_turn):
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start < last and end > first for first, last in spans) else -100
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]
    found = padded_document_log_probs(model, encoding["input_ids"], labels)
    found = [log_prob for log_prob in found if log_prob is not None]
    return sum(found), len(found)
