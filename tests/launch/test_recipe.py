import importlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.logging import get_logger
from launches import launch_of_trl, start
from methods import METHODS, needs
from safetensors import SafetensorError
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import hf_sft_variants
from hf_sft_variants.errors import InputError
from hf_sft_variants.launch.training import main, make_parser, parse


REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted(set(REPOSITORY.glob("recipes/**/*.yaml")) - set(REPOSITORY.glob("recipes/accelerate/*")))

RECIPE = """\
num_processes: 1
module: toy_variant
model_name_or_path: a/model
toy_weight: 0.5
reference_models: [a, b]
dataset_name: a/dataset
learning_rate: 1e-3
rates: [1e-3, 0.1]
centered: false
max_length: null
use_cpu: true
bf16: false
"""


@dataclass
class ToyConfig(SFTConfig):
    toy_weight: float = 1.0
    rates: list[float] | None = None
    reference_models: list[str] | None = None
    centered: bool = True
    toy_mode: str = field(default="fast", metadata={"choices": ["fast", "exact"]})
    steps_between: int | None = 3

    def __post_init__(self):
        super().__post_init__()
        if self.toy_weight < 0:
            raise InputError(f"`toy_weight` must be 0 or more, got {self.toy_weight}.")


class ToyTrainer(SFTTrainer):
    __module__ = "toy_variant.trainer"


def read(argv):
    return parse(make_parser(ToyTrainer, ToyConfig), argv)


@pytest.fixture
def recipe(tmp_path):
    def write(text=RECIPE):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def argv_of_module(argv, monkeypatch):
    return argv


def argv_of_accelerate(argv, monkeypatch):
    launch = launch_command_parser().parse_args(["--num_processes", "1", "-m", "toy_variant", *argv])
    return launch.training_script_args


def argv_of_trl(argv, monkeypatch):
    """What the installed TRL passes to our module."""
    launch = launch_of_trl(["sft", *argv])
    assert launch.module and launch.training_script == "toy_variant"
    return launch.training_script_args


@pytest.fixture(params=[argv_of_module, argv_of_accelerate, argv_of_trl])
def read_as_started(request, monkeypatch):
    return lambda argv: read(request.param(argv, monkeypatch))


def test_trl_repeats_keys_and_names_its_script(recipe, monkeypatch):
    argv = argv_of_trl(["--config", recipe(), "--toy_weight", "2", "--seed", "1"], monkeypatch)
    script = argv.index("--config") - 1
    assert argv[:2] == ["--toy_weight", "0.5"] and argv[script - 2 : script] == ["--toy_weight", "2"]
    assert argv[script].endswith("sft.py") and argv[script + 3 :] == ["--seed", "1"]


def test_recipe_values_arrive_with_their_types(read_as_started, recipe):
    script_args, training_args, model_args, _ = read_as_started(["--config", recipe()])
    assert (script_args.dataset_name, model_args.model_name_or_path) == ("a/dataset", "a/model")
    assert (training_args.learning_rate, training_args.max_length) == (1e-3, None)
    assert (training_args.toy_weight, training_args.centered, training_args.toy_mode) == (0.5, False, "fast")
    assert (training_args.reference_models, training_args.rates) == (["a", "b"], [1e-3, 0.1])


def test_flags_override_the_recipe(read_as_started, recipe):
    flags = "--learning_rate 0.1 --max_length 7 --toy_weight 0.25 --reference_models c d --steps_between none"
    flags += " --packing --rates 0.5 --centered --toy_mode=exact --logging_steps 2"
    _, training_args, _, _ = read_as_started(["--config", recipe(RECIPE + "packing: false\n"), *flags.split()])
    assert (training_args.learning_rate, training_args.max_length, training_args.packing) == (0.1, 7, True)
    assert (training_args.toy_weight, training_args.reference_models, training_args.rates) == (0.25, ["c", "d"], [0.5])
    assert (training_args.steps_between, training_args.centered, training_args.toy_mode) == (None, True, "exact")


def test_a_flag_equal_to_the_repeated_key_is_kept(read_as_started, recipe):
    _, training_args, _, _ = read_as_started(["--config", recipe(), "--toy_weight", "0.5", "--no_centered"])
    assert (training_args.toy_weight, training_args.centered) == (0.5, False)


