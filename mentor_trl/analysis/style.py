"""One look for all figures: colours that the colour-blind can tell apart, quiet axes, files by suffix."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SetupError


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too pale for lines
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FORMATS = (".png", ".pdf", ".svg")
DPI = 160


def color_of(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label; more labels than colours that one can tell apart are a [`SetupError`]."""
    if len(labels) > len(COLORS):
        raise SetupError(
            f"There are {len(labels)} labels, and only {len(COLORS)} colours that can be told apart. Draw fewer runs "
            "in a figure."
        )
    return dict(zip(labels, COLORS))


def new_figure(width: float, height: float) -> "Figure":
    """Empty figure, sizes in inches. It is drawn by matplotlib, if that is installed, without a window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise SetupError("Figures need matplotlib: pip install 'mentor-trl[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def quiet(axis: "Axes", grid: str = "both") -> None:
    """Take away what is not data: a light grid, no frame above and on the right."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(alpha=0.25, axis=grid)


def step_axis(axis: "Axes") -> None:
    """Ticks at whole steps only."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))


def share_axes(axes: Sequence["Axes"], values: Iterable[float]) -> float:
    """
    One axis for all panels of a share: from 0 to 1. Where all `values` are below a quarter the axis ends at a round
    number, which is returned for the label to state; see [`stated`].
    """
    top = round_top(max(values, default=1.0))
    for axis in axes:
        axis.set_ylim(-0.02 * top, 1.02 * top)
    return top


def round_top(highest: float) -> float:
    """
    End of an axis of shares of which the highest is given.

    >>> [round_top(value) for value in (0.7, 0.25, 0.2, 0.012, 0.0)]
    [1.0, 1.0, 0.25, 0.02, 1.0]
    """
    if not 0.0 < highest < 0.25:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(highest))
    return next(step * scale for step in (2.0, 2.5, 5.0, 10.0) if step * scale > highest)


def stated(label: str, top: float) -> str:
    """
    Label of an axis of shares, which says where it ends before 1.

    >>> stated("pass@k", 1.0), stated("pass@k", 0.05)
    ('pass@k', 'pass@k (axis to 0.05)')
    """
    return label if top == 1.0 else f"{label} (axis to {top:g})"


def shared_legend(figure: "Figure", axis: "Axes", note: str = "") -> None:
    """One legend for all panels, above them, from the named lines of one, with a note below."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        # As many columns as fit: inches of a character and of what stands beside the text
        columns = int(figure.get_figwidth() / (0.085 * max(map(len, labels)) + 0.75))
        place = {"loc": "outside upper center", "frameon": False, "ncols": max(1, min(len(labels), columns))}
        figure.legend(handles, labels, title=note or None, title_fontsize=8.5, **place)


def check_output(path: str | Path) -> Path:
    """Check that a figure can be saved under a name, before it is drawn: a [`SetupError`] names the formats."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise SetupError(f"The figure's name {path} must end in one of {', '.join(FORMATS)}.")
    return path


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Save a figure in the format of the suffix; missing folders are made."""
    path = check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
