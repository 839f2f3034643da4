"""
Figures of the report: what is drawn is worked out first, as plain numbers, then drawn. A picture carries the digest of
its numbers, so that it can be told whether it is up to date without comparing pixels, which differ by machine.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.study.lines import Run
from benchmarks.study.measures import CONFIDENCE, ENOUGH, against_cost, at_level, interval
from benchmarks.study.tables import HEADINGS, NONE, NOT_RUN, Block, Row, Table, expert_name
from mentor_trl.analysis.style import COLORS, DPI, new_figure, quiet
from mentor_trl.errors import SetupError


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

INK, OTHER, FAINT = COLORS[0], "0.45", 0.5
SEED = {"color": INK, "linewidth": 0.8}
MEAN = {"color": INK, "linewidth": 2.0}
BASELINE = {"color": OTHER, "linewidth": 1.2, "linestyle": "--"}
EQUAL = {"color": OTHER, "linewidth": 1.0, "linestyle": ":"}
DOT = {"color": COLORS[1], "linestyle": "none", "marker": "o", "markersize": 4.5, "alpha": 0.7}
BAR = {"color": INK, "linestyle": "none", "marker": "|", "markersize": 13, "markeredgewidth": 2.2}
WHISKER = {"color": INK, "linewidth": 1.6}
DIGEST = "Digest"
LEVELS = tuple(round(0.05 * step, 2) for step in range(1, 20))
Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Figure:
    """
    A figure before it is drawn.

    Args:
        name, table (`str`):
            Its own and that of the table to which it belongs.
        title, caption (`str`):
            What is said above it and beside it.
        panels (`list[dict[str, Any]]`):
            A panel each: curves of an arm, or dots of all arms in one measure. Empty where nothing was run.
        axes (`tuple[str, str]`):
            What is on the axes.
        other (`dict[str, Any]`, *optional*):
            The baseline's mean curve, which all panels show.
    """

    name: str
    table: str
    title: str
    caption: str
    panels: list[dict[str, Any]]
    axes: tuple[str, str]
    other: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        shown = [self.title, self.panels, self.axes, self.other, self.options]
        return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _rounded(values: Sequence[float]) -> list[float]:
    """Six digits: what a picture does not show must not change its digest."""
    return [float(f"{value:.6g}") for value in values]


def _pairs(x: Sequence[float], y: Sequence[float]) -> Curve:
    kept = [(one, other) for one, other in zip(x, y) if not (math.isnan(one) or math.isnan(other))]
    return _rounded([one for one, _ in kept]), _rounded([other for _, other in kept])


def by_step(name: str) -> Callable[[Run, Row], Curve]:
    return lambda run, row: _pairs(run.steps, run.curves.get(name, [math.nan] * len(run.steps)))


def by_cost(run: Run, row: Row) -> Curve:
    return _pairs(*against_cost(run, row.context)) if "cost" in run.curves else ([], [])


def by_accuracy(name: str) -> Callable[[Run, Row], Curve]:
    """A curve where the accuracy first reaches each level."""

    def curve(run: Run, row: Row) -> Curve:
        return _pairs(LEVELS, [at_level(run, name, level) for level in LEVELS]) if name in run.curves else ([], [])

    return curve


def by_samples(run: Run, row: Row) -> Curve:
    """pass@k of the last evaluation."""
    last = {int(name.removeprefix("pass@")): run.curves[name][-1] for name in run.curves if name.startswith("pass@")}
    return _pairs(sorted(last), [last[k] for k in sorted(last)])


ACCURACY = "accuracy (share of right samples)"
COST = "cost in {unit}forward-token equivalents × parameters"
UNITS = {1e15: "10¹⁵ ", 1e12: "10¹² ", 1e9: "10⁹ ", 1e6: "10⁶ ", 1e3: "10³ ", 1.0: ""}
# What is drawn of each run, title, axes, further options
CURVES: dict[str, tuple[Callable[[Run, Row], Curve], str, tuple[str, str], dict[str, Any]]] = {
    "steps": (by_step("accuracy"), "Accuracy against steps", ("optimizer step", ACCURACY), {"share": True}),
    "cost": (by_cost, "Accuracy against cost", (COST, ACCURACY), {"share": True, "budget": True}),
    "entropy": (by_accuracy("entropy"), "Entropy at equal accuracy", ("accuracy", "entropy (nats a token)"), {}),
    "entropy_steps": (by_step("entropy"), "Entropy against steps", ("optimizer step", "entropy (nats a token)"), {}),
    "distinct": (
        by_accuracy("distinct.few"),
        "Distinct right solutions at equal accuracy",
        ("accuracy", "distinct right solutions a prompt"),
        {},
    ),
    "alpha": (by_step("metrics.alpha"), "Weight of the guidance", ("optimizer step", "alpha"), {"share": True}),
    "pass_at": (by_samples, "pass@k at the end", ("samples k", "pass@k"), {"share": True, "log": True}),
}
# Measures, a panel each, with an arm a line
DOTS: dict[str, tuple[tuple[str, ...], str]] = {
    "outcomes": (("accuracy", "area"), "Outcomes by seed"),
    "branches": (("metrics.branch_rate", "metrics.replaced_rate"), "Where the expert speaks"),
    "differences": (("difference",), "Differences by seed"),
}
# One figure of a whole table, with a panel a block
EXPERTS = "experts"


def build(kind: str, table: Table) -> list[Figure]:
    """
    The figures of a kind for a table, one for each block; those for which nothing was run are left out.

    Raises:
        SetupError: If there is no such kind of figure.
    """
    if kind == EXPERTS:
        figures = [_by_expert(table)]
    elif kind in CURVES or kind in DOTS:
        make = _multiples if kind in CURVES else _dots
        figures = [make(kind, table, block, *_named(kind, table, block)) for block in table.blocks]
    else:
        known = ", ".join((*CURVES, *DOTS, EXPERTS))
        raise SetupError(f"The table {table.name} asks for the figure {kind}; there are {known}.")
    return [figure for figure in figures if figure.panels]


def _named(kind: str, table: Table, block: Block) -> tuple[str, str]:
    """Name of a figure, and the place that its title names."""
    several = len(table.blocks) > 1
    name = "-".join([table.name, kind.replace("_", "-"), *((block.task, block.expert) if several else ())])
    return name, f"task {block.task}, expert {expert_name(block.expert)}"


def _multiples(kind: str, table: Table, block: Block, name: str, place: str) -> Figure:
    draw, title, axes, options = CURVES[kind]
    panels = []
    for row in block.rows:
        if row.arm in UNTRAINED and kind != "pass_at":
            continue
        curves = [curve for curve in (draw(run, row) for run in row.runs.values()) if curve[0]]
        count = f"{len(row.runs)} seed{'s' * (len(row.runs) != 1)}" if row.runs else NOT_RUN
        panel = {"title": row.label, "count": count, "curves": curves, "mean": mean_curve(curves)}
        panels.append({**panel, "baseline": row is block.baseline})
    other, caption = None, "A panel an arm; thin lines are seeds, the thick one is their mean."
    if block.baseline and block.baseline.runs:
        curves = [curve for curve in (draw(run, block.baseline) for run in block.baseline.runs.values()) if curve[0]]
        other = {"label": block.baseline.label, "mean": mean_curve(curves)}
        caption += f" Dashed: the mean of {block.baseline.label}."
    options = dict(options)
    if options.pop("budget", False) and math.isfinite(block.context.budget):
        options["line"] = _rounded([block.context.budget])[0]
        caption += " Dotted: the smallest total cost of these arms, at which they are compared."
    if kind in ("entropy", "distinct"):
        caption += " Each value is of the step at which the accuracy is first reached; a mean needs all seeds."
    panels = panels if any(panel["curves"] for panel in panels) else []
    return Figure(name, table.name, f"{title}: {place}", caption, panels, axes, other, options)


UNTRAINED = ("policy", "expert")


def mean_curve(curves: Sequence[Curve]) -> Curve | None:
    """Mean where all curves are, at the points of all of them."""
    if len(curves) < 2:
        return None
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    points = sorted({value for x, _ in curves for value in x if low <= value <= high})
    if not points:
        return None
    return _pairs(points, np.mean([np.interp(points, x, y) for x, y in curves], axis=0))


SHARES = ("accuracy", "area", "area_cost")
DOTTED = f"Dots are seeds; a bar is their mean, with a t interval ({CONFIDENCE:.0%}) where there are {ENOUGH}."


def _dots(kind: str, table: Table, block: Block, name: str, place: str) -> Figure:
    measures, title = DOTS[kind]
    panels = []
    for what in measures:
        label = HEADINGS.get(what, what)
        if what == "difference":
            base = block.baseline
            if base is None or not base.runs:
                continue
            label = f"{HEADINGS.get(table.compared, table.compared)}, less that of {base.label}"
        rows = [row for row in block.rows if what != "difference" or row is not block.baseline]
        lines = [_line(row, what, table, block) for row in rows]
        panels.append({"label": label, "lines": lines, "zero": what == "difference", "share": what in SHARES})
    # An arm that has no value in any panel is left out, unless that is because it was not run
    kept = {line["label"] for panel in panels for line in panel["lines"] if line["values"] or line["count"] == NOT_RUN}
    for panel in panels:
        panel["lines"] = [line for line in panel["lines"] if line["label"] in kept]
    panels = [panel for panel in panels if any(line["values"] for line in panel["lines"])]
    return Figure(name, table.name, f"{title}: {place}", DOTTED, panels, ("", ""))


def _by_expert(table: Table) -> Figure:
    panels = []
    for block in table.blocks:
        lines = [_line(row, "accuracy", table, block) for row in block.rows]
        if any(line["values"] for line in lines):
            panels.append({"label": expert_name(block.expert), "lines": lines, "zero": False, "share": True})
    title = f"Final accuracy by expert: task {', '.join(dict.fromkeys(block.task for block in table.blocks))}"
    return Figure(
        f"{table.name}-{EXPERTS}",
        table.name,
        title,
        DOTTED,
        panels,
        ("final accuracy; below each panel, its expert", ""),
    )


def _line(row: Row, what: str, table: Table, block: Block) -> dict[str, Any]:
    found = row.differences(block.baseline, table.compared) if what == "difference" else row.values(what)
    values = [value for value in found.values() if not math.isnan(value)]
    summary = interval(values)
    bounds = _rounded([summary.low, summary.high]) if summary.count >= ENOUGH else None
    mean = _rounded([summary.mean])[0] if values else None
    count = (f"{len(values)}" if values else NONE) if row.runs else NOT_RUN
    return {"label": row.label, "count": count, "values": _rounded(values), "mean": mean, "bounds": bounds}


def draw(figure: Figure) -> "Drawing":
    """The picture."""
    return _draw_dots(figure) if "lines" in figure.panels[0] else _draw_multiples(figure)


def _draw_multiples(figure: Figure) -> "Drawing":
    count = len(figure.panels)
    columns = min(count, 3 if count in (5, 6, 9) else 4)
    lines = math.ceil(count / columns)
    drawing = new_figure(max(2.4 * columns, 5.5), 1.85 * lines + 1.0)
    grid = drawing.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, panel in zip(grid, figure.panels):
        _draw_panel(axis, panel, figure)
    for axis in grid[count:]:
        axis.set_axis_off()
    # An axis with nothing below it shows its own numbers
    for axis in grid[count - columns : count]:
        axis.tick_params(labelbottom=True)
    largest = max(x[-1] for panel in figure.panels for x, _ in panel["curves"])
    scale = next(scale for scale in UNITS if largest >= scale or scale == 1.0) if "{unit}" in figure.axes[0] else 1.0
    if not figure.options.get("log"):
        grid[0].xaxis.set_major_formatter(lambda value, position: f"{value / scale:g}")
    drawing.supxlabel(figure.axes[0].format(unit=UNITS[scale]), fontsize=9.5)
    drawing.supylabel(figure.axes[1], fontsize=9.5)
    entries = {"a seed": {**SEED, "alpha": FAINT}, "mean of the seeds": MEAN}
    if figure.other and figure.other["mean"]:
        entries[f"mean of {figure.other['label']}"] = BASELINE
    if "line" in figure.options:
        entries["equal cost"] = EQUAL
    _legend(drawing, figure.title, entries)
    return drawing


def _draw_panel(axis: "Axes", panel: Mapping[str, Any], figure: Figure) -> None:
    quiet(axis)
    axis.set_title(f"{fill(panel['title'], 30)}\n{panel['count']}", fontsize=8.5)
    axis.tick_params(labelsize=8)
    if figure.options.get("log"):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
    if figure.options.get("share"):
        axis.set_ylim(-0.03, 1.03)
    if "line" in figure.options:
        axis.axvline(figure.options["line"], **EQUAL)
    if figure.other and figure.other["mean"] and panel["curves"] and not panel["baseline"]:
        axis.plot(*figure.other["mean"], **BASELINE)
    for x, y in panel["curves"]:
        axis.plot(x, y, **SEED, alpha=FAINT, marker="." if len(x) == 1 else None)
    if panel["mean"]:
        axis.plot(*panel["mean"], **MEAN, marker="." if len(panel["mean"][0]) == 1 else None)
    if not panel["curves"]:
        text = NOT_RUN if panel["count"] == NOT_RUN else "no value"
        place = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, text, color=OTHER, fontsize=9, **place)


def _legend(drawing: "Drawing", title: str, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """The title of a figure and what its lines are."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, **style) for label, style in entries.items()]
    columns = len(entries) if drawing.get_figwidth() > 7 else 2
    place = {"loc": "outside upper center", "frameon": False, "fontsize": 8.5, "title_fontsize": 11}
    drawing.legend(handles=handles, title=title, ncols=columns, **place)


