"""The results of a study as one self-contained HTML page."""

import importlib.resources
import statistics
from collections.abc import Iterable
from html import escape
from shlex import quote
from string import Template
from typing import Any

import yaml

from .curves import learning_curve, line_styles, render_curves
from .statistics import LEVEL, MIN_SEEDS
from .study import OTHER_RUN, texts_in


_SHARES = ("accuracy", "format")
_NAMES = {"nll": "held-out NLL", "accuracy": "accuracy", "format": "format"}


def render_report(results: dict[str, Any]) -> str:
    """
    Render the results of a study, complete or not; the same results give the same HTML.

    Args:
        results (`dict[str, Any]`):
            Results from [`~hf_sft_variants.comparison.results.collect_results`].
    """
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    study = results["study"]
    header = {
        "arms": ", ".join(study["arms"]),
        "baseline": study["baseline"],
        "seeds": ", ".join(map(str, study["seeds"])),
        "runs": f"{len(results['runs'])} of {len(results['runs']) + len(results['missing'])} finished",
        "machine": "; ".join(_distinct(_place(run["machine"]) for run in results["runs"])),
    }
    return Template(template).substitute(
        title=escape(results["study_file"]),
        header=_definitions(header),
        study=escape(yaml.safe_dump(study, sort_keys=False, allow_unicode=True)),
        styles=line_styles(list(study["arms"])),
        missing=_missing(results["missing"]),
        sections="".join(_section(results, data) for data in study["data"]),
        reading=_how_to_read(results),
        command=escape(f"hf-sft-variants compare --config {quote(results['study_file'])}"),
        versions="".join(_distinct(_definitions(run["versions"]) for run in results["runs"])),
    )


def _place(machine: dict[str, Any]) -> str:
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    return ", ".join([*machine["gpus"], cpu])


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _definitions(values: dict[str, Any]) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in values.items()
    )


