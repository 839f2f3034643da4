"""What the quickstart prints and saves: tables, a verdict, and a figure of the training dynamics."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from examples.quickstart.evaluate import Evaluation, Run, area_under_curve, paired_difference
from mentor_trl.analysis import style


# Where the arms are compared: fixed before a run has curves to pick it from.
COMPARED_STEP = 100
BASELINE, OURS = "grpo", "mentor"
COLORS = dict(zip(("grpo", "mentor", "mentor_paper"), style.COLORS))


@dataclass(frozen=True)
class Table:
    """A table that can be printed and saved."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def print(self, console: Console) -> None:
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for position, name in enumerate(self.header):
            table.add_column(name, justify="right" if position else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        lines = [self.header, ["---"] + ["---:"] * (len(self.header) - 1), *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


@dataclass(frozen=True)
class Measure:
    """
    A row of the comparison.

    Args:
        name (`str`):
            What is measured.
        of_run (`Callable[[Run], np.ndarray | float]`):
            A number for each prompt, or one for the run.
        of_policy (`np.ndarray` or `float`, *optional*):
            The same of the policy before training.
        digits (`int`, *optional*, defaults to `3`):
            Digits after the point.
    """

    name: str
    of_run: Callable[[Run], np.ndarray | float]
    of_policy: np.ndarray | float | None = None
    digits: int = 3

    def mean(self, runs: list[Run]) -> np.ndarray | float:
        """Mean over runs, of each prompt where there is a number for each."""
        return np.mean([self.of_run(run) for run in runs], axis=0)

    def text(self, value: np.ndarray | float | None) -> str:
        return "" if value is None else f"{np.mean(value):.{self.digits}f}"

    def difference(self, ours: list[Run], theirs: list[Run]) -> str:
        """Paired over prompts; empty where there are none to pair."""
        ours, theirs = self.mean(ours), self.mean(theirs)
        return format_difference(*paired_difference(ours, theirs)) if np.ndim(ours) else ""


def write_report(policy: Evaluation, runs: list[Run], arms: dict[str, str], folder: Path, console: Console) -> None:
    """
    Print the tables and the verdict; save them with all numbers and the figure.

    Args:
        policy (`Evaluation`):
            The policy before training.
        runs (`list[Run]`):
            Evaluated runs, the same seeds for every arm.
        arms (`dict[str, str]`):
            Names of the arms to show, by recipe.
        folder (`Path`):
            Where to save.
        console (`Console`):
            Where to print.
    """
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    measures = make_measures(policy, runs[0])
    tables = [compare(measures, by_arm, arms), compare_seeds(measures[0], by_arm, arms)]
    tables += [describe_guidance(by_arm[arm], name) for arm, name in arms.items() if arm != BASELINE]
    conclusion = conclude(measures, by_arm)
    for table in tables:
        console.print()
        table.print(console)
    console.print(f"\n{conclusion}\n", style="bold", highlight=False)

    report = "\n\n".join(["# Quickstart", conclusion, *(table.markdown() for table in tables)])
    (folder / "report.md").write_text(report + "\n\n![Training dynamics](dynamics.png)\n")
    (folder / "results.json").write_text(json.dumps(to_json(policy, runs), indent=1))
    saved = [folder / "report.md", folder / "results.json"]
    if plot(policy, by_arm, arms, folder / "dynamics.png"):
        saved.append(folder / "dynamics.png")
    else:
        console.print("No figure: matplotlib is not installed (pip install matplotlib).")
    console.print(f"Saved: {', '.join(map(str, saved))}")


def make_measures(policy: Evaluation, run: Run) -> list[Measure]:
    at, last, samples = COMPARED_STEP, max(run.curve), policy.correct.shape[1]

    def area(run: Run) -> np.ndarray:
        curve = [policy.accuracy, *(evaluation.accuracy for evaluation in run.curve.values())]
        return area_under_curve([0, *run.curve], curve)

    return [
        Measure(f"accuracy at step {at}", lambda run: run.curve[at].accuracy, policy.accuracy),
        Measure(f"pass@{samples} at step {at}", lambda run: run.curve[at].solved, policy.solved),
        Measure(f"accuracy at step {last}", lambda run: run.curve[last].accuracy, policy.accuracy),
        Measure(f"pass@{samples} at step {last}", lambda run: run.curve[last].solved, policy.solved),
        Measure(f"mean accuracy over steps 0 to {last}", area),
        Measure(f"entropy at step {at}, nats", lambda run: run.curve[at].entropy, policy.entropy),
        Measure(f"entropy at step {last}, nats", lambda run: run.curve[last].entropy, policy.entropy),
        Measure(f"tokens a response at step {at}", lambda run: run.curve[at].length, policy.length, 1),
        Measure(f"tokens a response at step {last}", lambda run: run.curve[last].length, policy.length, 1),
        Measure(f"steps worked out at step {at}", lambda run: run.curve[at].work, policy.work),
        Measure(f"habit words a step at step {last}", lambda run: run.curve[last].habits, policy.habits),
        Measure("seconds of training", lambda run: run.seconds, digits=0),
    ]


def compare(measures: list[Measure], by_arm: dict[str, list[Run]], arms: dict[str, str]) -> Table:
    baseline = by_arm.get(BASELINE)
    others = [arm for arm in arms if arm != BASELINE] if baseline else []
    header = ["", "policy", *arms.values(), *(f"{arms[arm]} - {arms[BASELINE]}" for arm in others)]
    rows = [
        [
            measure.name,
            measure.text(measure.of_policy),
            *(measure.text(measure.mean(by_arm[arm])) for arm in arms),
            *(measure.difference(by_arm[arm], baseline) for arm in others),
        ]
        for measure in measures
    ]
    seeds = len(next(iter(by_arm.values())))
    return Table(f"Means over {seeds} seed(s); differences with 95% intervals, paired over prompts", header, rows)


def compare_seeds(measure: Measure, by_arm: dict[str, list[Run]], arms: dict[str, str]) -> Table:
    baseline = by_arm.get(BASELINE)
    others = [arm for arm in arms if arm != BASELINE] if baseline else []
    rows = []
    for position, run in enumerate(next(iter(by_arm.values()))):
        values = [measure.text(measure.of_run(by_arm[arm][position])) for arm in arms]
        differences = [measure.difference([by_arm[arm][position]], [baseline[position]]) for arm in others]
        rows.append([str(run.seed), *values, *differences])
    header = ["seed", *arms.values(), *(f"{arms[arm]} - {arms[BASELINE]}" for arm in others)]
    return Table(f"{measure.name.capitalize()}, by seed", header, rows)


def describe_guidance(runs: list[Run], name: str, windows: int = 3) -> Table:
    """What the trainer logged while rollouts were mixed, in equal windows of steps."""
    columns = {
        "alpha": "mentor/alpha",
        "reward, on-policy": "mentor/on_policy/reward",
        "reward, mixed": "mentor/mixed/reward",
        "gamma": "mentor/gamma",
        "branch points": "mentor/branch_rate",
        "replaced tokens": "mentor/replaced_rate",
    }
    rows = []
    guided = [[entry for entry in run.history if "mentor/mixed/reward" in entry] for run in runs]
    for parts in zip(*(np.array_split(entries, windows) for entries in guided)):
        entries = [entry for part in parts for entry in part]
        steps = [entry["step"] for entry in entries]
        values = [f"{np.mean([entry[key] for entry in entries]):.2f}" for key in columns.values()]
        rows.append([f"{min(steps)} to {max(steps)}", *values])
    return Table(f"Guidance in {name}, means over rollouts and seeds", ["steps", *columns], rows)


def conclude(measures: list[Measure], by_arm: dict[str, list[Run]]) -> str:
    """Say whether MENTOR is ahead of GRPO by more than the interval in the first measure, and name the others."""
    if not (by_arm.get(BASELINE) and by_arm.get(OURS)):
        return "No comparison: it needs the arms grpo and mentor."
    measure, *others = [measure for measure in measures if "accuracy" in measure.name]
    mean, half_width = paired_difference(measure.mean(by_arm[OURS]), measure.mean(by_arm[BASELINE]))
    pairs = zip(by_arm[OURS], by_arm[BASELINE])
    by_seed = [paired_difference(measure.of_run(ours), measure.of_run(theirs)) for ours, theirs in pairs]
    ahead = sum(difference > width for difference, width in by_seed)
    if mean > half_width:
        verdict = "MENTOR is ahead of GRPO by more than the interval"
    elif mean < -half_width:
        verdict = "MENTOR is behind GRPO by more than the interval"
    else:
        verdict = "MENTOR and GRPO are not told apart"
    rest = ", ".join(f"{other.name} {other.difference(by_arm[OURS], by_arm[BASELINE])}" for other in others)
    return (
        f"{verdict} in {measure.name}: {format_difference(mean, half_width)}, and in {ahead} of {len(by_seed)} seeds "
        f"taken alone. Differences elsewhere: {rest}."
    )


def format_difference(mean: float, half_width: float) -> str:
    """
    >>> format_difference(0.25, 0.031)
    '+0.250 ± 0.031'
    """
    return f"{mean:+.3f} ± {half_width:.3f}"


def to_json(policy: Evaluation, runs: list[Run]) -> dict:
    def numbers(evaluation: Evaluation) -> dict:
        values = {name: getattr(evaluation, name) for name in ("entropy", "length", "work", "habits")}
        return {"accuracy": evaluation.accuracy.tolist(), "solved": evaluation.solved.tolist(), **values}

    return {
        "compared_step": COMPARED_STEP,
        "policy": numbers(policy),
        "runs": [
            {
                "arm": run.arm,
                "seed": run.seed,
                "seconds": run.seconds,
                "curve": {step: numbers(evaluation) for step, evaluation in run.curve.items()},
            }
            for run in runs
        ],
    }


def plot(policy: Evaluation, by_arm: dict[str, list[Run]], arms: dict[str, str], path: Path) -> bool:
    """Draw the dynamics; returns whether matplotlib is there to do it."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    figure = style.new_figure(10, 6.4)
    axes = figure.subplots(2, 2, sharex=True)
    panels = {
        "accuracy (compared at the dotted line)": lambda evaluation: evaluation.accuracy.mean(),
        "entropy (nats)": lambda evaluation: evaluation.entropy,
        "response length (tokens)": lambda evaluation: evaluation.length,
    }
    for axis, (title, value) in zip(axes.flat, panels.items()):
        for arm, runs in by_arm.items():
            steps = [0, *runs[0].curve]
            curves = [[value(policy), *map(value, run.curve.values())] for run in runs]
            draw(axis, steps, curves, COLORS[arm], arms[arm])
        axis.set_title(title)
        axis.set_ylim(bottom=0.0)
    axes[0, 0].axvline(COMPARED_STEP, color="0.6", linestyle=":", linewidth=1)
    several = len(next(iter(by_arm.values()))) > 1
    axes[0, 0].legend(frameon=False, loc="upper left", title="thin lines: single seeds" if several else None)
    guided = next((arm for arm in by_arm if arm != BASELINE), None)
    if guided:
        draw_guidance(axes[1, 1], by_arm[guided], arms[guided])
    axes[1, 1].set_visible(guided is not None)
    style.share_axes([axes[0, 0], axes[1, 1]], [1.0])
    for axis in axes.flat:
        style.quiet(axis)
        style.step_axis(axis)
    for axis in (*axes[1], *axes[0][[False, guided is None]]):  # the lowest of each column
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    style.save_figure(figure, path)
    return True


def draw(axis, steps: list[int], curves: list[list[float]], color: str, label: str) -> None:
    """A thin line for each seed and a thick one for their mean."""
    for curve in curves if len(curves) > 1 else []:
        axis.plot(steps, curve, color=color, alpha=0.35, linewidth=0.8)
    axis.plot(steps, np.mean(curves, axis=0), color=color, linewidth=2.2, label=label)


def draw_guidance(axis, runs: list[Run], name: str) -> None:
    """Rewards of the two sources during training, and the weight of the mixed one."""
    series = {
        "reward, on-policy rollouts": ("mentor/on_policy/reward", COLORS[OURS], "-"),
        "reward, mixed rollouts": ("mentor/mixed/reward", style.COLORS[3], "-"),
        "alpha": ("mentor/alpha", "0.4", "--"),
    }
    for label, (key, color, line) in series.items():
        entries = [[entry for entry in run.history if key in entry] for run in runs]
        values = np.mean([[entry[key] for entry in run] for run in entries], axis=0)
        axis.plot([entry["step"] for entry in entries[0]], values, line, color=color, linewidth=1.6, label=label)
    axis.set_title(f"{name} during training")
    axis.legend(frameon=False)
