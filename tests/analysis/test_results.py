import json
from pathlib import Path

import pytest
from scipy import stats

from mentor_trl.analysis.results import make_table, read_results
from mentor_trl.errors import SetupError


def write_results(folder: Path, metric: str = "pass@1", limit: int | None = None, **values: float) -> Path:
    folder.mkdir(parents=True)
    one = lambda value: {"value": value, "low": value - 0.05, "high": value + 0.08, "stderr": 0.03}
    tasks = {
        name: {"metric": metric, **one(value), "pass_at_k": {"1": one(value), "4": one(2 * value)}}
        for name, value in values.items()
    }
    (folder / "results.json").write_text(json.dumps({"model": "m", "settings": {"limit": limit}, "tasks": tasks}))
    return folder


def test_table_by_hand(tmp_path):
    paths = [write_results(tmp_path / "a", x=0.5, y=0.1), write_results(tmp_path / "b", x=0.25, y=0.3)]
    table = make_table(read_results(paths))
    assert table.columns == ["x pass@1", "y pass@1", "average of 2 sets"]
    texts = ["50.0 (45.0 to 58.0)", "10.0 (5.0 to 18.0)", "30.0 (26.5 to 35.7)"]  # arms of 5.0 and 8.0, each / sqrt(2)
    assert [cell.text for cell in table.rows["a"]] == texts
    assert [cell.best for cell in table.rows["a"]] == [True, False, True]
    assert "| a | **50.0 (45.0 to 58.0)** | 10.0 (5.0 to 18.0) | **30.0" in table.to_markdown()
    assert table.to_csv().splitlines()[1] == "a,x pass@1,1,,0.5,0.45,0.58,0.03"
    assert "95% intervals over the problems" in table.caption and "runs" not in table.caption


def test_seeds_are_averaged_and_their_spread_is_the_interval(tmp_path):
    paths = [write_results(tmp_path / f"m-seed{seed}", x=value) for seed, value in ((1, 0.2), (2, 0.25), (3, 0.3))]
    table = make_table(read_results(paths), "pass@4")
    (cell,) = table.rows["m"]
    assert cell.value == pytest.approx(0.5) and table.name("m") == "m (3 runs)"
    assert cell.estimate.high - 0.5 == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / 3**0.5)
    assert "Student's 95% intervals" in table.caption


def test_a_trial_is_named(tmp_path):
    paths = [write_results(tmp_path / "a", limit=20, x=0.5), write_results(tmp_path / "b", x=0.25)]
    table = make_table(read_results(paths))
    assert "| a (first 20 problems) |" in table.to_markdown() and "| b |" in table.to_markdown()
    assert "trials" in table.caption and table.to_csv().splitlines()[1].startswith("a,x pass@1,1,20,")
    with pytest.raises(SetupError, match="Some evaluations of 'm' are trials"):
        make_table(read_results(paths, ["m", "m"]))


def test_a_row_that_lacks_a_task_has_no_average(tmp_path):
    paths = [write_results(tmp_path / "a", x=0.5, y=0.1), write_results(tmp_path / "b", x=0.25)]
    table = make_table(read_results(paths))
    assert table.rows["b"][1:] == [None, None] and "| b | 25.0 (20.0 to 33.0) | - | - |" in table.to_markdown()


def test_errors(tmp_path):
    paths = [write_results(tmp_path / "a", x=0.5), write_results(tmp_path / "b", metric="avg@4", x=0.5)]
    with pytest.raises(SetupError, match="different headlines: avg@4, pass@1"):
        make_table(read_results(paths))
    with pytest.raises(SetupError, match="'pass@32'; there are pass@1, pass@4"):
        make_table(read_results(paths), "pass@32")
    paths[1] = write_results(tmp_path / "c", y=0.5)
    with pytest.raises(SetupError, match="not of the same tasks"):
        make_table(read_results(paths, ["m", "m"]))
    (tmp_path / "bad.json").write_text('{"tasks": {"x": {"value": 1}}}')
    with pytest.raises(SetupError, match="not as `mentor-trl eval` writes it"):
        read_results([tmp_path / "bad.json"])
    with pytest.raises(SetupError, match="holds no results.json"):
        read_results([tmp_path])