def _missing(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return ""
    items = []
    for run in runs:
        error = f"<pre>{escape(run['error'])}</pre>" if run["error"] else ""
        items.append(f"<li>{escape(run['arm'])} on {escape(run['data'])}, seed {run['seed']}{error}</li>")
    return f'<div class="missing"><p>These runs are missing:</p><ul>{"".join(items)}</ul></div>'


def _section(results: dict[str, Any], data: str) -> str:
    arms = list(results["study"]["arms"])
    runs = {arm: [run for run in results["runs"] if (run["data"], run["arm"]) == (data, arm)] for arm in arms}
    runs = {arm: of_arm for arm, of_arm in runs.items() if of_arm}
    if not runs:
        return f"<h2>Data: {escape(data)}</h2><p>No run is finished.</p>"
    curves = {arm: learning_curve(of_arm) for arm, of_arm in runs.items()}
    title = "Logged training NLL, nats per token in the loss, mean over seeds"
    rows = len(next(iter(runs.values()))[0]["evaluations"]["nll"]["rows"])
    return (
        f"<h2>Data: {escape(data)}</h2><p>{rows:,} test rows</p>{_metrics_table(results, data, list(runs))}"
        f"{_controls_table(results, data)}<h3>Cost</h3>{_cost_table(runs, results['study'])}"
        f"<h3>Learning curves</h3>{render_curves(curves, arms, title)}{_answers(runs)}"
    )


def _metrics_table(results: dict[str, Any], data: str, arms: list[str]) -> str:
    summary = {(row["arm"], row["metric"]): row for row in results["summary"] if row["data"] == data}
    baseline = results["study"]["baseline"]
    differences = _differences(results, data)
    metrics = list(dict.fromkeys(metric for _, metric in summary))
    rows = []
    for arm in arms:
        cells = []
        for metric in metrics:
            cells.append(_summary_cell(metric, summary.get((arm, metric)), len(results["study"]["seeds"])))
            cells.append(_difference_cell(metric, differences.get((arm, baseline, metric)), arm == baseline))
        rows.append([_head(arm), *cells])
    headings = ["arm", *(text for metric in metrics for text in (_NAMES.get(metric, metric), "difference"))]
    return _table(headings, rows)


def _controls_table(results: dict[str, Any], data: str) -> str:
    """Differences of arms from their controls, if any arm has some."""
    differences = _differences(results, data)
    pairs = dict.fromkeys((arm, other) for arm, other, _ in differences if other != results["study"]["baseline"])
    if not pairs:
        return ""
    metrics = list(dict.fromkeys(metric for *_, metric in differences))
    rows = [
        [_head(arm), _cell(other), *(_difference_cell(m, differences.get((arm, other, m)), False) for m in metrics)]
        for arm, other in pairs
    ]
    headings = ["arm", "control", *(f"difference in {_NAMES.get(metric, metric)}" for metric in metrics)]
    return f"<h3>Against controls</h3>{_table(headings, rows)}"


def _differences(results: dict[str, Any], data: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = [row for row in results["differences"] if row["data"] == data]
    return {(row["arm"], row["baseline"], row["metric"]): row for row in rows}


def _summary_cell(metric: str, row: dict[str, Any] | None, seeds: int) -> str:
    if row is None:
        return _cell("–")
    spread = f" ± {_figure(metric, row['spread'])}" if row["spread"] is not None else ""
    note = f"{len(row['seeds'])} of {seeds} seeds" if len(row["seeds"]) < seeds else ""
    return _cell(_figure(metric, row["mean"]) + spread, note)


def _difference_cell(metric: str, row: dict[str, Any] | None, is_baseline: bool) -> str:
    if row is None:
        return _cell("baseline" if is_baseline else "–")
    ends = [_figure(metric, end, "+") for end in (row["low"], row["high"]) if end is not None]
    interval = f"<small>[{', '.join(ends)}]</small>" if ends else ""
    verdict = row["verdict"]
    return (
        f"<td>{_figure(metric, row['difference'], '+')}{interval}"
        f'<small class="{verdict.split()[0]}">{escape(verdict)}</small></td>'
    )


def _figure(metric: str, value: float, sign: str = "") -> str:
    """Shares in per cent, likelihoods and task metrics as they are."""
    return f"{value:{sign}.1%}" if metric in _SHARES else f"{value:{sign}.4f}"


def _cost_table(runs: dict[str, list[dict[str, Any]]], study: dict[str, Any]) -> str:
    baseline = study["baseline"]
    reference = _mean(runs[baseline], "seconds") if baseline in runs else None
    rows = []
    for arm, of_arm in runs.items():
        seconds, before = _mean(of_arm, "seconds"), _mean(of_arm, "seconds_before_training")
        ratio = f"{seconds / reference:.2f} ×" if reference else "–"
        kinds = sorted({run["memory_kind"] for run in of_arm})
        rows.append(
            [
                _head(arm),
                _cell(f"{_mean(of_arm, 'steps'):,.0f}"),
                _cell(
                    f"{seconds:,.1f} s", f"{before:,.1f} s before the first step{_needed(runs, study['arms'][arm])}"
                ),
                _cell(ratio),
                _cell(f"{_mean(of_arm, 'tokens'):,.0f}"),
                _cell(f"{max(run['peak_memory_bytes'] for run in of_arm) / 2**30:.2f} GiB", ", ".join(kinds)),
            ]
        )
    return _table(["arm", "steps", "time", f"time / {baseline}", "tokens", "peak memory"], rows)


def _needed(runs: dict[str, list[dict[str, Any]]], arm: dict[str, Any]) -> str:
    """Time of other arms whose models an arm uses, which is not part of its own."""
    names = _distinct(name for text in texts_in(arm.get("overrides")) for name in OTHER_RUN.findall(text))
    return "".join(f"; plus {_mean(runs[name], 'seconds'):,.1f} s of {name}" for name in names if name in runs)


def _answers(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Generated answers to the same prompts, from each arm's first seed."""
    first = {f"{arm}, seed {of_arm[0]['seed']}": of_arm[0]["generations"] for arm, of_arm in runs.items()}
    parts = []
    for i, sample in enumerate(next(iter(first.values()))):
        answers = {"expected": sample["expected"], **{arm: texts[i]["generation"] for arm, texts in first.items()}}
        boxes = "".join(
            f"<div><h4>{escape(name)}</h4><pre>{escape(text)}</pre></div>" for name, text in answers.items()
        )
        parts.append(f'<pre>{escape(sample["prompt"])}</pre><div class="answers">{boxes}</div>')
    return f"<h3>Answers to the first prompts</h3>{''.join(parts)}" if parts else ""


def _how_to_read(results: dict[str, Any]) -> str:
    sentences = [
        "± is the standard deviation over seeds"
        + (", which one seed does not have." if len(results["study"]["seeds"]) == 1 else "."),
        f"A difference is the arm minus {escape(results['study']['baseline'])}, or minus a control, paired by seed. "
        f"Its {LEVEL:.0%} interval, in brackets, is over new seeds and new test rows (for metrics without rows, over "
        "new seeds).",
        f"Verdicts need {MIN_SEEDS} seeds, intervals two. An interval that contains 0 shows no difference, which does "
        "not prove that there is none. One interval in twenty is expected to miss the true difference.",
        "Held-out NLL is in nats per token, lower is better; accuracy and format are shares of the test rows.",
        "Time is that of the run's process without imports and saving. It includes scoring and a reference that the "
        "method trains itself, but not another arm whose model is used, whose time is given separately. Tokens are "
        "those that were trained on, without padding, including those of a reference that the method trains itself. "
        "Peak memory is the highest over the seeds.",
        "Curves show the plain NLL of the tokens in the loss, which may be other tokens than plain SFT's.",
    ]
    return " ".join(sentences)


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _table(headings: Iterable[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headings)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(text: str) -> str:
    return f'<th scope="row">{escape(text)}</th>'


def _cell(text: str, note: str = "") -> str:
    return f"<td>{escape(text)}{f'<small>{escape(note)}</small>' if note else ''}</td>"
