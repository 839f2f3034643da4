"""The table of results: models against evaluation sets, from the files of `mentor-trl eval`."""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text

from ..errors import SetupError
from ..evaluation.pass_at_k import Estimate, average, over_runs
from ..evaluation.summary import to_table
from .runs import group_by_label, resolve_labels


@dataclass(frozen=True)
class Cell:
    """A mean over the prompts or evaluations with its 95% interval, and whether no other row has more as shown."""

    estimate: Estimate
    best: bool = False

    @property
    def value(self) -> float:
        return self.estimate.value

    @property
    def text(self) -> str:
        """In per cent, as in the report of an evaluation."""
        low, high = 100 * self.estimate.low, 100 * self.estimate.high
        return f"{100 * self.value:.1f} ({low:.1f} to {high:.1f})"


@dataclass(frozen=True)
class Result:
    """
    What one evaluation found: for each task its metrics, with its headline under `None`, and what that headline is,
    `"pass@1"` or `"avg@n"` of n samples a prompt. `limit` is the number of problems of each task, where only the first
    ones were evaluated.
    """

    label: str
    tasks: dict[str, dict[str | None, Cell]]
    headlines: dict[str, str]
    limit: int | None = None


@dataclass(frozen=True)
class ResultsTable:
    """
    For each label a cell a column, `None` where a task was not evaluated, the number of its evaluations, and the limit
    of one that is a trial. `metric` is what the cells are, where that is the same in all columns; else `"accuracy"`.
    """

    metric: str
    columns: list[str]
    rows: dict[str, list[Cell | None]]
    seeds: dict[str, int]
    limits: dict[str, int]

    @property
    def caption(self) -> str:
        parts = [f"{self.metric} in %, with 95% intervals over the problems as in the reports of `mentor-trl eval`"]
        if any(count > 1 for count in self.seeds.values()):
            parts.append("Student's 95% intervals over the runs where a row has several")
        if self.limits:
            parts.append("rows of the first problems only are trials, not to be compared with whole sets")
        return "; ".join(parts)

    def name(self, label: str) -> str:
        """Name of a row, with its number of evaluations and what makes it a trial."""
        facts = [f"{self.seeds[label]} runs"] * (self.seeds[label] > 1)
        facts += [f"first {self.limits.get(label)} problems"] * (label in self.limits)
        return f"{label} ({', '.join(facts)})" if facts else label

    def to_rich(self) -> Table:
        table = Table(title=self.caption, title_justify="left")
        table.add_column("")
        for column in self.columns:
            table.add_column(column, justify="right")
        for label, cells in self.rows.items():
            texts = [Text("-") if cell is None else Text(cell.text, "bold" if cell.best else "") for cell in cells]
            table.add_row(Text(self.name(label)), *texts)
        return table

    def to_markdown(self) -> str:
        shown = lambda cell: "-" if cell is None else f"**{cell.text}**" if cell.best else cell.text
        lines = [[self.name(label), *map(shown, cells)] for label, cells in self.rows.items()]
        return f"{self.caption}\n\n{to_table([['', *self.columns], *lines])}\n"

    def to_csv(self) -> str:
        numbers = [
            (label, column, self.seeds[label], self.limits.get(label), *astuple(cell.estimate))
            for label, cells in self.rows.items()
            for column, cell in zip(self.columns, cells)
            if cell is not None
        ]
        names = ["label", "task", "runs", "first_problems", self.metric, "low", "high", "stderr"]
        frame = pd.DataFrame(numbers, columns=names).astype({"first_problems": "Int64"})
        return frame.to_csv(index=False, lineterminator="\n")


def read_results(paths: Sequence[str | Path], labels: Sequence[str] | None = None) -> list[Result]:
    """Read results of evaluations; those of one label are seeds of one setting."""
    files = [_result_file(Path(path)) for path in paths]
    named = [file.resolve().parent if file.name == "results.json" else file.with_suffix("") for file in files]
    return [_read(file, label) for file, label in zip(files, resolve_labels(named, labels))]


