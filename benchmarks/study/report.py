"""
Write the study's report, docs/results/study.md and its figures, from the committed JSON lines.

    python -m benchmarks.study.report                write the report and its figures
    python -m benchmarks.study.report --check        exit with 1 where what is committed differs from what is made now
    python -m benchmarks.study.report --table NAME   print one table
    python -m benchmarks.study.report --figure NAME  draw one figure
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import figures
from benchmarks.study.lines import FOLDER, Run, read_runs
from benchmarks.study.reviewers import answers, studies
from benchmarks.study.tables import Table, build_table, cells, expert_name, markdown, missing, number
from mentor_trl.errors import SetupError


CONFIG = Path(__file__).with_name("study.yaml")
OUTPUT = Path("docs/results")
QUESTIONS = {"questions": "## What the reviewers asked", "findings": "## What else was to be settled"}
MODULE = "python -m benchmarks.study.report"
PREAMBLE = """\
# The study

Written by `{module}` from the JSON lines in [study/](study/), one line a run. No figure was
typed by hand, and `{module} --check` says whether this file agrees with the lines.

How to read the tables

- A **seed** has its own base model, policy, experts, data and order of sampling. Values are means over seeds, followed
  by every seed in the order of their numbers. *not run* is an arm without a line; *2 of 5* seeds counts what is there.
- **Accuracy** is the share of right samples to the test prompts at temperature 1. A seed is **solved** where its final
  accuracy is at least {solved}{others}.
- **Area by steps** is the mean height of the accuracy over optimizer steps, up to the smallest last step of the arms
  of the table: 1 is right from the start, 0 never. Steps of supervised training count like those of RL.
- **Area by cost** is the same over cost, up to the smallest total cost of the trained arms of the table. An arm that
  has ended keeps its accuracy. **Accuracy at equal cost** is read off at that cost.
- **Cost** is in forward-token equivalents times parameters: a token sampled by the policy counts 1, one trained on 3,
  a token that an expert reads or writes 1, times the parameters of that model. k, M, G, T are thousands, millions,
  10⁹, 10¹².
- **±** and *95%* are t intervals over at least 5 seeds; of fewer, only the range is given. Differences are paired by
  seed. Where seeds split between solved and not, a mean describes none of them: look at the seeds. Many arms are
  compared with one, and nothing is corrected for that: one in twenty 95% intervals misses by chance.
