import doctest
import importlib
import io
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.quickstart import evaluate, prepare, report, task  # noqa: E402


CHAIN = task.Problem(4, (("+", 7), ("*", 3), ("-", 9)))
TINY = prepare.Settings(
    num_test_prompts=8,
    num_train_prompts=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    base=prepare.Phase(task.Style(work=0.5), steps=2, learning_rate=1e-3, batch_size=4),
    expert=prepare.Phase(task.Style(work=1.0), steps=1, learning_rate=1e-3, batch_size=4),
    policy=prepare.Phase(task.Style(work=0.0), steps=1, learning_rate=1e-3, batch_size=4),
)


class NoProgress:
    def add_task(self, *args, **kwargs):
        return 0

    def update(self, *args, **kwargs):
        pass


def make_evaluation(correct: list[list[float]]) -> evaluate.Evaluation:
    return evaluate.Evaluation(np.array(correct), entropy=1.0, length=10.0, work=0.5, habits=0.1)


def make_run(arm: str, seed: int, correct: list[list[float]]) -> evaluate.Run:
    history = [
        {
            "step": step,
            "step_time": 0.5,
            "mentor/alpha": 1.0,
            "mentor/on_policy/reward": 0.25,
            "mentor/mixed/reward": 0.75,
            "mentor/gamma": 1.5,
            "mentor/branch_rate": 0.2,
            "mentor/replaced_rate": 0.1,
        }
        for step in (1, 2, 3, 4)
    ]
    if arm == "grpo":
        history = [{"step": entry["step"], "step_time": 0.5} for entry in history]
    curve = {report.COMPARED_STEP: make_evaluation(correct), 300: make_evaluation(correct)}
    return evaluate.Run(arm, seed, {step: Path() for step in curve}, history, curve)


@pytest.mark.parametrize("module", ["task", "evaluate", "report"])
def test_doctests(module):
    results = doctest.testmod(importlib.import_module(f"examples.quickstart.{module}"))
    assert results.attempted and not results.failed


def test_chain_by_hand():
    assert CHAIN.prompt == "4 +7 *3 -9 :"
    assert CHAIN.solution == "1 3 4"  # 11, 3, -6
    assert len(CHAIN.prompt.split()) == task.PROMPT_LENGTH


def test_worked_responses_are_right_and_name_their_steps():
    text = task.write_response(CHAIN, task.Style(work=1.0, ok=0.0, wait=0.0), random.Random(0))
    assert text == "work 4 +7 = 1 work 1 *3 = 3 work 3 -9 = 4 answer 1 3 4"
    assert task.exact_answer_reward([text], [CHAIN.solution]) == [1.0]


def test_guesses_keep_the_parity_and_are_right_one_time_in_five():
    rng, style, count = random.Random(0), task.Style(work=0.0, ok=0.0, wait=0.0), 4000
    firsts = [int(task.write_response(CHAIN, style, rng).split()[1]) for _ in range(count)]
    assert set(firsts) == {1, 3, 5, 7, 9}
    # Five standard deviations of a share.
    assert abs(firsts.count(1) / count - 0.2) < 5 * math.sqrt(0.2 * 0.8 / count)


def test_a_wrong_guess_is_carried_on():
    rng = random.Random(0)
    for _ in range(200):
        words = task.write_response(CHAIN, task.Style(work=0.5, ok=0.0, wait=0.0), rng).split()
        stated = list(map(int, words[words.index("answer") + 1 :]))
        if words[-8] == "work":
            assert stated[2] == (stated[1] - 9) % 10


def test_every_answer_is_equally_likely():
    rng, count = random.Random(0), 5000
    values = [task.sample_problem(rng).solution.split() for _ in range(count)]
    for step in range(task.NUM_STEPS):
        shares = np.bincount([int(value[step]) for value in values], minlength=10) / count
        assert np.abs(shares - 0.1).max() < 5 * math.sqrt(0.1 * 0.9 / count)


def test_reward():
    completions = [
        "guess 1 guess 3 guess 4 answer 1 3 4",
        "guess 1 guess 3 guess 4 answer 1 3 5",
        "answer 1 3 4 ok",
        "answer 1 3 4 answer 1 3 5",
        "work 4 +7 = 1",
        "",
    ]
    assert task.exact_answer_reward(completions, ["1 3 4"] * 6, prompts=None) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_tokenizer_round_trip():
    tokenizer = task.build_tokenizer()
    style = task.Style(work=0.5)
    for seed in range(50):
        rng = random.Random(seed)
        problem = task.sample_problem(rng)
        text = f"{problem.prompt} {task.write_response(problem, style, rng)}"
        ids = tokenizer(text)["input_ids"]
        assert ids == [task.VOCABULARY.index(word) for word in text.split()]
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert len(tokenizer) == len(set(task.VOCABULARY)) and tokenizer.chat_template is None


def test_splits_are_disjoint_and_repeat():
    train, test = prepare.make_splits(prepare.Settings())
    assert len(set(train)) == len(train) == 2000 and len(set(test)) == len(test) == 256
    assert not set(train) & set(test)
    assert (train, test) == prepare.make_splits(prepare.Settings())


