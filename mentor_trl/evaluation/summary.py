"""From samples to results (JSON), and to Markdown tables beside the paper's figures."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class TaskRun:
    """
    What one set gave: the rows of `samples_<task>.jsonl`, each with `num_samples` completions. `dataset` is `path`,
    `split` and, where there is one, `config` of the set on the Hub.
    """

    task: str
    num_samples: int
    temperature: float
    dataset: dict[str, str]
    samples: list[dict[str, Any]]


def summarize(run: TaskRun) -> dict[str, Any]:
    """
    What `results.json` says of one set, in shares between 0 and 1. The metric is `"pass@1"` for one sample a problem,
    else `"avg@n"`.
    """
    correct = [row["correct"] for row in run.samples]
    verdicts = Counter(verdict for row in run.samples for verdict in row["verdicts"])
    alone = [row["math_verify"] for row in run.samples if "math_verify" in row]
    return {
        "metric": "pass@1" if run.num_samples == 1 else f"avg@{run.num_samples}",
        **asdict(estimate(correct)),
        "pass_at_k": {str(k): asdict(estimate(correct, k)) for k in ks_to_report(run.num_samples)},
        "num_problems": len(correct),
        "num_samples": run.num_samples,
        "temperature": run.temperature,
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
    """The results of [`collect`] as Markdown tables, beside the figures that the paper states for a base model."""
    tasks = results["tasks"]
    parts = [f"# Evaluation of {results['model']}", _accuracy_table(results, paper_model)]
    sampled = {name: summary for name, summary in tasks.items() if summary["num_samples"] > 1}
    if sampled:
        parts += ["## pass@k", _pass_at_k_table(sampled, paper_model)]
    parts += ["## Verdicts", _verdict_table(tasks), "## Settings"]
    parts.append("\n".join(f"- {name}: `{value}`" for name, value in results["settings"].items()))
    return "\n\n".join(parts) + "\n"


def _accuracy_table(results: dict[str, Any], paper_model: str) -> str:
    tasks = results["tasks"]
    header = ["%", *(f"{TASKS[name]} {summary['metric']}" for name, summary in tasks.items()), "average of nine"]
    own = [results["model"], *map(_percent, tasks.values()), _percent(results["average"])]
    alone = ["graded by math-verify alone", *(_percent(one.get("math_verify")) for one in tasks.values()), ""]
    blank = [""] * len(tasks)
    stated = PAPER_AVERAGES[paper_model].items()
    paper = [[f"paper, {paper_model}, {method}", *blank, f"{value:.1f}"] for method, value in stated]
    return to_table([header, own, *([alone] if any(alone[1:]) else []), *paper])


def _pass_at_k_table(sampled: dict[str, dict[str, Any]], paper_model: str) -> str:
    ks = sorted({int(k) for summary in sampled.values() for k in summary["pass_at_k"]})
    rows = [["%", *(f"pass@{k}" for k in ks)]]
    for name, summary in sampled.items():
        rows.append([TASKS[name], *(_percent(summary["pass_at_k"].get(str(k))) for k in ks)])
        stated = PAPER_PASS_AT_32.get(paper_model, {}).get(name)
        if stated is not None and 32 in ks:
            rows.append([f"paper, {paper_model}, MENTOR", *(f"{stated:.1f}" if k == 32 else "" for k in ks)])
    return to_table(rows)


def _verdict_table(tasks: dict[str, dict[str, Any]]) -> str:
    kinds = sorted({kind for summary in tasks.values() for kind in summary["verdicts"]})
    rows = [["set", "problems", "samples a problem", "temperature", *kinds]]
    for name, summary in tasks.items():
        counts = [str(summary["verdicts"].get(kind, 0)) for kind in kinds]
        sampling = [str(summary["num_problems"]), str(summary["num_samples"]), f"{summary['temperature']:g}"]
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
