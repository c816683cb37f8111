import random
import string

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from fixtures.small_tokenizers import KINDS, byte_fallback, byte_level, characters_of_tokens, unigram, word_piece
from helpers import SMALL as SMALL_RUN
from helpers import make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    ByT5Tokenizer,
    XLMRobertaConfig,
    XLMRobertaForTokenClassification,
    set_seed,
)

from hf_sft_variants import SFTGOConfig, SFTGOTrainer
from hf_sft_variants.sft_go import llmlingua2
from hf_sft_variants.sft_go.importance_model import MAX_WINDOW, load_importance_model, max_window
from hf_sft_variants.sft_go.importance_words import cut_windows, split_into_words
from hf_sft_variants.sft_go.llmlingua2 import LLMLingua2Scorer, importance_scores


WINDOW = 24
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    # Probabilities all over [0, 1], so that a wrong word or window shows
    "initializer_range": 0.6,
}

WORDS = [
    "the", "sum", "is", "42.", "unhappiness", "(yes,", "really!)", "don't", "x=3;", "--", "...", "“quoted”", "½", "Ж",
    "naïve", "e\u0301te\u0301", "日本語の文章", "中文，句子。", "한국어", "😀👍🏽", "a😀b", "👩‍👩‍👧",
    "a\u200bb", "REALLY",
]  # fmt: skip
SPACES = [" ", " ", " ", "  ", "\n", "\t", "\n\n", " \n\t ", "\u00a0"]


@pytest.fixture(scope="module", autouse=True)
def process_state():
    PartialState(cpu=True)


def make_bert(tokenizer, **options):
    set_seed(0)
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": WINDOW, **SMALL, **options}
    return BertForTokenClassification(BertConfig(pad_token_id=tokenizer.pad_token_id, **options)).eval()


def make_xlm_roberta(tokenizer):
    set_seed(0)
    positions = WINDOW + tokenizer.pad_token_id + 1
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=positions, pad_token_id=tokenizer.pad_token_id, **SMALL
    )
    return XLMRobertaForTokenClassification(config).eval()


IMPORTANCE_TOKENIZERS = {"bert": word_piece(), "uncased_bert": word_piece(lowercase=True), "xlm_roberta": unigram()}
IMPORTANCE_MODELS = {
    "bert": make_bert(IMPORTANCE_TOKENIZERS["bert"]),
    "uncased_bert": make_bert(IMPORTANCE_TOKENIZERS["uncased_bert"]),
    "xlm_roberta": make_xlm_roberta(IMPORTANCE_TOKENIZERS["xlm_roberta"]),
}
TARGET_KINDS = ["byte_level", "byte_fallback", "unigram", "word_piece"]
TARGET_TOKENIZERS = {kind: KINDS[kind][0]() for kind in TARGET_KINDS}


def random_text(generator: random.Random, max_words: int) -> str:
    words = generator.choices(WORDS, k=generator.randint(0, max_words))
    return "".join(word + generator.choice(SPACES) for word in words)


def random_example(generator: random.Random, tokenizer, max_words: int = 12) -> dict:
    """A prompt that is not supervised, then one or two responses with a special token after each."""
    input_ids, labels = [], []
    for _ in range(generator.randint(1, 2)):
        prompt = tokenizer.encode("What is it?", add_special_tokens=False)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        response = [*tokenizer.encode(random_text(generator, max_words), add_special_tokens=False), end]
        input_ids += prompt + response
        labels += [-100] * len(prompt) + response
    if generator.random() < 0.2:  # the first token of an example is predicted by nothing
        labels[0] = input_ids[0]
    return {"input_ids": input_ids, "labels": labels}


# The slow reference: one example, one window, one character at a time


def reference_scores(example, kind, model, importance_tokenizer, window=WINDOW) -> list[float]:
    target_tokenizer = TARGET_TOKENIZERS[kind]
    text, characters_of = reference_text(example, kind, target_tokenizer)
    encoding = importance_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = encoding.tokens()
    words = reference_words(tokens, importance_tokenizer)
    keep = []
    for start, end in reference_windows(words, window - 2):
        ids = importance_tokenizer.convert_tokens_to_ids(tokens[start:end])
        first, last = importance_tokenizer.encode("")
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[first, *ids, last]])).logits[0]
        keep += logits.softmax(-1)[1:-1, 1].tolist()
    words_of_character = [set() for _ in text]
    for number, word in enumerate(words):
        for sub_word in word:
            if tokens[sub_word] != "▁":
                for character in range(*encoding["offset_mapping"][sub_word]):
                    words_of_character[character].add(number)
    for character in range(1, len(text)):  # what normalization dropped belongs to the word before it
        if not words_of_character[character] and not text[character].isspace():
            words_of_character[character] = words_of_character[character - 1]
    word_scores = [sum(keep[sub_word] for sub_word in word) / len(word) for word in words]
    scores = [0.0] * len(example["input_ids"])
    for position, characters in characters_of.items():
        for character in characters:
            if not text[character].isspace():
                for word in words_of_character[character]:
                    scores[position] = max(scores[position], word_scores[word])
    return scores


