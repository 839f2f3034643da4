import json
import math
from pathlib import Path

import pandas as pd
import pytest

from mentor_trl.analysis.runs import make_curve, read_runs, resolve_labels
from mentor_trl.errors import SetupError


def write_state(folder: Path, history: list[dict], step: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "log_history": history}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def test_the_furthest_state_is_read(tmp_path):
    run = tmp_path / "run"
    write_state(run, [{"step": 1, "a": 1.0}], step=1)
    for step in (9, 10):
        write_state(run / f"checkpoint-{step}", [{"step": step, "a": float(step)}], step)
    for path in (run, run / "checkpoint-10", run / "checkpoint-10" / "trainer_state.json"):
        (read,) = read_runs([path])
        assert read.label == "run" and read.series("a").to_dict() == {10: 10.0}


def test_the_log_of_a_run_that_goes_on_is_read(tmp_path):
    run = write_state(tmp_path / "run", [{"step": 1, "a": 1.0}], step=1)
    (run / "log.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a')
    for path in (run, run / "log.jsonl"):
        (read,) = read_runs([path])
        assert read.label == "run" and read.series("a").to_dict() == {1: 1.0, 2: 2.0}


def test_values_that_are_none_or_not_finite_are_no_points(tmp_path):
    history = [{"step": 1, "a": None}, {"step": 2, "a": math.nan}, {"step": 3, "a": 2}, {"step": 4, "b": 1.0}]
    (run,) = read_runs([write_state(tmp_path / "run", history)])
    assert run.series("a").to_dict() == {3: 2.0} and run.metrics == ["a", "b", "step"]


def test_a_missing_metric_names_the_run_and_what_is_there(tmp_path):
    (run,) = read_runs([write_state(tmp_path / "run", [{"step": 1, "b": 1.0}])])
    with pytest.raises(SetupError) as error:
        run.first_series(("a", "c"), "entropy")
    assert all(part in str(error.value) for part in (str(tmp_path / "run"), "no entropy", "`a`, `c`", "`b`"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "holds no log.jsonl"),
        (lambda folder: write_state(folder, []), "has logged nothing"),
        (lambda folder: (write_state(folder, []) / "trainer_state.json").write_text("{"), "not valid JSON"),
    ],
)
def test_runs_that_cannot_be_read(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(SetupError, match=message):
        read_runs([tmp_path / "run"])


def test_evaluations_of_one_dataset(tmp_path):
    history = [
        {"step": 5, "a": 9.0},
        {"step": 5, "eval_x_runtime": 1.0, "eval_a": 1.0},
        {"step": 5, "eval_y_runtime": 1.0, "eval_a": 2.0},
    ]
    (run,) = read_runs([write_state(tmp_path / "run", history)])
    assert run.evaluations("y").series("eval_a").to_dict() == {5: 2.0}
    with pytest.raises(SetupError, match="more than once at step 5"):
        run.evaluations().series("eval_a")
    with pytest.raises(SetupError, match="`x`, `y`"):
        run.evaluations("z")


def test_labels():
    paths = [Path("a/m-seed1"), Path("a/m-seed2"), Path("b/m-seed1")]
    assert resolve_labels(paths) == ["a/m", "a/m", "b/m"]
    assert resolve_labels([Path("seed1")]) == ["seed1"]
    assert resolve_labels(paths, ["x", "x", "y"]) == ["x", "x", "y"]
    with pytest.raises(SetupError, match="2 labels"):
        resolve_labels(paths, ["x", "y"])
    with pytest.raises(SetupError, match="given twice"):
        resolve_labels([Path("a"), Path("b/../a")])


def test_band_over_seeds_by_hand():
    seeds = [pd.Series({1: 0.0, 2: 2.0, 3: 7.0}), pd.Series({1: 2.0, 2: 4.0}), pd.Series({1: 4.0, 2: 6.0})]
    curve = make_curve(seeds)
    assert curve.mean.to_dict() == {1: 2.0, 2: 4.0}
    # Deviation 2 over three runs
    assert curve.error.tolist() == pytest.approx([2 / math.sqrt(3)] * 2)
    assert (curve.runs, curve.dropped, curve.raw) == (3, 1, None)


def test_smoothing_is_a_centred_mean_and_keeps_the_raw_values():
    series = pd.Series({1: 0.0, 2: 3.0, 5: 6.0})
    curve = make_curve([series], smooth=3)
    assert curve.mean.to_dict() == {1: 1.5, 2: 3.0, 5: 4.5} and curve.raw.equals(series) and curve.error is None
    with pytest.raises(SetupError, match="window is 0"):
        make_curve([series], smooth=0)


def test_seeds_without_a_common_step():
    with pytest.raises(SetupError, match="in common"):
        make_curve([pd.Series({1: 0.0}), pd.Series({2: 0.0})])
