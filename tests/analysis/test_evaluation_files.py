"""What `mentor-trl eval` writes is what `mentor-trl plot` reads."""

import json
from dataclasses import asdict

import pytest
from evaluation.test_summary import make_run

from mentor_trl.analysis.rates import pass_at_k_curves
from mentor_trl.analysis.results import make_table, read_results
from mentor_trl.analysis.samples import read_samples
from mentor_trl.cli import main as cli
from mentor_trl.evaluation.summary import collect, summarize, write_samples


@pytest.fixture
def results(tmp_path):
    """Folder of an evaluation of two sets."""
    folder = tmp_path / "mentor-seed1"
    folder.mkdir()
    runs = [make_run("aime24", 8), make_run("math500", 1)]
    for run in runs:
        write_samples(run, folder)
    content = collect("org/model", {"limit": None}, {run.task: summarize(run) for run in runs})
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "results.md").write_text("# not read\n")
    return folder


def test_the_curve_is_that_of_the_results(results):
    stored = json.loads((results / "results.json").read_text())["tasks"]
    curves = pass_at_k_curves(read_samples([results]))
    assert [(row.task, row.k) for row in curves.itertuples()] == [
        *(("aime24", k) for k in (1, 2, 4, 8)),
        ("math500", 1),
    ]
    for row in curves.to_dict("records"):
        expected = stored[row["task"]]["pass_at_k"][str(row["k"])]
        assert (row["value"], row["low"], row["high"]) == tuple(expected[name] for name in ("value", "low", "high"))


def test_the_table_is_that_of_the_results(results):
    stored = json.loads((results / "results.json").read_text())["tasks"]
    table = make_table(read_results([results]))
    assert table.columns == ["aime24 avg@8", "math500 pass@1", "average of 2 sets"]
    for name, cell in zip(stored, table.rows["mentor"]):
        assert asdict(cell.estimate) == {end: stored[name][end] for end in ("value", "low", "high", "stderr")}
    (cell,) = make_table(read_results([results]), "pass@8").rows["mentor"]
    assert cell.value == stored["aime24"]["pass_at_k"]["8"]["value"]


def test_all_kinds_take_the_folder(results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for kind, extra in (("words", []), ("pass-at-k", []), ("table", ["--metric", "pass@1"])):
        output = tmp_path / ("out.md" if kind == "table" else "out.png")
        assert cli.main(["plot", kind, str(results), "-o", str(output), *extra]) == 0
        assert output.stat().st_size > 0
    captured = capsys.readouterr()
    assert "pass@k, aime24" in captured.out and "one k only: math500" in captured.err
