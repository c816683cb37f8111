import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import slow_nll
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from hf_sft_variants.errors import InputError, first_line
from hf_sft_variants.evaluation import (
    check_tagged_dataset,
    exact_match,
    generate_answers,
    held_out_nll,
    last_number_match,
    tagged_scores,
)
from hf_sft_variants.evaluation.tagged_answers import tagged_response
from hf_sft_variants.launch.loading import load_model_and_tokenizer, load_split


@pytest.fixture
def rows(chat_rows) -> Dataset:
    answers = [row["completion"][0]["content"].split()[-1] for row in chat_rows]
    return chat_rows.add_column("answer", answers)


@pytest.fixture
def tagged_rows(rows) -> Dataset:
    """The same rows for SFTKey: with reasoning and answer, without completion."""
    return rows.add_column("reasoning", [f"It is {answer}." for answer in rows["answer"]]).remove_columns("completion")


@pytest.fixture
def saved_model(tmp_path, tiny_model, tokenizer) -> str:
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def saved_adapter(tmp_path, saved_model) -> str:
    base, _ = load_model_and_tokenizer(saved_model, device="cpu")
    peft_model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    peft_model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def uneven(rows):
    """The same rows with prompts and completions of different lengths."""
    return rows.map(
        lambda row, i: {
            "prompt": [{"role": "user", "content": "Please. " * (i % 4) + row["prompt"][0]["content"]}],
            "completion": [{"role": "assistant", "content": row["completion"][0]["content"] * (1 + i % 3)}],
        },
        with_indices=True,
    )


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_nll_equals_a_slow_computation_for_any_batch_size(tiny_model, tokenizer, rows, batch_size):
    rows = uneven(rows)
    expected = slow_nll(tiny_model.eval(), tokenizer, rows)
    assert held_out_nll(tiny_model, tokenizer, rows, batch_size) == pytest.approx(expected, rel=1e-6)


def test_nll_is_the_evaluation_loss_of_sft_trainer(tmp_path, tiny_model, tokenizer, rows):
    rows = rows.select_columns(["prompt", "completion"])
    args = SFTConfig(tmp_path, use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=len(rows))
    trainer = SFTTrainer(tiny_model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    expected = trainer.evaluate()["eval_loss"]
    assert held_out_nll(tiny_model, tokenizer, rows) == pytest.approx(expected, rel=1e-5)


def with_completions(tagged_rows, **tags):
    return tagged_rows.map(
        lambda row: {
            "completion": [
                {"role": "assistant", "content": tagged_response(row["reasoning"], row["answer"], **tags)},
            ]
        }
    )


def test_nll_of_tagged_responses_needs_no_completion(tiny_model, tokenizer, tagged_rows):
    ready = with_completions(tagged_rows)
    nll = held_out_nll(tiny_model, tokenizer, tagged_rows, tagged=True)
    assert nll == held_out_nll(tiny_model, tokenizer, ready)
    # `completion` is used only without `reasoning`
    assert nll == held_out_nll(tiny_model, tokenizer, ready.remove_columns("reasoning"), tagged=True)
    other = with_completions(tagged_rows, thinking_tags=("[t]", "[/t]"), answer_tags=("[a]", "[/a]"))
    assert nll == held_out_nll(tiny_model, tokenizer, other, tagged=True) != held_out_nll(tiny_model, tokenizer, other)


def test_nll_of_tagged_responses_has_the_tags_that_are_asked_for(tiny_model, tokenizer, tagged_rows):
    tags = {"thinking_tags": ["[t]", "[/t]"], "answer_tags": ["[a]", "[/a]"]}
    expected = held_out_nll(tiny_model, tokenizer, with_completions(tagged_rows, **tags))
    assert held_out_nll(tiny_model, tokenizer, tagged_rows, tagged=True, **tags) == expected


def test_evaluating_leaves_the_model_in_its_mode(tiny_model, tokenizer, rows):
    tiny_model.train()
    tiny_model.model.layers[0].eval()  # like a frozen part
    modes = [module.training for module in tiny_model.modules()]
    held_out_nll(tiny_model, tokenizer, rows.select(range(2)))
    generate_answers(tiny_model, tokenizer, ["Hi"], max_new_tokens=1)
    assert [module.training for module in tiny_model.modules()] == modes


def generate_one(model, tokenizer, text, max_new_tokens):
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    output = model.generate(input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.size(1) :], skip_special_tokens=True)


