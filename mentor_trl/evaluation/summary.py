"""From samples to results (JSON), and to Markdown tables beside the paper's figures."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files import write_whole
from . import PAPER_TASKS, TASKS
from .pass_at_k import Estimate, average, estimate, ks_to_report


PAPER_AVERAGES: dict[str, dict[str, float]] = {
    "Qwen2.5-7B": {"on-policy RL": 42.8, "LUFFY": 42.8, "QuestA": 44.1, "MENTOR": 46.7},
    "Qwen2.5-3B": {"on-policy RL": 31.0, "LUFFY": 31.1, "QuestA": 31.8, "MENTOR": 35.3},
    "Llama-3.1-8B": {"on-policy RL": 20.6, "LUFFY": 21.5, "QuestA": 19.0, "MENTOR": 23.8},
}
"""Averages of the nine sets in percent, by base model and method ([paper](https://huggingface.co/papers/2510.04140))."""

PAPER_PASS_AT_32: dict[str, dict[str, float]] = {"Qwen2.5-7B": {"aime24": 36.7, "aime25": 30.0, "amc23": 77.1}}
"""pass@32 of MENTOR in percent, by base model."""

INTERVALS = (
    "Intervals are 95% intervals over the problems of a set: Wilson's, with the effective sample size of the spread "
    "over problems; for an average over sets, that of independent sets (MOVER)."
)
"""What the intervals of tables and files are, in a sentence."""

MANY_CUT = 0.05
"""Share of completions cut off at the limit of new tokens from which the report gives a hint."""


@dataclass(frozen=True)
class TaskRun:
    """
    What one set gave: the rows of `samples_<task>.jsonl`, each with `num_samples` completions. `dataset` is `path`,
    `split` and, where there is one, `config` of the set on the Hub; `room` is the most new tokens that would have
    fitted, where that is known.
    """

    task: str
    num_samples: int
    temperature: float
    dataset: dict[str, str]
    samples: list[dict[str, Any]]
    max_new_tokens: int | None = None
    room: int | None = None


def summarize(run: TaskRun) -> dict[str, Any]:
    """
    What `results.json` says of one set, in shares between 0 and 1. The metric is `"pass@1"` for one sample a problem,
    else `"avg@n"`.
    """
    correct = [row["correct"] for row in run.samples]
    verdicts = Counter(verdict for row in run.samples for verdict in row["verdicts"])
    alone = [row["math_verify"] for row in run.samples if "math_verify" in row]
    cut = [flag for row in run.samples for flag in row.get("truncated", [])]
    return {
        "metric": "pass@1" if run.num_samples == 1 else f"avg@{run.num_samples}",
        **asdict(estimate(correct)),
        "pass_at_k": {str(k): asdict(estimate(correct, k)) for k in ks_to_report(run.num_samples)},
        "num_problems": len(correct),
        "num_samples": run.num_samples,
        "temperature": run.temperature,
        "max_new_tokens": run.max_new_tokens,
        "room": run.room,
        "truncated": fmean(cut) if cut else None,
        "dataset": run.dataset,
        "verdicts": dict(verdicts.most_common()),
        **({"math_verify": asdict(estimate(alone))} if alone else {}),
    }


def collect(model: str, settings: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """
    Put the summaries of several sets together: `model`, `settings`, `tasks`, and `average`, an estimate over the
    paper's nine sets, or `None` where one of them is missing.
    """
    names = ("value", "low", "high", "stderr")
    nine = [Estimate(*(tasks[task][name] for name in names)) for task in PAPER_TASKS if task in tasks]
    mean = asdict(average(nine)) if len(nine) == len(PAPER_TASKS) else None
    return {"model": model, "settings": settings, "tasks": tasks, "average": mean}


def to_markdown(results: dict[str, Any], paper_model: str = "Qwen2.5-7B") -> str:
    """
    The results of [`collect`] as Markdown tables, beside the figures that the paper states for a base model. Those are
    of whole sets: results of the first problems of each (`limit`) stand alone.
    """
    tasks, limit = results["tasks"], results["settings"].get("limit")
    stated = None if limit is not None else paper_model
    parts = [f"# Evaluation of {results['model']}"]
    if limit is not None:
        parts.append(
            f"**A trial: only the first {limit} problems of each set were evaluated.** The paper's figures, of whole "
            "sets, do not stand beside them."
        )
    parts += [_accuracy_table(results, stated), INTERVALS, *_truncation_hints(tasks)]
    sampled = {name: summary for name, summary in tasks.items() if summary["num_samples"] > 1}
    if sampled:
        parts += ["## pass@k", _pass_at_k_table(sampled, stated)]
    parts += ["## Verdicts", _verdict_table(tasks), "## Settings"]
    parts.append("\n".join(f"- {name}: `{value}`" for name, value in results["settings"].items()))
    return "\n\n".join(parts) + "\n"


def _accuracy_table(results: dict[str, Any], paper_model: str | None) -> str:
    """A row a set: nine of them side by side fit no screen."""
    rows = [["set", "metric", "%", "95% interval", "cut off", "by math-verify alone"]]
    for name, one in results["tasks"].items():
        alone = one.get("math_verify")
        rows.append(
            [TASKS[name], one["metric"], *_value_and_interval(one), _cut(one), alone and f"{100 * alone['value']:.1f}"]
        )
    if results["average"]:
        rows.append(["average of nine", "", *_value_and_interval(results["average"]), "", ""])
    for method, value in PAPER_AVERAGES.get(paper_model, {}).items():
        rows.append([f"average of nine, paper: {paper_model}, {method}", "", f"{value:.1f}", "", "", ""])
    kept = [column for column in zip(*rows) if any(column[1:])]
    return to_table([[cell or "" for cell in row] for row in zip(*kept)])


def _value_and_interval(estimate: dict[str, Any]) -> list[str]:
    value, low, high = (f"{100.0 * estimate[name]:.1f}" for name in ("value", "low", "high"))
    return [value, f"{low} to {high}"]


def _cut(summary: dict[str, Any]) -> str:
    share = summary.get("truncated")
    return "" if share is None else f"{100.0 * share:.1f}%"


def _truncation_hints(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """A paragraph for each set of which many completions were cut off: most of those count as wrong for it."""
    hints = []
    for name, one in tasks.items():
        share, limit, room = one.get("truncated"), one.get("max_new_tokens"), one.get("room")
        if share is None or share < MANY_CUT:
            continue
        remedy = f"set `max_new_tokens` higher, up to {room}" if room else "set `max_new_tokens` higher, if it fits"
        if room == limit:
            remedy = "the model's context has no room for more"
        count = one["num_problems"] * one["num_samples"]
        hints.append(
            f"**{TASKS[name]}: {round(share * count):,} of {count:,} completions were cut off at {limit:,} new "
            f"tokens.** One that does not reach its answer counts as wrong; {remedy}."
        )
    return hints


def _pass_at_k_table(sampled: dict[str, dict[str, Any]], paper_model: str | None) -> str:
    ks = sorted({int(k) for summary in sampled.values() for k in summary["pass_at_k"]})
    rows = [["%, 95% interval", *(f"pass@{k}" for k in ks)]]
    for name, summary in sampled.items():
        rows.append([TASKS[name], *(_percent(summary["pass_at_k"].get(str(k))) for k in ks)])
        stated = PAPER_PASS_AT_32.get(paper_model, {}).get(name)
        if stated is not None and 32 in ks:
            rows.append(
                [f"{TASKS[name]}, paper: {paper_model}, MENTOR", *(f"{stated:.1f}" if k == 32 else "" for k in ks)]
            )
    return to_table(rows)


def _verdict_table(tasks: dict[str, dict[str, Any]]) -> str:
    kinds = sorted({kind for summary in tasks.values() for kind in summary["verdicts"]})
    rows = [["set", "problems", "samples a problem", "temperature", "new tokens", *kinds]]
    for name, summary in tasks.items():
        counts = [str(summary["verdicts"].get(kind, 0)) for kind in kinds]
        sampling = [str(summary["num_problems"]), str(summary["num_samples"]), f"{summary['temperature']:g}"]
        sampling.append(f"{summary.get('max_new_tokens') or ''}")
        rows.append([TASKS[name], *sampling, *counts])
    return to_table(rows)


def _percent(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return ""
    value, low, high = (100.0 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def to_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the header first, as a Markdown table whose first column alone is aligned to the left."""
    header, *body = rows
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (header, rule, *body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def write_samples(run: TaskRun, folder: Path) -> Path:
    """Write the samples of a set, one problem a line, to `samples_<task>.jsonl` of a folder."""
    path = folder / f"samples_{run.task}.jsonl"
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in run.samples))
    return path
