import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.study import cost, store, tune  # noqa: E402
from benchmarks.study.arms import Plan, Stage  # noqa: E402


CONFIG = {
    "settings": {"steps": 40, "evaluate_every": 10, "prompts": 4, "samples": 2, "final_samples": 4},
    "tasks": {"toy": {"max_completion_length": 8}, "long": {"max_completion_length": 16, "settings": {"steps": 80}}},
    "arms": {
        "policy": {"label": "before"},
        "grpo": {"label": "GRPO", "alternatives": {"epsilon_high": [0.4]}, "stages": [{"recipe": "grpo.yaml"}]},
        "mentor": {
            "label": "MENTOR",
            "expert": True,
            "alternatives": {"correction_exponent": [0.0]},
            "stages": [{"recipe": "mentor.yaml", "options": {"beta": 0.1}}],
        },
        "paper": {"label": "paper", "like": "mentor", "options": {"correction_exponent": 0.0}},
        "two": {
            "label": "two",
            "expert": True,
            "stages": [
                {"recipe": "x/sft.yaml", "share": 0.25, "options": {"learning_rate": 1e-3}},
                {"recipe": "grpo.yaml", "share": 0.75},
            ],
        },
    },
    "studies": {
        "main": [
            {"tasks": ["toy"], "arms": ["policy", "grpo", "mentor"], "seeds": [1, 2], "experts": ["weak", "strong"]},
            {"tasks": ["long"], "arms": ["two"], "seeds": [2]},
        ],
        "paper": [{"tasks": ["toy"], "arms": ["mentor", "paper"], "seeds": [1]}],
        "tuning": [{"tasks": ["toy"], "arms": ["grpo", "mentor"], "seeds": [9], "learning_rates": [1e-4, 1e-3, 1e-2]}],
    },
}
TUNED = {"toy": {"mentor": {"learning_rate": 5e-4, "correction_exponent": 0.25}}}


def test_arms_with_an_expert_run_with_each_and_first_seeds_come_first():
    runs = list(Plan(CONFIG).runs("main"))
    assert [(run.arm, run.expert, run.seed) for run in runs] == [
        ("policy", None, 1),
        ("grpo", None, 1),
        ("mentor", "weak", 1),
        ("mentor", "strong", 1),
        ("policy", None, 2),
        ("grpo", None, 2),
        ("mentor", "weak", 2),
        ("mentor", "strong", 2),
        ("two", "strong", 2),
    ]
    assert len({run.key for run in runs}) == len(runs)


def test_options_of_stages():
    *_, two = Plan(CONFIG).runs("main")
    first, second = two.stages
    assert first == Stage("x/sft.yaml", 20, {"learning_rate": 1e-3}) and first.supervised
    assert second == Stage("grpo.yaml", 60, {"max_completion_length": 16, "learning_rate": 2e-4})


def test_an_arm_takes_over_another_with_what_was_tuned_for_it():
    mentor, paper = Plan(CONFIG, TUNED).runs("paper")
    assert mentor.stages[0].options["correction_exponent"] == 0.25
    assert paper.stages[0].options["correction_exponent"] == 0.0
    assert mentor.stages[0].options["learning_rate"] == paper.stages[0].options["learning_rate"] == 5e-4
    assert paper.stages[0].options["beta"] == 0.1


def test_a_search_has_each_rate_and_the_alternative_at_the_middle_one():
    runs = [run for run in Plan(CONFIG, TUNED).runs("tuning") if run.arm == "mentor"]
    points = [
        (run.stages[0].options["learning_rate"], run.stages[0].options.get("correction_exponent")) for run in runs
    ]
    assert points == [(1e-4, None), (1e-3, None), (1e-2, None), (1e-3, 0.0)]
    again = {"tasks": ["toy"], "arms": ["mentor"], "seeds": [8], "learning_rates": [1e-3, 1e-2], "alternatives": False}
    runs = list(Plan(CONFIG | {"studies": {"again": [again]}}).runs("again"))
    assert [run.stages[0].options["learning_rate"] for run in runs] == [1e-3, 1e-2]


