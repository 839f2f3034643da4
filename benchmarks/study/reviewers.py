"""What the method's reviewers asked, answered by figures of the tables: sentences of the configuration, filled."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.measures import ENOUGH, Interval, interval
from benchmarks.study.tables import NONE, NOT_RUN, SUMMED_UP, Block, Row, Table, difference, markdown, missing, number
from mentor_trl.errors import SetupError


SLOT = re.compile(r"\{([^{}]+)\}")


def answers(questions: Sequence[Mapping[str, Any]], tables: Mapping[str, Table], command: str) -> str:
    """
    The questions in their order as one table.

    Args:
        questions (`Sequence[dict[str, Any]]`):
            Each with `question`, `tables` (names) and `sentence`, whose slots are those of [`fill`].
        tables (`dict[str, Table]`):
            All tables by name.
        command (`str`):
            Command that makes the runs of a study, with `{study}`.
    """
    rows = []
    for at, question in enumerate(questions, start=1):
        named = [find(name, tables) for name in question.get("tables", ())]
        links = "<br>".join(f"[{table.spec['title']}](#{table.name})" for table in named) or NONE
        commands = "<br>".join(f"`{command.format(study=study)}`" for study in studies(named)) or NONE
        gaps = sum(1 for table in named for _ in missing(table))
        gap = f" *Incomplete: {gaps} of {sum(len(table.rows) for table in named)} rows lack runs.*" if gaps else ""
        answer = fill(question["sentence"], tables) + gap if any(table.run for table in named) else f"*{NOT_RUN}*"
        rows.append([str(at), question["question"], answer, links, commands])
    return markdown(["", "question", "what was measured", "tables", "runs by"], rows)


def studies(tables: Sequence[Table]) -> list[str]:
    """Studies from which tables take their runs."""
    named = [table.spec["study"] for table in tables]
    return list(dict.fromkeys(one for name in named for one in ([name] if isinstance(name, str) else name)))


def find(name: str, tables: Mapping[str, Table]) -> Table:
    if name not in tables:
        raise SetupError(f"The report has no table {name}; it has {', '.join(tables)}.")
    return tables[name]


def fill(sentence: str, tables: Mapping[str, Table]) -> str:
    """
    A sentence with its slots filled: `{table:arm:what}`, `{table:arm:what:task}` or `{table:arm:what:task:expert}`.
    The arm `*` stands for all arms of the table. `what` is a measure, `difference` to the table's baseline (or
    `difference.MEASURE`), `verdict` on that difference, `solved`, or `label`.
    """
    return SLOT.sub(lambda found: _slot(found[1], tables), " ".join(sentence.split()))


def _slot(text: str, tables: Mapping[str, Table]) -> str:
    name, arm, what, *place = [part.strip() for part in text.split(":")]
    table = find(name, tables)
    block = table.block(*place)
    if arm != "*":
        row = block.row(arm)
        if row is None:
            raise SetupError(f"The table {name} has no arm {arm}, which the slot {{{text}}} names.")
        return value(row, what, block, table.compared)
    rows = [row for row in block.rows if not (what.startswith(("difference", "verdict")) and row is block.baseline)]
    found = [f"{row.label} {value(row, what, block, table.compared)}" for row in rows if row.runs]
    left = [row.label for row in rows if not row.runs]
    return "; ".join(found + ([f"{NOT_RUN}: {' and '.join(left)}"] if left else []))


def value(row: Row, what: str, block: Block, compared: str) -> str:
    """A figure of an arm with its interval."""
    if what == "label":
        return row.label
    kind, _, named = what.partition(".")
    if not row.runs:
        return NOT_RUN
    if kind in ("difference", "verdict"):
        if block.baseline is None or not block.baseline.runs:
            return f"({block.baseline.label if block.baseline else 'the baseline'}: {NOT_RUN})"
        found = interval(list(row.differences(block.baseline, named or compared).values()))
        return difference(found) if kind == "difference" else verdict(found)
    values = [number for number in row.values(what).values() if not math.isnan(number)]
    if what == "solved":
        return f"{sum(values):.0f} of {len(values)}"
    if what in SUMMED_UP:
        return number(interval(values).mean)
    return with_interval(interval(values))


def with_interval(found: Interval) -> str:
    """
    >>> with_interval(interval([0.5, 0.7]))
    '.60 (range of 2: .50, .70)'
    """
    if found.count < 2:
        return NONE if not found.count else f"{number(found.mean)} (one seed)"
    kind = found.kind if found.count >= ENOUGH else f"range of {found.count}"
    return f"{number(found.mean)} ({kind}: {number(found.low)}, {number(found.high)})"


def verdict(found: Interval) -> str:
    """
    What few seeds allow to say of a difference.

    >>> verdict(interval([0.1, 0.2, 0.3]))
    'higher in all 3 seeds'
    >>> verdict(interval([0.1, -0.2, 0.3, 0.1, -0.1]))
    'not told apart (95% interval, 5 seeds)'
    """
    if not found.count:
        return NONE
    enough = found.count >= ENOUGH
    where = f"95% interval, {found.count} seeds" if enough else f"all {found.count} seeds"
    if found.low > 0.0 or found.high < 0.0:
        way = "higher" if found.low > 0.0 else "lower"
        return f"{way} ({where})" if enough else f"{way} in {where}" if found.count > 1 else f"{way} in the one seed"
    return f"not told apart ({where})" if enough else f"not told apart (signs differ in {found.count} seeds)"
