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
    lines = [line.get_ydata().tolist() for line in axis.get_lines() if len(line.get_ydata())]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["grpo", "mentor (2 runs)"]
    assert lines == [[0.1, 0.2], pytest.approx([0.3, 0.5])] and len(axis.collections) == 1  # one band


def axes_of(paths, plot=figures.plot_training, **options) -> dict:
    figure, _ = plot(read_runs(paths), **options)
    return {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}


def test_axes_include_what_they_should(runs, tmp_path):
    axes = axes_of(runs)
    assert axes["accuracy"].get_ylim() == pytest.approx((-0.02, 1.02))
    assert all(-1.0 < axis.get_ylim()[0] <= 0.0 for axis in axes.values())
    assert all(tick == int(tick) for axis in axes.values() for tick in axis.get_xticks())
    low = write_run(tmp_path / "low", plain_entry, [0.01, 0.04])
    assert axes_of([low])["accuracy (axis to 0.05)"].get_ylim()[1] == pytest.approx(0.051)


def test_what_stays_the_same_is_a_note(tmp_path):
    entries = lambda step, value: {**guided_entry(step, value), "mentor/alpha": 1.0, "mentor/on_policy/advantage": 0.0}
    run = write_run(tmp_path / "mentor", entries, [0.2, 0.4])
    figure, _ = figures.plot_guidance(read_runs([run]))
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert "weight of the mixed advantages" not in axes and len(axes["advantage by source"].get_lines()) == 1
    note = figure.legends[0].get_title().get_text()
    assert note == "alpha is 1 at all steps; on-policy mean advantage is 0 at all steps"
    other = write_run(tmp_path / "other", guided_entry, [0.2, 0.4])  # a comparison is drawn
    assert "weight of the mixed advantages" in axes_of([run, other], figures.plot_guidance)


def test_bands_are_announced_where_they_are_seen(tmp_path):
    for values, seen in (([0.4, 0.6], True), ([0.2, 0.4001], False)):
        folder = tmp_path / str(seen)
        folder.mkdir()
        paths = [write_run(folder / f"a-seed{i}", plain_entry, one) for i, one in enumerate(([0.2, 0.4], values))]
        figure, _ = figures.plot_training(read_runs(paths))
        assert ("bands" in figure.legends[0].get_title().get_text()) is seen


def test_one_step_is_no_figure(tmp_path, capsys):
    run = write_run(tmp_path / "short", plain_entry, [0.25])
    assert run_plot("training", run, "-o", tmp_path / "f.png") == 2
    error = capsys.readouterr().err
    assert "One step was logged" in error and "accuracy 0.25" in error and not (tmp_path / "f.png").exists()


def test_accuracy_is_found_where_one_reward_can_be_it(tmp_path, capsys):
    def named(*names):
        return lambda step, value: {"step": step, **{f"rewards/{name}/mean": value for name in names}}

    one, two = (
        read_runs([write_run(tmp_path / f"run{len(names)}", named(*names), [0.1, 0.2])])
        for names in (("mine", "format_reward"), ("mine", "format_reward", "other"))
    )
    assert figures.find_accuracy(one) == figures.find_accuracy([*one, *two]) == "mine"
    with pytest.raises(SetupError, match="name it with --accuracy, one of mine, other"):
        figures.find_accuracy(two)


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
