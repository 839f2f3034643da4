"""The study's results as they are on disk, JSON lines with a run each, read into runs with curves."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mentor_trl.errors import SetupError


FOLDER = Path("docs/results/study")
CURVES = ("accuracy", "entropy", "length", "distinct", "cost", "seconds", "expert_tokens")
# Fields that hold several curves, and what stands before the name of each
FAMILIES = {"pass_at": "pass@", "describe": "describe.", "metrics": "metrics."}
REQUIRED = ("study", "task", "arm", "label", "seed", "steps", "accuracy")


@dataclass(frozen=True)
class Run:
    """
    A run with its curves.

    Args:
        study, task, arm, label (`str`):
            Where it belongs, and what the arm is called in tables and figures.
        expert (`str`, *optional*):
            Name of the expert, where the arm has one.
        seed (`int`):
            Seed.
        steps (`tuple[float, ...]`):
            Optimizer steps at which the model was evaluated.
        curves (`dict[str, tuple[float, ...]]`):
            Values at these steps, NaN where there is none: `accuracy`, `cost`, ..., `pass@8`, `describe.wait`,
            `metrics.alpha`.
        options (`dict[str, Any]`):
            What the run was started with, and the numbers that are not curves, such as `parameters.policy`.
    """

    study: str
    task: str
    arm: str
    label: str
    expert: str | None
    seed: int
    steps: tuple[float, ...]
    curves: Mapping[str, tuple[float, ...]]
    options: Mapping[str, Any]

    @property
    def trained(self) -> bool:
        return len(self.steps) > 1


def read_runs(folder: str | Path = FOLDER) -> list[Run]:
    """
    Runs of all `.jsonl` files of a folder, in the order of the files' names. Of lines of a study and an arm with
    the same `key` the first counts; a line that a kill has cut off is no run.

    Raises:
        SetupError: If a line lacks a field, or a curve has not one value for each step.
    """
    runs, keys = [], set()
    for path in sorted(Path(folder).glob("*.jsonl")):
        for number, text in enumerate(path.read_text().splitlines(), start=1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            key = tuple(map(line.get, ("study", "arm", "key"))) if "key" in line else len(runs)
            if key not in keys:
                runs.append(parse(line, f"{path}, line {number}"))
            keys.add(key)
    return runs


def parse(line: Mapping[str, Any], place: str = "the line") -> Run:
    """
    The run of a line.

    Raises:
        SetupError: If a field is missing, or a curve has not one value for each step.
    """
    missing = [name for name in REQUIRED if line.get(name) is None]
    if missing:
        raise SetupError(f"{place}: the run lacks {', '.join(missing)}.")
    steps = tuple(float(step) for step in line["steps"])
    found = {name: line[name] for name in CURVES if line.get(name) is not None}
    for family, prefix in FAMILIES.items():
        named = (line.get(family) or {}).items()
        found |= {f"{prefix}{name.removeprefix('mentor/')}": values for name, values in named}
    curves = {name: _curve(name, values, len(steps), place) for name, values in found.items()}
    if "distinct" in curves:
        curves["distinct.few"] = _of_few_samples(curves)
    fields = ("study", "task", "arm", "label", "expert", "seed")
    return Run(**{name: line.get(name) for name in fields}, steps=steps, curves=curves, options=_options(line))


def _curve(name: str, values: Iterable[float | None], count: int, place: str) -> tuple[float, ...]:
    values = tuple(math.nan if value is None else float(value) for value in values)
    # A metric is a mean over the steps between two evaluations, and there is none of a supervised stage
    if name.startswith("metrics.") and len(values) < count:
        values = (math.nan,) * (count - len(values)) + values
    if len(values) != count:
        raise SetupError(
            f"{place}: {name} has {len(values)} values for {count} steps. Each evaluation needs one (or null)."
        )
    return values


def _of_few_samples(curves: Mapping[str, tuple[float, ...]]) -> tuple[float, ...]:
    """Distinct solutions, without a last evaluation that had more samples, and so more chances, than the others."""
    passes = [values for name, values in curves.items() if name.startswith("pass@")]
    known = [sum(not math.isnan(value) for value in values) for values in zip(*passes)]
    more = len(known) > 1 and known[-1] > known[-2]
    return (*curves["distinct"][:-1], math.nan) if more else curves["distinct"]


def _options(line: Mapping[str, Any]) -> dict[str, Any]:
    known = {*CURVES, *FAMILIES, *REQUIRED, "expert", "options", "parameters", "versions", "key"}
    numbers = {name: value for name, value in line.items() if name not in known and isinstance(value, (int, float))}
    sizes = {f"parameters.{name}": value for name, value in (line.get("parameters") or {}).items()}
    return {**(line.get("options") or {}), **numbers, **sizes}
