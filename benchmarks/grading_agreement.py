r"""
The rewards of three graders on files of gold answers: ours, TRL's `accuracy_reward`, and math-verify alone.

```bash
python benchmarks/grading_agreement.py FOLDER/math500.jsonl FOLDER/gsm8k_test.jsonl --output differences.jsonl
```

A row with the columns `gold` and `completion` is graded as it is. Of any other row the gold answer is read as training
reads it, and graded against its own `\boxed{}`, against the same answer rewritten (`\dfrac` for `\frac`, spaces, the
unit moved or left out), and against the answer of the next row that differs. Each row on which two graders differ, and
each that ours should have graded otherwise, is listed.
"""

import argparse
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mentor_trl.evaluation.graded_rows import grade_by_math_verify
from mentor_trl.rewards.accuracy import accuracy_reward
from mentor_trl.rewards.answers import gold_answer
from mentor_trl.rewards.grading import get_grader


COLUMNS = ("solution", "answer", "final_answer")
_UNIT = re.compile(
    r"(?P<core>.*[\d}])\s*(?:\((?P<bare>[a-z ]+)\)|(?P<styled>\\(?:text|mathrm)\s*\{[^{}]*\}))(?P<end>\$?)$"
)


class Row(NamedTuple):
    """One pair to grade, and the reward it should get (`None` where that is for the reader to say)."""

    kind: str
    gold: str
    completion: str
    reward: float | None


def rewritten(answer: str) -> list[str]:
    """Other ways to write an answer."""
    ways = [answer.replace(r"\frac", r"\dfrac"), re.sub(r"(?<=\d)(?=[+=<>])|(?<=[+=<>])(?=\d)", " ", answer)]
    match = _UNIT.fullmatch(answer)
    if match and not re.search(r"[,;x@]|\\times|\\log", match["core"]):
        unit = match["bare"] or match["styled"]
        ways += [match["core"] + match["end"], rf"{match['core']}\,\text{{{unit}}}{match['end']}"]
        if match["bare"]:
            ways.append(f"{match['core']} {unit}")
    return [way for way in dict.fromkeys(ways) if way != answer]


def rows_of(path: Path) -> Iterator[Row]:
    """The pairs of a JSON lines file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if "completion" in records[0]:
        yield from (Row("as given", r["gold"], r["completion"], r.get("reward")) for r in records)
        return
    answers = [_bare(record) for record in records]
    for index, answer in enumerate(answers):
        yield Row("own box", answer, rf"\boxed{{{answer}}}", 1.0)
        yield from (Row("rewritten", answer, rf"\boxed{{{way}}}", 1.0) for way in rewritten(answer))
        following = [*answers[index + 1 :], *answers]
        other = next((one for one in following if "".join(one.split()) != "".join(answer.split())), None)
        if other is not None:
            yield Row("next row", answer, rf"\boxed{{{other}}}", 0.0)


def _bare(record: dict) -> str:
    value = next(record[name] for name in COLUMNS if record.get(name) not in (None, "") and _is_short(record, name))
    return gold_answer(value) or ""


def _is_short(record: dict, name: str) -> bool:
    # A worked solution stands beside its answer in some sets.
    return name != "solution" or not any(record.get(other) not in (None, "") for other in COLUMNS[1:])


def grade(rows: list[Row]) -> dict[str, list[float | None]]:
    """The rewards of the three graders."""
    from trl.rewards import accuracy_reward as trl_reward

    logging.disable(logging.CRITICAL)
    golds, completions = [row.gold for row in rows], [row.completion for row in rows]
    return {
        "ours": accuracy_reward(completions, solution=golds),
        "trl": trl_reward([[{"content": text}] for text in completions], solution=golds),
        "math-verify": [float(one) for one in grade_by_math_verify(completions, golds)],
    }


def report(path: Path, differences: list[dict]) -> None:
    """Print one line a kind of row, and collect the rows to look at."""
    rows = list(rows_of(path))
    rewards = grade(rows)
    counts: Counter = Counter()
    for index, row in enumerate(rows):
        given = {name: values[index] for name, values in rewards.items()}
        counts[row.kind] += 1
        for name, value in given.items():
            counts[row.kind, name] += row.reward is not None and value == row.reward
        differs = len(set(given.values())) > 1 or (row.reward is not None and given["ours"] != row.reward)
        if differs:
            differences.append({"file": path.name, **row._asdict(), "rewards": given})
    for kind in dict.fromkeys(row.kind for row in rows):
        right = ", ".join(f"{name} {counts[kind, name]}" for name in rewards)
        print(f"{path.name}, {kind}: of {counts[kind]} as expected: {right}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines files of gold answers")
    parser.add_argument("--output", type=Path, help="file for the rows that differ; if not set, they are printed")
    args = parser.parse_args()
    differences: list[dict] = []
    for path in args.files:
        report(path, differences)
    lines = [json.dumps(row, ensure_ascii=False) for row in differences]
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        print(*lines, sep="\n")
    get_grader().close()


if __name__ == "__main__":
    main()
