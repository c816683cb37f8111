"""The model card: TRL's, with the method's settings."""

import shutil
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from trl import SFTConfig

from .checkpoints import local_name, named_settings
from .trl_internals import get_config_model_id


_VERSIONS = "### Framework versions\n\n"


class ModelCardMixin:
    """Completes the card that TRL writes, and saves it with each model that the user saves."""

    _card_dataset_name: str | None = None

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """
        Like [`~trl.SFTTrainer.create_model_card`], but adds the method's settings, as keys of a recipe, and the
        version of this library. Local models and data sets, for which TRL's card has `None` or a broken link, get
        their names. A card written later without a data set, such as a checkpoint's, keeps the last one.
        """
        self._card_dataset_name = dataset_name = dataset_name or self._card_dataset_name
        model_name = model_name or Path(self.args.hub_model_id or self._output_dir).name
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            self._complete_card(self._output_dir / "README.md", dataset_name)

    @property
    def _output_dir(self) -> Path:
        return Path(self.args.output_dir).resolve()

    def _complete_card(self, path: Path, dataset_name: str | None) -> None:
        card = ModelCard.load(path)
        start = get_config_model_id(self.model.config)
        name = local_name(start or "") or type(self.model).__name__
        text = card.text.replace('model="None"', f'model="{self._output_dir.name}"')
        text = text.replace(
            _VERSIONS, f"{_settings(self.args)}{_VERSIONS}- hf_sft_variants: {version('hf_sft_variants')}\n"
        )
        text = text.replace("[None](https://huggingface.co/None)", f"`{name}`")
        # The Hub refuses a card with a model or a data set that it does not have
        if name != start:
            card.data.base_model = None
            text = text.replace(f"[{start}](https://huggingface.co/{start})", f"`{name}`")
        if dataset_name is not None and local_name(dataset_name) != dataset_name:
            card.data.datasets = None
            link = f"[{dataset_name}](https://huggingface.co/datasets/{dataset_name})"
            text = text.replace(link, f"`{local_name(dataset_name)}`")
        card.text = text
        card.save(path)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        path, start = Path(output_dir or self.args.output_dir, "README.md"), get_config_model_id(self.model.config)
        if self.args.should_save and path.is_file() and local_name(start) != start:
            card = ModelCard.load(path)  # of an adapter, PEFT has put the base model's path there
            card.data["base_model"] = None
            card.data["tags"] = [tag for tag in card.data.get("tags") or [] if not tag.endswith(start)]
            card.save(path)

    def save_model(self, output_dir=None, _internal_call=False):
        """Like [`~transformers.Trainer.save_model`], but writes the card first, so that PEFT completes it."""
        if not _internal_call:
            self.create_model_card()
            if output_dir is not None and self.is_world_process_zero():
                folder = Path(output_dir).resolve()
                folder.mkdir(parents=True, exist_ok=True)
                if folder != self._output_dir:
                    shutil.copy(self._output_dir / "README.md", folder)
        super().save_model(output_dir, _internal_call)


def _settings(args: SFTConfig) -> str:
    settings = named_settings(args)
    if not settings:
        return ""
    return f"### Settings\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```\n\n"