def test_tuning_takes_what_learns_fast_and_ends_well():
    assert tune.score({"steps": [0, 10, 30], "accuracy": [0.0, 1.0, 0.5]}) == pytest.approx((2 / 3 + 0.5) / 2)

    plan = Plan(CONFIG)
    lines = [
        {"task": "toy", "arm": run.arm, "options": run.stages[0].options, "steps": [0, 10, 20], "accuracy": curve}
        for run, curve in zip(plan.runs("tuning"), [[0, 0, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0.5]] * 2)
    ]
    assert tune.choose(lines, plan) == {"toy": {"grpo": {"learning_rate": 1e-3}, "mentor": {"learning_rate": 1e-3}}}
    lines[7]["accuracy"] = [1, 1, 1]
    assert tune.choose(lines, plan)["toy"]["mentor"] == {"learning_rate": 1e-3, "correction_exponent": 0.0}


def test_every_run_of_the_study_can_be_described():
    plan = Plan.read()
    for study in plan.config["studies"]:
        runs = list(plan.runs(study))
        assert runs and len({(run.arm, run.key) for run in runs}) == len(runs), study


def test_rollouts_cost_what_was_sampled_trained_and_heard():
    history = [
        {"step": 1, "step_time": 2.0, "num_tokens": 100, "mentor/on_policy/rows": 4.0, "mentor/on_policy/length": 5.0}
        | {"mentor/mixed/rows": 4.0, "mentor/mixed/length": 10.0},
        {"step": 2, "step_time": 1.0},
        {"train_loss": 0.0},
    ]
    spent = cost.of_rollouts(history, {}, policy=10, expert=100)
    # 100 tokens, of which 60 were written: prompts have 5, and mixed rows 4 x (10 + 5)
    assert spent == [(1, 10 * 4 * 100 + 100 * 60, 60, 2.0), (2, 10 * 4 * 100 + 100 * 60, 60, 3.0)]
    history[0]["mentor/distillation/expert_tokens"] = 10.0  # half of the 20 tokens that on-policy rows have
    assert cost.of_rollouts(history, {}, policy=10, expert=100)[0].expert_tokens == 60 + 20
    del history[0]["mentor/distillation/expert_tokens"]
    hinted = cost.of_rollouts(history, {"num_generations": 4}, policy=10, expert=100, hint_tokens=7)
    assert hinted[0].expert_tokens == 60 + 2 * 7
    history[0]["mentor/resampling/rows"] = 16
    assert cost.of_rollouts(history, {}, policy=10, expert=0)[0].cost == 10 * (100 + 3 * 50)


def test_trajectories_are_written_once():
    history = [{"step": step, "loss": 1.0, "num_tokens": 40 * step} for step in (1, 2, 3)]
    spent = cost.of_supervised(history, 60, policy=10, expert=100, step_seconds=0.5)
    assert spent[0] == (1, 10 * 3 * 40 + 100 * 40, 40, 0.5)
    assert spent[2] == (3, 10 * 3 * 120 + 100 * 60, 60, 1.5)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "main.jsonl"
    store.add(file, {"key": "a", "arm": "x"})
    with file.open("a") as stream:
        stream.write(json.dumps({"key": "b", "arm": "x"})[:9])
    store.add(file, {"key": "c", "arm": "y"})
    assert store.done(file) == {("x", "a"), ("y", "c")}
    assert list(store.by_key(tmp_path)) == ["a", "c"]


@pytest.mark.parametrize("name", ["study", "label", "arm"])
def test_the_key_of_a_run_is_of_what_it_does(name):
    runs = list(Plan(CONFIG).runs("main"))
    object.__setattr__(runs[1], name, "another")
    assert runs[1].key == list(Plan(CONFIG).runs("main"))[1].key
