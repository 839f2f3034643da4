"""Training runs as TRL leaves them on disk: their logged metrics, and curves over the runs of a label."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import SetupError
from ..training.console import LOG_FILE


STATE = "trainer_state.json"
_SEED = re.compile(r"[-_.]?seed[-_.]?\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """The entries of TRL's log of a run. Runs of one label are seeds of one setting."""

    path: Path
    label: str
    history: list[dict[str, Any]]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that have a value somewhere, sorted."""
        return sorted({name for entry in self.history for name in entry if _number(entry.get(name)) is not None})

    def series(self, name: str) -> pd.Series:
        """Values of a metric by step; empty where it was never logged."""
        points = [(entry["step"], _number(entry.get(name))) for entry in self.history if "step" in entry]
        points = [(step, value) for step, value in points if value is not None]
        repeated = [step for step, count in Counter(step for step, _ in points).items() if count > 1]
        if repeated:
            raise SetupError(
                f"Run {self.path} logged `{name}` more than once at step {repeated[0]}. If it evaluates on several "
                "datasets, name one of them with --eval NAME."
            )
        return pd.Series(dict(points), name=name, dtype=float).sort_index()

    def logged(self, names: Sequence[str]) -> bool:
        """Whether one of several metrics has a value somewhere."""
        return not set(names).isdisjoint(self.metrics)

    def first_series(self, names: Sequence[str], what: str) -> pd.Series:
        """Values of the first of several metrics that was logged."""
        for name in names:
            if len(series := self.series(name)):
                return series
        raise SetupError(
            f"Run {self.path} has no {what}: it logged none of {_quoted(names)}. It has {_quoted(self.metrics)}."
        )

    def evaluations(self, dataset: str | None = None) -> "Run":
        """The same run with the entries of its evaluations only, of one of several datasets if that is named."""
        ours = lambda name: name.startswith("eval_") if dataset is None else name == f"eval_{dataset}_runtime"
        history = [entry for entry in self.history if any(map(ours, entry))]
        if not history:
            found = {name[5:-8] for entry in self.history for name in entry if re.fullmatch("eval_.+_runtime", name)}
            known = f"it has {_quoted(sorted(found))}" if found else "set `eval_strategy` when you train"
            raise SetupError(f"Run {self.path} logged no evaluation{f' on {dataset!r}' if dataset else ''}: {known}.")
        return Run(self.path, self.label, history)


@dataclass(frozen=True)
class Curve:
    """
    A metric over the steps: the mean over `runs` of a label, smoothed; for several runs its standard error, for a
    smoothed one what was smoothed; and the number of steps that not all runs have, which are in no mean.
    """

    mean: pd.Series
    error: pd.Series | None = None
    raw: pd.Series | None = None
    runs: int = 1
    dropped: int = 0


def read_runs(paths: Sequence[str | Path], labels: Sequence[str] | None = None) -> list[Run]:
    """Read training runs: of several states in a folder, that of the highest step."""
    paths = [Path(path) for path in paths]
    labels = resolve_labels([_run_folder(path) for path in paths], labels)
    return [Run(path, label, _history(path)) for path, label in zip(paths, labels)]


def resolve_labels(paths: Sequence[Path], labels: Sequence[str] | None = None) -> list[str]:
    """
    Return the labels given, or make them: the last part of each path, less its seed; more parts where two different
    paths end alike.

    >>> resolve_labels([Path("runs/grpo"), Path("runs/mentor-seed1"), Path("runs/mentor_seed2")])
    ['grpo', 'mentor', 'mentor']
    >>> resolve_labels([Path("a/mentor"), Path("b/mentor")])
    ['a/mentor', 'b/mentor']
    """
    if labels is not None:
        if len(labels) != len(paths):
            raise SetupError(
                f"There are {len(labels)} labels ({', '.join(labels)}) for {len(paths)} inputs. Give one for each, in "
                "their order; inputs with the same label are seeds of one setting."
            )
        return list(labels)
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for path in paths if parts.count(path.resolve().parts) > 1)
        raise SetupError(f"{twice} is given twice, which would count as two seeds. Leave one out.")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    names = ["/".join(part[-depth:]) for part in parts]
    return [_SEED.sub("", name) or name for name in names]


def group_by_label(items: Sequence[Any]) -> dict[str, list[Any]]:
    """Items that have a `label`, by label, in the order of their first appearance."""
    labels = dict.fromkeys(item.label for item in items)
    return {label: [item for item in items if item.label == label] for label in labels}


def make_curve(series: Sequence[pd.Series], smooth: int = 1) -> Curve:
    """
    Curve of the runs of a label.

    >>> curve = make_curve([pd.Series({1: 0.0, 2: 1.0}), pd.Series({1: 1.0, 2: 1.0, 3: 1.0})])
    >>> curve.mean.tolist(), curve.error.tolist(), curve.dropped
    ([0.5, 1.0], [0.5, 0.0], 1)
    """
    if smooth < 1:
        raise SetupError(f"The smoothing window is {smooth}; it must be 1 (no smoothing) or more.")
    smoothed = pd.concat([one.rolling(smooth, center=True, min_periods=1).mean() for one in series], axis=1)
    shared = smoothed.dropna()
    if shared.empty:
        raise SetupError(
            f"Runs of one label have no step of {series[0].name!r} in common. Give them different labels (--labels)."
        )
    count = len(series)
    if count == 1:
        return Curve(shared.iloc[:, 0], raw=series[0] if smooth > 1 else None)
    error = shared.std(axis=1, ddof=1) / math.sqrt(count)
    return Curve(shared.mean(axis=1), error, runs=count, dropped=len(smoothed) - len(shared))


def _run_folder(path: Path) -> Path:
    """The folder that names a run, from one of the paths that lead to it."""
    folder = path.resolve().parent if path.name in (STATE, LOG_FILE) else path
    return folder.resolve().parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder


def _history(path: Path) -> list[dict[str, Any]]:
    states = map(_read_state, _state_files(path))
    history = max(states, key=lambda state: state.get("global_step", 0)).get("log_history") or []
    if not any("step" in entry for entry in history):
        raise SetupError(f"Run {path} has logged nothing. Set `logging_steps` below the number of steps of training.")
    return history


def _state_files(path: Path) -> list[Path]:
    if not path.exists():
        raise SetupError(f"Run {path} does not exist (working directory: {Path.cwd()}).")
    if path.is_file():
        return [path]
    places = (path / LOG_FILE, path / STATE, *path.glob(f"checkpoint-*/{STATE}"))
    files = [file for file in places if file.is_file()]
    if not files:
        raise SetupError(
            f"Run {path} holds no {LOG_FILE}, which training writes as it goes, and no {STATE}, neither itself nor in "
            "a checkpoint-N folder."
        )
    return files


def _read_state(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    try:
        if file.name == LOG_FILE:
            # The last line may be under way
            entries = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            return {"global_step": max((entry["step"] for entry in entries), default=0), "log_history": entries}
        state = json.loads(text)
    except ValueError as error:
        raise SetupError(f"{file} is not valid JSON: {error}. Was its training ended while it was written?") from error
    if not isinstance(state, dict):
        raise SetupError(f"{file} holds a {type(state).__name__}, not the state of a trainer.")
    return state


def _number(value: Any) -> float | None:
    """A finite number, or `None`: TRL logs `None` for what has no value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"
