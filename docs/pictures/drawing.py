"""What the pictures share: colours on light and on dark pages, boxes, arrows, and how a figure is saved."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib


matplotlib.use("svg")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402


# Letters become outlines, so that no viewer's font changes their width
matplotlib.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "mentor", "font.family": "DejaVu Sans"}


@dataclass(frozen=True)
class Colors:
    """Colours of a picture on one kind of page; each ink is readable on each fill."""

    paper: str
    ink: str
    frame: str
    policy: str
    expert: str
    both: str
    training: str
    plain: str


LIGHT = Colors("#ffffff", "#1f2933", "#8b97a3", "#cfe3f7", "#fbdcbc", "#dcd6f2", "#d9ead3", "#f1f3f5")
DARK = Colors("#1e2129", "#e6e9ee", "#7d8896", "#1f4468", "#6b4216", "#463a72", "#2c4f2a", "#2c313b")


class Panel:
    """A field of so many units without axes, on which boxes and arrows are drawn."""

    def __init__(self, ax, colors: Colors, width: float = 100, height: float = 52):
        self.ax, self.colors = ax, colors
        ax.set_xlim(0, width)
        ax.set_ylim(0, height)
        ax.axis("off")

    def text(self, x: float, y: float, text: str, size: float = 8, **style) -> None:
        style = {"ha": "center", "va": "center", "color": self.colors.ink} | style
        self.ax.text(x, y, text, fontsize=size, **style)

    def box(self, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 8) -> None:
        self._rounded(x, y, width, height, facecolor=color, edgecolor=self.colors.ink, linewidth=1.0)
        self.text(x + width / 2, y + height / 2, text, size)

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        style = {"facecolor": "none", "edgecolor": self.colors.frame, "linestyle": (0, (4, 3)), "linewidth": 1.1}
        self._rounded(x, y, width, height, **style)

    def bar(self, x: float, y: float, width: float, height: float, color: str, line: float = 0.8) -> None:
        self.ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=self.colors.ink, linewidth=line))

    def arrow(self, start, end, text: str = "", at=None, style: str = "-|>", size: float = 7) -> None:
        look = {"arrowstyle": style, "color": self.colors.ink, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        self.ax.annotate("", xy=end, xytext=start, arrowprops=look)
        if text:
            x, y = at or ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 2.4)
            self.text(x, y, text, size)

    def path(self, *points: tuple[float, float]) -> None:
        """A dashed line through some points, with a head at its end."""
        if len(points) > 2:
            xs, ys = zip(*points[:-1])
            self.ax.plot(xs, ys, color=self.colors.ink, linewidth=1.1, linestyle=(0, (4, 2)))
        self.arrow(points[-2], points[-1])

    def _rounded(self, x, y, width, height, **style) -> None:
        self.ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1.5", **style))


def save(figure: Figure, file: Path, colors: Colors) -> None:
    """Write an SVG, the same bytes each time."""
    figure.savefig(file, facecolor=colors.paper, metadata={"Date": None})
    file.write_text("".join(f"{line.rstrip()}\n" for line in file.read_text().splitlines()))
