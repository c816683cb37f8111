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
        seeds = generator.choices(range(len(arm)), k=len(arm))
        drawn.append(
            statistics.fmean(
                sum(a["rows"][i] for i in rows) / sum(a["counts"][i] if a["counts"] else 1 for i in rows)
                - sum(b["rows"][i] for i in rows) / sum(b["counts"][i] if b["counts"] else 1 for i in rows)
                for a, b in ((arm[seed], baseline[seed]) for seed in seeds)
            )
        )
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
    assert (result["low"], result["high"]) == (pytest.approx(0.1), pytest.approx(0.4))
    one = compare(arm[:1], baseline[:1])
    assert (one["low"], one["high"], one["verdict"]) == (None, None, "no interval")


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
