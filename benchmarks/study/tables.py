"""Tables of the report: arms against what was measured of them, all seeds shown, what was not run named as such."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study.lines import Run
from benchmarks.study.measures import ENOUGH, Context, Interval, interval, measure
from mentor_trl.errors import SetupError


HEADINGS = {
    "seeds": "seeds",
    "solved": "seeds solved",
    "accuracy": "final accuracy",
    "area": "area by steps",
    "area_cost": "area by cost",
    "accuracy_cost": "accuracy at equal cost",
    "reached": "step at which {level} is reached",
    "entropy": "final entropy, nats",
    "entropy_level": "entropy at accuracy {level}, nats",
    "length": "final length, tokens",
    "distinct": "distinct right solutions a prompt",
    "distinct_level": "distinct right solutions at accuracy {level}",
    "cost": "cost",
    "seconds": "training seconds",
    "expert_tokens": "expert tokens",
    "guided_until": "guided until step",
    "memory": "memory, GiB",
    "metrics.branch_rate": "branch points, share of mixed tokens",
    "metrics.replaced_rate": "replaced, share of mixed tokens",
    "metrics.weight": "E[w]",
}
COLUMNS = ("seeds", "solved", "accuracy", "area", "difference", "area_cost", "cost", "seconds", "expert_tokens")
SUMMED_UP = ("cost", "seconds", "expert_tokens")  # whose seeds are not listed
NOT_RUN, NONE = "not run", "–"
EXPERTS = {"barely": "barely stronger", "other": "strong, with other habits"}  # others are called what they are


@dataclass(frozen=True)
class Row:
    """
    An arm on a task with an expert.

    Args:
        arm, label, task, expert (`str`):
            What it is.
        runs (`dict[int, Run]`):
            Its runs by seed.
        planned (`tuple[int, ...]`):
            Seeds that it should have.
        context (`Context`):
            What its block has in common.
    """

    arm: str
    label: str
    task: str
    expert: str | None
    runs: Mapping[int, Run]
    planned: tuple[int, ...]
    context: Context

    def values(self, name: str) -> dict[int, float]:
        """A measure by seed."""
        return {seed: measure(name, run, self.context) for seed, run in self.runs.items()}

    def differences(self, other: "Row", name: str) -> dict[int, float]:
        """A measure less that of another arm, by the seeds that both have."""
        ours, theirs = self.values(name), other.values(name)
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}

    @property
    def missing(self) -> list[int]:
        return [seed for seed in self.planned if seed not in self.runs]

    @property
    def place(self) -> str:
        return ", ".join(filter(None, (self.task, f"expert {expert_name(self.expert)}" if self.expert else None)))


@dataclass(frozen=True)
class Block:
    """Rows that are compared with each other: one task, one expert."""

    task: str
    expert: str
    rows: tuple[Row, ...]
    baseline: Row | None
    context: Context

    def row(self, arm: str) -> Row | None:
        known = {row.arm: row for row in (*self.rows, *filter(None, (self.baseline,)))}
        return known.get(arm)


@dataclass(frozen=True)
class Table:
    """A table with its blocks, one for each task and expert; `spec` is what the configuration says of it."""

    spec: Mapping[str, Any]
    blocks: tuple[Block, ...]
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.spec["name"]

    @property
    def compared(self) -> str:
        return self.spec.get("compare", "area")

    @property
    def rows(self) -> list[Row]:
        return [row for block in self.blocks for row in block.rows]

    @property
    def run(self) -> bool:
        """Whether anything of it was run."""
        return any(row.runs for row in self.rows)

    def block(self, task: str | None = None, expert: str | None = None) -> Block:
        """The block of a task and an expert; the first that fits."""
        for block in self.blocks:
            if task in (None, block.task) and expert in (None, block.expert):
                return block
        raise SetupError(f"The table {self.name} has no block of the task {task} and the expert {expert}.")


def build_table(spec: Mapping[str, Any], runs: Sequence[Run], config: Mapping[str, Any]) -> Table:
    """
    The table that the configuration describes.

    Args:
        spec (`dict[str, Any]`):
            `name`, `title`, `study` (one, or several of which the first counts that has a seed), `task` or `tasks`,
            `arms`, and, if wanted, `experts`, `baseline`, `columns`, `compare`, `split` (a row for each label of an
            arm), `solved`, `level`.
        runs (`Sequence[Run]`):
            All runs.
        config (`dict[str, Any]`):
            The whole study.yaml, for labels and planned seeds of what was not run.
    """
    studies = _listed(spec["study"])
    tasks, experts = _listed(spec.get("tasks", spec.get("task"))), _listed(spec.get("experts", "strong"))
    defaults = {name: config["report"].get(name, value) for name, value in (("solved", 0.9), ("level", 0.5))}
    spec = {**defaults, **spec}
    blocks = tuple(_block(spec, runs, config, studies, task, expert) for task in tasks for expert in experts)
    columns = tuple(spec.get("columns", COLUMNS))
    if not spec.get("baseline"):
        columns = tuple(name for name in columns if not name.startswith("difference"))
    return Table(spec, blocks, columns)


def _block(spec, runs: Sequence[Run], config, studies: list[str], task: str, expert: str) -> Block:
    arms = spec["arms"] if spec.get("baseline") in (None, *spec["arms"]) else [*spec["arms"], spec["baseline"]]
    groups = []
    for arm in arms:
        found = [run for run in runs if run.study in studies and (run.task, run.arm) == (task, arm)]
        found = [run for run in found if run.expert in (None, expert)]
        labels = dict.fromkeys(run.label for run in found) if spec.get("split") else [None]
        for label in labels or [None]:
            chosen = [run for run in found if label in (None, run.label)]
            groups.append((arm, _by_seed(chosen, studies)))
    context = _context(spec, [run for _, found in groups for run in found.values()], runs, task)
    rows = []
    for arm, found in groups:
        label = next((run.label for run in found.values()), _arm(config, arm).get("label", arm))
        heard = next((run.expert for run in found.values()), expert if _arm(config, arm).get("expert") else None)
        planned = _planned(config, studies, task, arm, expert)
        rows.append(Row(arm, label, task, heard, found, planned, context))
    baseline = next((row for row in rows if row.arm == spec.get("baseline")), None)
    shown = tuple(row for row in rows if row.arm in spec["arms"])
    return Block(task, expert, shown, baseline, context)


def _by_seed(runs: Sequence[Run], studies: list[str]) -> dict[int, Run]:
    """One run for each seed, of the first study that has it; two of one study are a [`SetupError`]."""
    found: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.seed, studies.index(run.study))):
        if run.seed in found and found[run.seed].study == run.study:
            raise SetupError(
                f"The study {run.study} has two runs of the arm {run.arm} with seed {run.seed} on {run.task} (expert: "
                f"{run.expert}). Remove one, or set `split` in the table, if their labels differ."
            )
        found.setdefault(run.seed, run)
    return found


def _context(spec, compared: Sequence[Run], runs: Sequence[Run], task: str) -> Context:
    trained = [run for run in compared if run.trained]
    costs = [run.curves["cost"][-1] for run in trained if "cost" in run.curves]
    return Context(
        solved=spec["solved"],
        level=spec["level"],
        end=min((run.steps[-1] for run in trained), default=math.inf),
        budget=min(costs, default=math.inf),
        start={run.seed: run.curves["accuracy"][0] for run in runs if (run.task, run.arm) == (task, "policy")},
    )


def _planned(config, studies: list[str], task: str, arm: str, expert: str) -> tuple[int, ...]:
    """Seeds that the configuration of the first of the studies that has the arm names for it."""
    for study in studies:
        seeds = set()
        for block in config.get("studies", {}).get(study, ()):
            heard = block.get("experts", ["strong"])
            fits = expert in heard or not _arm(config, arm).get("expert")
            if task in block["tasks"] and arm in block["arms"] and fits:
                seeds |= set(block["seeds"])
        if seeds:
            return tuple(sorted(seeds))
    return ()


def _arm(config, name: str) -> dict[str, Any]:
    """What the configuration says of an arm, and of the one that it is `like`."""
    arm = config.get("arms", {}).get(name, {})
    return {**_arm(config, arm["like"]), **arm} if "like" in arm else arm


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def expert_name(expert: str | None) -> str:
    return EXPERTS.get(expert, expert) if expert else NONE


def number(value: float, sign: bool = False) -> str:
    """
    A number as it is read best: two digits after the point, three of what is below .1, three in all of what is large.

    >>> number(0.6213), number(1.0), number(0.0034), number(160), number(163_900_000_000.0)
    ('.62', '1.00', '.003', '160', '164 G')
    >>> number(0.12, sign=True), number(-0.12), number(-1e-9), number(float("nan"))
    ('+.12', '-.12', '.000', '–')
    """
    if not math.isfinite(value):
        return NONE
    size, unit = abs(value), ""
    for name in ("k", "M", "G", "T", "P"):
        if size < 999.5:
            break
        size, unit = size / 1000.0, f" {name}"
    whole = size == int(size) and size >= 10 and not unit
    digits = 0 if whole or size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.0995 or size == 0.0 else 3
    text = f"{size:.{digits}f}"
    mark = "" if not float(text) else "-" if value < 0 else "+" if sign else ""
    return mark + text.removeprefix("0" if text.startswith("0.") else "") + unit


def with_seeds(values: Mapping[int, float]) -> str:
    """Mean, with half its t interval where seeds suffice, and every seed."""
    found = interval(list(values.values()))
    if not found.count:
        return NONE
    half = f" ± {number(found.high - found.mean)}" if found.count >= ENOUGH else ""
    seeds = " ".join(number(values[seed]) for seed in sorted(values))
    return f"{number(found.mean)}{half} · {seeds}" if len(values) > 1 else number(found.mean)


def difference(found: Interval) -> str:
    """A difference with its interval, or with the range of what are too few for one."""
    if not found.count:
        return NONE
    if found.count == 1:
        return f"{number(found.mean, sign=True)} (one seed)"
    kind = found.kind if found.count >= ENOUGH else f"range of {found.count}"
    return f"{number(found.mean, sign=True)} ({kind}: {number(found.low, sign=True)}, {number(found.high, sign=True)})"


def cell(row: Row, column: str, baseline: Row | None, compared: str) -> str:
    """What a table says of an arm in a column."""
    if column == "seeds":
        count, planned = len(row.runs), len(row.planned)
        return f"{count} of {planned}" if planned > count else str(count)
    if not row.runs:
        return NOT_RUN
    if column.startswith("difference"):
        if baseline is None or not baseline.runs or row.arm == baseline.arm:
            return NONE
        name = column.partition(".")[2] or compared
        return difference(interval(list(row.differences(baseline, name).values())))
    if column.startswith("options."):
        stated = {run.options.get(column.partition(".")[2]) for run in row.runs.values()} - {None}
        return ", ".join(sorted(f"{one:g}" if isinstance(one, float) else str(one) for one in stated)) or NONE
    values = row.values(column)
    if column == "solved":
        return f"{sum(values.values()):.0f} of {len(values)}"
    there = [value for value in values.values() if not math.isnan(value)]
    if column == "reached":
        return f"{number(interval(there).mean)} ({len(there)} of {len(values)})" if there else "never"
    if column in SUMMED_UP:
        return number(interval(there).mean)
    if not there:
        return NONE
    return with_seeds(values)


def heading(column: str, table: Table) -> str:
    if column.startswith("difference"):
        name = column.partition(".")[2] or table.compared
        base = table.spec["baseline"]
        baselines = [block.baseline for block in table.blocks if block.baseline]
        label = baselines[0].label if baselines else base
        return f"{heading(name, table)}, less that of {label}"
    plain = re.sub(r"^(metrics|describe|options)\.", "", column).replace("_", " ")
    return HEADINGS.get(column, plain).format(level=number(table.spec["level"]))


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headings and rows."""
    leading = {"task": len({block.task for block in table.blocks}) > 1}
    leading["expert"] = len({block.expert for block in table.blocks}) > 1
    shown = [name for name, several in leading.items() if several]
    headings = [*shown, "arm", *(heading(column, table) for column in table.columns)]
    rows = []
    for block in table.blocks:
        for row in block.rows:
            place = [{"task": row.task, "expert": expert_name(row.expert)}[name] for name in shown]
            values = [cell(row, column, block.baseline, table.compared) for column in table.columns]
            rows.append([*place, row.label, *values])
    return headings, rows


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what holds a figure is on the right."""
    escaped = [[str(value).replace("|", "\\|") for value in row] for row in (headings, *rows)]
    numeric = [all(row[at][:1] in "0123456789.+-–n" for row in escaped[1:]) for at in range(len(headings))]
    rules = ["---:" if right and at else "---" for at, right in enumerate(numeric)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (escaped[0], rules, *escaped[1:]))


def missing(table: Table) -> Iterator[str]:
    """What the table should have and has not, in words."""
    for row in table.rows:
        if not row.runs:
            yield f"{row.label} ({row.place}): {NOT_RUN}"
        elif row.missing:
            yield f"{row.label} ({row.place}): no run with seed {', '.join(map(str, row.missing))}"