def test_a_single_value_of_a_list_key_is_a_list_of_one(read_as_started, recipe):
    _, training_args, model_args, _ = read_as_started(
        ["--config", recipe(RECIPE.replace("[a, b]", "a") + "lora_target_modules: all-linear\n")]
    )
    assert training_args.reference_models == ["a"]
    assert model_args.lora_target_modules == "all-linear"  # unpacked by TRL, as on the command line


def test_env_of_the_recipe_is_set(read_as_started, recipe, monkeypatch):
    monkeypatch.setenv("TOY_VARIABLE", "0")
    read_as_started(["--config", recipe(RECIPE + "env: {TOY_VARIABLE: 1}\n")])
    assert os.environ["TOY_VARIABLE"] == "1"


def test_accelerate_config_may_stand_in_the_recipe(read_as_started, recipe):
    read_as_started(["--config", recipe(RECIPE + "accelerate_config: single_gpu\n")])


def test_without_a_recipe():
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu", "--bf16", "false", "--toy_weight", "2"]
    assert read(flags)[1].toy_weight == 2


def test_trl_without_a_recipe_or_without_module_in_it(recipe, monkeypatch):
    flags = ["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu", "--bf16", "false"]
    method_flags = ["--module", "toy_variant", "--toy_weight", "2"]
    assert read(argv_of_trl([*method_flags, *flags], monkeypatch))[1].toy_weight == 2
    plain = recipe("num_processes: 1\nseed: 3\n")
    training_args = read(argv_of_trl(["--config", plain, *method_flags, *flags], monkeypatch))[1]
    assert (training_args.seed, training_args.toy_weight) == (3, 2)


@pytest.mark.parametrize("key", ["toy_wieght: 0.3", "learnin_rate: 0.1"])
def test_misspelt_key_below_module(read_as_started, recipe, key):
    nearest = {"toy_wieght": "toy_weight", "learnin_rate": "learning_rate"}[key.partition(":")[0]]
    with pytest.raises(InputError, match=rf"recipe\.yaml: unknown key .*; did you mean `{nearest}`\?"):
        read_as_started(["--config", recipe(RECIPE + key)])


def test_misspelt_flag(read_as_started, recipe):
    with pytest.raises(InputError, match=r"command line: unknown flag `--toy_wieght`; did you mean `--toy_weight`\?"):
        read_as_started(["--config", recipe(), "--toy_wieght", "0.3"])


def test_abbreviated_flag(read_as_started, recipe):
    with pytest.raises(InputError, match=r"unknown flag `--learning_rat`; did you mean `--learning_rate`\?"):
        read_as_started(["--config", recipe(), "--learning_rat", "0.3"])


def test_launch_option_below_module(read_as_started, recipe):
    with pytest.raises(InputError, match="`num_machines` is an option of `accelerate launch`: move it above `module`"):
        read_as_started(["--config", recipe(RECIPE + "num_machines: 1\n")])


