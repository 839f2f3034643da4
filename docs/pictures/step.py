"""Draw docs/pictures/step.svg and step-dark.svg, one training step: `python docs/pictures/step.py`."""

import sys
from pathlib import Path

from drawing import DARK, LIGHT, Colors, Panel, save
from matplotlib.figure import Figure


# A made-up mixed row: tokens, the expert's weight at each, and who wrote it
TOKENS = ["So", "the", "total", "is", "7", "+", "5", "=", "12"]
WEIGHTS = [0.15, 0.05, 0.55, 0.1, 0.75, 0.9, 0.2, 0.05, 0.3]
AGREED, REPLACED = {4}, {5}


def rows(panel: Panel, x: float, y: float, color: str, marks: bool = False) -> None:
    """Four rollouts as bars of unequal length; of mixed ones a few tokens are the expert's."""
    for number, length in enumerate((20, 15, 18, 13)):
        panel.bar(x, y - 3.4 * number, length, 2.2, color)
        for at in ((3, 9), (6,), (4, 11, 14), (8,))[number] if marks else ():
            panel.bar(x + at, y - 3.4 * number, 1.5, 2.2, panel.colors.expert)


def token_by_token(panel: Panel, y: float) -> None:
    """A mixed row, its drafts, the weights, coins and tokens."""
    colors = panel.colors
    panel.frame(2, y - 2, 136, 34)
    panel.text(5, y + 28.5, "A mixed row, token by token", 9, ha="left", fontweight="bold")
    for height, name in (
        (22.5, "the policy drafts"),
        (14.5, "entropy H gives the weight\nw = min(1, H / gamma)"),
        (7.5, "coin: the expert, with probability w"),
        (1.5, "the token"),
    ):
        panel.text(5, y + height, name, 7.5, ha="left")
    drafts = [*TOKENS]
    drafts[5] = "-"
    for number, (draft, token, weight) in enumerate(zip(drafts, TOKENS, WEIGHTS)):
        x = 43 + 10.4 * number
        panel.box(x, y + 20.5, 9, 4, draft, colors.policy, 7.5)
        panel.bar(x + 2.5, y + 11.5, 4, 7 * weight, colors.both)
        panel.bar(x + 2.5, y + 11.5, 4, 7, "none")
        heads = number in AGREED | REPLACED
        panel.text(x + 4.5, y + 7.5, "expert" if heads else "policy", 7, fontweight="bold" if heads else "normal")
        panel.box(x, y - 0.5, 9, 4, token, colors.expert if heads else colors.policy, 7.5)
    for number, name in ((4, "agreed"), (5, "replaced")):
        panel.text(43 + 10.4 * number + 4.5, y - 4.2, name, 7)
    panel.arrow((40, y - 4.2), (83.5, y - 4.2), style="-", linewidth=0)
    panel.text(80, y - 7, "branch points", 7, style="italic")


def step(panel: Panel) -> None:
    """The whole loop, left to right, and what is fed back."""
    colors = panel.colors
    panel.box(2, 78, 16, 12, "prompts", colors.plain, 9)
    panel.text(38, 98.3, "on-policy rows: the policy alone", 8)
    rows(panel, 28, 94, colors.policy)
    panel.text(38, 78.3, "mixed rows: expert at branch points", 8)
    rows(panel, 28, 74, colors.policy, marks=True)
    panel.arrow((18, 86), (26.5, 90))
    panel.arrow((18, 82), (26.5, 70))
    panel.box(60, 78, 16, 12, "rewards", colors.plain, 9)
    panel.arrow((50, 90), (60, 86))
    panel.arrow((50, 70), (60, 82))
    panel.box(84, 85, 24, 12, "advantages on-policy\n(R - mean) / std", colors.policy, 7.5)
    panel.box(84, 67, 24, 12, "advantages mixed\nalpha max(0, R - mean)", colors.expert, 7.5)
    panel.arrow((76, 86), (84, 91))
    panel.arrow((76, 82), (84, 73))
    panel.box(114, 67, 24, 12, "correction rho\nat branch points", colors.both, 7.5)
    panel.arrow((108, 73), (114, 73))
    panel.box(114, 85, 24, 12, "TRL's loss,\nupdate of the policy", colors.training, 7.5)
    panel.arrow((108, 91), (114, 91))
    panel.arrow((126, 79), (126, 85))


def main(folder: Path) -> None:
    """Draw both files."""
    for name, colors in (("step.svg", LIGHT), ("step-dark.svg", DARK)):
        figure = Figure(figsize=(11, 8.6))
        panel = Panel(figure.add_axes((0, 0, 1, 1)), colors, 140, 110)
        step(panel)
        token_by_token(panel, 14)
        save(figure, folder / name, colors)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
