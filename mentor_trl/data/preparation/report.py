"""The account of a data set: how many rows came in, what became of each, how many are left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console


@dataclass
class Report:
    """
    Counts of one run.

    Args:
        loaded (`int`):
            Number of rows of the source.
        steps (`list[tuple[str, int]]`):
            What was asked of the rows and how many were dropped for it, in the order of the run.
        facts (`list[tuple[str, str]]`):
            Further things worth knowing about the rows that are left.
    """

    loaded: int
    steps: list[tuple[str, int]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Number of rows that are left."""
        return self.loaded - sum(dropped for _, dropped in self.steps)

    def rows(self) -> list[tuple[str, str, str]]:
        """What happened, rows dropped, rows left: the lines of the table."""
        lines, left = [("rows loaded", "", f"{self.loaded:,}")], self.loaded
        for name, dropped in self.steps:
            left -= dropped
            lines.append((name, f"{dropped:,}", f"{left:,}"))
        return lines

    def print(self, title: str, console: "Console | None" = None) -> None:
        """Print the table, to stderr unless a console is given."""
        from rich.console import Console
        from rich.table import Table

        console = console or Console(stderr=True)
        table = Table("", "dropped", "left", title=title, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for line in self.rows():
            table.add_row(*line)
        console.print(table)
        for name, value in self.facts:
            console.print(f"{name}: {value}", highlight=False, markup=False)

    def markdown(self) -> str:
        """The same as a Markdown table and list."""
        lines = ["| | dropped | left |", "| --- | ---: | ---: |"]
        lines += [f"| {name} | {dropped} | {left} |" for name, dropped, left in self.rows()]
        lines += [""] * bool(self.facts) + [f"- {name}: {value}" for name, value in self.facts]
        return "\n".join(lines)


class Funnel:
    """
    Rows that pass one test after another, with every dropped row on the account.

    Args:
        dataset ([`~datasets.Dataset`]):
            The rows.
    """

    def __init__(self, dataset: "Dataset"):
        self.dataset = dataset
        self.report = Report(loaded=len(dataset))
        self.columns: dict[str, list] = {}

    def keep(self, step: str, kept: Sequence[bool]) -> None:
        """Drop the rows that are not `kept`, here and in `columns`, and count them as dropped by `step`."""
        self.report.steps.append((step, len(kept) - sum(kept)))
        if all(kept):
            return
        self.dataset = self.dataset.select([index for index, keep in enumerate(kept) if keep])
        for name, values in self.columns.items():
            self.columns[name] = [value for value, keep in zip(values, kept, strict=True) if keep]

    def drop(self, reasons: Sequence[str | None], steps: Sequence[str]) -> None:
        """Drop the rows that have a reason, one of `steps`; each is a step of its own."""
        for step in steps:
            self.keep(step, [reason != step for reason in reasons])
            reasons = [reason for reason in reasons if reason != step]
