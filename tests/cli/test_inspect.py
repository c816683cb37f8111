import json
import math
import re
from html.parser import HTMLParser
from itertools import chain

import pytest
from datasets import load_dataset
from helpers import SMALL, padded_document_log_probs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_sft_variants import SFTGOConfig, SFTGOTrainer
from hf_sft_variants.cli import main
from hf_sft_variants.inspection.token_text import token_text, token_texts, visible_text


SFT = "model_name_or_path: model\ndataset_name: data\noutput_dir: runs/sft\nmax_length: 128\n"
SFT_GO = "num_processes: 1\nmodule: hf_sft_variants.sft_go\nmin_grouped_tokens: 2\n" + SFT
ODD = 'a <script>alert("x")</script> & tab\t$title 🎉\n'


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model, tokenizer, chat_rows):
    """A working directory with a model that has no weights, a data set of 12 rows, and two recipes."""
    tiny_model.config.architectures = ["LlamaForCausalLM"]
    tiny_model.config.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = list(chat_rows)
    rows[0] = {**rows[0], "completion": [{"role": "assistant", "content": ODD}]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sft.yaml").write_text(SFT)
    (tmp_path / "sft_go.yaml").write_text(SFT_GO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained_rows(folder, tiny_model, tokenizer):
    """The rows that SFTGOTrainer trains on."""

    def prepare(**options):
        args = SFTGOConfig("out", **{**SMALL, "max_length": 128, "min_grouped_tokens": 2, **options})
        rows = load_dataset("data", split="train")
        return SFTGOTrainer(tiny_model, args, train_dataset=rows, processing_class=tokenizer).train_dataset

    return prepare


class Page(HTMLParser):
    """The tokens of each row of a page, as (text, classes), and its counts."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.counts, self.tags = [], [], set()
        self._depth, self._in_counts = 0, False
        self.feed(html)
        self.data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if attributes.get("class") == "tokens":
            self.rows.append([])
        elif tag == "small":
            self._in_counts = True
        elif self.rows and tag == "span":
            self._depth += 1
            self.rows[-1].append(["", attributes["class"].split(), attributes.get("style", "")])

    def handle_endtag(self, tag):
        self._depth -= tag == "span" and bool(self.rows)
        self._in_counts &= tag != "small"

    def handle_data(self, data):
        if self._in_counts:
            self.counts.append(data)
        elif self._depth > 0:
            self.rows[-1][-1][0] += data


def inspect_page(*flags):
    assert main(["inspect", *flags, "--output", "page.html"]) == 0
    with open("page.html", encoding="utf-8") as file:
        return file.read()


def inspect_text(capsys, *flags):
    assert main(["inspect", *flags, "--format", "text"]) == 0
    return capsys.readouterr().out


class TestPage:
    def test_each_token_once_and_in_order(self, folder, trained_rows, tokenizer):
        page = Page(inspect_page("--config", "sft_go.yaml", "--rows", ":"))
        trained = trained_rows()
        assert len(page.rows) == len(trained) == 12
        for number, (tokens, example) in enumerate(zip(page.rows, trained, strict=True)):
            ids = example["input_ids"]
            assert [text for text, _, _ in tokens] == [visible_text(token_text(tokenizer, i)) for i in ids]
            assert page.data["rows"][str(number)]["ids"] == ids
            assert page.data["rows"][str(number)]["labels"] == example["labels"]

    def test_loss_groups_and_scores_are_those_of_training(self, folder, trained_rows):
        page = Page(inspect_page("--config", "sft_go.yaml"))
        groups_seen = set()
        for tokens, example in zip(page.rows, trained_rows(), strict=True):
            in_loss = ["in-loss" in classes for _, classes, _ in tokens]
            assert in_loss == [label != -100 for label in example["labels"]]
            groups = [next((c for c in classes if c.startswith("c0-")), None) for _, classes, _ in tokens]
            wanted = [f"c0-{group}" for group in example["group_ids"]]
            assert groups == [group if inside else None for group, inside in zip(wanted, in_loss, strict=True)]
            groups_seen |= set(groups)
            assert [style.startswith("--s0:") for _, _, style in tokens] == in_loss
        assert {"c0-0", "c0-1"} <= groups_seen
        scores = page.data["columns"].index({"name": "importance_scores", "names": {}})
        assert page.data["rows"]["0"]["values"][scores][-1] == f"{trained_rows()[0]['importance_scores'][-1]:.4g}"

    def test_counts(self, folder, trained_rows):
        page = Page(inspect_page("--config", "sft_go.yaml"))
        for counts, example in zip(page.counts, trained_rows(), strict=True):
            labels, groups = example["labels"], example["group_ids"]
            assert counts.startswith(f"{len(labels)} tokens · {sum(label != -100 for label in labels)} in the loss")
            assert re.findall(r": (\d+)", counts)[:2] == [str(groups.count(1)), str(groups.count(0))]

    def test_nothing_of_the_data_is_markup(self, folder):
        html = inspect_page("--config", "sft_go.yaml", "--rows", "0")
        page = Page(html)
        assert html.count("<script") == 2 and "alert(" not in "".join(re.findall(r"<[^>]*>", html))
        assert visible_text(ODD) in "".join(text for text, _, _ in page.rows[0]).replace(r"\xf0\x9f\x8e\x89", "🎉")

    def test_needs_nothing_from_elsewhere(self, folder):
        html = inspect_page("--config", "sft_go.yaml")
        for reference in ("http", "src=", "link", "url(", "@import", "fetch("):
            assert reference not in html
        assert {"img", "iframe", "object"}.isdisjoint(Page(html).tags)
        assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html

    def test_header(self, folder):
        html = inspect_page("--config", "sft_go.yaml", "--rows", "2:5", "--important_fraction", "0.25")
        for text in ("sft_go.yaml", "SFTGOTrainer", ">model<", "data, split train", "rows 2 to 4 of 12", ">0.25<"):
            assert text in html
        assert "important_fraction" in html and "learning_rate" not in html

    def test_histogram_counts_each_score_in_the_loss(self, folder):
        html = inspect_page("--config", "sft_go.yaml")
        titles = re.findall(r"<title>[^<]*: ([^<]*)</title>", html.partition("<svg")[2])
        total = sum(int(number) for title in titles for number in re.findall(r"(\d+) (?:un)?important", title))
        in_loss = sum("in-loss" in classes for row in Page(html).rows for _, classes, _ in row)
        assert total == in_loss and f"of {in_loss:,} tokens in the loss" in html

    def test_columns_of_any_method(self, folder, trained_rows):
        rows = load_dataset("data", split="train")
        lengths = [len(ids) for ids in trained_rows()["input_ids"]]
        for name, value in {"mine": lambda t: t % 4 - 1, "key": lambda t: t % 2 == 0, "nll": lambda t: -t / 7}.items():
            rows = rows.add_column(name, [[value(token) for token in range(length)] for length in lengths])
        rows = rows.add_column("confidence", [[row / 3] * length for row, length in enumerate(lengths)])
        rows.to_json("data/train.jsonl")
        page = Page(inspect_page("--config", "sft_go.yaml", "--group_by", "column", "--group_column", "mine"))
        names = [column["name"] for column in page.data["columns"]]
        assert names[0] == "group_ids" and {"key", "nll", "confidence"} <= set(names) and "mine" not in names
        assert set(page.data["columns"][0]["names"]) == {"0", "1", "2"}
        assert page.data["columns"][names.index("key")]["names"] == {"1": "key"}
        assert "confidence: 0.6667" in page.counts[2] and "group 2: " in page.counts[2]

    def test_says_what_it_does_to_the_file(self, folder, capsys):
        command = ["inspect", "--config", "sft.yaml", "--rows", "0:3", "--output", "new/folder/page.html"]
        assert main(command) == 0 and main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines == [f"{verb} new/folder/page.html: rows 0 to 2 of 12" for verb in ("wrote", "replaced")]


class TestRecipes:
    def test_plain_sft(self, folder, capsys):
        page = Page(inspect_page("--config", "sft.yaml"))
        assert page.data["columns"] == [] and len(page.rows) == 12
        text = inspect_text(capsys, "--config", "sft.yaml", "--rows", "1")
        assert "(<|im_start|>)" in text and "[<|im_end|>]" in text and "/1]" not in text

    @pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
    def test_packing_shows_whole_examples_and_the_groups_of_training(self, folder, trained_rows, strategy):
        """Rows longer than `max_length` are cut by one strategy and kept whole, then split, by the others."""
        flags = ["--packing", "--packing_strategy", strategy, "--max_length", "48"]
        page = Page(inspect_page("--config", "sft_go.yaml", *flags, "--attn_implementation", "eager"))
        options = {"packing": True, "packing_strategy": strategy, "max_length": 48}
        packed = trained_rows(**options)
        assert len(page.rows) == 12
        values = next(i for i, column in enumerate(page.data["columns"]) if column["name"] == "group_ids")
        shown = sorted(
            pair for row in page.data["rows"].values() for pair in zip(row["ids"], row["values"][values], strict=True)
        )
        assert shown == sorted(pair for row in packed for pair in zip(row["input_ids"], row["group_ids"], strict=True))

    @pytest.mark.parametrize("packing", [False, True])
    def test_prepared_rows_are_shown_as_they_are(self, packing, folder, capsys, trained_rows):
        """Without the column that says what they were prepared with."""
        prepared = trained_rows(packing=packing)
        (folder / "prepared").mkdir()
        prepared.to_parquet(folder / "prepared" / "train.parquet")
        flags = ("--dataset_name", "prepared", "--packing", str(packing), "--rows", ":")
        shown = inspect_text(capsys, "--config", "sft_go.yaml", *flags)
        assert f"of {len(prepared)}" in shown and "important" in shown and "annotated_with" not in shown

    def test_groups_depend_on_the_whole_training_set(self, folder):
        every_row = Page(inspect_page("--config", "sft_go.yaml", "--rows", ":")).data["rows"]["5"]
        assert Page(inspect_page("--config", "sft_go.yaml", "--rows", "5")).data["rows"]["5"] == every_row

    def test_settings_of_a_gpu_and_a_tracker_do_not_stop_it(self, folder, capsys):
        text = SFT + "bf16: true\ntf32: true\nreport_to: wandb\npush_to_hub: true\neval_strategy: steps\n"
        (folder / "gpu.yaml").write_text(text + "model_revision: main\nuse_peft: true\nload_in_4bit: true\n")
        assert "row 0" in inspect_text(capsys, "--config", "gpu.yaml")
        assert not (folder / "runs").exists()

    def test_streaming(self, folder, capsys):
        flags = ["--config", "sft.yaml", "--dataset_streaming", "--max_steps", "2", "--rows"]
        assert "rows 10 to 11 of a stream" in inspect_text(capsys, *flags, "10:20")
        assert main(["inspect", *flags, "12:"]) == 2
        assert "`--rows` starts at row 12, but the prepared data set has no more rows" in capsys.readouterr().err

    def test_template_of_another_model(self, folder, capsys, tokenizer):
        tokenizer.save_pretrained("other")
        other = PreTrainedTokenizerFast.from_pretrained("other")
        other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
        other.chat_template = other.chat_template.replace("<|im_start|>", "<|turn|>")
        other.save_pretrained("other")
        text = inspect_text(capsys, "--config", "sft.yaml", "--rows", "0", "--chat_template_path", "other")
        assert "(<|turn|>)" in text and "<|im_start|>" not in text

    def test_a_variant_of_ones_own(self, folder, capsys, monkeypatch):
        (folder / "my_variant.py").write_text(
            "from enum import IntEnum\n\nfrom hf_sft_variants import AnnotatedSFTTrainer\n\n\n"
            "class Place(IntEnum):\n    NONE = -1\n    LATE = 2\n\n\n"
            "def add(example):\n    return {'mine': [i % 3 for i, _ in enumerate(example['input_ids'])]}\n\n\n"
            "class MyTrainer(AnnotatedSFTTrainer):\n    annotation_columns = {'mine': Place.NONE}\n\n"
            "    def annotate(self, dataset, dataset_name):\n        return dataset.map(add)\n"
        )
        (folder / "mine.yaml").write_text("module: my_variant\n" + SFT)
        text = inspect_text(capsys, "--config", "mine.yaml", "--rows", "1")
        assert "late: " in text and "group 1: " in text and "/2]" in text

    def test_weights(self, folder, capsys):
        recipe = "module: hf_sft_variants.weighted\nkey_pattern: (?P<key>\\S+)\\s*$\nanswer_weight: 2.5\n"
        (folder / "weighted.yaml").write_text(recipe + SFT)
        text = inspect_text(capsys, "--config", "weighted.yaml", "--rows", "1")
        assert "token=number with its token_weights" in text and "=2.5]" in text and "=1]" in text


class TestText:
    def test_brackets_without_a_terminal(self, folder, capsys, trained_rows, tokenizer):
        text = inspect_text(capsys, "--config", "sft_go.yaml", "--rows", "3:5")
        assert "\x1b" not in text and text.startswith("rows 3 to 4 of 12.")
        example = trained_rows()[3]
        marks = []
        columns = ("input_ids", "labels", "group_ids", "importance_scores")
        for token_id, label, group, score in zip(*(example[column] for column in columns), strict=True):
            token = visible_text(token_text(tokenizer, token_id))
            marks.append(f"({token})" if label == -100 else f"[{token}/{group}={score:.2g}]")
        assert "".join(marks) in text.replace("\n", "")

    def test_styles_on_a_terminal(self, folder, capsys, monkeypatch):
        plain = inspect_text(capsys, "--config", "sft.yaml", "--rows", "3")
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        styled = inspect_text(capsys, "--config", "sft_go.yaml", "--rows", "3")
        assert "\x1b[2m<|im_start|>\x1b[0m" in styled and "\x1b[1;4m" in styled and "(<|im_start|>)" not in styled
        unstyled = re.sub(r"\x1b\[2m=[^\x1b]*\x1b\[0m|\x1b\[[\d;]*m", "", styled).splitlines()[3:]
        assert unstyled == re.sub(r"[(\[](.*?)[)\]](?=[(\[]|$)", r"\1", plain, flags=re.M).splitlines()[3:]

    def test_probabilities(self, folder, capsys, tiny_model, trained_rows):
        tiny_model.save_pretrained("model")
        page = inspect_page("--config", "sft.yaml", "--probabilities")
        expected = [
            [0.0, *(math.exp(log_prob) for log_prob in padded_document_log_probs(tiny_model, *of_row))]
            for of_row in ((row["input_ids"], row["input_ids"]) for row in trained_rows())
        ]
        data, mean = Page(page).data, []
        (number,) = [i for i, column in enumerate(data["columns"]) if column["name"] == "probability"]
        for row, probabilities in zip(data["rows"].values(), expected, strict=True):
            in_loss = [position > 0 and label != -100 for position, label in enumerate(row["labels"])]
            found = [float(value) for value in row["values"][number]]
            for value, probability, is_in_loss in zip(found, probabilities, in_loss, strict=True):
                assert value == pytest.approx(probability if is_in_loss else 0.0, rel=1e-3)
            mean += [probability for probability, is_in_loss in zip(probabilities, in_loss, strict=True) if is_in_loss]
        sentence = f"Mean probability of {len(mean):,} tokens in the loss under the starting model: "
        assert f"{sentence}{sum(mean) / len(mean):.2f}" in page and "2510.00526" in page
        assert sentence in inspect_text(capsys, "--config", "sft.yaml", "--probabilities")
        assert sentence not in inspect_text(capsys, "--config", "sft.yaml")

    def test_probabilities_of_packed_rows(self, folder, tiny_model, trained_rows):
        tiny_model.save_pretrained("model")
        examples = [row["input_ids"] for row in trained_rows()][:3]
        packed = {"input_ids": list(chain.from_iterable(examples)), "seq_lengths": list(map(len, examples))}
        (folder / "data" / "train.jsonl").write_text(json.dumps(packed) + "\n")
        data = Page(inspect_page("--config", "sft.yaml", "--probabilities", "--max_length", "512")).data
        (number,) = [i for i, column in enumerate(data["columns"]) if column["name"] == "probability"]
        expected = [
            probability
            for ids in examples
            for probability in (0.0, *map(math.exp, padded_document_log_probs(tiny_model, ids, ids)))
        ]
        (row,) = data["rows"].values()
        assert list(map(float, row["values"][number])) == pytest.approx(expected, rel=1e-3)

    def test_into_a_file(self, folder, capsys):
        assert main(["inspect", "--config", "sft.yaml", "--format", "text", "--output", "tokens.txt"]) == 0
        assert capsys.readouterr().out == "wrote tokens.txt: rows 0 to 11 of 12\n"
        assert "[<|im_end|>]" in (folder / "tokens.txt").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "a:b"], "`--rows` must be a range such as 0:20 or 100:, or a row's number, got 'a:b'"),
        (["--rows", ""], "`--rows` must be a range such as 0:20 or 100:, or a row's number, got ''"),
        (["--rows=-3:"], "a row's number, got '-3:'"),
        (["--rows", "5:5"], "`--rows` must end after its start (the end is exclusive), got '5:5'"),
        (["--rows", "12:20"], "`--rows` starts at row 12, but the prepared data set has 12 rows"),
        (["--learnin_rate", "1"], "unknown flag `--learnin_rate`; did you mean `--learning_rate`?"),
        (["--model_name_or_path", "nowhere"], "`model_name_or_path` is 'nowhere', which could not be loaded"),
        (["--dataset_name", "./nowhere"], "`dataset_name` is './nowhere'"),
        (["--max_length", "2"], "The train dataset has no supervised token"),
        (["--output", "sft.yaml/page.html"], "`--output` is 'sft.yaml/page.html', which can't be written"),
        (["--config", "nowhere.yaml"], "nowhere.yaml can't be read: No such file"),
        (["--config", "misspelt.yaml"], "misspelt.yaml: unknown key `max_lenght`; did you mean `max_length`?"),
        (["--config", "no_module.yaml"], "`module` is 'no_such_package', which can't be imported"),
        (
            ["--config", "no_trainer.yaml"],
            "`module` is 'json', which must have one subclass of SFTTrainer",
        ),
    ],
)
def test_errors_in_words(folder, capsys, flags, message):
    (folder / "misspelt.yaml").write_text(SFT + "max_lenght: 3\n")
    (folder / "no_module.yaml").write_text("module: no_such_package\n" + SFT)
    (folder / "no_trainer.yaml").write_text("module: json\n" + SFT)
    assert main(["inspect", "--config", "sft_go.yaml", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-sft-variants: error: ") and message in error


class TestTokenText:
    @pytest.fixture
    def sentence_piece(self):
        """Spaces as ▁, unknown characters as bytes, as in Llama 2."""
        pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁", "ing", "▁world"]
        backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")

    @pytest.mark.parametrize(
        ("token", "text"),
        [("▁Hello", " Hello"), ("▁", " "), ("ing", "ing"), ("</s>", "</s>"), ("<0xE2>", r"\xe2"), ("<0x0A>", "\n")],
    )
    def test_sentence_piece(self, sentence_piece, token, text):
        assert token_text(sentence_piece, sentence_piece.convert_tokens_to_ids(token)) == text

    def test_word_piece(self):
        pieces = {piece: i for i, piece in enumerate(["[UNK]", "play", "##ing", "."])}
        backend = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
        backend.decoder = decoders.WordPiece(cleanup=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
        assert token_texts(tokenizer, {0, 2}) == {0: "[UNK]", 2: "ing"}
        assert [token_text(tokenizer, i) for i in range(1, 4)] == [" play", "ing", " ."]

    def test_byte_level_tokens_join_to_the_text(self, tokenizer):
        text = "Add the ones:\n\tnaïve 👩‍🚀 日本 e\u0301\xa0!"
        pieces = [token_text(tokenizer, token_id) for token_id in tokenizer(text)["input_ids"]]
        raw = b"".join(re.sub(rb"\\x(..)", lambda m: bytes.fromhex(m[1].decode()), p.encode()) for p in pieces)
        assert raw.decode() == text
        assert r"\xf0" in "".join(pieces)

    def test_an_id_that_the_tokenizer_does_not_have(self, tokenizer):
        assert token_text(tokenizer, 10_000) == "<no token 10000>"

    def test_what_cannot_be_seen_gets_a_mark(self):
        assert visible_text("a b\t\n\r\x1b[1m\u200b\xa0é") == r"a·b⇥↵\r\x1b[1m\u200b\xa0é"
