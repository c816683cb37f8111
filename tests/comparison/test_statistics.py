"""Intervals against their definition, how often they hold, and what has to hold of any."""

import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_sft_variants.comparison.evaluations import metric
from hf_sft_variants.comparison.statistics import compare, half_width, summarize


def nll_of(seed, rows=30, shift=0.0):
    generator = random.Random(seed)
    counts = [generator.randint(3, 40) for _ in range(rows)]
    return metric([count * (generator.uniform(0.5, 2.0) + shift) for count in counts], counts, higher_is_better=False)


def accuracy_of(seed, rows=30, share=0.5):
    generator = random.Random(seed)
    return metric([int(generator.random() < share) for _ in range(rows)])


def without_rows(metric):
    return {**metric, "rows": None, "counts": None}


def slow_interval(arm, baseline):
    """The definition, one seed and one row at a time."""
    cells = []
    for ours, theirs in zip(arm, baseline, strict=True):
        cells.append([])
        for row in range(len(ours["rows"])):
            values = []
            for of in (ours, theirs):
                counts = of["counts"] or [1] * len(of["rows"])
                values.append(of["mean"] + (of["rows"][row] - of["mean"] * counts[row]) / statistics.fmean(counts))
            cells[-1].append(values[0] - values[1])
    of_seeds = [statistics.fmean(row) for row in cells]
    of_rows = [statistics.fmean(column) for column in zip(*cells, strict=True)]
    mean, seeds, rows = statistics.fmean(of_seeds), len(of_seeds), len(of_rows)
    noise = sum((cells[s][r] - of_seeds[s] - of_rows[r] + mean) ** 2 for s in range(seeds) for r in range(rows))
    noise /= (seeds - 1) * (rows - 1) * seeds * rows
    t_seeds, t_rows = (stats.t(n - 1).ppf(0.975) for n in (seeds, rows))
    from_rows = statistics.variance(of_rows) / rows
    square = t_seeds**2 * statistics.variance(of_seeds) / seeds + t_rows**2 * max(from_rows - noise, 0)
    half = max(square, t_rows**2 * from_rows) ** 0.5
    return mean - half, mean + half


@pytest.mark.parametrize("make", [nll_of, accuracy_of])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_interval_is_that_of_the_definition(make, seeds):
    arm, baseline = [make(seed) for seed in range(seeds)], [make(seed) for seed in range(10, 10 + seeds)]
    result = compare(arm, baseline)
    assert (result["low"], result["high"]) == pytest.approx(slow_interval(arm, baseline))
    assert result["per_seed"] == [ours["mean"] - theirs["mean"] for ours, theirs in zip(arm, baseline, strict=True)]
    assert result["difference"] == pytest.approx(statistics.fmean(result["per_seed"]))


def test_interval_of_one_part_alone_is_students():
    """Rows without seeds, and seeds without rows: Student's interval of the one that varies."""
    values = np.random.default_rng(1).normal(size=8)
    expected = stats.t.ppf(0.975, 7) * values.std(ddof=1) / 8**0.5
    assert half_width(np.tile(values, (4, 1))) == pytest.approx(expected)
    assert half_width(np.tile(values[:, None], (1, 50))) == pytest.approx(expected)
    assert half_width(values[:, None]) == pytest.approx(expected)


def test_pairing_removes_what_the_rows_have_in_common():
    baseline = [accuracy_of(seed, rows=200) for seed in (1, 2, 3)]
    arm = [metric([1 - value if i < 3 else value for i, value in enumerate(of["rows"])]) for of in baseline]
    paired = compare(arm, baseline)
    unpaired = compare([accuracy_of(seed, rows=200) for seed in (7, 8, 9)], baseline)
    assert paired["high"] - paired["low"] < 0.3 * (unpaired["high"] - unpaired["low"])


def test_verdicts():
    baseline = [nll_of(seed) for seed in (1, 2, 3)]
    assert compare([nll_of(seed, shift=-0.3) for seed in (1, 2, 3)], baseline)["verdict"] == "better"
    assert compare([nll_of(seed, shift=0.3) for seed in (1, 2, 3)], baseline)["verdict"] == "worse"
    assert compare([nll_of(seed) for seed in (4, 5, 6)], baseline)["verdict"] == "no difference shown"
    good, bad = ([accuracy_of(seed, share=share) for seed in (1, 2, 3)] for share in (0.9, 0.1))
    assert compare(good, bad)["verdict"] == "better" and compare(bad, good)["verdict"] == "worse"


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("known", [True, False])
def test_below_three_seeds_there_is_no_verdict(seeds, known):
    good, bad = ([accuracy_of(seed, share=share) for seed in range(seeds)] for share in (0.9, 0.1))
    if not known:
        good, bad = [[without_rows(metric) for metric in metrics] for metrics in (good, bad)]
    result = compare(good, bad)
    assert result["verdict"] == "no verdict below 3 seeds"
    if seeds == 1:
        assert result["low"] is result["high"] is None
    else:
        assert result["low"] < result["difference"] < result["high"]


