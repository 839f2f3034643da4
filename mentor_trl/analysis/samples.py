"""Sampled responses: those of `mentor-trl eval`, or TRL's completions tables."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import SetupError
from ..rewards.answers import completion_text
from .runs import resolve_labels


@dataclass(frozen=True)
class Sample:
    """
    A prompt (`doc_id` of a task) and the responses to it; `correct` is 1 for each that is right, and `source` says who
    sampled them, in a completions table of training.
    """

    doc_id: str
    task: str
    completions: list[str]
    correct: list[int] | None = None
    source: str | None = None


@dataclass(frozen=True)
class SampleSet:
    """The samples of a file or folder, under a label."""

    path: Path
    label: str
    samples: list[Sample]


def read_samples(paths: Sequence[str | Path], labels: Sequence[str] | None = None) -> list[SampleSet]:
    """
    Read samples from `.jsonl` and `.parquet` files, or folders of them.

    Raises:
        [`SetupError`]: if a file is missing, empty, or not of this form.
    """
    paths = [Path(path) for path in paths]
    named = [path.with_suffix("") if path.suffix in (".jsonl", ".parquet") else path for path in paths]
    labels = resolve_labels(named, labels)
    return [SampleSet(path, label, _read(path)) for path, label in zip(paths, labels)]


def keep_tasks(sets: Sequence[SampleSet], tasks: Sequence[str] | None) -> list[SampleSet]:
    """The samples of some tasks, of which each set must have one; all of them where no task is named."""
    if tasks is None:
        return list(sets)
    for one in sets:
        known = dict.fromkeys(sample.task for sample in one.samples)
        for task in tasks:
            if task not in known:
                raise SetupError(f"Samples {one.path} have no task {task!r}; they have {', '.join(known)}.")
    return [SampleSet(one.path, one.label, [sample for sample in one.samples if sample.task in tasks]) for one in sets]


def _read(path: Path) -> list[Sample]:
    if not path.exists():
        raise SetupError(f"Samples {path} do not exist (working directory: {Path.cwd()}).")
    files = [path] if path.is_file() else sorted([*path.rglob("*.jsonl"), *path.rglob("*.parquet")])
    samples = [_sample(file, index, row) for file in files for index, row in enumerate(_rows(file))]
    if not samples:
        raise SetupError(f"Samples {path} are empty: there is no row in {len(files)} .jsonl and .parquet files.")
    return samples


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        try:
            return pd.read_parquet(file).to_dict("records")
        except (OSError, ValueError) as error:
            raise SetupError(f"{file} cannot be read as parquet: {error}") from error
    if file.suffix != ".jsonl":
        raise SetupError(f"Samples {file} must be a .jsonl or a .parquet file, or a folder of them.")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise SetupError(f"{file}, line {number} is not valid JSON: {error}.") from error
        if not isinstance(rows[-1], dict):
            raise SetupError(f"{file}, line {number} holds a {type(rows[-1]).__name__}, not an object.")
    return rows


def _sample(file: Path, index: int, row: dict[str, Any]) -> Sample:
    where = f"{file}, row {index}"
    if row.get("completions") is not None:
        completions = [completion_text(one) for one in row["completions"]]
    elif row.get("completion") is not None:
        completions = [completion_text(row["completion"])]
    else:
        raise SetupError(
            f"{where} has neither `completions` (a list of texts) nor `completion`; it has "
            f"{', '.join(f'`{name}`' for name in row)}."
        )
    if not completions:
        raise SetupError(f"{where} has an empty list of completions.")
    correct = None if row.get("correct") is None else [int(one) for one in row["correct"]]
    if correct is not None and len(correct) != len(completions):
        raise SetupError(f"{where} has {len(completions)} completions and {len(correct)} of `correct`.")
    doc_id, task = row.get("doc_id", index), row.get("task") or file.stem
    return Sample(str(doc_id), str(task), completions, correct, row.get("source"))
