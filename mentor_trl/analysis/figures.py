"""The figures: training dynamics, guidance, reasoning words, pass@k."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .runs import Curve, Run, group_by_label, make_curve
from .style import color_of, new_figure, quiet, shared_legend


if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """Lines over the steps: the metrics of each by its name, the preferred one first. A single line has no name."""

    title: str
    unit: str
    lines: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class PanelCurves:
    """The curves of a panel: for each label, for each line."""

    panel: Panel
    curves: dict[str, dict[str, Curve]]


LINE_STYLES = ("-", "--")
TRAINING = ("accuracy", "entropy", "length")
_GUIDANCE = (
    ("weight of the mixed advantages", "alpha", {"": "alpha"}),
    ("entropy threshold", "gamma (nats)", {"": "gamma"}),
    (
        "where the expert speaks",
        "share of the tokens",
        {"branch points": "branch_rate", "replaced tokens": "replaced_rate"},
    ),
    ("drafted tokens that stand", "acceptance", {"": "acceptance"}),
    ("reward by source", "mean reward", {"on-policy": "on_policy/reward", "mixed": "mixed/reward"}),
    ("advantage by source", "mean advantage", {"on-policy": "on_policy/advantage", "mixed": "mixed/advantage"}),
)
GUIDANCE = tuple(
    Panel(title, unit, {line: (f"mentor/{metric}",) for line, metric in lines.items()})
    for title, unit, lines in _GUIDANCE
)


def training_panel(name: str, accuracy: str = "accuracy_reward", evaluation: bool = False) -> Panel:
    """
    Panel of the training dynamics: accuracy, reward, entropy or length. On-policy rows are preferred: with mixed rows
    in it, a metric of TRL is not about the policy. Runs without an expert have TRL's metrics, all of whose rows are
    on-policy.
    """
    titles = {
        "accuracy": ("accuracy", "mean of " + accuracy, f"rewards/{accuracy}", f"rewards/{accuracy}/mean"),
        "reward": ("reward", "mean reward", "reward", "reward"),
        "entropy": ("entropy", "nats", "entropy", "entropy"),
        "length": ("response length", "tokens", "length", "completions/mean_length"),
    }
    title, unit, ours, trl = titles[name]
    metrics = (f"eval_{trl}",) if evaluation else (f"mentor/on_policy/{ours}", trl)
    return Panel(title, unit, {"": metrics})


def panel_curves(runs: Sequence[Run], panel: Panel, smooth: int = 1) -> PanelCurves:
    """Curves of a panel, one for each label and line; a run that lacks a metric is a [`SetupError`]."""
    curves = {
        label: {
            line: make_curve([run.first_series(names, line or panel.title) for run in group], smooth)
            for line, names in panel.lines.items()
        }
        for label, group in group_by_label(runs).items()
    }
    return PanelCurves(panel, curves)


def plot_training(
    runs: Sequence[Run],
    panels: Sequence[str] = TRAINING,
    accuracy: str = "accuracy_reward",
    smooth: int = 1,
    evaluation: bool = False,
) -> tuple["Figure", list[PanelCurves]]:
    """Accuracy, entropy and response length against the step, for several runs (Figure 2 of the paper)."""
    shown = [panel_curves(runs, training_panel(name, accuracy, evaluation), smooth) for name in panels]
    return _draw_panels(new_figure(max(3.7 * len(shown), 5.0), 3.5), 1, shown, smooth), shown


def plot_guidance(runs: Sequence[Run], smooth: int = 1) -> tuple["Figure", list[PanelCurves]]:
    """What the expert did, as [`plot_training`]: alpha, gamma, branches, acceptance, and rewards by source."""
    shown = [panel_curves(runs, panel, smooth) for panel in GUIDANCE]
    return _draw_panels(new_figure(11.0, 6.2), 2, shown, smooth), shown


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
    axis.set_ylim(0.0, min(1.02, max(rates["high"].max() * 1.08, 0.01)))
    axis.set_ylabel("share of responses with the word")
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
    for axis in axes[::columns]:
        axis.set_ylabel("pass@k")
    for label in labels:
        axes[0].plot([], [], "o-", color=colors[label], markersize=3.5, linewidth=1.8, label=label)
    shared_legend(figure, axes[0], "bands: 95% intervals over the prompts")
    return figure


def _draw_panels(figure: "Figure", rows: int, shown: list[PanelCurves], smooth: int) -> "Figure":
    axes = list(figure.subplots(rows, len(shown) // rows, squeeze=False, sharex=True).flat)
    colors = color_of(list(shown[0].curves))
    for axis, panel in zip(axes, shown):
        for label, lines in panel.curves.items():
            for style, curve in zip(LINE_STYLES, lines.values()):
                name = f"{label} ({curve.runs} runs)" if curve.runs > 1 else label
                _draw_curve(axis, curve, colors[label], style, name if style == "-" else None)
        if len(panel.panel.lines) > 1:
            _line_legend(axis, panel.panel.lines)
        axis.set_title(panel.panel.title, fontsize=11)
        axis.set_ylabel(panel.panel.unit)
        quiet(axis)
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel("step")
    several = any(curve.runs > 1 for lines in shown[0].curves.values() for curve in lines.values())
    notes = [f"moving means of {smooth} logged values"] * (smooth > 1)
    notes += ["bands: one standard error of the mean of the runs"] * several
    shared_legend(figure, axes[0], "; ".join(notes))
    return figure


def _draw_curve(axis: "Axes", curve: Curve, color: str, style: str, name: str | None) -> None:
    if curve.raw is not None:
        axis.plot(curve.raw.index, curve.raw, color=color, linewidth=0.7, alpha=0.3)
    if curve.error is not None:
        low, high = curve.mean - curve.error, curve.mean + curve.error
        axis.fill_between(curve.mean.index, low, high, color=color, alpha=0.18, linewidth=0)
    # A run of one logged step would be an invisible line
    marker = "o" if len(curve.mean) == 1 else None
    axis.plot(curve.mean.index, curve.mean, style, color=color, linewidth=1.7, marker=marker, label=name)


def _line_legend(axis: "Axes", names: Iterable[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color="0.3", linestyle=style, label=name) for style, name in zip(LINE_STYLES, names)]
    axis.legend(handles=handles, frameon=True, framealpha=0.8, edgecolor="none", fontsize=8.5)
