"""Log-probabilities of a prepared data set's labels under any causal language model, in small tiles of logits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..base.trl_internals import DataCollatorForLanguageModeling
from ..lm_head.forward import head_log_probs, head_settings


# Elements of a tile of logits: 128 MiB in float32
_TILE = 2**25


class LogProbScorer:
    """
    Scores batches of tokenized examples. Only positions with a label go through the LM head, a few at a time.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, with or without an adapter, quantized or not, on one device or several.
        per_token (`bool`, *optional*, defaults to `False`):
            Whether to return the log-probability of each label in addition to their sum.
        top (`bool`, *optional*, defaults to `False`):
            Whether to also return the log-probability of the most likely token in place of each label.
        padding_free (`bool`, *optional*):
            Whether to concatenate a batch into one row instead of padding it. Defaults to `True` with flash attention,
            which skips the other documents; otherwise a padded batch of similar lengths is faster. Must be `False` for
            prompt learning, whose virtual tokens belong in front of every example.
    """

    def __init__(
        self, model: PreTrainedModel, per_token: bool = False, padding_free: bool | None = None, top: bool = False
    ):
        self.base_model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.text_config = self.base_model.config.get_text_config()
        self.model = model.eval()
        self.per_token = per_token
        self.top = top
        if padding_free is None:
            uses_flash = "flash" in (self.base_model.config._attn_implementation or "")
            padding_free = uses_flash and not has_virtual_tokens(model)
        self.collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)  # padding is masked

    @torch.no_grad()
    def __call__(self, examples: list[dict]) -> list[dict]:
        """
        Score a batch.

        Args:
            examples (`list[dict]`):
                Examples with `input_ids` and `labels` (`-100` on tokens not to be scored).

        Returns:
            `list[dict]`: For each example `sum_log_prob` (in nats, summed in double precision), `num_tokens` (number
            of scored labels; nothing predicts the first token of an example) and, if `per_token`, `token_log_probs`
            (one for each token of `input_ids`, 0 where nothing is scored) and, if `top`, `top_log_probs` likewise.
        """
        batch = self.collator([{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples])
        device = input_device(self.model)
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        labels = batch.pop("labels")
        log_probs = self._log_probs(self._hidden_states(batch), labels)
        lengths = [len(example["input_ids"]) for example in examples]
        rows = log_probs[:, 0, : sum(lengths)].split(lengths, 1) if self.collator.padding_free else log_probs.unbind(1)
        results = []
        for row, length, example in zip(rows, lengths, examples, strict=True):
            num_tokens = sum(label != -100 for label in example["labels"][1:])
            result = {"sum_log_prob": row[0, :length].double().sum().item(), "num_tokens": num_tokens}
            if self.per_token:
                result["token_log_probs"] = row[0, :length].numpy()
            if self.top:
                result["top_log_probs"] = row[1, :length].numpy()
            results.append(result)
        return results

    def _hidden_states(self, batch: dict) -> torch.Tensor:
        """The LM head's input, computed through the adapter's forward."""
        backbone = self.base_model.base_model
        with _restored_forward(self.base_model):
            self.base_model.forward = lambda **inputs: backbone(**{**inputs, "use_cache": False})
            return self.model(**batch).last_hidden_state

    def _log_probs(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Log-probability of each label and, with `top`, of the most likely token in its place; 0 where there is none, as
        on the first token of a row.
        """
        mask, targets = labels[:, 1:] != -100, labels[:, 1:]
        # Counted from the right: prompt learning prepends virtual tokens
        hidden_states = hidden_states[:, -labels.size(1) : -1]
        hidden_states, targets = hidden_states[mask.to(hidden_states.device)], targets[mask]
        head = self.base_model.get_output_embeddings()
        if type(head) is torch.nn.Linear and not hasattr(head, "_hf_hook") and not self.top:
            targets = targets[None].to(hidden_states.device)
            of_labels = head_log_probs(head, self.text_config, hidden_states[None], targets).log_probs[None]
        else:
            size = max(_TILE // self.text_config.vocab_size, 1)
            tiles = zip(hidden_states.split(size), targets.split(size), strict=True)
            of_labels = torch.cat([self._of_module(head, *tile) for tile in tiles], 1)
        log_probs = torch.zeros(len(of_labels), *labels.shape)
        log_probs[:, :, 1:][:, mask.cpu()] = of_labels.cpu().float()
        return log_probs

    def _of_module(self, head: torch.nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Score with the head's own forward, because it has an adapter, is quantized or is offloaded."""
        settings = head_settings(self.text_config)
        logits, softcap = head(hidden_states).float() * settings["scale"], settings["softcap"]
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        targets = targets.to(logits.device)
        of_labels = [logits.gather(1, targets[:, None])[:, 0], logits.amax(1)][: 1 + self.top]
        return torch.stack(of_labels) - logits.logsumexp(1)


def has_virtual_tokens(model: PreTrainedModel) -> bool:
    """Whether a prompt-learning adapter prepends tokens of its own to each row, in front of any padding."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def input_device(model: PreTrainedModel) -> torch.device:
    """Device of a model's inputs: where its embeddings run, if the model is spread over devices or offloaded."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


@contextmanager
def _restored_forward(model: PreTrainedModel) -> Iterator[None]:
    """Restore a model's `forward` on exit."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        if before is None:
            vars(model).pop("forward", None)
        else:
            model.forward = before