def test_launch_option_on_the_command_line(read_as_started, recipe):
    with pytest.raises(InputError, match="`--num_processes` is an option of `accelerate launch`"):
        read_as_started(["--config", recipe(), "--num_processes", "2"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: fast", "`learning_rate` must be float, got 'fast'"),
        ("learning_rate: null", "`learning_rate` must be float, got None"),
        ("toy_weight: [1]", r"`toy_weight` must be float, got \[1\]"),
        ("toy_weight: true", "`toy_weight` must be float, got True"),
        ("toy_weight: {a: 1}", "`toy_weight` must be float, got {'a': 1}"),
        ("rates: [a]", r"`rates` must be list\[float\] \| None, got \['a'\]"),
        ("reference_models: [{}]", r"`reference_models` must be list\[str\] \| None"),
        ("centered: 3", "`centered` must be bool, got 3"),
        ("centered: maybe", "`centered` must be bool, got 'maybe'"),
        ("max_steps: 2.5", "`max_steps` must be int, got 2.5"),
        ("toy_mode: fats", "`toy_mode` must be one of fast, exact, got 'fats'"),
        ("toy_mode: [fast]", r"`toy_mode` must be one of fast, exact, got \['fast'\]"),
        ("eval_strategy: no", '`eval_strategy` must be one of no, steps, .*, got False .*write "no"'),
        ("datasets: [{pth: x}]", r"unknown key `pth` in `datasets`; did you mean `path`\?"),
        ("datasets: [{name: x}]", "`path` is missing in an entry of `datasets`"),
        ("env: 3", "`env` must be a mapping"),
        ("learning-rate: 0.1", r"unknown key `learning-rate`; did you mean `learning_rate`\?"),
        ("xyzzy: 1", "unknown key `xyzzy`; `--help` lists"),
        ("1: 1", "unknown key `1`"),
    ],
)
def test_wrong_line_in_the_recipe(recipe, line, message):
    with pytest.raises(InputError, match=r"recipe\.yaml: " + message):
        read(["--config", recipe(RECIPE + line)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_proceses: 1\n" + RECIPE, r"unknown key `num_proceses`; did you mean `num_processes`\?"),
        (RECIPE.replace("toy_variant", "other_variant"), "`module` is other_variant, but toy_variant was started"),
        (RECIPE.replace("model_name_or_path: a/model", ""), "`model_name_or_path` is missing"),
        (RECIPE.replace("dataset_name: a/dataset", ""), "`dataset_name` is missing"),
        ("- a\n- b\n", r"recipe.yaml must hold lines of `key: value` .*got \['a', 'b'\]"),
        ("", "recipe.yaml must hold lines of `key: value` .*got None"),
        ("a: [", "recipe.yaml is not valid YAML"),
        (RECIPE.replace("toy_weight: 0.5", "toy_weight: -1"), "`toy_weight` must be 0 or more, got -1"),
    ],
)
def test_wrong_recipe(recipe, text, message):
    with pytest.raises(InputError, match=message):
        read(["--config", recipe(text)])


def test_missing_recipe():
    with pytest.raises(InputError, match=r"nowhere\.yaml can't be read: No such file"):
        read(["--config", "nowhere.yaml"])


def test_recipe_given_without_config(recipe):
    with pytest.raises(InputError, match="does not belong to a flag; pass a recipe as `--config FILE`"):
        read([recipe()])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--toy_wieght", "1"], "did you mean `--toy_weight`?"),
        (["--toy_weight", "heavy"], "argument --toy_weight/--toy-weight: invalid float value: 'heavy'"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_main_ends_with_a_short_message(recipe, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(ToyTrainer, ToyConfig, ["--config", recipe(), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.startswith("usage: python -m toy_variant [--config") and error.count("\n") == 2


def test_missing_split(recipe, dataset_folder, capsys):
    text = RECIPE.replace("a/dataset", str(dataset_folder)) + "dataset_train_split: trian\n"
    with pytest.raises(SystemExit):
        main(ToyTrainer, ToyConfig, ["--config", recipe(text)])
    assert "`dataset_train_split` is 'trian', but the data set has train, test" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in hf_sft_variants.__all__ if name.endswith("Config")])
def test_no_key_of_a_method_is_an_abbreviation_for_trl(name):
    """`trl sft` reads the first letters of one of its own flags as that flag, before our module is started."""
    keys, trl_keys = ({field.name for field in fields(c)} for c in (getattr(hf_sft_variants, name), SFTConfig))
    flags = make_parser(SFTTrainer, SFTConfig)._option_string_actions
    assert not [flag for flag in flags if flag.startswith(tuple(f"--{key}" for key in keys - trl_keys))]


def test_missing_data(recipe, tmp_path, capsys):
    folder = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit):
        main(ToyTrainer, ToyConfig, ["--config", recipe(RECIPE.replace("a/dataset", folder))])
    error = " ".join(capsys.readouterr().err.split())
    assert f"`dataset_name` is {folder!r}, which can't be loaded" in error
    assert "`hf-sft-variants quickstart` writes quickstart/data" in error


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_recipes_are_read_strictly(path, monkeypatch):
    module = yaml.safe_load(path.read_text()).get("module")
    trainer_class, config_class = (DPOTrainer, DPOConfig) if path.stem.endswith("_dpo") else (SFTTrainer, SFTConfig)
    if module is not None:
        package = importlib.import_module(module)
        trainer_class, config_class = (
            next(getattr(package, name) for name in package.__all__ if name.endswith(suffix))
            for suffix in ("Trainer", "Config")
        )
    parse(make_parser(trainer_class, config_class), ["--config", str(path), "--use_cpu", "true", "--bf16", "false"])


def test_chat_templates_of_recipes_are_there():
    """TRL would look for a missing file on the Hub."""
    templates = [yaml.safe_load(path.read_text()).get("chat_template_path") for path in RECIPES]
    assert all((REPOSITORY / template).is_file() for template in templates if template)


@pytest.mark.parametrize(
    ("recipe_name", "own_keys"),
    [
        ("sft_go.yaml", {"group_by", "important_fraction", "worst_group_weight"}),
        ("poft.yaml", {"reference_models", "beta", "gamma"}),
        ("poft_uniform.yaml", {"preference_weighting"}),
        pytest.param("sftmix.yaml", {"mixup_weight", "mixup_alpha", "confidence_source"}, marks=needs("sftmix")),
    ],
)
def test_quickstart_recipes_differ_in_the_method_alone(recipe_name, own_keys):
    ours, plain = (
        yaml.safe_load((REPOSITORY / "recipes" / "quickstart" / name).read_text())
        for name in (recipe_name, "sft_baseline.yaml")
    )
    assert {key for key in ours if ours[key] != plain.get(key)} == {"module", "output_dir", *own_keys}
    assert plain.keys() <= ours.keys()


def test_quickstart_recipes_of_sftkey_differ_in_stages_and_epochs_alone():
    paths = sorted((REPOSITORY / "recipes" / "quickstart").glob("sftkey*.yaml"))
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in paths}
    arm_keys = ("stages", "stage_fractions", "key_loss_weight", "num_train_epochs")
    arms = {name: [recipe.pop(key, None) for key in arm_keys] for name, recipe in recipes.items()}
    assert arms == {
        "sftkey": [["full", "key"], [0.5, 0.5], None, 2],
        "sftkey_compute_matched": [["full", "full"], None, None, 2],
        "sftkey_key_tag": [["key"], None, None, 1],
        "sftkey_reversed": [["key", "full"], None, None, 2],
        "sftkey_sft_tag": [["full"], None, None, 1],
        "sftkey_weighted": [["full"], None, 4.0, 2],
    }
    for name, recipe in recipes.items():
        assert recipe == recipes["sftkey"] | {"output_dir": f"quickstart/runs/{name}"}


