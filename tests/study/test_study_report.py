import copy
import doctest
import importlib

import pytest
import yaml

from benchmarks.study import figures, report
from benchmarks.study.arms import Plan
from benchmarks.study.lines import parse
from benchmarks.study.measures import interval
from benchmarks.study.report import CONFIG, Report
from benchmarks.study.reviewers import fill, verdict
from benchmarks.study.tables import build_table, cells, missing
from mentor_trl.errors import SetupError


@pytest.fixture
def table(config, lines):
    return lambda **spec: build_table(
        {**config["report"]["tables"][0], **spec}, [parse(line) for line in lines], config
    )


def test_a_table_shows_every_seed_and_what_was_not_run(table):
    found = table(columns=["options.learning_rate", "seeds", "solved", "accuracy", "area", "difference"])
    headings, rows = cells(found)
    assert headings[1:3] == ["learning rate", "seeds"]
    assert headings[-1] == "area by steps, less that of GRPO"
    assert rows == [
        ["GRPO", "0.0002", "3", "1 of 3", ".50 · .00 .50 1.00", ".25 · .00 .25 .50", "–"],
        ["MENTOR", "0.0002", "2 of 3", "2 of 2", "1.00 · 1.00 1.00", ".50 · .50 .50", "+.38 (range of 2: +.25, +.50)"],
        ["GATS", "not run", "0 of 3", *["not run"] * 4],
    ]
    assert list(missing(found)) == ["MENTOR (chain, expert strong): no run with seed 3", "GATS (chain): not run"]


def test_five_pairs_have_a_t_interval(config, line):
    lines = [
        line(arm, seed, [0.0, end]) for seed in range(1, 6) for arm, end in (("grpo", 0.1 * seed), ("mentor", 1.0))
    ]
    found = build_table(config["report"]["tables"][0], [parse(one) for one in lines], config)
    bounds = interval([0.5 - 0.05 * seed for seed in range(1, 6)])
    assert cells(found)[1][1][5] == f"+.35 (95%: +{bounds.low:.2f}, +{bounds.high:.2f})".replace("+0.", "+.")


def test_arms_are_compared_up_to_the_step_and_the_cost_that_all_reach(config, line):
    short = line("grpo", accuracy=[0.0, 1.0], cost=[0.0, 8e10])
    found = build_table(config["report"]["tables"][0], [parse(short), parse(line())], config)
    context = found.blocks[0].context
    assert (context.end, context.budget) == (50.0, 8e10)
    assert found.block().row("mentor").values("accuracy_cost") == {1: pytest.approx(0.8)}


def test_the_first_study_that_has_a_seed_counts_and_experts_are_told_apart(config, line):
    lines = [line(study="two", seed=seed, accuracy=[0.0, 0.2]) for seed in (1, 2)]
    lines += [line(seed=1), line(seed=1, expert="weak", accuracy=[0.0, 0.4]), line("grpo")]
    spec = {**config["report"]["tables"][0], "study": ["one", "two"], "experts": ["strong", "weak"]}
    found = build_table(spec, [parse(one) for one in lines], config)
    assert found.block(expert="strong").row("mentor").values("accuracy") == {1: 1.0, 2: 0.2}
    assert found.block(expert="weak").row("mentor").values("accuracy") == {1: 0.4}
    # An arm without an expert is compared in every block
    assert [row[:2] for row in cells(found)[1] if row[1] == "GRPO"] == [["–", "GRPO"]] * 2


def test_two_runs_of_a_seed_are_refused_unless_a_row_is_a_label(config, line):
    runs = [parse(line(label=f"MENTOR {rate}")) for rate in (1, 2)]
    with pytest.raises(SetupError, match="two runs of the arm mentor with seed 1"):
        build_table(config["report"]["tables"][0], runs, config)
    split = build_table({**config["report"]["tables"][0], "split": True, "arms": ["mentor"]}, runs, config)
    assert [row.label for row in split.rows] == ["MENTOR 1", "MENTOR 2"]


def test_sentences_are_filled_with_figures(table):
    found = {"head": table()}
    assert fill("MENTOR {head:mentor:area},\n GRPO {head:grpo:solved}", found) == (
        "MENTOR .50 (range of 2: .50, .50), GRPO 1 of 3"
    )
    assert fill("{head:*:difference}", found) == "MENTOR +.38 (range of 2: +.25, +.50); not run: GATS"
    assert fill("{head:mentor:difference.accuracy:chain:strong}", found) == "+.75 (range of 2: +.50, +1.00)"
    for slot, message in (("tail:mentor:area", "no table tail"), ("head:opd:area", "no arm opd")):
        with pytest.raises(SetupError, match=message):
            fill(f"{{{slot}}}", found)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.1, 0.2], "higher in all 2 seeds"),
        ([-0.1, -0.2, -0.3], "lower in all 3 seeds"),
        ([0.1, -0.2], "not told apart (signs differ in 2 seeds)"),
        ([0.1, 0.2, 0.1, 0.2, 0.15], "higher (95% interval, 5 seeds)"),
        ([0.01, 0.9, 0.01, 0.01, 0.01], "not told apart (95% interval, 5 seeds)"),
        ([0.1], "higher in the one seed"),
        ([], "–"),
    ],
)
def test_verdicts_say_what_the_seeds_allow(values, expected):
    assert verdict(interval(values)) == expected


