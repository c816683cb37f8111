"""Two gloo processes give the loss and the gradients of one."""

import pytest
import torch
from helpers import assert_same_gradients, save_models, scores_in
from methods import needs
from two_processes import EVALUATIONS, OTHERS, RUNS, STEPS, load_rows, make_trainer_of, of_methods, run, run_on_two


pytestmark = pytest.mark.distributed

# For one process
TWICE_THE_ROWS = {"gradient_accumulation_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_factory, tokenizer, token_rows):
    """Holds models and rows."""
    folder = tmp_path_factory.mktemp("two_processes")
    save_models(folder, tiny_model_factory(), tokenizer)
    rows = token_rows.select(range(8))
    lengths = [len(ids) for ids in rows["input_ids"]]
    rows = rows.add_column("ref_logps", [[-5.0 - row / 4, -6.0 + row % 3] for row in range(8)])
    rows = rows.add_column("key_mask", [[int(t >= length * 0.6) for t in range(length)] for length in lengths])
    rows = rows.add_column(
        "mine", [[(row + t) % (row % 3 + 1) for t in range(length)] for row, length in enumerate(lengths)]
    )
    rows.to_json(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module")
def results(folder, other_process):
    assert other_process.run(run_on_two, folder, forks=2) == 0
    return torch.load(folder / "results.pt", weights_only=True)


def metrics_of(log, method):
    return {name: value for name, value in log.items() if name == "nll" or name.startswith(f"{method}/")}


@pytest.mark.parametrize("name", of_methods(STEPS))
def test_equal_to_one_process(name, results, folder, tmp_path):
    case, result = STEPS[name], results[name]
    expected = run(case, folder, tmp_path, **TWICE_THE_ROWS)
    assert result["log"]["loss"] == pytest.approx(expected["log"]["loss"], rel=1e-6)
    assert_same_gradients(result["gradients"], expected["gradients"], tolerance=1e-6)
    metrics = metrics_of(expected["log"], case.method)
    assert len(metrics) > (2 if name == "poft_uniform" else 3)
    tolerance = 1e-5 if case.method == "poft" else 1e-6
    assert metrics_of(result["log"], case.method) == pytest.approx(metrics, rel=tolerance)


@needs("sftkey")
def test_stages_equal_to_one_process(results, folder, tmp_path):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    expected = run(OTHERS["stages"], folder, tmp_path, **options)
    assert expected["learning_rates"] == [0, 1e-2, 0, 2e-3] == results["stages"]["learning_rates"]
    # Adam makes steps of full size of tiny gradients, so rounding shows
    for name, values in results["stages"]["weights"].items():
        torch.testing.assert_close(values, expected["weights"][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", of_methods(RUNS))
def test_runs_equal_to_one_process(name, results, folder, tmp_path):
    expected = run(RUNS[name], folder, tmp_path, gradient_accumulation_steps=2)
    assert torch.equal(expected["halves"], results[name]["halves"]) and expected["halves"].sum() == 4
    for parameter, values in results[name]["weights"].items():
        torch.testing.assert_close(values, expected["weights"][parameter], rtol=1e-5, atol=1e-6)
        assert torch.equal(values, results[f"{name}_resumed"]["weights"][parameter])


@needs("sft_go")
def test_processes_score_together(results, folder, tmp_path):
    expected = run(OTHERS["rho1"], folder, tmp_path, **TWICE_THE_ROWS)
    assert results["rho1"]["log"]["loss"] == pytest.approx(expected["log"]["loss"], rel=1e-6)
    assert_same_gradients(results["rho1"]["gradients"], expected["gradients"], tolerance=1e-6)
    by_one, by_two = scores_in(tmp_path / "scores"), scores_in(folder / "two" / "rho1" / "scores")
    assert by_one == by_two and [len(scores) for scores in by_one.values()] == [8]


@needs("sft_go")
def test_counts_of_each_process_alone_are_sft_trainers(results):
    plain, ours = results["separate_counts_of_sft_trainer"], results["separate_counts"]
    assert ours["log"]["loss"] == pytest.approx(plain["log"]["loss"], rel=1e-6)
    assert_same_gradients(ours["gradients"], plain["gradients"], tolerance=1e-6)


@pytest.mark.parametrize("name", of_methods(EVALUATIONS))
def test_rows_repeated_for_the_last_batch_do_not_count(name, results, folder, tmp_path):
    case = EVALUATIONS[name]
    trainer = make_trainer_of(case, folder, tmp_path)
    evaluated = trainer.evaluate(load_rows(folder).select(range(case.num_evaluated)))
    metrics = {name: value for name, value in evaluated.items() if name == "eval_nll" or "/" in name}
    assert len(metrics) >= (1 if case.method == "sftmix" else 4)
    assert metrics == pytest.approx({key: results[name]["evaluated"][key] for key in metrics}, rel=1e-6)