# LoRA and QLoRA on one GPU change these keys, none of the method's
LORA_KEYS = {"num_processes", "accelerate_config", "dtype", "output_dir", "learning_rate", "reference_batch_tokens"}
LORA_KEYS |= {"use_peft", "lora_r", "lora_alpha", "lora_target_modules", "lora_dropout", "optim", "load_in_4bit"}
LORA_KEYS |= {"use_bnb_nested_quant", "per_device_train_batch_size", "gradient_accumulation_steps"}


@pytest.mark.parametrize(
    ("suffix", "own_keys"),
    [
        ("_lora", LORA_KEYS),
        ("_qlora", LORA_KEYS),
        ("_rho1", {"group_by", "reference_model", "output_dir"}),
        ("_llmlingua2", {"group_by", "importance_model", "output_dir"}),
    ],
)
def test_variants_of_recipes_differ_in_their_own_keys_alone(suffix, own_keys):
    variants = [path for path in RECIPES if path.stem.endswith(suffix)]
    assert variants
    for path in variants:
        main_path = path.with_name(path.name.replace(suffix, ""))
        recipe, main_recipe = (yaml.safe_load(path.read_text()) for path in (path, main_path))
        keys = recipe.keys() | main_recipe.keys()
        assert {key for key in keys if recipe.get(key) != main_recipe.get(key)} <= own_keys
        assert recipe["output_dir"] == main_recipe["output_dir"] + suffix


def test_each_method_has_recipes_for_lora_and_qlora():
    methods = {
        suffix: {path.parent.name for path in RECIPES if path.stem.endswith(suffix)} for suffix in ("_lora", "_qlora")
    }
    assert methods["_lora"] == methods["_qlora"] == METHODS.keys() - {"base", "weighted"}  # the published ones


