"""The report that is in the repository against the lines that it was made of."""

import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.study import report  # noqa: E402
from benchmarks.study.arms import Plan  # noqa: E402
from benchmarks.study.store import read  # noqa: E402


LINES = ROOT / "docs" / "results" / "study"


def test_the_report_is_what_the_lines_say(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    report.main(["--check"])
    assert "agree" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(LINES.glob("*.jsonl")), ids=lambda file: file.stem)
def test_lines_are_of_runs_that_the_study_plans(file):
    planned = {(run.arm, run.key) for run in Plan.read().runs(file.stem)}
    assert {(line["arm"], line["key"]) for line in read(file)} <= planned
