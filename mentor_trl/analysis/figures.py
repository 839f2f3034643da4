"""The figures: training dynamics, guidance, reasoning words, pass@k."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import SetupError
from .runs import Curve, Run, group_by_label, make_curve
from .style import color_of, new_figure, quiet, round_top, share_axes, shared_legend, stated, step_axis


if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """
    Lines over the steps: the metrics of each by its name, the preferred one first. A single line has no name. The axis
    starts at 0 where nothing is below, and that of a `share` goes to 1. Lines named in `steady` are not drawn where
    they are the same at all steps of all runs, as a setting or the method may make them.
    """

    title: str
    unit: str
    lines: dict[str, tuple[str, ...]]
    share: bool = False
    steady: tuple[str, ...] = ()


@dataclass(frozen=True)
class PanelCurves:
    """The curves of a panel: for each label, for each line."""

    panel: Panel
    curves: dict[str, dict[str, Curve]]

    @property
    def all(self) -> list[Curve]:
        return [curve for lines in self.curves.values() for curve in lines.values()]


LINE_STYLES = {"on-policy": "-", "mixed": "--", "branch points": "-", "replaced tokens": "--"}
TRAINING = ("accuracy", "entropy", "length")
# A run of so few values shows each of them
FEW = 12
# Values that differ by less are the same, but for rounding
STEADY = 1e-6
_GUIDANCE = (
    ("weight of the mixed advantages", "alpha", {"": "alpha"}, True, ("",)),
    ("entropy threshold", "gamma (nats)", {"": "gamma"}, False, ("",)),
    (
        "where the expert speaks",
        "share of the tokens",
        {"branch points": "branch_rate", "replaced tokens": "replaced_rate"},
        False,
        (),
    ),
    ("drafted tokens that stand", "acceptance", {"": "acceptance"}, True, ("",)),
    ("reward by source", "mean reward", {"on-policy": "on_policy/reward", "mixed": "mixed/reward"}, True, ()),
    (
        "advantage by source",
        "mean advantage",
        {"on-policy": "on_policy/advantage", "mixed": "mixed/advantage"},
        False,
        ("on-policy", "mixed"),
    ),
)
GUIDANCE = tuple(
    Panel(title, unit, {line: (f"mentor/{metric}",) for line, metric in lines.items()}, share, steady)
    for title, unit, lines, share, steady in _GUIDANCE
)


def training_panel(name: str, accuracy: str = "accuracy_reward", evaluation: bool = False) -> Panel:
    """
    Panel of the training dynamics: accuracy, reward, entropy or length. On-policy rows are preferred: with mixed rows
    in it, a metric of TRL is not about the policy. Runs without an expert have TRL's metrics, all of whose rows are
    on-policy.
    """
    titles = {
        "accuracy": ("accuracy", "mean of " + accuracy, f"rewards/{accuracy}", f"rewards/{accuracy}/mean", True),
        "reward": ("reward", "mean reward", "reward", "reward", True),
        "entropy": ("entropy", "nats", "entropy", "entropy", False),
        "length": ("response length", "tokens", "length", "completions/mean_length", False),
    }
    title, unit, ours, trl, share = titles[name]
    metrics = (f"eval_{trl}",) if evaluation else (f"mentor/on_policy/{ours}", trl)
    return Panel(title, unit, {"": metrics}, share)


def find_accuracy(runs: Sequence[Run]) -> str:
    """
    Name of the reward function that is the accuracy of all runs: `accuracy_reward`, or the only one that is left
    without `format_reward`.
    """
    name = re.compile(r"(?:eval_(?:.+_)?)?rewards/(.+)/mean")
    found = [{match[1] for metric in run.metrics if (match := name.fullmatch(metric))} for run in runs]
    candidates = set.intersection(*found) - {"format_reward"}
    if "accuracy_reward" in candidates or not candidates:
        return "accuracy_reward"
    if len(candidates) > 1:
        raise SetupError(
            f"Run {runs[0].path} has several rewards, of which one is to be the accuracy: name it with --accuracy, "
            f"one of {', '.join(sorted(candidates))}."
        )
    return candidates.pop()


def panel_curves(runs: Sequence[Run], panel: Panel, smooth: int = 1, needed: bool = True) -> PanelCurves:
    """
    Curves of a panel, one for each label and line. A run that lacks a metric is a [`SetupError`], or, where it is not
    `needed`, its label lacks the line.
    """
    curves = {}
    for label, group in group_by_label(runs).items():
        lines = {
            line: names for line, names in panel.lines.items() if needed or all(run.logged(names) for run in group)
        }
        curves[label] = {
            line: make_curve([run.first_series(names, line or panel.title) for run in group], smooth)
            for line, names in lines.items()
        }
    return PanelCurves(panel, curves)


def plot_training(
    runs: Sequence[Run],
    panels: Sequence[str] = TRAINING,
    accuracy: str | None = None,
    smooth: int = 1,
    evaluation: bool = False,
) -> tuple["Figure", list[PanelCurves]]:
    """
    Accuracy, entropy and response length against the step, for several runs (Figure 2 of the paper). Without a name
    the accuracy is that of [`find_accuracy`].
    """
    accuracy = accuracy or (find_accuracy(runs) if "accuracy" in panels else "")
    shown = [panel_curves(runs, training_panel(name, accuracy, evaluation), smooth) for name in panels]
    shown, notes = _worth_drawing(shown)
    return _draw_panels(new_figure(max(3.7 * len(shown), 5.0), 3.5), 1, shown, smooth, notes), shown


def plot_guidance(runs: Sequence[Run], smooth: int = 1) -> tuple["Figure", list[PanelCurves]]:
    """What the expert did, as [`plot_training`]: alpha, gamma, branches, acceptance, and rewards by source."""
    shown = [panel_curves(runs, panel, smooth, needed=panel is GUIDANCE[0]) for panel in GUIDANCE]
    shown, notes = _worth_drawing(shown)
    rows = 1 if len(shown) <= 3 else 2
    columns = math.ceil(len(shown) / rows)
    return _draw_panels(new_figure(max(3.7 * columns, 5.0), 3.1 * rows + 0.3), rows, shown, smooth, notes), shown


def _worth_drawing(shown: list[PanelCurves]) -> tuple[list[PanelCurves], list[str]]:
    """The panels that have a curve, without lines that stay the same; notes say what is left out."""
    kept, notes, values = [], [], []
    for one in shown:
        for line in one.panel.lines:
            curves = [lines[line] for lines in one.curves.values() if line in lines]
            numbers = np.concatenate([curve.mean for curve in curves]) if curves else np.empty(0)
            if line in one.panel.steady and len(numbers) > 1 and np.ptp(numbers) < STEADY:
                for lines in one.curves.values():
                    lines.pop(line, None)
                notes.append(f"{line + ' ' if line else ''}{one.panel.unit} is {numbers[0] + 0.0:.3g} at all steps")
        curves = one.all
        if curves and max(len(curve.mean) for curve in curves) > 1:
            kept.append(one)
        values += [f"{one.panel.title} {curve.mean.iloc[0]:.3g} {one.panel.unit}" for curve in curves[:1]]
    if not kept:
        raise SetupError(
            f"One step was logged, which gives no curve ({', '.join(values)}). Train for more steps, or lower "
            "`logging_steps` (`eval_steps` for --eval)."
        )
    return kept, notes


def plot_words(rates: "pd.DataFrame") -> "Figure":
    """Rates of [`~mentor_trl.analysis.rates.word_rates`], with 95% intervals (Figure 3 of the paper)."""
    labels, words = list(dict.fromkeys(rates["label"])), list(dict.fromkeys(rates["word"]))
    colors, width = color_of(labels), 0.8 / len(labels)
    figure = new_figure(min(max(1.6 + len(words) * (0.3 + 0.13 * len(labels)), 5.5), 11.0), 3.8)
    axis = figure.subplots()
    for position, label in enumerate(labels):
        rows = rates[rates["label"] == label].set_index("word").loc[words]
        x = np.arange(len(words)) + (position - (len(labels) - 1) / 2) * width
        error = np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]]).clip(min=0.0)
        name = f"{label} ({rows['responses'].iloc[0]:,} responses)"
        axis.bar(x, rows["rate"], width * 0.92, color=colors[label], label=name)
        axis.errorbar(x, rows["rate"], yerr=error, fmt="none", ecolor="0.25", elinewidth=0.8)
    axis.set_xticks(range(len(words)), words, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.6, len(words) - 0.4)
    top = round_top(rates["high"].max())
    axis.set_ylim(0.0, top)
    axis.set_ylabel(stated("share of responses with the word", top))
    quiet(axis, grid="y")
    shared_legend(figure, axis, "thin lines: 95% intervals")
    return figure


def plot_pass_at_k(curves: "pd.DataFrame") -> "Figure":
    """Curves of [`~mentor_trl.analysis.rates.pass_at_k_curves`], a panel a task (Figure 4 of the paper)."""
    tasks, labels = list(dict.fromkeys(curves["task"])), list(dict.fromkeys(curves["label"]))
    colors, columns = color_of(labels), min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns)
    figure = new_figure(max(3.8 * columns, 5.0), 3.1 * rows + 0.4)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, task in zip(axes, tasks):
        of_task = curves[curves["task"] == task]
        for label, line in of_task.groupby("label", sort=False):
            axis.plot(line["k"], line["value"], "o-", color=colors[label], markersize=3.5, linewidth=1.8)
            axis.fill_between(line["k"], line["low"], line["high"], color=colors[label], alpha=0.15, linewidth=0)
        ticks = sorted(set(of_task["k"]))
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        prompts = sorted(set(of_task["prompts"]))
        axis.set_title(f"{task} ({' or '.join(map(str, prompts))} prompts)", fontsize=11)
        axis.set_xlabel("k")
        quiet(axis)
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    top = share_axes(axes[: len(tasks)], curves["high"])
    for axis in axes[::columns]:
        axis.set_ylabel(stated("pass@k", top))
    for label in labels:
        axes[0].plot([], [], "o-", color=colors[label], markersize=3.5, linewidth=1.8, label=label)
    shared_legend(figure, axes[0], "bands: 95% intervals over the prompts")
    return figure


def _draw_panels(figure: "Figure", rows: int, shown: list[PanelCurves], smooth: int, notes: list[str]) -> "Figure":
    axes = list(figure.subplots(rows, math.ceil(len(shown) / rows), squeeze=False, sharex=True).flat)
    colors = color_of(list(shown[0].curves))
    for axis, panel in zip(axes, shown):
        for label, lines in panel.curves.items():
            for line, curve in lines.items():
                _draw_curve(axis, curve, colors[label], LINE_STYLES.get(line, "-"))
        if len(panel.panel.lines) > 1:
            _line_legend(axis, dict.fromkeys(line for lines in panel.curves.values() for line in lines))
        axis.set_title(panel.panel.title, fontsize=11)
        _set_scale(axis, panel)
        quiet(axis)
        step_axis(axis)
    columns = axes[0].get_subplotspec().get_gridspec().ncols
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[max(len(shown) - columns, 0) : len(shown)]:  # the lowest of each column
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    for label, lines in shown[0].curves.items():
        runs = max((curve.runs for curve in lines.values()), default=1)
        axes[0].plot([], [], color=colors[label], linewidth=1.7, label=f"{label} ({runs} runs)" if runs > 1 else label)
    thin = any(curve.raw is not None for panel in shown for curve in panel.all)
    explained = [f"moving means of {smooth} logged values{', which are the thin lines' if thin else ''}"] * (
        smooth > 1
    )
    if any(_has_visible_band(axis, panel) for axis, panel in zip(axes, shown)):
        explained.append("bands: one standard error of the mean of the runs")
    shared_legend(figure, axes[0], "; ".join(explained + notes))
    return figure


def _set_scale(axis: "Axes", panel: PanelCurves) -> None:
    drawn = [curve.mean if curve.raw is None else curve.raw for curve in panel.all]
    drawn += [curve.mean + curve.error for curve in panel.all if curve.error is not None]
    low, high = min(one.min() for one in drawn), max(one.max() for one in drawn)
    axis.set_ylabel(panel.panel.unit)
    if panel.panel.share and low >= 0.0 and high <= 1.0:
        axis.set_title(stated(panel.panel.title, share_axes([axis], [high])), fontsize=11)
    elif low >= 0.0 < high:
        axis.set_ylim(-0.02 * high, 1.08 * high)


def _has_visible_band(axis: "Axes", panel: PanelCurves) -> bool:
    """Whether some band is thicker than a line: a hundredth of the axis."""
    low, high = axis.get_ylim()
    errors = [curve.error.max() for curve in panel.all if curve.error is not None]
    return bool(errors) and 2 * max(errors) > 0.01 * (high - low)


def _draw_curve(axis: "Axes", curve: Curve, color: str, style: str) -> None:
    if curve.raw is not None:
        axis.plot(curve.raw.index, curve.raw, color=color, linewidth=0.7, alpha=0.3)
    if curve.error is not None:
        low, high = curve.mean - curve.error, curve.mean + curve.error
        axis.fill_between(curve.mean.index, low, high, color=color, alpha=0.18, linewidth=0)
    marker = "o" if len(curve.mean) <= FEW else None
    axis.plot(curve.mean.index, curve.mean, style, color=color, linewidth=1.7, marker=marker, markersize=3.5)


def _line_legend(axis: "Axes", names: Iterable[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color="0.3", linestyle=LINE_STYLES[name], label=name) for name in names]
    axis.legend(handles=handles, frameon=True, framealpha=0.8, edgecolor="none", fontsize=8.5)