# The commands themselves, on a tiny model.


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"what is {i} plus {i}", "completion": f" {i} plus {i} is {2 * i}"} for i in range(8)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_model_factory, tokenizer):
    folder = str(tmp_path_factory.mktemp("model"))
    tiny_model_factory(num_hidden_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_recipe(tmp_path, model_folder, dataset_folder):
    values = {
        "num_processes": 1,
        "module": "hf_sft_variants.sft_go",
        "worst_group_weight": 0.5,
        "min_grouped_tokens": 2,
        "model_name_or_path": model_folder,
        "dataset_name": str(dataset_folder),
        "output_dir": str(tmp_path / "run"),
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "use_cpu": True,
        "bf16": False,
        "max_steps": 5,
        "logging_steps": 1,
        "report_to": "none",
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def assert_sft_go_trained(folder, steps, worst_group_weight):
    """Returns what was logged."""
    assert (folder / "adapter_model.safetensors").is_file()
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "- sft-go\n" in card and "trained with SFT-GO" in card
    assert "# Model Card for run\n" in card and "None" not in card and "huggingface.co/datasets" not in card
    state = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert state["log_history"][0]["sft_go/worst_group_weight"] == worst_group_weight
    return state["log_history"]


def test_stock_trl_command_runs_the_method(tiny_recipe):
    """In a process of its own; the other tests start what the command would launch."""
    trl = Path(sys.executable).with_name("trl")
    command = [trl, "sft", "--config", tiny_recipe, "--max_steps", "2", "--worst_group_weight", "0.25"]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONPATH=str(REPOSITORY), PYTHONWARNINGS="ignore")
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "Model saved to" in finished.stdout
    assert_sft_go_trained(tiny_recipe.parent / "run", steps=2, worst_group_weight=0.25)


def test_accelerate_launch_runs_the_method(tiny_recipe):
    command = ["--cpu", "-m", "hf_sft_variants.sft_go", "--config", str(tiny_recipe)]
    start(launch_command_parser().parse_args([*command, "--max_steps", "1", "--eval_strategy", "steps"]))
    logs = assert_sft_go_trained(tiny_recipe.parent / "run", steps=1, worst_group_weight=0.5)
    assert any("eval_loss" in log for log in logs)


def test_stock_trl_command_refuses_a_misspelt_key(tiny_recipe, capsys):
    tiny_recipe.write_text(tiny_recipe.read_text() + "learnin_rate: 0.1\n")
    with pytest.raises(SystemExit, match="2"):
        start(launch_of_trl(["sft", "--config", str(tiny_recipe)]))
    error = f"error: {tiny_recipe}: unknown key `learnin_rate`; did you mean `learning_rate`?"
    assert error in capsys.readouterr().err


def test_what_a_trainer_announces_is_shown(tmp_path, monkeypatch, caplog):
    """Such as which stage begins, although Python shows warnings only."""

    class AnnouncingTrainer:
        """Stands in for a trainer with stages."""

        def __init__(self, **kwargs):
            get_logger("hf_sft_variants.toy").info("Stage 1 begins.")
            raise InputError("That's all.")

    AnnouncingTrainer.__module__ = "toy_variant.trainer"
    monkeypatch.setattr(logging.getLogger("hf_sft_variants"), "level", logging.NOTSET)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    argv = ["--model_name_or_path", "nowhere", "--dataset_name", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(SystemExit):
        main(AnnouncingTrainer, SFTConfig, argv)
    assert "Stage 1 begins." in caplog.text


def test_refusals_and_missing_models_are_short_messages(tmp_path, capsys):
    """A trainer's `InputError` ends the program like any other wrong input."""

    class RefusingTrainer:
        """Stands in for a trainer that refuses its data."""

        error = InputError("Row 3 is wrong.")

        def __init__(self, **kwargs):
            raise self.error

    RefusingTrainer.__module__ = "toy_variant.trainer"
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    argv = ["--model_name_or_path", "nowhere", "--dataset_name", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    for error, message in (
        (InputError("Row 3 is wrong."), "error: Row 3 is wrong."),
        (OSError("no file"), "error: `model_name_or_path` is 'nowhere', which can't be loaded: no file"),
        (SafetensorError("cut"), "error: `model_name_or_path` is 'nowhere', which can't be loaded: cut"),
    ):
        RefusingTrainer.error = error
        with pytest.raises(SystemExit) as exit_info:
            main(RefusingTrainer, SFTConfig, argv)
        assert exit_info.value.code == 2 and message in capsys.readouterr().err
    RefusingTrainer.error = ValueError("a defect, not an input")
    with pytest.raises(ValueError, match="a defect, not an input"):  # it keeps its traceback
        main(RefusingTrainer, SFTConfig, argv)