"""


class Report:
    """
    Tables, questions and figures of a configuration and runs.

    Args:
        config (`dict[str, Any]`):
            Content of study.yaml, whose `report` this is about.
        runs (`Sequence[Run]`):
            Runs.
        pictures (`str`, *optional*, defaults to `"study"`):
            Folder of the figures, seen from the report.
    """

    def __init__(self, config: Mapping[str, Any], runs: Sequence[Run], pictures: str = "study"):
        self.config, self.runs, self.pictures = config["report"], list(runs), pictures
        built = [build_table(spec, self.runs, config) for spec in self.config["tables"]]
        self.tables = {table.name: table for table in built}
        if len(self.tables) < len(built):
            raise SetupError("Two tables of the report have the same name.")
        self.figures: dict[str, figures.Figure] = {}
        for table in built:
            drawn = [figure for kind in table.spec.get("figures", ()) for figure in figures.build(kind, table)]
            self.figures |= {figure.name: figure for figure in drawn}

    def text(self) -> str:
        """The report in Markdown."""
        solved = self.config.get("solved", 0.9)
        others = [table.spec for table in self.tables.values() if table.spec["solved"] != solved]
        named = "; ".join(f"{spec['solved']} in [{spec['title']}](#{spec['name']})" for spec in others)
        preamble = PREAMBLE.format(module=MODULE, solved=solved, others=f" ({named})" if named else "")
        parts = [preamble, "## What was run", self._counts()]
        for name, title in QUESTIONS.items():
            if self.config.get(name):
                answered = answers(self.config[name], self.tables, self.config["command"])
                parts += [title, self.config.get("asked", "") if name == "questions" else "", answered]
        parts += [self.section(table) for table in self.tables.values()]
        parts += ["## What is missing", self._missing()]
        return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"

    def section(self, table: Table) -> str:
        """A table with its commands and figures."""
        made = " and ".join(f"`{self.config['command'].format(study=study)}`" for study in studies([table]))
        parts = [f'<a id="{table.name}"></a>\n\n## {table.spec["title"]}', table.spec.get("note", "")]
        parts += [self._compared(table), markdown(*cells(table)) if table.run else _planned(table)]
        parts.append(f"Runs by {made}; this table alone by `{MODULE} --table {table.name}`.")
        for figure in self.figures.values():
            if figure.table == table.name:
                drawn = f"{figure.caption} Drawn by `{MODULE} --figure {figure.name}`."
                parts += [f"![{figure.title}]({self.pictures}/{figure.name}.png)", drawn]
        return "\n\n".join(part.strip() for part in parts if part.strip())

    def _compared(self, table: Table) -> str:
        """What the table's runs were cut to."""
        parts = []
        for block in table.blocks:
            if any(row.runs for row in block.rows):
                several = len(table.blocks) > 1
                where = f"{block.task}, expert {expert_name(block.expert)}" if several else f"Task {block.task}"
                end, budget = block.context.end, block.context.budget
                parts.append(f"{where}: areas up to step {number(end)} and up to a cost of {number(budget)}")
        return "; ".join(parts) + "." if parts else ""

    def _counts(self) -> str:
        groups = defaultdict(list)
        for run in self.runs:
            groups[run.study, run.task].append(run)
        if not groups:
            return "Nothing yet: there are no lines."
        rows = []
        for (study, task), runs in groups.items():
            seeds = sorted({run.seed for run in runs})
            experts = sorted({run.expert for run in runs if run.expert})
            seconds = sum(run.curves["seconds"][-1] for run in runs if "seconds" in run.curves)
            arms = len({(run.arm, run.label) for run in runs})
            counted = [str(arms), ", ".join(experts) or "–", ", ".join(map(str, seeds)), str(len(runs))]
            rows.append([study, task, *counted, f"{seconds / 3600:.1f}"])
        headings = ["study", "task", "arms", "experts", "seeds", "runs", "hours of training"]
        return markdown(headings, rows)

    def _missing(self) -> str:
        lines = []
        for table in self.tables.values():
            texts = missing(table) if table.run else ["nothing was run"]
            lines += [f"- {table.spec['title']}: {text}." for text in texts]
        shown = {id(run) for table in self.tables.values() for row in table.rows for run in row.runs.values()}
        left = defaultdict(int)
        for run in self.runs:
            left[run.study, run.task, run.label] += id(run) not in shown
        lines += [
            f"- In no table: {label} ({study}, {task}), {count} runs."
            for (study, task, label), count in left.items()
            if count
        ]
        return "\n".join(lines) or "Nothing that was planned."

    def write(self, folder: Path) -> list[Path]:
        """Write the report and its figures; figures that are no longer part of it go."""
        pictures = folder / self.pictures
        pictures.mkdir(parents=True, exist_ok=True)
        written = [folder / "study.md"]
        written[0].write_text(self.text())
        for figure in self.figures.values():
            written.append(figures.save(figure, pictures / f"{figure.name}.png"))
        for path in set(pictures.glob("*.png")) - set(written):
            path.unlink()
        return written

    def differences(self, folder: Path) -> list[str]:
        """Where a folder differs from what would be written: in text, or in what a figure was drawn from."""
        page = folder / "study.md"
        found = [] if page.exists() and page.read_text() == self.text() else [f"{page} is not what the lines say"]
        for figure in self.figures.values():
            path = folder / self.pictures / f"{figure.name}.png"
            if figures.drawn_from(path) != figure.digest:
                found.append(f"{path} was not drawn from these lines")
        wanted = {f"{name}.png" for name in self.figures}
        extra = [path for path in sorted((folder / self.pictures).glob("*.png")) if path.name not in wanted]
        return found + [f"{path} belongs to no table" for path in extra]


def _planned(table: Table) -> str:
    """What stands in the place of a table without runs."""
    arms = "; ".join(dict.fromkeys(row.label for row in table.rows))
    tasks = ", ".join(dict.fromkeys(block.task for block in table.blocks))
    return f"*Not run.* Arms: {arms}. Tasks: {tasks}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="study.yaml")
    parser.add_argument("--lines", type=Path, default=FOLDER, help="folder of the JSON lines")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the report")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with what is there, and write nothing")
    action.add_argument("--table", help="print this table and write nothing")
    action.add_argument("--figure", help="draw this figure alone")
    args = parser.parse_args(arguments)
    try:
        report = Report(yaml.safe_load(args.config.read_text()), read_runs(args.lines))
        _act(report, args)
    except SetupError as error:
        sys.exit(str(error))


def _act(report: Report, args: argparse.Namespace) -> None:
    if args.check:
        found = report.differences(args.output)
        if found:
            sys.exit("\n".join([*found, f"Run: {MODULE}"]))
        print(f"{args.output / 'study.md'} and {len(report.figures)} figures agree with {len(report.runs)} runs.")
    elif args.table:
        print(markdown(*cells(_named(args.table, report.tables, "table"))))
    elif args.figure:
        figure = _named(args.figure, report.figures, "figure")
        print(figures.save(figure, args.output / report.pictures / f"{figure.name}.png"))
    else:
        for path in report.write(args.output):
            print(path)


def _named(name: str, things: Mapping[str, Any], kind: str) -> Any:
    if name not in things:
        raise SetupError(f"The report has no {kind} {name}; it has {', '.join(things) or 'none'}.")
    return things[name]


if __name__ == "__main__":
    main()
