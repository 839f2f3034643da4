"""From samples to results (JSON), a Markdown table beside the paper's figures, and model-index entries."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import PAPER_TASKS, TASKS
from .pass_at_k import Estimate, average, estimate, ks_to_report


if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from .harness import TaskRun


PAPER_AVERAGES: dict[str, dict[str, float]] = {
    "Qwen2.5-7B": {"on-policy RL": 42.8, "LUFFY": 42.8, "QuestA": 44.1, "MENTOR": 46.7},
    "Qwen2.5-3B": {"on-policy RL": 31.0, "LUFFY": 31.1, "QuestA": 31.8, "MENTOR": 35.3},
    "Llama-3.1-8B": {"on-policy RL": 20.6, "LUFFY": 21.5, "QuestA": 19.0, "MENTOR": 23.8},
}
"""Averages of the nine sets in percent, by base model and method ([paper](https://huggingface.co/papers/2510.04140))."""

PAPER_PASS_AT_32: dict[str, dict[str, float]] = {"Qwen2.5-7B": {"aime24": 36.7, "aime25": 30.0, "amc23": 77.1}}
"""pass@32 of MENTOR in percent, by base model."""


def summarize(run: "TaskRun") -> dict[str, Any]:
    """
    Summarise the samples of one set.

    Args:
        run ([`~mentor_trl.evaluation.harness.TaskRun`]):
            Samples.

    Returns:
        `dict`: `metric` (`"pass@1"` for one sample a problem, else `"avg@n"`) with `value`, `low`, `high` and
        `stderr`; `pass_at_k`, the same for each `k`; `num_problems`, `num_samples`, `temperature`, `dataset`, and
        `verdicts`, the number of completions by verdict; and, where math-verify alone graded the set as well,
        `math_verify`, what the metric is then. Shares are between 0 and 1.
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
    Put the summaries of several sets together.

    Args:
        model (`str`):
            Name of the model.
        settings (`dict`):
            How the completions were drawn.
        tasks (`dict[str, dict]`):
            Name of each set and its summary.

    Returns:
        `dict`: `model`, `settings`, `tasks`, and `average`, an estimate over the paper's nine sets, or `None` where
        one of them is missing.
    """
    nine = [_estimate_of(tasks[name]) for name in PAPER_TASKS if name in tasks]
    mean = asdict(average(nine)) if len(nine) == len(PAPER_TASKS) else None
    return {"model": model, "settings": settings, "tasks": tasks, "average": mean}


def _estimate_of(summary: dict[str, Any]) -> Estimate:
    return Estimate(**{name: summary[name] for name in ("value", "low", "high", "stderr")})


def to_markdown(results: dict[str, Any], paper_model: str = "Qwen2.5-7B") -> str:
    """
    Write results as Markdown tables, beside the figures that the paper states.

    Args:
        results (`dict`):
            What [`collect`] returned.
        paper_model (`str`, *optional*, defaults to `"Qwen2.5-7B"`):
            Base model of the paper's rows, a key of [`PAPER_AVERAGES`].

    Returns:
        `str`: the report.
    """
    tasks = results["tasks"]
    parts = [f"# Evaluation of {results['model']}", _accuracy_table(results, paper_model)]
    sampled = {name: summary for name, summary in tasks.items() if summary["num_samples"] > 1}
    if sampled:
        parts += ["## pass@k", _pass_at_k_table(sampled, paper_model)]
    parts += ["## Verdicts", _verdict_table(tasks), "## Settings", _settings_list(results["settings"])]
    return "\n\n".join(parts) + "\n"


def _accuracy_table(results: dict[str, Any], paper_model: str) -> str:
    tasks = results["tasks"]
    header = ["%", *(f"{TASKS[name]} {summary['metric']}" for name, summary in tasks.items()), "average of nine"]
    own = [results["model"], *map(_percent, tasks.values()), _percent(results["average"])]
    alone = ["graded by math-verify alone", *(_percent(one.get("math_verify")) for one in tasks.values()), ""]
    blank = [""] * len(tasks)
    paper = [
        [f"paper, {paper_model}, {method}", *blank, f"{value:.1f}"]
        for method, value in PAPER_AVERAGES[paper_model].items()
    ]
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
        rows.append(
            [TASKS[name], str(summary["num_problems"]), str(summary["num_samples"]), f"{summary['temperature']:g}"]
            + counts
        )
    return to_table(rows)


def _settings_list(settings: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: `{value}`" for name, value in settings.items())


def _percent(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return ""
    value, low, high = (100.0 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def to_table(rows: Sequence[Sequence[str]]) -> str:
    """
    Write rows of text, the header first, as a Markdown table whose first column alone is aligned to the left.
    """
    header, *body = rows
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (header, rule, *body)]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def write_samples(run: "TaskRun", folder: Path) -> Path:
    """
    Write the samples of a set, one problem a line, to `samples_<task>.jsonl`.

    Args:
        run ([`~mentor_trl.evaluation.harness.TaskRun`]):
            Samples.
        folder (`Path`):
            Folder, which must exist.
    """
    path = folder / f"samples_{run.task}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in run.samples:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def read_samples(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """
    Read samples back.

    Args:
        paths (`Iterable[str | Path]`):
            Files that [`write_samples`] wrote.

    Returns:
        `list[dict]`: for each problem `doc_id`, `task`, `prompt`, `completions`, `correct`, `answer` and `verdicts`.
    """
    lines = [line for path in paths for line in Path(path).read_text(encoding="utf-8").split("\n")]
    return [json.loads(line) for line in lines if line]


def model_index(results: dict[str, Any]) -> "list[EvalResult]":
    """
    Turn results into the entries of a model card's `model-index`.

    Args:
        results (`dict`):
            What [`collect`] returned.

    Returns:
        `list[EvalResult]`: for each set its metric and, where several samples were drawn, pass@k for the largest k, in
        percent.

    Raises:
        `ValueError`: if only the first problems of the sets were evaluated.
    """
    limit = results["settings"].get("limit")
    if limit is not None:
        raise ValueError(
            f"Only the first {limit} problems of each set were evaluated, which is no result for a model card; "
            "evaluate again without `limit`"
        )
    entries = []
    for name, summary in results["tasks"].items():
        entries.append(_entry(name, summary, summary["metric"], summary))
        k = max(map(int, summary["pass_at_k"]))
        if k > 1:
            entries.append(_entry(name, summary, f"pass@{k}", summary["pass_at_k"][str(k)]))
    return entries


def _entry(name: str, summary: dict[str, Any], metric: str, estimate: dict[str, Any]) -> "EvalResult":
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        dataset_type=summary["dataset"]["path"],
        dataset_name=TASKS[name],
        dataset_config=summary["dataset"].get("config"),
        dataset_split=summary["dataset"]["split"],
        metric_type="accuracy" if metric.startswith("avg") else "pass@k",
        metric_name=metric,
        metric_value=round(100.0 * estimate["value"], 2),
        metric_args={
            "num_samples": summary["num_samples"],
            "temperature": summary["temperature"],
            "confidence_interval": [round(100.0 * estimate[end], 2) for end in ("low", "high")],
        },
    )
