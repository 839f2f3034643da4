import json
import math

import pytest
from scipy.stats import ttest_1samp

from benchmarks.study.lines import parse, read_runs
from benchmarks.study.measures import Context, area, at_level, interval, measure
from mentor_trl.errors import SetupError


def test_a_line_becomes_curves_that_are_as_long_as_the_steps(line):
    run = parse(line(pass_at={"1": [0.0, 0.5, 1.0], "8": [None, None, 1.0]}))
    assert run.curves["pass@1"] == (0.0, 0.5, 1.0)
    assert math.isnan(run.curves["pass@8"][0]) and run.curves["pass@8"][2] == 1.0
    # A metric is a mean over the steps before an evaluation
    assert math.isnan(run.curves["metrics.alpha"][0]) and run.curves["metrics.alpha"][1:] == (1.0, 1.0)
    assert (run.options["alpha"], run.options["learning_rate"], run.options["parameters.expert"]) == (1.0, 2e-4, 200)


def test_distinct_solutions_of_more_samples_are_not_those_of_fewer(line):
    run = parse(line(pass_at={"1": [0.0, 0.5, 1.0], "32": [None, None, 1.0]}, distinct=[0.0, 1.0, 9.0]))
    assert measure("distinct", run, Context()) == 9.0
    assert at_level(run, "distinct.few", 0.25) == 0.5 and math.isnan(at_level(run, "distinct.few", 0.75))
    assert at_level(parse(line(distinct=[0.0, 1.0, 9.0])), "distinct.few", 0.75) == 5.0


@pytest.mark.parametrize(
    "fields, message",
    [({"seed": None}, "line 1: the run lacks seed"), ({"entropy": [1.0]}, "line 1: entropy has 1 values for 3 steps")],
)
def test_a_line_that_cannot_be_used_is_named(fields, message, line, write_lines):
    with pytest.raises(SetupError, match=message):
        read_runs(write_lines([line(**fields)]))


def test_a_run_counts_once_in_its_study_and_a_line_that_was_cut_off_does_not(line, write_lines):
    folder = write_lines([line(key="a"), line(key="a", seed=2), line("grpo", key="a"), line(key="a", study="other")])
    with (folder / "one.jsonl").open("a") as stream:
        stream.write(json.dumps(line(key="c"))[:50] + "\n" + json.dumps(line(key="d", seed=4)) + "\n")
    assert [(run.study, run.arm, run.seed) for run in read_runs(folder)] == [
        ("one", "mentor", 1),
        ("one", "grpo", 1),
        ("one", "mentor", 4),
        ("other", "mentor", 1),
    ]


def test_area_is_the_mean_height_up_to_an_end():
    assert area([0, 10, 30], [0.0, 1.0, 1.0], 30) == pytest.approx(25 / 30)
    # Up to 20: a triangle of 5 and a rectangle of 10
    assert area([0, 10, 30], [0.0, 1.0, 1.0], 20) == pytest.approx(15 / 20)
    # A curve that has ended keeps its height
    assert area([0, 10], [0.0, 1.0], 20) == pytest.approx(15 / 20)
    assert math.isnan(area([0, 10], [0.0, math.nan], 10))


def test_what_is_spent_before_the_first_evaluation_counts(run):
    late = run(cost=[100.0, 200.0, 300.0], accuracy=(0.4, 0.6, 0.8))
    context = Context(budget=200.0, start={1: 0.1})
    # .1 up to a cost of 100, then from .4 to .6
    assert measure("area_cost", late, context) == pytest.approx((0.1 + 0.5) / 2)
    assert measure("accuracy_cost", late, context) == pytest.approx(0.6)
    assert measure("area_cost", late, Context(budget=200.0)) == pytest.approx(0.5 / 2)
    assert measure("area_cost", late, Context(budget=50.0, start={1: 0.1})) == pytest.approx(0.1)


def test_measures_of_a_run(run):
    trained, context = run(), Context(solved=0.9, level=0.25, end=100.0, budget=1e11)
    expected = {
        "accuracy": 1.0,
        "solved": 1.0,
        "area": 0.5,
        "area_cost": 0.5,
        "reached": 25.0,
        "entropy_level": 0.875,
        "pass@4": 1.0,
        "describe.wait": 1.0,
        "metrics.branch_rate": 0.25,
        "guided_until": 100.0,
        "seconds": 50.0,
        "alpha": 1.0,
    }
    assert {name: measure(name, trained, context) for name in expected} == pytest.approx(expected)
    assert math.isnan(measure("metrics.nothing", trained, context))
    assert measure("memory", run(memory=3 * 2**29), context) == 1.5 and math.isnan(measure("memory", trained, context))
    adaptive = {"mentor/alpha": [1.0, 0.1], "mentor/guidance/withdrawn": [0.0, 0.75]}
    early = measure("guided_until", run(metrics=adaptive), context)
    assert early == trained.steps[1] + 0.25 * (trained.steps[2] - trained.steps[1])
    untrained = run("policy", accuracy=(0.3,))
    assert measure("accuracy", untrained, context) == 0.3
    assert all(math.isnan(measure(name, untrained, context)) for name in ("area", "area_cost", "cost", "seconds"))
    assert math.isnan(measure("reached", run(accuracy=(0.0, 0.1, 0.2)), context))


def test_intervals_are_those_of_t_from_five_seeds_on_and_ranges_before():
    values = [0.1, 0.4, 0.2, 0.9, 0.3]
    found, expected = interval(values), ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.kind == "95%"
    few = interval([*values[:4], math.nan])
    assert (few.low, few.high, few.count, few.kind) == (0.1, 0.9, 4, "range")
    assert math.isnan(interval([]).mean)