def test_without_rows_there_are_the_seeds_alone():
    baseline = [without_rows(accuracy_of(seed)) for seed in (1, 2, 3)]
    arm = [{**metric, "mean": metric["mean"] + gain} for metric, gain in zip(baseline, (0.1, 0.2, 0.4), strict=True)]
    result = compare(arm, baseline)
    # By hand: mean 7 / 30, standard deviation 0.15275, Student's t of 2 degrees of freedom 4.30265
    half = 4.30265 * 0.152753 / 3**0.5
    assert (result["low"], result["high"]) == (pytest.approx(7 / 30 - half, 1e-4), pytest.approx(7 / 30 + half, 1e-4))


def test_a_metric_without_a_direction_is_neither_better_nor_worse():
    baseline, arm = (
        [{**accuracy_of(seed, share=share), "higher_is_better": None} for seed in (1, 2, 3)] for share in (0.1, 0.9)
    )
    assert compare(arm, baseline)["verdict"] == compare(baseline, arm)["verdict"] == "different"
    assert compare(arm, arm)["verdict"] == "no difference shown"


@pytest.mark.parametrize("shared", [0.0, 0.05, 0.25])
@pytest.mark.parametrize("spread_of_seeds", [0.0, 0.01, 0.05, 0.25, 1.0])
@pytest.mark.parametrize("rows", [84, 500])
@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_where_arms_are_equal(seeds, rows, spread_of_seeds, shared):
    """Seeds' effects, effects of rows that all seeds share, and the noise of single cells."""
    generator, data_sets = np.random.default_rng(0), 2000
    of_seeds = generator.normal(0, spread_of_seeds, (data_sets, seeds, 1))
    of_rows = generator.normal(0, shared, (data_sets, 1, rows))
    noise = generator.standard_normal((data_sets, seeds, rows), dtype=np.float32) * 0.25
    differences = of_seeds + of_rows + noise
    covered = np.abs(differences.mean((1, 2))) <= half_width(differences)
    assert 0.93 <= covered.mean() <= 0.995


@pytest.mark.parametrize("spread_of_seeds", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_where_only_rows_and_seeds_vary(seeds, spread_of_seeds):
    """Cells without noise: every seed sees the same effect of a row."""
    generator = np.random.default_rng(0)
    of_seeds = generator.normal(0, spread_of_seeds, (2000, seeds, 1))
    differences = of_seeds + generator.normal(0, 0.25, (2000, 1, 84))
    assert 0.93 <= (np.abs(differences.mean((1, 2))) <= half_width(differences)).mean() <= 0.995


@pytest.mark.parametrize("spread_of_seeds", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_of_verdicts_on_ratios_of_sums(seeds, spread_of_seeds):
    """NLL with other token counts in every row, through the whole comparison: long rows weigh more, and vary alike."""
    generator, wrong, data_sets = np.random.default_rng(0), 0, 600
    for _ in range(data_sets):
        counts = generator.integers(5, 60, 84)
        difficulty = generator.normal(1, 0.5, 84)
        arms = [
            [
                metric(
                    list(counts * (difficulty + generator.normal(0, spread_of_seeds) + generator.normal(0, 0.25, 84))),
                    list(counts),
                    higher_is_better=False,
                )
                for _ in range(seeds)
            ]
            for _ in range(2)
        ]
        wrong += compare(*arms)["verdict"] != "no difference shown"
    assert 0.005 <= wrong / data_sets <= 0.07


def test_summary():
    metrics = [{"mean": 0.2}, {"mean": 0.6}]
    assert summarize(metrics) == {"mean": 0.4, "spread": pytest.approx(0.2 * 2**0.5)}
    assert summarize(metrics[:1]) == {"mean": 0.2, "spread": None}


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 8), st.randoms(use_true_random=False))
def test_swapping_the_arms_negates_and_equal_arms_are_equal(seeds, rows, generator):
    first, second = (
        [
            metric([generator.uniform(0, 9) for _ in range(rows)], [generator.randint(1, 9) for _ in range(rows)])
            for _ in range(seeds)
        ]
        for _ in range(2)
    )
    there, back = compare(first, second), compare(second, first)
    assert there["difference"] == pytest.approx(-back["difference"], abs=1e-12)
    assert (there["low"], there["high"]) == (
        pytest.approx(-back["high"], abs=1e-9),
        pytest.approx(-back["low"], abs=1e-9),
    )
    assert there["low"] <= there["high"]
    same = compare(first, first)
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)
