"""
Draw docs/pictures/engines.svg and engines-dark.svg, the ways to run mixed rollouts: `python docs/pictures/engines.py`.
"""

import sys
from pathlib import Path

from drawing import DARK, LIGHT, Colors, Panel, save
from matplotlib.figure import Figure


class Way(Panel):
    """One way to run, in a field of 100 x 52."""

    def __init__(self, ax, colors: Colors, title: str):
        super().__init__(ax, colors)
        self.text(1, 49, title, 11, ha="left", fontweight="bold")

    def process(self, x, y, width, height, name: str) -> None:
        """A process or server with a name, around its boxes."""
        self.frame(x, y, width, height)
        self.text(x + width / 2, y + height - 3, name, 7.5)

    def model(self, x, y, width, height, name: str, kind: str) -> None:
        """A model; the kind is a field of the colours."""
        self.box(x, y, width, height, name, getattr(self.colors, kind))


def in_process(panel: Way) -> None:
    panel.process(14, 4, 72, 40, "training process (transformers)")
    panel.model(19, 14, 24, 17, "policy,\ntrained", "training")
    panel.model(57, 14, 24, 17, "expert", "expert")
    panel.arrow((43, 26), (57, 26), "drafts")
    panel.arrow((57, 19), (43, 19), "tokens", at=(50, 16.2))


def remote_expert(panel: Way) -> None:
    panel.process(2, 4, 40, 40, "training process (transformers)")
    panel.model(9, 14, 26, 17, "policy,\ntrained", "training")
    panel.process(64, 4, 34, 40, "expert's server (stock vLLM)")
    panel.model(70, 14, 22, 17, "expert", "expert")
    panel.arrow((42, 26), (64, 26), "prefix")
    panel.arrow((64, 19), (42, 19), "a token, log s", at=(53, 16.2))


def colocated(panel: Way) -> None:
    panel.process(2, 4, 57, 40, "training process")
    panel.model(5, 14, 18, 17, "policy,\ntrained", "training")
    panel.model(37, 14, 19, 17, "policy in\nvLLM, with\nprocessor", "policy")
    panel.arrow((23, 22.5), (37, 22.5), "weights,\nin memory", at=(30, 28))
    panel.process(73, 4, 25, 40, "expert's server")
    panel.model(76.5, 14, 18, 17, "expert", "expert")
    panel.arrow((59, 26), (73, 26), "prefix")
    panel.arrow((73, 19), (59, 19), "a token", at=(66, 16.2))


def shared(panel: Way) -> None:
    panel.process(2, 4, 32, 40, "training process")
    panel.model(8, 14, 20, 17, "policy,\ntrained", "training")
    panel.process(55, 4, 43, 40, "server, or in the training process")
    panel.model(60, 9, 33, 27, "one vLLM engine\n\nexpert = target\npolicy = draft", "both")
    panel.arrow((34, 26), (55, 26), "weights")
    panel.arrow((55, 19), (34, 19), "rows", at=(44.5, 16.2))


def stock(panel: Way) -> None:
    panel.process(2, 4, 30, 40, "training process")
    panel.model(7, 14, 20, 17, "policy,\ntrained", "training")
    panel.process(58, 25, 40, 19, "policy's server (stock vLLM)")
    panel.model(64, 27.5, 28, 10, "policy, with processor", "policy")
    panel.process(58, 3, 40, 19, "expert's server (stock vLLM)")
    panel.model(64, 5.5, 28, 10, "expert", "expert")
    panel.arrow((32, 37), (58, 37), "weights")
    panel.arrow((58, 29), (32, 29), "row up to a branch point", at=(45, 31.3))
    panel.arrow((32, 16), (58, 16), "prefix", at=(45, 18.3))
    panel.arrow((58, 9), (32, 9), "a token, log s", at=(45, 6.7))


def replicas(panel: Way) -> None:
    panel.process(2, 4, 30, 40, "training process")
    panel.model(7, 14, 20, 17, "policy,\ntrained", "training")
    for number, y in enumerate((34.5, 24.5, 13.5, 3.5)):
        name = ("policy", "expert")[number // 2]
        panel.model(66, y, 32, 8, f"server {number % 2 + 1} of the {name}", name)
        panel.arrow((32, 24 + 4 * (1.5 - number)), (66, y + 4), style="<|-|>")
    panel.text(45, 44, "a row stays with\none server of each", 7)


def main(folder: Path) -> None:
    """Draw both files."""
    ways = {
        "1  In process": in_process,
        "2  In process, expert elsewhere": remote_expert,
        "3  Colocated vLLM, expert elsewhere": colocated,
        "4  Shared engine": shared,
        "5  Stock servers": stock,
        "6  Replicas": replicas,
    }
    for name, colors in (("engines.svg", LIGHT), ("engines-dark.svg", DARK)):
        figure = Figure(figsize=(11, 9.2))
        for ax, (title, draw) in zip(figure.subplots(3, 2).flat, ways.items()):
            draw(Way(ax, colors, title))
        figure.subplots_adjust(left=0.015, right=0.985, top=0.985, bottom=0.015, wspace=0.04, hspace=0.06)
        save(figure, folder / name, colors)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
