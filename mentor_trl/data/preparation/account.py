"""The account of a dataset: how many rows came in, what became of each, how many are left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Report:
    """Counts of one run."""

    loaded: int
    steps: list[tuple[str, int]] = field(default_factory=list)  # why rows were dropped, and how many, in order
    facts: list[tuple[str, str]] = field(default_factory=list)  # worth knowing of the rows that are left

    @property
    def kept(self) -> int:
        """Number of rows that are left."""
        return self.loaded - sum(dropped for _, dropped in self.steps)

    def print(self, title: str) -> None:
        """Print the table and the facts to stderr."""
        from rich.console import Console
        from rich.markdown import Markdown

        Console(stderr=True).print(f"{title}\n", Markdown(self.markdown()))

    def markdown(self) -> str:
        """A table of the steps, and a list of the facts."""
        lines = ["| | dropped | left |", "| --- | ---: | ---: |", f"| rows loaded | | {self.loaded:,} |"]
        left = self.loaded
        for name, dropped in self.steps:
            left -= dropped
            lines.append(f"| {name} | {dropped:,} | {left:,} |")
        return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in self.facts)])


class Funnel:
    """Rows that pass one test after another, with every dropped row on the account."""

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
