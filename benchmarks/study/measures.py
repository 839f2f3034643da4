"""What tables say of a run, one number each, and what few seeds allow to say of several."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from benchmarks.study.lines import Run


ENOUGH = 5  # seeds for a t interval
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Context:
    """
    What the runs of a comparison have in common.

    Args:
        solved (`float`):
            Accuracy from which on a seed counts as solved.
        level (`float`):
            Accuracy at which runs are compared that reach it at different times.
        end (`float`):
            Step up to which areas are taken: the smallest last step.
        budget (`float`):
            Cost up to which areas are taken: the smallest total cost of a trained run.
        start (`dict[int, float]`, *optional*):
            Accuracy of the untrained policy by seed, which is all there is before a run's first evaluation.
    """

    solved: float = 0.9
    level: float = 0.5
    end: float = math.inf
    budget: float = math.inf
    start: Mapping[int, float] = field(default_factory=dict)


class Interval(NamedTuple):
    """Mean of values; the t interval of at least [`ENOUGH`] values, the range of fewer."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def kind(self) -> str:
        return "95%" if self.count >= ENOUGH else "range"


def interval(values: Sequence[float]) -> Interval:
    """
    Mean with an interval of values that are there.

    >>> interval([0.5, 0.7])
    Interval(mean=0.6, low=0.5, high=0.7, count=2)
    >>> interval([0.1, 0.2, 0.3, 0.4, 0.5]).kind
    '95%'
    """
    values = np.array([value for value in values if not math.isnan(value)])
    if not values.size:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean, low, high = float(values.mean()), float(values.min()), float(values.max())
    if values.size >= ENOUGH:
        half = float(t.ppf((1 + CONFIDENCE) / 2, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
        low, high = mean - half, mean + half
    return Interval(mean, low, high, int(values.size))


def area(x: Sequence[float], y: Sequence[float], end: float) -> float:
    """
    Mean height of a curve from its start to an end; after its last point a curve keeps its height.

    >>> area([0, 10, 20], [0.0, 1.0, 1.0], 20)
    0.75
    >>> area([0, 10], [0.0, 1.0], 5)
    0.25
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    inside = x < end
    if not inside.any() or np.isnan(y).any():
        return math.nan
    x, y = np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
    return float(np.trapezoid(y, x) / (end - x[0]))


def against_cost(run: Run, context: Context) -> tuple[list[float], list[float]]:
    """Accuracy against cost from cost 0 on. What was spent before the first evaluation has no effect until then."""
    costs, accuracies = list(run.curves["cost"]), list(run.curves["accuracy"])
    if costs[0] > 0.0:
        start = context.start.get(run.seed, 0.0)
        costs, accuracies = [0.0, costs[0], *costs], [start, start, *accuracies]
    return costs, accuracies


def first_reached(x: Sequence[float], accuracy: Sequence[float], level: float) -> float:
    """
    Where a curve first reaches a level, between its points by a straight line; NaN if it does not.

    >>> first_reached([0, 10, 20], [0.0, 0.5, 1.0], 0.75)
    15.0
    """
    for at, value in enumerate(accuracy):
        if value >= level:
            if at == 0:
                return float(x[0])
            before = accuracy[at - 1]
            return float(x[at - 1] + (x[at] - x[at - 1]) * (level - before) / (value - before))
    return math.nan


def at_level(run: Run, name: str, level: float) -> float:
    """Value of a curve where the accuracy first reaches a level."""
    step = first_reached(run.steps, run.curves["accuracy"], level)
    return math.nan if math.isnan(step) else float(np.interp(step, run.steps, run.curves[name]))


def _last(name: str) -> Callable[[Run, Context], float]:
    return lambda run, context: run.curves[name][-1]


def _spent(name: str) -> Callable[[Run, Context], float]:
    return lambda run, context: run.curves[name][-1] if run.trained else math.nan


def _area_by_cost(run: Run, context: Context) -> float:
    compared = math.isfinite(context.budget) and run.curves["cost"][-1] > 0.0
    return area(*against_cost(run, context), context.budget) if compared else math.nan


def _accuracy_at_cost(run: Run, context: Context) -> float:
    compared = math.isfinite(context.budget) and run.curves["cost"][-1] > 0.0
    return float(np.interp(context.budget, *against_cost(run, context))) if compared else math.nan


def _guided_until(run: Run, context: Context) -> float:
    """Last step before which mixed rows had a weight; guidance that was withdrawn on the way has its share of it."""
    guided = [index for index, alpha in enumerate(run.curves["metrics.alpha"]) if alpha > 0.0]
    if not guided:
        return 0.0
    last = guided[-1]
    withdrawn = run.curves.get("metrics.guidance/withdrawn", (0.0,) * len(run.steps))[last]
    return run.steps[last] - withdrawn * (run.steps[last] - run.steps[last - 1])


MEASURES: dict[str, Callable[[Run, Context], float]] = {
    "accuracy": _last("accuracy"),
    "solved": lambda run, context: float(run.curves["accuracy"][-1] >= context.solved),
    "area": lambda run, context: area(run.steps, run.curves["accuracy"], context.end) if run.trained else math.nan,
    "area_cost": _area_by_cost,
    "accuracy_cost": _accuracy_at_cost,
    "reached": lambda run, context: first_reached(run.steps, run.curves["accuracy"], context.level),
    "entropy": _last("entropy"),
    "entropy_level": lambda run, context: at_level(run, "entropy", context.level),
    "length": _last("length"),
    "distinct": _last("distinct"),
    "distinct_level": lambda run, context: at_level(run, "distinct.few", context.level),
    "cost": _spent("cost"),
    "seconds": _spent("seconds"),
    "expert_tokens": _spent("expert_tokens"),
    "guided_until": _guided_until,
    "memory": lambda run, context: run.options["memory"] / 2**30,
}


def measure(name: str, run: Run, context: Context) -> float:
    """
    A number of a run, NaN where it has none. Beside [`MEASURES`] there are `pass@K` and `describe.NAME` at the end,
    `metrics.NAME` as the mean over the training, and the numbers and options that a line states.
    """
    try:
        if name in MEASURES:
            return MEASURES[name](run, context)
        if name.startswith("metrics."):
            values = [value for value in run.curves[name] if not math.isnan(value)]
            return float(np.mean(values)) if values else math.nan
        return float(run.curves[name][-1] if name in run.curves else run.options[name])
    except (KeyError, TypeError, ValueError):
        return math.nan
