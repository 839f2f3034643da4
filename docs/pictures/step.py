"""Draw docs/pictures/step.svg and step-dark.svg, one training step: `python docs/pictures/step.py`."""

import sys
from pathlib import Path

from drawing import DARK, LIGHT, Panel, save
from matplotlib.figure import Figure


# A made-up mixed row: drafts, tokens that stand, the expert's weight at each, and where the coin shows the expert
DRAFTS = ["So", "the", "total", "is", "7", "-", "5", "=", "12"]
TOKENS = ["So", "the", "total", "is", "7", "+", "5", "=", "12"]
WEIGHTS = [0.15, 0.05, 0.55, 0.1, 0.75, 0.9, 0.2, 0.05, 0.3]
HEADS = {4: "agrees", 5: "replaces"}


def rows(panel: Panel, x: float, y: float, marks: tuple[tuple[int, ...], ...]) -> None:
    """Rollouts of unequal length as bars, with the expert's tokens at the marks."""
    for number, (length, places) in enumerate(zip((22, 17, 20, 14), marks)):
        panel.bar(x, y - 3.6 * number, length, 2.4, panel.colors.policy)
        for place in places:
            panel.bar(x + place, y - 3.6 * number, 1.5, 2.4, panel.colors.expert)


def loop(panel: Panel) -> None:
    """From prompts to the update, left to right, and what is fed back."""
    colors = panel.colors
    panel.box(2, 76, 15, 11, "prompts", colors.plain, 9)
    panel.text(28, 101, "on-policy rows: the policy alone", ha="left")
    rows(panel, 28, 96, ((),) * 4)
    panel.text(28, 75, "mixed rows, of prompts that fail: expert at branch points", ha="left")
    rows(panel, 28, 70, ((3, 9, 15), (6,), (4, 11, 14), (8,)))
    panel.arrow((17, 84), (27, 92))
    panel.arrow((17, 79), (27, 67))
    panel.path((40, 84), (40, 78))
    panel.text(41.5, 81, "gamma: quantile\nof the entropies", 7, ha="left")
    panel.box(62, 87, 14, 11, "rewards", colors.plain, 9)
    panel.box(62, 59.5, 14, 11, "rewards", colors.plain, 9)
    panel.arrow((51.5, 92.5), (62, 92.5))
    panel.arrow((51.5, 65), (62, 65))
    panel.box(83, 87, 25, 11, "advantages\n(R - mean) / std", colors.policy)
    panel.box(83, 59.5, 25, 11, "advantages\nalpha max(0, R - mean)", colors.expert)
    panel.arrow((76, 92.5), (83, 92.5))
    panel.arrow((76, 65), (83, 65))
    panel.arrow((72, 87), (88, 70.5), "mean", at=(74.5, 78))
    panel.path((104, 78), (104, 70.5))
    panel.text(104, 80, "alpha: schedule, or measured gain", 7)
    panel.box(114, 59.5, 24, 11, "correction rho\nat branch points", colors.both)
    panel.arrow((108, 65), (114, 65))
    panel.box(114, 87, 24, 11, "TRL's loss,\nupdate of the policy", colors.training)
    panel.arrow((108, 92.5), (114, 92.5))
    panel.arrow((132, 70.5), (132, 87))
    panel.path((126, 98), (126, 106), (22, 106), (22, 90))
    panel.text(74, 107.8, "new weights, for the next batch", 7)


def token_by_token(panel: Panel) -> None:
    """A mixed row: drafts, weights, coins and tokens."""
    colors, first, wide = panel.colors, 44, 10.3
    panel.frame(2, 2, 136, 49)
    for x in (28, 50):
        panel.ax.plot((x, 2 if x == 28 else 138), (58, 51), color=colors.frame, linewidth=1.1, linestyle=(0, (4, 3)))
    panel.text(5, 46, "A mixed row, token by token", 9.5, ha="left", fontweight="bold")
    names = {
        38.5: "the policy drafts",
        28.5: "entropy H gives the expert's\nweight w = min(1, H / gamma)",
        19: "coin: the expert, with\nprobability w",
        11.5: "the token that stands",
    }
    for y, name in names.items():
        panel.text(5, y, name, ha="left")
    for number, (draft, token, weight) in enumerate(zip(DRAFTS, TOKENS, WEIGHTS)):
        x, heads = first + wide * number, HEADS.get(number)
        panel.box(x, 36, 8.8, 5, draft, colors.policy)
        panel.bar(x + 2.4, 24.5, 4, 8, "none", 0.6)
        panel.bar(x + 2.4, 24.5, 4, 8 * weight, colors.both)
        panel.text(x + 4.4, 19, "expert" if heads else "policy", 7, fontweight="bold" if heads else "normal")
        panel.box(x, 9, 8.8, 5, token, colors.expert if heads else colors.policy)
        if heads:
            panel.text(x + 4.4, 6, heads, 7)
    panel.text(first + wide * 6, 6, "branch points: r = p / s", 7, ha="left")


def main(folder: Path) -> None:
    """Draw both files."""
    for name, colors in (("step.svg", LIGHT), ("step-dark.svg", DARK)):
        figure = Figure(figsize=(8.3, 6.5))
        panel = Panel(figure.add_axes((0, 0, 1, 1)), colors, 140, 110)
        loop(panel)
        token_by_token(panel)
        save(figure, folder / name, colors)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