def test_pretraining_leaves_out_the_held_out_problems(monkeypatch):
    problems = iter([CHAIN, task.Problem(1, CHAIN.steps), CHAIN, task.Problem(2, CHAIN.steps)])
    monkeypatch.setattr(task, "sample_problem", lambda rng: next(problems))
    texts = prepare.sample_texts(task.Style(work=1.0), {CHAIN}, random.Random(0))
    assert [next(texts)[0], next(texts)[0]] == ["1", "2"]


def test_labels_are_the_response_and_its_end():
    ids, labels = prepare.make_batch(["4 +7 *3 -9 : answer 1 3 4 <eos>", "4 +7 *3 -9 : ok answer 1 3 4 <eos>"])
    words = [[task.VOCABULARY[i] for i in row if i >= 0] for row in labels.tolist()]
    assert words == ["answer 1 3 4 <eos>".split(), "ok answer 1 3 4 <eos>".split()]
    assert ids.shape == labels.shape == (2, 11)
    assert torch.equal(ids[labels >= 0], labels[labels >= 0])


def test_prepare_writes_once_for_the_same_settings(tmp_path, monkeypatch):
    prepare.prepare(tmp_path, NoProgress(), TINY)
    rows = evaluate.read_prompts(tmp_path / "data" / "train.jsonl")
    assert len(rows) == 16 and set(rows[0]) == {"prompt", "solution"}
    result = evaluate.evaluate(tmp_path / "models" / "policy", rows[:3], num_samples=2)
    assert result.correct.shape == (3, 2) and 0.0 < result.entropy <= math.log(len(task.VOCABULARY))

    monkeypatch.setattr(prepare, "pretrain", lambda *args: pytest.fail("not cached"))
    prepare.prepare(tmp_path, NoProgress(), TINY)
    with pytest.raises(pytest.fail.Exception, match="not cached"):
        prepare.prepare(tmp_path, NoProgress(), prepare.Settings())


def test_paired_difference_by_hand():
    # Differences 1, 0, 1, 0: mean 1/2, variance (4 * 1/4) / 3.
    mean, half_width = evaluate.paired_difference(np.array([1.0, 0.5, 1.0, 0.5]), np.array([0.0, 0.5, 0.0, 0.5]))
    assert mean == 0.5
    assert half_width == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    # Noise that both share does not widen the interval.
    shared = np.random.default_rng(0).random(100)
    assert evaluate.paired_difference(shared + 0.1, shared) == pytest.approx((0.1, 0.0))


def test_accuracy_and_pass_at_k():
    evaluation = make_evaluation([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    assert evaluation.accuracy.tolist() == [0.0, 0.25, 1.0]
    assert evaluation.solved.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "ours, verdict",
    [
        ([[1, 1], [1, 1], [1, 1]], "MENTOR is ahead of GRPO by more than the interval"),
        ([[0, 0], [0, 1], [1, 0]], "MENTOR and GRPO are not told apart"),
    ],
)
def test_report(tmp_path, ours, verdict):
    console = report.Console(file=io.StringIO(), width=1000)
    policy = make_evaluation([[0, 0], [0, 0], [0, 0]])
    runs = [make_run("grpo", seed, [[0, 0], [0, 1], [1, 0]]) for seed in (1, 2)]
    runs += [make_run("mentor", seed, ours) for seed in (1, 2)]
    report.write_report(policy, runs, {"grpo": "GRPO", "mentor": "MENTOR"}, tmp_path, console)
    for text in (console.file.getvalue(), (tmp_path / "report.md").read_text()):
        assert verdict in text
        assert "+0.000 ± 0.000" in text or "+0.667 ± 0.327" in text  # differences 1, 1/2, 1/2
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"][2]["curve"]["100"]["accuracy"] == np.mean(ours, axis=1).tolist()


def test_conclusion_when_mentor_is_behind():
    worse, better = make_run("mentor", 1, [[0, 0], [0, 0], [0, 1]]), make_run("grpo", 1, [[1, 1], [1, 1], [1, 1]])
    measure = report.Measure("accuracy", lambda run: run.curve[100].accuracy)
    conclusion = report.conclude([measure], {"grpo": [better], "mentor": [worse]})
    assert conclusion.startswith("MENTOR is behind GRPO by more than the interval in accuracy: -0.833 ± 0.327")


def test_the_paper_recipe_differs_in_the_exponent_only():
    recipes = {
        name: yaml.safe_load((ROOT / "recipes" / "quickstart" / f"{name}.yaml").read_text())
        for name in ("grpo", "mentor", "mentor_paper")
    }
    mentor, paper, grpo = recipes["mentor"], recipes["mentor_paper"], recipes["grpo"]
    assert {key for key in mentor if mentor[key] != paper[key]} == {"correction_exponent", "output_dir"}
    assert mentor.keys() == paper.keys() and paper["correction_exponent"] == 0.0
    assert {key for key in grpo if grpo[key] != mentor[key]} == {"num_mixed_generations", "output_dir"}
    assert mentor["max_steps"] % mentor["save_steps"] == report.COMPARED_STEP % mentor["save_steps"] == 0