def test_the_report_is_checked_against_the_lines(config, lines, line, write_lines, tmp_path, capsys):
    config["report"]["tables"][0]["figures"] = ["steps", "entropy"]
    folder, output, study = write_lines(lines), tmp_path / "results", tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(config))
    options = ["--config", str(study), "--lines", str(folder), "--output", str(output)]
    report.main(options)
    text = (output / "study.md").read_text()
    assert "+.38 (range of 2: +.25, +.50), higher in all 2 seeds; GRPO 1 of 3; MENTOR 2 of 2; not run: GATS." in text
    assert "Incomplete: 2 of 3 rows lack runs" in text and "| one | chain | 2 | strong | 1, 2, 3 | 5 |" in text
    assert {path.name for path in (output / "study").glob("*.png")} == {"head-steps.png", "head-entropy.png"}
    report.main([*options, "--check"])
    report.main([*options, "--table", "head"])
    assert "| MENTOR | 2 of 3 | 2 of 2 |" in capsys.readouterr().out
    # Another line, another report; what was drawn of what has not changed stands
    write_lines([*lines, line(seed=3, entropy=[1.0, 0.9, 0.8])])
    (output / "study" / "old.png").write_bytes(b"")
    with pytest.raises(SystemExit) as failed:
        report.main([*options, "--check"])
    assert "study.md is not what the lines say" in failed.value.code
    assert "head-steps.png was not drawn" in failed.value.code and "old.png belongs to no table" in failed.value.code
    report.main(options)
    report.main([*options, "--check"])
    with pytest.raises(SystemExit, match="no figure nothing"):
        report.main([*options, "--figure", "nothing"])


def test_a_figure_is_told_by_its_numbers(config, lines):
    build = lambda lines: Report(config, [parse(line) for line in lines]).figures
    before, changed = build(lines), copy.deepcopy(lines)
    changed[3]["entropy"][1] += 0.01
    assert {name for name in before if before[name].digest != build(changed)[name].digest} == {"head-entropy"}


@pytest.mark.parametrize("kind", [*figures.CURVES, *figures.DOTS, figures.EXPERTS])
def test_every_kind_of_figure_is_drawn(kind, table, tmp_path):
    (figure,) = figures.build(kind, table())
    path = figures.save(figure, tmp_path / f"{figure.name}.png")
    assert figures.drawn_from(path) == figure.digest and figures.drawn_from(tmp_path / "nothing.png") is None
    shown = {line["label"]: line["count"] for panel in figure.panels for line in panel.get("lines", ())}
    shown = shown or {panel["title"]: panel["count"] for panel in figure.panels}
    assert shown["GATS"] == "not run" and shown["MENTOR"].startswith("2")


def test_unknown_figures_are_refused(table):
    with pytest.raises(SetupError, match="asks for the figure pie; there are steps"):
        figures.build("pie", table())


def test_means_of_curves_are_where_all_are():
    assert figures.mean_curve([([0.0, 2.0], [0.0, 1.0]), ([0.0, 1.0], [1.0, 1.0])]) == ([0.0, 1.0], [0.5, 0.75])
    assert figures.mean_curve([([0.0], [1.0])]) is None


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.read()


def test_the_study_has_an_answer_to_each_question_before_anything_is_run(plan):
    empty = Report(plan.config, [])
    text = empty.text()
    assert len(plan.config["report"]["questions"]) == 11 and not empty.figures
    assert "Nothing yet: there are no lines." in text and "{" not in text
    assert text.count("*Not run.* Arms: ") == text.count(": nothing was run.") == len(empty.tables)
    unknown = {row.arm for table in empty.tables.values() for row in table.rows} - set(plan.config["arms"])
    assert not unknown


def test_every_run_of_the_study_is_in_a_table(plan, line):
    fields = ("study", "task", "arm", "label", "expert", "seed")
    runs = [run for study in plan.config["studies"] for run in plan.runs(study)]
    accuracy = lambda run: [0.3] if run.arm in ("policy", "expert") else [0.0, 0.5, 1.0]
    lines = [line(accuracy=accuracy(run), **{name: getattr(run, name) for name in fields}) for run in runs]
    lines = list({(run.study, run.arm, run.key): one for run, one in zip(runs, lines)}.values())
    full = Report(plan.config, [parse(line) for line in lines])
    assert "In no table" not in full.text()
    assert {figure.table for figure in full.figures.values()}


@pytest.mark.parametrize("name", ["lines", "measures", "tables", "reviewers", "figures"])
def test_examples_of_docstrings(name):
    assert doctest.testmod(importlib.import_module(f"benchmarks.study.{name}")).failed == 0


def test_the_configuration_is_where_the_report_looks():
    assert "report" in yaml.safe_load(CONFIG.read_text())
