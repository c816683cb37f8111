"""Log-probabilities of a prepared data set's labels under any causal language model, without building logits."""

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ..base.trl_internals import DataCollatorForLanguageModeling, add_fused_lm_head
from ..errors import InputError


class LogProbScorer:
    """
    Scores batches of tokenized examples with a model's fused LM head.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model; its `forward` gets TRL's fused LM head.
        per_token (`bool`, *optional*, defaults to `False`):
            Whether to return each label's log-probability beside their sum.
        padding_free (`bool`, *optional*):
            Whether a batch is one row without padding. By default where the model's attention is flash attention,
            which skips the other documents; elsewhere a padded batch of similar lengths is faster.

    Raises:
        `InputError`: For an adapter that the fused LM head can't see: prompt learning, or one on `lm_head`.
    """

    def __init__(self, model: PreTrainedModel, per_token: bool = False, padding_free: bool | None = None):
        base_model = model.get_base_model() if is_peft_model(model) else model
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            raise InputError("A model with a prompt-learning adapter can't score: its virtual tokens move the labels.")
        if isinstance(base_model.get_output_embeddings(), BaseTunerLayer):
            raise InputError("A model with an adapter on `lm_head` can't score: the fused LM head does not see it.")
        add_fused_lm_head(base_model)
        self.model = model.eval()
        self.per_token = per_token
        if padding_free is None:
            padding_free = "flash" in (base_model.config._attn_implementation or "")
        # The padding token is not looked at: it is masked
        self.collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)

    @torch.no_grad()
    def __call__(self, examples: list[dict]) -> list[dict]:
        """
        Score a batch.

        Args:
            examples (`list[dict]`):
                Examples with `input_ids` and `labels` (`-100` on tokens not to be scored).

        Returns:
            `list[dict]`: For each example `sum_log_prob` (in nats, added up in double precision), `num_tokens` (labels
            scored; the first token of an example is predicted by nothing) and, if asked for, `token_log_probs` (one
            for each token of `input_ids`, 0 where nothing is scored).
        """
        batch = self.collator([{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples])
        device = self.model.device
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        log_probs = self.model(**batch, fused_lm_head=True).log_probs.float()
        lengths = [len(example["input_ids"]) for example in examples]
        # One entry for each token of `input_ids`: nothing predicts the first
        log_probs = torch.cat([log_probs.new_zeros(len(log_probs), 1), log_probs], dim=1).cpu()
        rows = log_probs[0, : sum(lengths)].split(lengths) if self.collator.padding_free else log_probs
        return [
            self._result(row[:length], example["labels"])
            for row, length, example in zip(rows, lengths, examples, strict=True)
        ]

    def _result(self, log_probs: torch.Tensor, labels: list[int]) -> dict:
        result = {
            "sum_log_prob": log_probs.double().sum().item(),
            "num_tokens": sum(label != -100 for label in labels[1:]),
        }
        if self.per_token:
            result["token_log_probs"] = log_probs.numpy()
        return result
