"""The model card names method, paper, settings and version, whichever way the model is saved; the Hub can read it."""

import re

import pytest
import yaml
from helpers import SMALL, make_trainer
from huggingface_hub import ModelCard
from methods import METHODS, needs, with_references
from peft import LoraConfig

import hf_sft_variants
from hf_sft_variants.base.checkpoints import RUN_FILE, named_settings


def make(method, model, tokenizer, chat_rows, folder, **options):
    options = {**METHODS[method].options, "max_steps": 1, **options}
    return make_trainer(*METHODS[method].classes, model, tokenizer, with_references(chat_rows), folder, **options)


def assert_complete(card: ModelCard, trainer, **front_matter):
    """The card says how the model was made, and its front matter can be read."""
    paper, data = trainer._paper, card.data.to_dict()
    assert "None" not in card.content and 'model=""' not in card.content
    assert f"# Model Card for {data['model_name']}\n" in card.content
    assert f"This model was trained with {trainer._name}" in card.text
    assert bool(paper) == (trainer._name != "Weighted SFT")  # the one that no paper proposed
    if paper:
        assert f"{trainer._name}, a method introduced in [{paper['title']}]" in card.text
        assert f"(https://huggingface.co/papers/{paper['id']})" in card.text and paper["citation"] in card.text
    assert f"- hf_sft_variants: {hf_sft_variants.__version__}\n" in card.text
    (settings,) = re.findall(r"### Settings\n\n```yaml\n(.*?)```", card.text, re.DOTALL)
    assert yaml.safe_load(settings) == named_settings(trainer.args)
    assert set(trainer._tag_names) <= set(data["tags"]) and len(set(data["tags"])) == len(data["tags"])
    assert {name: data.get(name) for name in front_matter} == front_matter


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "base"])
class TestSavedModel:
    @pytest.mark.cell("TRL's expectations", "tags and a model card that names the method and cites its paper")
    def test_save_model(self, method, lora, tiny_model, tokenizer, chat_rows, tmp_path):
        """Without a checkpoint, and into another folder, where PEFT would leave an empty form."""
        options = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if lora else {}
        trainer = make(method, tiny_model, tokenizer, chat_rows, tmp_path / "out", **options)
        for folder in (None, tmp_path / "other", tmp_path / "out" / "inside"):
            trainer.save_model(folder)
            card = ModelCard.load((folder or tmp_path / "out") / "README.md")
            assert_complete(card, trainer, model_name="out", library_name="peft" if lora else "transformers")
            assert "[More Information Needed]" not in card.text and ("- PEFT " in card.text) == lora


@needs("poft")
class TestNames:
    def make(self, *args, **options):
        return make("poft", *args, save_strategy="no", **options)

    def card(self, folder):
        return ModelCard.load(folder / "README.md")

    def test_the_data_set_is_kept(self, tiny_model, tokenizer, chat_rows, tmp_path):
        """A checkpoint's card, and that of `save_model`, are written without a name."""
        trainer = self.make(tiny_model, tokenizer, chat_rows, tmp_path)
        trainer.create_model_card(dataset_name="org/data", tags="mine")
        assert "mine" in self.card(tmp_path).data.tags
        trainer.save_model()
        assert_complete(self.card(tmp_path), trainer, datasets="org/data")
        assert "on the [org/data](https://huggingface.co/datasets/org/data) dataset" in self.card(tmp_path).text

    def test_a_data_set_on_disk_is_no_link(self, tiny_model, tokenizer, chat_rows, tmp_path):
        (tmp_path / "data").mkdir()
        trainer = self.make(tiny_model, tokenizer, chat_rows, tmp_path / "out")
        trainer.create_model_card(dataset_name=str(tmp_path / "data"))
        card = self.card(tmp_path / "out")
        assert_complete(card, trainer, datasets=None)
        assert "on the `data` dataset" in card.text and str(tmp_path) not in card.content

    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    def test_places_on_this_machine_are_not_named(self, lora, tiny_model, tokenizer, chat_rows, tmp_path):
        """Neither of the model that the run starts with, nor of references, files and data sets."""
        start, reference, data = (tmp_path / name for name in ("start", "reference", "data"))
        data.mkdir()
        for folder in (start, reference):
            tiny_model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        trainer_class, config_class = METHODS["poft"].classes
        args = config_class(
            str(tmp_path / "out"), **SMALL, max_steps=1, reference_models=[f"{reference}/"],
            score_cache_dir=str(tmp_path / "scores"),
        )  # fmt: skip
        peft_config = LoraConfig(r=4, target_modules="all-linear") if lora else None
        trainer = trainer_class(
            str(start), args, train_dataset=chat_rows, processing_class=tokenizer, peft_config=peft_config
        )
        trainer.create_model_card(dataset_name=f"{data}/")
        trainer.train()
        trainer.save_model(tmp_path / "other")
        cards = [ModelCard.load(path) for path in tmp_path.rglob("README.md")]
        assert len(cards) == (3 if lora else 2)
        for card in cards:
            assert str(tmp_path) not in card.content and card.data.base_model is None
            if "### Settings" in card.text:
                assert "reference_models:\n- reference\n" in card.text
                assert "fine-tuned version of `start` on the `data` dataset" in card.text
        run = (tmp_path / "out" / "checkpoint-1" / RUN_FILE).read_text()
        assert str(tmp_path) not in run and '"name": "reference"' in run

    @pytest.mark.parametrize(
        ("options", "name"), [({}, "out"), ({"hub_model_id": "user/on-the-hub"}, "on-the-hub")], ids=["folder", "hub"]
    )
    def test_the_model_has_a_name(self, options, name, tiny_model, tokenizer, chat_rows, tmp_path, monkeypatch):
        (tmp_path / "out").mkdir()
        monkeypatch.chdir(tmp_path / "out")
        trainer = self.make(tiny_model, tokenizer, chat_rows, ".", **options)
        trainer.create_model_card()
        assert_complete(self.card(tmp_path / "out"), trainer, model_name=name)
        trainer.create_model_card(model_name="mine")
        assert_complete(self.card(tmp_path / "out"), trainer, model_name="mine")
