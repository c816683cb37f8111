"""Intervals against a slow bootstrap, and what has to hold of any."""

import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_variants.comparison.evaluations import metric
from hf_sft_variants.comparison.statistics import compare, summarize


def nll_of(seed, rows=30, shift=0.0):
    generator = random.Random(seed)
    counts = [generator.randint(3, 40) for _ in range(rows)]
    return metric([count * (generator.uniform(0.5, 2.0) + shift) for count in counts], counts, higher_is_better=False)


def accuracy_of(seed, rows=30, share=0.5):
    generator = random.Random(seed)
    return metric([int(generator.random() < share) for _ in range(rows)])


def without_rows(metric):
    return {**metric, "rows": None, "counts": None}


def slow_interval(arm, baseline, draws=2000):
    """The definition, one draw and one row at a time."""
    generator, drawn = random.Random(5), []
    for _ in range(draws):
        rows = generator.choices(range(len(arm[0]["rows"])), k=len(arm[0]["rows"]))
        differences = [
            sum(a["rows"][i] for i in rows) / sum(a["counts"][i] if a["counts"] else 1 for i in rows)
            - sum(b["rows"][i] for i in rows) / sum(b["counts"][i] if b["counts"] else 1 for i in rows)
            for a, b in zip(arm, baseline, strict=True)
        ]
        mean = statistics.fmean(differences)
        seeds = generator.choices(range(len(arm)), k=len(arm))
        deviation = statistics.fmean(differences[seed] - mean for seed in seeds)
        drawn.append(mean + (len(arm) / (len(arm) - 1)) ** 0.5 * deviation)
    return np.quantile(drawn, [0.025, 0.975])


@pytest.mark.parametrize("make", [nll_of, accuracy_of])
def test_interval_is_that_of_the_definition(make):
    arm, baseline = [make(seed) for seed in (1, 2, 3)], [make(seed) for seed in (4, 5, 6)]
    result = compare(arm, baseline)
    low, high = slow_interval(arm, baseline)
    # Both are random: an end of 2,000 draws has a standard error of about 3 % of the width
    assert result["low"] == pytest.approx(low, abs=0.12 * (high - low))
    assert result["high"] == pytest.approx(high, abs=0.12 * (high - low))
    assert result["per_seed"] == [ours["mean"] - theirs["mean"] for ours, theirs in zip(arm, baseline, strict=True)]
    assert result["difference"] == pytest.approx(statistics.fmean(result["per_seed"]))


def test_pairing_removes_what_the_rows_have_in_common():
    baseline = [accuracy_of(1, rows=200)]
    same_but_three = metric([1 - value if i < 3 else value for i, value in enumerate(baseline[0]["rows"])])
    paired, unpaired = compare([same_but_three], baseline), compare([accuracy_of(7, rows=200)], baseline)
    assert paired["high"] - paired["low"] < 0.3 * (unpaired["high"] - unpaired["low"])


def test_verdicts():
    baseline = [nll_of(seed) for seed in (1, 2)]
    assert compare([nll_of(seed, shift=-0.3) for seed in (1, 2)], baseline)["verdict"] == "better"
    assert compare([nll_of(seed, shift=0.3) for seed in (1, 2)], baseline)["verdict"] == "worse"
    assert compare([nll_of(seed) for seed in (3, 4)], baseline)["verdict"] == "no difference shown"
    assert compare([accuracy_of(1, share=0.9)], [accuracy_of(2, share=0.1)])["verdict"] == "better"
    assert compare([accuracy_of(1, share=0.1)], [accuracy_of(2, share=0.9)])["verdict"] == "worse"


def test_without_rows_there_are_the_seeds_alone():
    baseline = [without_rows(accuracy_of(seed)) for seed in (1, 2, 3)]
    arm = [{**metric, "mean": metric["mean"] + gain} for metric, gain in zip(baseline, (0.1, 0.2, 0.4), strict=True)]
    result = compare(arm, baseline)
    # By hand: mean 7 / 30, standard deviation 0.15275, Student's t of 2 degrees of freedom 4.30265
    half = 4.30265 * 0.152753 / 3**0.5
    assert (result["low"], result["high"]) == (pytest.approx(7 / 30 - half, 1e-4), pytest.approx(7 / 30 + half, 1e-4))
    one = compare(arm[:1], baseline[:1])
    assert (one["low"], one["high"], one["verdict"]) == (None, None, "no interval")


def test_a_metric_without_a_direction_is_neither_better_nor_worse():
    baseline, arm = ([{**accuracy_of(1, share=share), "higher_is_better": None}] for share in (0.1, 0.9))
    assert compare(arm, baseline)["verdict"] == compare(baseline, arm)["verdict"] == "different"
    assert compare(arm, arm)["verdict"] == "no difference shown"


@pytest.mark.parametrize(
    "seeds, rows, spread_of_seeds, most",
    [(1, 84, 0.0, 0.1), (2, 84, 0.03, 0.1), (3, 500, 0.03, 0.15), (2, 500, 1.0, 0.45), (3, 500, 1.0, 0.3)],
)
def test_how_often_equal_arms_are_called_different(seeds, rows, spread_of_seeds, most):
    """One time in twenty is what the interval says; docs/compare.md says how much more it is where seeds matter."""
    generator, different = np.random.default_rng(0), 0
    for _ in range(100):
        difficulty = generator.normal(1, 0.5, rows)
        arms = [
            [
                metric(list(difficulty + generator.normal(0, spread_of_seeds) + generator.normal(0, 0.25, rows)))
                for _ in range(seeds)
            ]
            for _ in range(2)
        ]
        different += compare(*arms)["verdict"] != "no difference shown"
    assert different / 100 <= most


def test_summary():
    metrics = [{"mean": 0.2}, {"mean": 0.6}]
    assert summarize(metrics) == {"mean": 0.4, "spread": pytest.approx(0.2 * 2**0.5)}
    assert summarize(metrics[:1]) == {"mean": 0.2, "spread": None}


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 8), st.randoms(use_true_random=False))
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
    assert (same["difference"], same["low"], same["high"], same["verdict"]) == (0, 0, 0, "no difference shown")
