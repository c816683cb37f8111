"""The model card: TRL's, with what is known of the method's settings."""

from pathlib import Path

import yaml
from trl import SFTConfig

from .. import __version__
from .checkpoints import describe_settings


_VERSIONS = "### Framework versions\n\n"


class ModelCardMixin:
    """Completes the card that TRL writes."""

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """
        As [`~trl.SFTTrainer.create_model_card`]; with the method's settings, as keys of a recipe, and the version of
        this library. What TRL fills in for models of the Hub alone says what is there.
        """
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, "README.md")
        card = path.read_text(encoding="utf-8")
        start = Path(self.model.config.name_or_path).name or type(self.model).__name__
        card = card.replace("[None](https://huggingface.co/None)", f"`{start}`")
        card = card.replace('model="None"', f'model="{Path(self.args.output_dir).name}"')
        card = card.replace(_VERSIONS, f"{_settings(self.args)}{_VERSIONS}- hf_sft_variants: {__version__}\n")
        path.write_text(card, encoding="utf-8")


def _settings(args: SFTConfig) -> str:
    settings = describe_settings(args)
    if not settings:
        return ""
    return f"### Settings\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```\n\n"