def test_conversations_and_texts_are_answered(tiny_model, tokenizer):
    conversation = [{"role": "user", "content": "What is 12 plus 30?"}]
    rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    texts = generate_answers(tiny_model, tokenizer, [conversation, "A farmer has", rendered], 8, batch_size=2)
    assert texts[0] == texts[2] == generate_one(tiny_model, tokenizer, rendered, 8)
    assert texts[1] == generate_one(tiny_model, tokenizer, "A farmer has", 8)
    assert generate_answers(tiny_model, tokenizer, []) == []


def test_a_processor_brings_its_tokenizer_and_template(tiny_model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    processor = SimpleNamespace(tokenizer=bare, chat_template=tokenizer.chat_template)
    prompts = [[{"role": "user", "content": "What is 12 plus 30?"}], "A farmer has"]
    assert generate_answers(tiny_model, processor, prompts, 4) == generate_answers(tiny_model, tokenizer, prompts, 4)


def test_decoding_is_greedy_whatever_the_model_asks_for(tiny_model, tokenizer):
    expected = generate_answers(tiny_model, tokenizer, ["What is", "A farmer"], 8)
    config = tiny_model.generation_config
    config.do_sample, config.temperature, config.top_k, config.repetition_penalty, config.num_beams = (
        True,
        9.0,
        5,
        3.0,
        2,
    )
    tiny_model.config.use_cache = False
    random_state = torch.get_rng_state()
    assert generate_answers(tiny_model, tokenizer, ["What is", "A farmer"], 8) == expected
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not tiny_model.config.use_cache
    assert (config.do_sample, config.repetition_penalty, config.num_beams) == (True, 3.0, 2)


def test_tagged_scores_measure_accuracy_and_format_apart():
    generations = [
        "<Thinking>2 + 3</Thinking>\n<Answer>5.0</Answer>",
        "<Thinking>2 + 3</Thinking>\n<Answer>6</Answer>",
        "<Answer>5</Answer>",
        "five",
    ]
    scores = tagged_scores(generations, ["5", "5", "5", "5"])
    assert scores == {"accuracy": 0.5, "format_rate": 0.5, "score": pytest.approx(0.7 * 0.5 + 0.3 * 0.5)}
    scores = tagged_scores(
        ["[t]a[/t][a]Paris[/a]"], ["paris"], thinking_tags=["[t]", "[/t]"], answer_tags=["[a]", "[/a]"]
    )
    assert scores == {"accuracy": 1, "format_rate": 1, "score": 1}
    assert tagged_scores(["#### 5"], [5]) == {"accuracy": 1, "format_rate": 0, "score": 0.7}


@pytest.mark.parametrize(
    ("generations", "answers", "message"),
    [
        ([], [], "`generations` has 0 rows and `answers` 0"),
        (["5"], ["5", "6"], "`generations` has 1 rows and `answers` 2"),
        (["5", "6"], ["5", None], "`answers` of row 1 is None"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(generations, answers, message):
    with pytest.raises(InputError, match=message):
        tagged_scores(generations, answers)


def test_batched_generations_equal_single_ones(tiny_model, tokenizer, rows):
    rows = uneven(rows).select(range(6))
    _, batched = exact_match(tiny_model, tokenizer, rows, max_new_tokens=8, batch_size=4)
    for row, text in zip(rows, batched, strict=True):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = tiny_model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        assert text == tokenizer.decode(output[0, ids.size(1) :], skip_special_tokens=True)


def test_exact_match_counts_marked_answers_only(monkeypatch, tiny_model, tokenizer, rows):
    rows = rows.select(range(4))  # the answers are 5, 20, 61, 16
    texts = ["#### 5.0", "It is 20.", "#### 16\n#### 61", "#### 16 #### 17"]
    text_of = {row["prompt"][0]["content"]: text for row, text in zip(rows, texts, strict=True)}

    def answer(model, tokenizer, prompts, max_new_tokens, device):
        contents = [tokenizer.decode(ids) for ids in prompts]
        return [next(text for question, text in text_of.items() if question in content) for content in contents]

    monkeypatch.setattr("hf_sft_variants.evaluation.generation._generate", answer)
    share, generations = exact_match(tiny_model, tokenizer, rows, batch_size=3)
    assert share == 0.5
    assert generations == texts
    assert last_number_match(generations, rows) == 0.75


def test_an_adapter_folder_is_loaded_on_the_base_model_it_names(saved_model, saved_adapter, rows):
    recognised, tokenizer = load_model_and_tokenizer(saved_adapter, device="cpu")
    named, _ = load_model_and_tokenizer(saved_model, adapter=saved_adapter, device="cpu")
    base, _ = load_model_and_tokenizer(saved_model, device="cpu")
    nlls = [held_out_nll(model, tokenizer, rows) for model in (recognised, named, base)]
    assert nlls[0] == nlls[1] != nlls[2]
    assert exact_match(recognised, tokenizer, rows, max_new_tokens=2)[0] == 0.0


def test_what_cannot_be_loaded_is_named(tmp_path, saved_model, tiny_model, tokenizer):
    with pytest.raises(InputError, match="`model` 'nowhere/at-all' can't be loaded"):
        load_model_and_tokenizer("nowhere/at-all")
    with pytest.raises(InputError, match=r"`adapter` .* can't be loaded: it has no adapter_config\.json"):
        load_model_and_tokenizer(saved_model, adapter=saved_model)
    with pytest.raises(InputError, match="`device` is 'gpu9'"):
        load_model_and_tokenizer(saved_model, device="gpu9")


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, saved_model):
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        load_model_and_tokenizer(saved_model)


def test_a_data_set_that_cannot_be_evaluated_is_refused(tiny_model, tokenizer, rows):
    with pytest.raises(InputError, match="no column 'completion', only 'prompt', 'answer'"):
        held_out_nll(tiny_model, tokenizer, rows.remove_columns("completion"))
    with pytest.raises(InputError, match="`dataset` is empty"):
        held_out_nll(tiny_model, tokenizer, rows.select([]))
    with pytest.raises(InputError, match="Column 'prompt' of `dataset` holds 'Hi'"):
        held_out_nll(tiny_model, tokenizer, Dataset.from_list([{"prompt": "Hi", "completion": "Ho"}]))
    with pytest.raises(InputError, match="`answer` of row 1 is 'many'"):
        wrong = rows.select(range(2)).remove_columns("answer").add_column("answer", ["3", "many"])
        exact_match(tiny_model, tokenizer, wrong)


def test_a_data_set_without_tagged_responses_is_refused(tiny_model, tokenizer, rows, tagged_rows):
    check_tagged_dataset(rows)
    with pytest.raises(InputError, match="no column 'reasoning', only 'prompt', 'answer'"):
        check_tagged_dataset(rows.remove_columns("completion"))
    with pytest.raises(InputError, match="no column 'answer', only 'prompt', 'reasoning'"):
        held_out_nll(tiny_model, tokenizer, tagged_rows.remove_columns("answer"), tagged=True)
    with pytest.raises(InputError, match="Column 'prompt' of `dataset` holds 'Hi'"):
        check_tagged_dataset(Dataset.from_list([{"prompt": "Hi", "reasoning": "a", "answer": "b"}]))
    with pytest.raises(InputError, match="`reasoning` of row 1 is None"):
        gap = tagged_rows.select(range(2)).remove_columns("reasoning").add_column("reasoning", ["a", None])
        held_out_nll(tiny_model, tokenizer, gap, tagged=True)


def test_a_split_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "Hi"}\n')
    assert len(load_split(str(tmp_path))) == 1
    with pytest.raises(InputError, match="`split` 'validation' could not be loaded"):
        load_split(str(tmp_path), "validation")
    with pytest.raises(InputError, match="`dataset` 'nowhere/at-all'"):
        load_split("nowhere/at-all")


@pytest.mark.parametrize(
    "message, expected",
    [
        ("", "RuntimeError"),
        ("one\ntwo", "one"),
        ("Error(s) in loading state_dict:\n\tsize mismatch", "Error(s) in loading state_dict: size mismatch"),
    ],
)
def test_first_line_of_an_error(message, expected):
    assert first_line(RuntimeError(message)) == expected
