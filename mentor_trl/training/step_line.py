"""The log of a run as a table that grows: one line a logged step, the columns that the run has and that fit."""

import fnmatch
import math
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm


REPEAT = 20  # lines between two headers
NOTHING = "-"


def _decimals(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _share(value: float) -> str:
    return f"{value:.1%}" if 0 < value < 0.0995 else f"{value:.0%}"


def _count(value: float) -> str:
    if value < 1000:
        return f"{value:.1f}" if value < 100 else f"{value:.0f}"
    return tqdm.format_sizeof(value)


def _left(seconds: float) -> str:
    days, rest = divmod(int(seconds), 24 * 3600)
    return f"{days}d {rest // 3600:02}h" if days else tqdm.format_interval(seconds)


class Column(NamedTuple):
    """A column; of several metrics the first that was logged is its value."""

    name: str
    rank: int  # the lowest are kept where not all fit
    width: int
    form: Callable[[float], str]
    metrics: tuple[str, ...]
    meaning: str


ON_POLICY = "mentor/on_policy/"
EXTRA = 12  # rank from which on columns are shown where there is room to spare
COLUMNS = (
    Column("reward", 0, 6, _decimals, (f"{ON_POLICY}reward",), "on-policy rollouts"),
    Column("mixed", 1, 6, _decimals, ("mentor/mixed/reward",), "reward of mixed rollouts"),
    Column("expert", 2, 6, _decimals, ("mentor/trajectory/reward",), "reward of expert trajectories"),
    # `*` stands for anything: the reward functions of that name
    Column("accuracy", 4, 8, _decimals, (f"{ON_POLICY}rewards/*accuracy*",), "on-policy rollouts"),
    Column("length", 5, 6, _count, ("completions/mean_length",), "tokens of a completion"),
    Column("cut", 11, 5, _share, ("completions/clipped_ratio",), "share of completions at the length limit"),
    Column("entropy", 8, 7, _decimals, ("entropy",), "nats"),
    Column("KL", 6, 6, _decimals, ("mentor/distillation/reverse_kl", f"{ON_POLICY}reverse_kl"), "to the expert, nats"),
    Column("alpha", 7, 5, "{:.2f}".format, ("mentor/alpha",), "weight of mixed advantages"),
    Column("E[w]", 9, 5, _decimals, ("mentor/weight",), "mean weight of the expert"),
    Column("replaced", 10, 8, _share, ("mentor/replaced_rate",), "share of the tokens of mixed rollouts"),
    Column("loss", EXTRA, 7, _decimals, ("loss",), ""),
    Column("grad norm", EXTRA + 1, 9, _decimals, ("grad_norm",), ""),
    Column("lr", EXTRA + 2, 7, "{:.1e}".format, ("learning_rate",), ""),
    Column("tok/s", 9, 5, _count, ("tokens_per_second",), "prompts and completions"),
    Column("left", 3, 7, _left, ("seconds_left",), ""),
)
# What only a step that sampled rollouts logs
SAMPLED = "reward"


def value_of(column: Column, logs: dict[str, Any]) -> float | None:
    """
    Value of a column in an entry of the log.

    >>> value_of(COLUMNS[3], {"mentor/on_policy/rewards/my_accuracy": 0.5})
    0.5
    """
    for pattern in column.metrics:
        for name in [pattern] if "*" not in pattern else fnmatch.filter(logs, pattern):
            value = logs.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                return float(value)
    return None


def _rewards(logs: dict[str, Any]) -> set[float]:
    names = (SAMPLED, *(metric for column in COLUMNS[:3] for metric in column.metrics))
    return {logs[name] for name in names if isinstance(logs.get(name), (int, float)) and math.isfinite(logs[name])}


def fitting(columns: Sequence[Column], width: int, step_width: int) -> list[Column]:
    """The columns that fit in a width beside that of the step, the most important ones, in their order."""
    kept, used = [], step_width
    for column in sorted(columns, key=lambda column: column.rank):
        gaps = (len(kept) + 1) * (2 if column.rank >= EXTRA else 1)
        if used + column.width + gaps > width:
            break
        used += column.width
        kept.append(column)
    return [column for column in columns if column in kept]


class StepLines:
    """
    Lines of a run. The columns are those that had a value since the last header; where a new one appears, or the width
    changes, the header is repeated.
    """

    def __init__(self):
        self.columns: list[Column] = []
        self.seen: set[str] = set()
        self.lines = self.width = 0
        self.explained = False
        self.begin(0, [])

    def begin(self, step: int, history: Sequence[dict[str, Any]]) -> None:
        """Training begins, or goes on at a step with a history."""
        self.first = self.step = step
        self.started, self.seconds = time.monotonic(), 0.0
        self.tokens = max((entry["num_tokens"] for entry in history if entry.get("num_tokens")), default=0)
        self.rewards = {value for entry in history for value in _rewards(entry)}
        self.learned = any(entry.get("grad_norm") for entry in history)

    def step_lines(self, logs: dict[str, Any], step: int, max_steps: int, width: int) -> tuple[list[str], str]:
        """Lines of the header, if it is due, and the line of a step."""
        logs = logs | self._speed(logs, step, max_steps)
        self.rewards |= _rewards(logs)
        self.learned = self.learned or bool(logs.get("grad_norm"))
        values = {column.name: value_of(column, logs) for column in COLUMNS}
        if values["mixed"] is None and not values["alpha"]:
            values["alpha"] = None  # guidance is over
        shown = {name for name, value in values.items() if value is not None}
        step_width = max(4, 2 * len(str(max_steps)) + 1)
        header = []
        due = self.lines % REPEAT == 0
        if due or width != self.width or not shown <= self.seen:
            # A step that learns from rollouts of an earlier one says nothing of theirs
            kept = set() if due and SAMPLED in logs else self.seen
            self.seen, self.width, self.lines = shown | kept, width, 0
            self.columns = fitting([column for column in COLUMNS if column.name in self.seen], width, step_width)
            header = self._header(step_width, width)
        self.seen |= shown
        self.lines += 1
        cells = [f"{step}/{max_steps}".rjust(step_width)]
        for column in self.columns:
            value = values[column.name]
            cells.append((NOTHING if value is None else column.form(value)).rjust(column.width))
        return header, self._gap(step_width).join(cells)

    def advice(self) -> str:
        """What to change where nothing was learned, as all rewards were the same."""
        if self.learned or len(self.rewards) != 1:
            return ""
        (value,) = self.rewards
        easier = "take easier problems, longer completions, or an expert that is right more often"
        way = easier if value <= 0 else "take harder problems"
        return f" Every reward was {value:g}, so nothing was learned: {way}."

    def _speed(self, logs: dict[str, Any], step: int, max_steps: int) -> dict[str, float]:
        found, done = {}, step - self.first
        if done > 0:
            found["seconds_left"] = (time.monotonic() - self.started) / done * (max_steps - step)
        # Time of the steps alone, not of evaluations and checkpoints between them
        self.seconds += (logs.get("step_time") or 0.0) * (step - self.step)
        self.step = step
        tokens = logs.get("num_tokens") or 0
        if tokens > self.tokens and self.seconds > 0:
            found["tokens_per_second"] = (tokens - self.tokens) / self.seconds
            self.tokens, self.seconds = tokens, 0.0
        return found

    def _gap(self, step_width: int) -> str:
        used = step_width + sum(column.width for column in self.columns)
        return " " * max(1, min(3, (self.width - used) // max(1, len(self.columns))))

    def _header(self, step_width: int, width: int) -> list[str]:
        names = ["step".rjust(step_width), *(column.name.rjust(column.width) for column in self.columns)]
        lines = [self._gap(step_width).join(names)]
        if not self.explained:
            self.explained = True
            meanings = [f"{column.name} ({column.meaning})" for column in self.columns if column.meaning]
            lines = [*textwrap.wrap(f"Columns: {', '.join(meanings)}", width, break_on_hyphens=False), *lines]
        return lines


def evaluation_line(logs: dict[str, Any], step: int) -> str:
    """An evaluation in a line."""
    runtime = next((key for key in logs if key.endswith("_runtime")), "eval_runtime")
    name = runtime.removesuffix("_runtime").removeprefix("eval").removeprefix("_")
    plain = {key.removeprefix("eval_"): value for key, value in logs.items()}
    plain |= {f"{ON_POLICY}{key.removesuffix('/mean')}": value for key, value in plain.items() if "reward" in key}
    facts = [
        f"{column.name} {column.form(value)}"
        for column in COLUMNS
        if column.name in ("reward", "accuracy", "length", "cut", "entropy")
        and (value := value_of(column, plain)) is not None
    ]
    if runtime in logs:
        facts.append(tqdm.format_interval(logs[runtime]))
    return f"Evaluation{f' on {name}' if name else ''} at step {step}: {', '.join(facts)}"


def end_line(logs: dict[str, Any], step: int, first: int) -> str:
    """The summary that ends training, in a line."""
    speed = f"{logs['train_runtime'] / max(1, step - first):.3g} s a step"
    return f"Trained to step {step} in {tqdm.format_interval(logs['train_runtime'])} ({speed})."