def reference_text(example, kind, tokenizer):
    special = set(tokenizer.all_special_ids)
    text, characters_of, run = "", {}, []
    for position, label in [*enumerate(example["labels"]), (None, -100)]:
        if position != 0 and label != -100 and label not in special:
            run.append(position)
        elif run:
            piece, characters = characters_of_tokens(kind, tokenizer, [example["input_ids"][i] for i in run])
            for token, numbers in zip(run, characters, strict=True):
                characters_of[token] = [len(text) + number for number in numbers]
            text, run = text + piece + "\n", []
    return text, characters_of


def reference_words(tokens, tokenizer):
    """LLMLingua-2's own rule for BERT and for XLM-RoBERTa; words as lists of sub-word numbers."""
    words = []
    for number, token in enumerate(tokens):
        if "[CLS]" in tokenizer.get_vocab():
            begins = not token.startswith("##")
        else:
            begins = token.startswith("▁") or token in string.punctuation
        if begins or not words:
            words.append([])
        words[-1].append(number)
    return words


def reference_windows(words, size):
    windows = [[]]
    for word in words:
        if windows[-1] and len(windows[-1]) + len(word) > size:
            windows.append([])
        for sub_word in word:
            if len(windows[-1]) == size:
                windows.append([])
            windows[-1].append(sub_word)
    return [(window[0], window[-1] + 1) for window in windows if window]


def check_against_reference(kind, name, examples):
    model, importance_tokenizer = IMPORTANCE_MODELS[name], IMPORTANCE_TOKENIZERS[name]
    results = LLMLingua2Scorer(model, importance_tokenizer, TARGET_TOKENIZERS[kind])(examples)
    for example, result in zip(examples, results, strict=True):
        scores = result["importance_scores"]
        assert scores.dtype == np.float32
        expected = reference_scores(example, kind, model, importance_tokenizer)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


class TestAgainstSlowReference:
    @pytest.mark.parametrize("name", IMPORTANCE_MODELS)
    @pytest.mark.parametrize("kind", TARGET_KINDS)
    def test_random_texts(self, kind, name):
        generator = random.Random(f"{kind} {name}")
        examples = [random_example(generator, TARGET_TOKENIZERS[kind]) for _ in range(20)]
        check_against_reference(kind, name, examples)

    def test_two_hundred_random_texts(self):
        generator = random.Random(7)
        examples = [random_example(generator, TARGET_TOKENIZERS["byte_level"]) for _ in range(200)]
        check_against_reference("byte_level", "xlm_roberta", examples)

    @pytest.mark.parametrize("name", IMPORTANCE_MODELS)
    @pytest.mark.parametrize(
        "text", ["the sum is 42. " * 60, "unhappiness" * 30, "no " * 9 + "a" * 100 + " yes", "日" * 99]
    )
    def test_longer_than_a_window(self, name, text):
        token_ids = TARGET_TOKENIZERS["byte_level"].encode(text)
        check_against_reference("byte_level", name, [{"input_ids": [0, *token_ids], "labels": [-100, *token_ids]}])