def _draw_dots(figure: Figure) -> "Drawing":
    labels, count = [[line["label"] for line in panel["lines"]] for panel in figure.panels], len(figure.panels)
    shared = all(one == labels[0] for one in labels)
    names = 0.075 * max(len(label) for one in labels for label in one) + 0.4
    width = count * (4.2 - 0.5 * min(count, 4)) + names * (1 if shared else count)
    drawing = new_figure(max(width, 6.0), 0.29 * max(map(len, labels)) + 1.5)
    axes = drawing.subplots(1, count, squeeze=False)[0]
    for at, (axis, panel) in enumerate(zip(axes, figure.panels)):
        quiet(axis, grid="x")
        for height, line in enumerate(panel["lines"]):
            _draw_line(axis, height, line)
        axis.set_yticks(range(len(labels[at])), labels[at] if not (shared and at) else [], fontsize=8.5)
        axis.set_ylim(len(labels[at]) - 0.4, -0.6)
        axis.set_xlabel(panel["label"], fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        if panel["zero"]:
            axis.axvline(0.0, color="0.25", linewidth=0.9)
        elif panel["share"]:
            axis.set_xlim(-0.03, 1.03)
        else:
            axis.set_xlim(0.0, 1.04 * axis.get_xlim()[1])  # dots do not touch the edge
            axis.locator_params(axis="x", nbins=5)
    if figure.axes[0]:
        drawing.supxlabel(figure.axes[0], fontsize=9.5)
    entries = {"a seed": DOT, "mean of the seeds": BAR}
    if any(line["bounds"] for panel in figure.panels for line in panel["lines"]):
        entries[f"{CONFIDENCE:.0%} t interval, {ENOUGH} seeds or more"] = WHISKER
    _legend(drawing, f"{figure.title} (on the right: number of seeds)", entries)
    return drawing


def _draw_line(axis: "Axes", at: int, line: Mapping[str, Any]) -> None:
    if line["bounds"]:
        axis.plot(line["bounds"], [at, at], **WHISKER)
    if line["mean"] is not None:
        axis.plot([line["mean"]], [at], **BAR)
    axis.plot(line["values"], [at] * len(line["values"]), **DOT)
    place = {"transform": axis.get_yaxis_transform(), "va": "center", "color": OTHER, "fontsize": 8}
    axis.text(1.02, at, line["count"], **place)


def save(figure: Figure, path: Path) -> Path:
    """Draw a figure into a PNG file that carries the digest of its numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, text = BytesIO(), PngInfo()
    draw(figure).savefig(drawn, format="png", dpi=DPI)
    text.add_text(DIGEST, figure.digest)
    # Few colours make a small file, which matters where pictures are under version control
    Image.open(drawn).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(path, optimize=True, pnginfo=text)
    return path


def drawn_from(path: Path) -> str | None:
    """Digest of the numbers of a picture, if there is one."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(DIGEST)