def make_table(results: Sequence[Result], metric: str | None = None) -> ResultsTable:
    """Put results together: a row a label, a column a task, and the average of the tasks."""
    tasks = list(dict.fromkeys(task for one in results for task, values in one.tasks.items() if metric in values))
    if not tasks:
        known = sorted({name for one in results for values in one.tasks.values() for name in values if name})
        raise SetupError(f"No evaluation has the metric {metric!r}; there are {', '.join(known) or 'none at all'}.")
    rows, seeds, limits = {}, {}, {}
    for label, group in group_by_label(results).items():
        found = [{task for task in tasks if metric in one.tasks.get(task, {})} for one in group]
        if any(one != found[0] for one in found):
            raise SetupError(f"The {len(group)} evaluations of {label!r} are not of the same tasks with {metric!r}.")
        if len({one.limit for one in group}) > 1:
            raise SetupError(
                f"Some evaluations of {label!r} are trials of the first problems (`limit`), or of other numbers of "
                "them: give them different labels (--labels)."
            )
        if group[0].limit is not None:
            limits[label] = group[0].limit
        per_task = [[one.tasks[task][metric] for one in group] if task in found[0] else None for task in tasks]
        if len(tasks) > 1:  # the average of each evaluation
            per_task.append(None if None in per_task else [_over_tasks(of_one) for of_one in zip(*per_task)])
        rows[label], seeds[label] = [cells and _over_runs(cells) for cells in per_task], len(group)
    names = [_column(task, results) for task in tasks] if metric is None else tasks
    names += [f"average of {len(tasks)} sets"] * (len(tasks) > 1)
    return ResultsTable(metric or "accuracy", names, _mark_best(rows), seeds, limits)


def _column(task: str, results: Sequence[Result]) -> str:
    headlines = sorted({one.headlines[task] for one in results if task in one.headlines})
    if len(headlines) > 1:
        raise SetupError(
            f"Evaluations of {task!r} have different headlines: {', '.join(headlines)}. Choose a metric that all have "
            "(--metric pass@1), or evaluate them alike."
        )
    return f"{task} {headlines[0]}"


def _over_runs(cells: Sequence[Cell]) -> Cell:
    return cells[0] if len(cells) == 1 else Cell(over_runs([cell.value for cell in cells]))


def _over_tasks(cells: Sequence[Cell]) -> Cell:
    return Cell(average([cell.estimate for cell in cells]))


def _mark_best(rows: dict[str, list[Cell | None]]) -> dict[str, list[Cell | None]]:
    if len(rows) < 2:
        return rows
    shown = lambda cell: round(100 * cell.value, 1)
    best = [max((shown(cell) for cell in column if cell is not None), default=None) for column in zip(*rows.values())]
    return {
        label: [cell and replace(cell, best=shown(cell) == top) for cell, top in zip(cells, best)]
        for label, cells in rows.items()
    }


def _result_file(path: Path) -> Path:
    if not path.exists():
        raise SetupError(f"Results {path} do not exist (working directory: {Path.cwd()}).")
    if path.is_file():
        return path
    if not (path / "results.json").is_file():
        raise SetupError(f"Folder {path} holds no results.json; `mentor-trl eval` writes it.")
    return path / "results.json"


def _read(file: Path, label: str) -> Result:
    """Metrics of each task, the names of their headlines, and the limit of a trial."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tasks = content["tasks"]
        metrics = {
            task: {None: _cell(one), **{f"pass@{k}": _cell(number) for k, number in one["pass_at_k"].items()}}
            for task, one in tasks.items()
        }
        headlines = {task: str(one["metric"]) for task, one in tasks.items()}
        return Result(label, metrics, headlines, content.get("settings", {}).get("limit"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SetupError(
            f"{file} is not as `mentor-trl eval` writes it (JSON with `tasks`, each with `metric`, `value`, `low`, "
            f"`high`, `stderr` and `pass_at_k`): {error!r}."
        ) from error


def _cell(number: dict[str, Any]) -> Cell:
    return Cell(Estimate(*(float(number[name]) for name in ("value", "low", "high", "stderr"))))