class TestScores:
    tokenizer = TARGET_TOKENIZERS["byte_level"]

    @pytest.fixture
    def scorer(self):
        return LLMLingua2Scorer(IMPORTANCE_MODELS["bert"], IMPORTANCE_TOKENIZERS["bert"], self.tokenizer)

    @pytest.mark.parametrize("importance_tokenizer", [word_piece(), byte_level()], ids=["word_piece", "byte_level"])
    def test_white_space_special_and_other_tokens_have_none(self, importance_tokenizer):
        scorer = LLMLingua2Scorer(make_bert(importance_tokenizer), importance_tokenizer, self.tokenizer)
        prompt = self.tokenizer.encode("<|user|>the sum")
        response = self.tokenizer.encode("\n\n42 \t<|user|> yes!<|end|>\n")
        example = {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
        scores = scorer([example])[0]["importance_scores"]
        for score, token in zip(scores[len(prompt) :], map(self.tokenizer.decode, response), strict=True):
            assert (score > 0) == (not token.isspace() and token not in {"<|user|>", "<|end|>"})
        assert not scores[: len(prompt)].any()

    def test_first_token_and_nothing_supervised(self, scorer):
        token_ids = self.tokenizer.encode("42 42")
        labels = {"whole": token_ids, "nothing": [-100] * len(token_ids), "single": token_ids[:1]}
        examples = [{"input_ids": token_ids[: len(row)], "labels": row} for row in labels.values()]
        whole, nothing, single = (result["importance_scores"] for result in scorer(examples))
        assert whole[0] == 0 and whole[-1] > 0
        assert not nothing.any()
        assert single.tolist() == [0]

    def test_words_of_two_runs_do_not_merge(self, scorer):
        mark, un, happy = (self.tokenizer.encode(text) for text in ("?", "un", "happy"))
        example = {"input_ids": mark + un + mark + happy, "labels": [-100, *un, -100, *happy]}
        apart = scorer([example])[0]["importance_scores"]
        spaced = self.tokenizer.encode("?un\nhappy")
        together = scorer([{"input_ids": spaced, "labels": [-100, *spaced[1:]]}])[0]["importance_scores"]
        np.testing.assert_allclose(apart[apart > 0], together[together > 0], atol=1e-5)

    @pytest.mark.parametrize("name", IMPORTANCE_MODELS)
    def test_batches_and_order_do_not_matter(self, name):
        generator = random.Random(3)
        examples = [random_example(generator, self.tokenizer, max_words=40) for _ in range(30)]
        models = IMPORTANCE_MODELS[name], IMPORTANCE_TOKENIZERS[name], self.tokenizer
        expected = LLMLingua2Scorer(*models)(examples)
        for batch_tokens in (1, 100, 700):
            scorer = LLMLingua2Scorer(*models, batch_tokens=batch_tokens)
            order = generator.sample(range(len(examples)), len(examples))
            for row, result in zip(order, scorer([examples[row] for row in order]), strict=True):
                np.testing.assert_allclose(
                    result["importance_scores"], expected[row]["importance_scores"], rtol=0, atol=1e-5
                )


class TestWindows:
    @given(lengths=st.lists(st.integers(1, 30), max_size=30), window=st.integers(1, 20))
    @settings(max_examples=200, deadline=None, derandomize=True)
    def test_windows_cut_at_words(self, lengths, window):
        ends = np.cumsum(lengths).tolist()
        starts = [end - length for end, length in zip(ends, lengths, strict=True)]
        windows = cut_windows(starts, sum(lengths), window)
        assert [number for start, end in windows for number in range(start, end)] == list(range(sum(lengths)))
        assert all(0 < end - start <= window for start, end in windows)
        for start, _ in windows:
            word = max(number for number, word_start in enumerate(starts) if word_start <= start)
            assert start == starts[word] or lengths[word] > window

    def test_window_of_a_model(self):
        tokenizer = IMPORTANCE_TOKENIZERS["bert"]
        assert [max_window(model) for model in IMPORTANCE_MODELS.values()] == [WINDOW] * 3
        assert max_window(make_bert(tokenizer, max_position_embeddings=600)) == MAX_WINDOW

    @pytest.mark.parametrize(
        "build, text, expected",
        [
            (word_piece, "un-happiness, (yes) 42", ["un", "-", "happiness", ",", "(", "yes", ")", "42"]),
            (unigram, "un-happiness, (yes) 42", ["un", "-happiness", ",", "(yes", ")", "42"]),
            (byte_level, "un-happiness, (yes) 42", ["un", "-", "happiness", ",", "(", "yes", ")", "42"]),
            (byte_fallback, "happiness\n 42  café ", ["happiness", "42", "café"]),  # does not cut at spaces itself
        ],
    )
    def test_words(self, build, text, expected):
        words = [text[start:end].strip() for start, end in split_into_words(text, build()).word_spans]
        assert [word for word in words if word] == expected


def train_to_keep_digits(model, tokenizer):
    generator = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    words, numbers = ["the", "sum", "is", "tens", "ones", ".", "and", "are", "of", "Add", "The"], [12, 30, 42, 7, 5]
    vocabulary = [*words, *map(str, numbers)]
    for _ in range(40):
        texts = [" ".join(generator.choices(vocabulary, k=10)) for _ in range(16)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        tokens = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()]
        labels = torch.tensor([[int(token.removeprefix("##").isdigit()) for token in row] for row in tokens])
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def rows():
    generator = random.Random(11)
    examples = [random_example(generator, TARGET_TOKENIZERS["byte_level"]) for _ in range(20)]
    return Dataset.from_list([*examples, examples[0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a compressor that has learned to keep words with a digit."""
    folder = tmp_path_factory.mktemp("importance_model")
    tokenizer = word_piece()
    model = make_bert(tokenizer, initializer_range=0.1, max_position_embeddings=128)
    train_to_keep_digits(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestImportanceScores:
    def score(self, rows, folder, tmp_path, **options):
        options = {**SMALL_RUN, "group_by": "llmlingua2", "importance_model": str(folder), **options}
        args = SFTGOConfig(str(tmp_path), score_cache_dir=str(tmp_path / "scores"), **options)
        return importance_scores(rows, args, TARGET_TOKENIZERS["byte_level"], "train")

    def test_learned_words_score_high(self, rows, folder, tmp_path):
        tokenizer = TARGET_TOKENIZERS["byte_level"]
        example = tokenizer.encode("The sum of the tens is 42 and the ones are 30.")
        row = Dataset.from_list([{"input_ids": example, "labels": example}])
        scores = self.score(row, folder, tmp_path)[0].as_py()
        tokens = [tokenizer.decode(token_id) for token_id in example]
        digits = [score for score, token in zip(scores, tokens, strict=True) if token.strip().isdigit()]
        letters = [score for score, token in zip(scores, tokens, strict=True) if token.strip().isalpha()]
        assert min(digits) > 0.5 > max(letters)

    def test_found_on_disk_whatever_the_fraction(self, rows, folder, tmp_path, monkeypatch):
        scores = self.score(rows, folder, tmp_path)
        monkeypatch.setattr(llmlingua2, "load_importance_model", None)
        assert self.score(rows, folder, tmp_path, important_fraction=0.3, score_batch_tokens=64) == scores
        assert self.score(rows.select(range(20, -1, -1)), folder, tmp_path).to_pylist() == scores.to_pylist()[::-1]
        with pytest.raises(TypeError):  # what is cut is not there
            cut = rows.map(lambda row: {name: row[name][:8] for name in ("input_ids", "labels")})
            self.score(cut, folder, tmp_path)


class TestTrainer:
    def test_groups_follow_the_scores(self, tiny_model, tokenizer, folder, chat_rows, tmp_path):
        options = {
            "group_by": "llmlingua2",
            "importance_model": str(folder),
            "score_cache_dir": str(tmp_path / "scores"),
        }
        options |= {"max_steps": 1, "min_grouped_tokens": 2, "special_tokens_important": False}
        trainer = make_trainer(SFTGOTrainer, SFTGOConfig, tiny_model, tokenizer, chat_rows, tmp_path, **options)
        for row in trainer.train_dataset:
            groups, scores = np.array(row["group_ids"]), np.array(row["importance_scores"])
            assert ((groups >= 0) == (np.array(row["labels"]) != -100)).all()
            assert scores[groups == 1].min() >= scores[groups == 0].max()
        trainer.train()


class TestErrors:
    bert = IMPORTANCE_MODELS["bert"]

    def save(self, folder, model, tokenizer=None):
        model.save_pretrained(folder)
        (tokenizer or IMPORTANCE_TOKENIZERS["bert"]).save_pretrained(folder)
        return str(folder)

    def refused(self, folder, message):
        with pytest.raises(ValueError, match=f"`importance_model=.* can't be loaded: {message}.*two labels"):
            load_importance_model(folder)

    def test_loads_what_it_needs(self, tmp_path):
        model, tokenizer = load_importance_model(self.save(tmp_path, self.bert))
        assert model.dtype == torch.float32
        assert not model.training
        assert tokenizer.is_fast

    def test_causal_language_model(self, tmp_path, tiny_model, tokenizer):
        self.refused(self.save(tmp_path, tiny_model, tokenizer), "it is a LlamaForCausalLM")

    def test_three_labels(self, tmp_path):
        model = make_bert(IMPORTANCE_TOKENIZERS["bert"], num_labels=3)
        self.refused(self.save(tmp_path, model), "it has 3 labels")

    def test_no_classifier(self, tmp_path):
        folder = self.save(tmp_path, BertModel(self.bert.config))
        config = (tmp_path / "config.json").read_text().replace('"BertModel"', '"BertForTokenClassification"')
        (tmp_path / "config.json").write_text(config)
        self.refused(folder, r"it lacks the weights \['classifier.bias'")

    def test_tokenizer_without_offsets(self, tmp_path):
        folder = self.save(tmp_path, make_bert(IMPORTANCE_TOKENIZERS["bert"], vocab_size=400), ByT5Tokenizer())
        assert not AutoTokenizer.from_pretrained(folder).is_fast
        self.refused(folder, "its tokenizer is a ByT5Tokenizer, which gives no character offsets. Save a fast")

    @pytest.mark.parametrize("name", ["no/such-model", "folder"])
    def test_nothing_there(self, name, tmp_path):
        self.refused(str(tmp_path) if name == "folder" else name, "")

    def test_broken_weights(self, tmp_path):
        folder = self.save(tmp_path, self.bert)
        (tmp_path / "model.safetensors").write_bytes(b"broken")
        self.refused(folder, "")

    def test_no_such_model_before_scoring(self, tmp_path):
        options = {**SMALL_RUN, "group_by": "llmlingua2", "importance_model": "no/such-model"}
        with pytest.raises(ValueError, match=r"importance_model='no/such-model'` can't be loaded"):
            importance_scores(None, SFTGOConfig(str(tmp_path), **options), TARGET_TOKENIZERS["byte_level"], "train")
