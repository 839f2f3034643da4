import json
from pathlib import Path

import pytest

from mentor_trl.analysis import figures
from mentor_trl.analysis.runs import read_runs
from mentor_trl.analysis.style import COLORS, color_of
from mentor_trl.cli import main as cli
from mentor_trl.cli import plot
from mentor_trl.errors import SetupError


pytest.importorskip("matplotlib")


def guided_entry(step: int, value: float) -> dict:
    names = [name for panel in figures.GUIDANCE for metrics in panel.lines.values() for name in metrics]
    ours = {"mentor/on_policy/rewards/accuracy_reward": value, "mentor/on_policy/entropy": 0.5}
    theirs = {"rewards/accuracy_reward/mean": 9.0, "entropy": 9.0, "completions/mean_length": 9.0}
    return {"step": step, **dict.fromkeys(names, value), **ours, **theirs, "mentor/on_policy/length": 20.0}


def plain_entry(step: int, value: float) -> dict:
    return {"step": step, "rewards/accuracy_reward/mean": value, "entropy": 0.4, "completions/mean_length": 10.0}


def write_run(folder: Path, entry, values: list[float]) -> str:
    folder.mkdir()
    history = [entry(step, value) for step, value in enumerate(values, start=1)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": len(values), "log_history": history}))
    return str(folder)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    return [
        write_run(tmp_path / "grpo", plain_entry, [0.1, 0.2]),
        write_run(tmp_path / "mentor-seed1", guided_entry, [0.2, 0.4, 0.6]),
        write_run(tmp_path / "mentor-seed2", guided_entry, [0.4, 0.6]),
    ]


def run_plot(*argv) -> int:
    return cli.main(["plot", *map(str, argv)])


def test_training_prefers_on_policy_metrics_and_takes_trl_runs(runs):
    _, shown = figures.plot_training(read_runs(runs))
    accuracy, entropy, length = (panel.curves for panel in shown)
    assert accuracy["grpo"][""].mean.tolist() == [0.1, 0.2]
    assert accuracy["mentor"][""].mean.tolist() == pytest.approx([0.3, 0.5])
    assert accuracy["mentor"][""].runs == 2 and accuracy["mentor"][""].dropped == 1
    assert entropy["mentor"][""].mean.tolist() == [0.5, 0.5] and length["mentor"][""].mean.tolist() == [20.0, 20.0]


def test_figures_draw_what_they_show(runs):
    figure, shown = figures.plot_training(read_runs(runs), panels=["accuracy"])
    (axis,) = figure.axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.get_lines()}
    assert lines.keys() == {"grpo", "mentor (2 runs)"} and len(axis.collections) == 1  # one band
    assert lines["mentor (2 runs)"] == pytest.approx([0.3, 0.5])


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_training_and_guidance_write_files(runs, tmp_path, capsys, suffix):
    out = tmp_path / "new" / f"figure.{suffix}"
    assert run_plot("training", *runs, "--smooth", 2, "-o", out) == 0
    assert out.stat().st_size > 1000
    captured = capsys.readouterr()
    assert f"Saved {out}" in captured.out and "runs of 'mentor' differ in their steps" in captured.err
    assert run_plot("guidance", *runs[1:], "--labels", "a", "b", "-o", out) == 0


def test_words_and_pass_at_k_write_files(tmp_path, capsys):
    rows = [{"doc_id": i, "task": "t", "completions": ["Wait", "then"], "correct": [1, 0]} for i in range(4)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert run_plot("words", *inputs, "-o", tmp_path / "w.png") == 0
    assert run_plot("pass-at-k", *inputs, "-o", tmp_path / "k.png") == 0
    out = capsys.readouterr().out
    assert "1.000" in out and "0.500" in out
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("w.png", "k.png"))


def test_tasks_without_a_curve_are_named(tmp_path, capsys):
    rows = [{"doc_id": 0, "task": "many", "completions": ["x", "x"], "correct": [1, 0]}]
    rows += [{"doc_id": 0, "task": "one", "completions": ["x"], "correct": [1]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_plot("pass-at-k", tmp_path / "a.jsonl", "-o", tmp_path / "k.png") == 0
    captured = capsys.readouterr()
    assert "pass@k, one" in captured.out and captured.err == "Note: not drawn, for there is one k only: one.\n"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["training", "absent"], ["plot training: error: Run absent does not exist"]),
        (["training", "{grpo}", "--accuracy", "mine"], ["no accuracy", "`rewards/mine/mean`", "`entropy`"]),
        (["training", "{grpo}", "--eval"], ["logged no evaluation", "eval_strategy"]),
        (["training", "{grpo}", "-o", "x.gif"], ["x.gif", ".png, .pdf, .svg"]),
        (["guidance", "{grpo}"], ["grpo", "no weight of the mixed advantages", "`mentor/alpha`"]),
        (["table", "{grpo}"], ["holds no results.json"]),
        (["rollout", "{grpo}"], ["log_rollout_records"]),
        (["words", "{grpo}"], ["are empty"]),
    ],
)
def test_errors_are_one_line(runs, capsys, argv, parts):
    assert run_plot(*(part.format(grpo=runs[0]) for part in argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line


def test_every_kind_has_help(capsys):
    for kind in ("training", "guidance", "words", "pass-at-k", "table", "rollout"):
        with pytest.raises(SystemExit) as stop:
            plot.main([kind, "--help"])
        assert stop.value.code == 0 and "usage: mentor-trl plot" in capsys.readouterr().out


def test_too_many_labels():
    assert len(set(color_of("abcdefg").values())) == len(COLORS)
    with pytest.raises(SetupError, match="8 labels"):
        color_of("abcdefgh")
