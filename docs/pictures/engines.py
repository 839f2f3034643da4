"""Draw docs/pictures/engines.svg, the ways to run mixed rollouts: `python docs/pictures/engines.py`."""

from pathlib import Path

import matplotlib


matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402


INK, FRAME, PAPER = "#1f2933", "#8b97a3", "#ffffff"
POLICY, EXPERT, BOTH, TRAINING = "#cfe3f7", "#fbdcbc", "#dcd6f2", "#d9ead3"
# Letters become outlines, so that no viewer's font changes their width
matplotlib.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "engines", "font.family": "DejaVu Sans"}


class Panel:
    """One way to run, drawn in a field of 100 x 52."""

    def __init__(self, ax, title: str):
        self.ax = ax
        ax.set_xlim(0, 100)
        ax.set_ylim(0, 52)
        ax.axis("off")
        ax.text(1, 49, title, fontsize=11, fontweight="bold", color=INK, va="center")

    def _rounded(self, x, y, width, height, **style) -> None:
        self.ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=1.5", **style))

    def process(self, x, y, width, height, name: str) -> None:
        """A process or server with a name, around its boxes."""
        self._rounded(x, y, width, height, facecolor="none", edgecolor=FRAME, linestyle=(0, (4, 3)), linewidth=1.1)
        self.ax.text(x + width / 2, y + height - 3, name, fontsize=7.5, color=INK, ha="center", va="center")

    def model(self, x, y, width, height, name: str, color: str) -> None:
        self._rounded(x, y, width, height, facecolor=color, edgecolor=INK, linewidth=1.0)
        self.ax.text(x + width / 2, y + height / 2, name, fontsize=8, color=INK, ha="center", va="center")

    def arrow(self, start, end, text: str = "", at=None, style: str = "-|>") -> None:
        arrow = {"arrowstyle": style, "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        self.ax.annotate("", xy=end, xytext=start, arrowprops=arrow)
        if text:
            x, y = at or ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 2.4)
            self.ax.text(x, y, text, fontsize=7, color=INK, ha="center", va="center")


def in_process(panel: Panel) -> None:
    panel.process(14, 4, 72, 40, "training process (transformers)")
    panel.model(19, 14, 24, 17, "policy,\ntrained", TRAINING)
    panel.model(57, 14, 24, 17, "expert", EXPERT)
    panel.arrow((43, 26), (57, 26), "drafts")
    panel.arrow((57, 19), (43, 19), "tokens", at=(50, 16.2))


def remote_expert(panel: Panel) -> None:
    panel.process(2, 4, 40, 40, "training process (transformers)")
    panel.model(9, 14, 26, 17, "policy,\ntrained", TRAINING)
    panel.process(64, 4, 34, 40, "expert's server (stock vLLM)")
    panel.model(70, 14, 22, 17, "expert", EXPERT)
    panel.arrow((42, 26), (64, 26), "prefix")
    panel.arrow((64, 19), (42, 19), "a token, log s", at=(53, 16.2))


def colocated(panel: Panel) -> None:
    panel.process(2, 4, 57, 40, "training process")
    panel.model(5, 14, 18, 17, "policy,\ntrained", TRAINING)
    panel.model(37, 14, 19, 17, "policy in\nvLLM, with\nprocessor", POLICY)
    panel.arrow((23, 22.5), (37, 22.5), "weights,\nin memory", at=(30, 28))
    panel.process(73, 4, 25, 40, "expert's server")
    panel.model(76.5, 14, 18, 17, "expert", EXPERT)
    panel.arrow((59, 26), (73, 26), "prefix")
    panel.arrow((73, 19), (59, 19), "a token", at=(66, 16.2))


def shared(panel: Panel) -> None:
    panel.process(2, 4, 32, 40, "training process")
    panel.model(8, 14, 20, 17, "policy,\ntrained", TRAINING)
    panel.process(55, 4, 43, 40, "server, or in the training process")
    panel.model(60, 9, 33, 27, "one vLLM engine\n\nexpert = target\npolicy = draft", BOTH)
    panel.arrow((34, 26), (55, 26), "weights")
    panel.arrow((55, 19), (34, 19), "rows", at=(44.5, 16.2))


def stock(panel: Panel) -> None:
    panel.process(2, 4, 30, 40, "training process")
    panel.model(7, 14, 20, 17, "policy,\ntrained", TRAINING)
    panel.process(58, 25, 40, 19, "policy's server (stock vLLM)")
    panel.model(64, 27.5, 28, 10, "policy, with processor", POLICY)
    panel.process(58, 3, 40, 19, "expert's server (stock vLLM)")
    panel.model(64, 5.5, 28, 10, "expert", EXPERT)
    panel.arrow((32, 37), (58, 37), "weights")
    panel.arrow((58, 29), (32, 29), "row up to a branch point", at=(45, 31.3))
    panel.arrow((32, 16), (58, 16), "prefix", at=(45, 18.3))
    panel.arrow((58, 9), (32, 9), "a token, log s", at=(45, 6.7))


def replicas(panel: Panel) -> None:
    panel.process(2, 4, 30, 40, "training process")
    panel.model(7, 14, 20, 17, "policy,\ntrained", TRAINING)
    for number, y in enumerate((34.5, 24.5, 13.5, 3.5)):
        name, color = (("policy", POLICY), ("expert", EXPERT))[number // 2]
        panel.model(66, y, 32, 8, f"server {number % 2 + 1} of the {name}", color)
        panel.arrow((32, 24 + 4 * (1.5 - number)), (66, y + 4), style="<|-|>")
    panel.ax.text(45, 44, "a row stays with\none server of each", fontsize=7, color=INK, ha="center", va="center")


def main() -> None:
    ways = {
        "1  In process": in_process,
        "2  In process, expert elsewhere": remote_expert,
        "3  Colocated vLLM, expert elsewhere": colocated,
        "4  Shared engine": shared,
        "5  Stock servers": stock,
        "6  Replicas": replicas,
    }
    figure, axes = plt.subplots(3, 2, figsize=(11, 9.2), facecolor=PAPER)
    for ax, (title, draw) in zip(axes.flat, ways.items()):
        draw(Panel(ax, title))
    figure.subplots_adjust(left=0.015, right=0.985, top=0.985, bottom=0.015, wspace=0.04, hspace=0.06)
    file = Path(__file__).with_suffix(".svg")
    figure.savefig(file, facecolor=PAPER, metadata={"Date": None})
    file.write_text("".join(f"{line.rstrip()}\n" for line in file.read_text().splitlines()))


if __name__ == "__main__":
    main()
