"""The tasks of the study: their answers, their experts, and what is prepared for a run."""

import doctest
import importlib
import json
import math
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.study import prepare, properties  # noqa: E402


TASKS = ["chain", "fork", "paths"]
TINY = prepare.Settings(
    num_test_prompts=8,
    num_train_prompts=16,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    base=prepare.Phase(steps=2, learning_rate=1e-3, batch_size=4),
    tuned=prepare.Phase(steps=1, learning_rate=1e-3, batch_size=4),
    samples=1,
)


@pytest.fixture(params=TASKS)
def module(request):
    return importlib.import_module(f"benchmarks.study.tasks.{request.param}")


def write(module, style: str, count: int = 600):
    """Problems, replies in a style, and whether these are right."""
    rng = random.Random(0)
    problems = [module.sample_problem(rng) for _ in range(count)]
    replies = [module.write_response(problem, module.STYLES[style], rng) for problem in problems]
    prompts, solutions = [problem.prompt for problem in problems], [problem.solution for problem in problems]
    return problems, replies, module.reward(prompts=prompts, completions=replies, solution=solutions)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_doctests(module):
    assert not doctest.testmod(prepare).failed
    assert not doctest.testmod(module).failed


def test_experts_are_as_strong_as_named(module):
    share = {style: sum(write(module, style)[2]) / 600 for style in module.STYLES}
    assert share["strong"] == share["other"] == 1.0
    assert share["policy"] < share["barely"] < 0.1 < share["weak"] < 0.5


def test_replies_are_of_the_vocabulary_and_end_in_time(module):
    for style in module.STYLES:
        problems, replies, _ = write(module, style, count=200)
        tokens = module.build_tokenizer()([f"{one.prompt} {reply}" for one, reply in zip(problems, replies)]).input_ids
        assert not any(module.build_tokenizer().unk_token_id in row for row in tokens)
        assert max(len(reply.split()) for reply in replies) < prepare.MAX_NEW_TOKENS


def test_no_answer_is_worth_stating_blindly(module):
    problems, replies, _ = write(module, "strong", count=2000)
    for reply, _ in Counter(replies).most_common(3):
        prompts, solutions = [one.prompt for one in problems], [one.solution for one in problems]
        rewards = module.reward(prompts=prompts, completions=[reply] * len(problems), solution=solutions)
        assert sum(rewards) / len(rewards) < 0.02


def test_there_are_more_problems_than_a_run_takes(module):
    sizes, rng = getattr(module, "SETTINGS", prepare.Settings()), random.Random(0)
    count = int(1.2 * (sizes.num_test_prompts + sizes.num_train_prompts))
    assert len(prepare.sample_distinct(module, rng, count)) == count
    with pytest.raises(ValueError, match="set 3 lower"):
        prepare.sample_distinct(SimpleNamespace(__name__="two", sample_problem=lambda rng: rng.randrange(2)), rng, 3)


def test_right_replies_are_described_by_numbers_and_a_key(module):
    problems, replies, rewards = write(module, "weak", count=100)
    for problem, reply, right in zip(problems, replies, rewards):
        described = module.describe(problem.prompt, reply)
        assert not right or described.pop("solution")
        described.pop("solution", None)
        assert all(isinstance(value, (int, float)) for value in described.values())
    assert module.describe(problems[0].prompt, "= =")["solution"] is None


def test_prepare(tmp_path, module):
    task = module.__name__.split(".")[-1]
    prepared = prepare.prepare(task, 1, tmp_path, TINY)
    models = ["policy", *(f"expert_{name}" for name in prepare.experts_of(module))]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(models)
    assert list(prepared["pass_at_1"]) == list(prepared["parameters"]) == models
    splits = {
        name: [json.loads(line) for line in (tmp_path / "data" / f"{name}.jsonl").open()] for name in ("train", "test")
    }
    assert not {row["prompt"] for row in splits["train"]} & {row["prompt"] for row in splits["test"]}
    for row in splits["train"]:
        replies = [row[f"trajectory_{name}"] for name in prepare.experts_of(module)]
        assert (
            module.reward(prompts=[row["prompt"]] * 4, completions=replies, solution=[row["solution"]] * 4)
            == [1.0] * 4
        )
    pairs = [json.loads(line) for line in (tmp_path / "sft_weak" / "train.jsonl").open()]
    assert [pair["completion"].strip() for pair in pairs] == [row["trajectory_weak"] for row in splits["train"]]


def test_prepare_again_only_where_something_has_changed(tmp_path):
    policy = tmp_path / "models" / "policy" / "config.json"
    prepare.prepare("chain", 1, tmp_path, TINY)
    policy.write_text("kept")
    prepare.prepare("chain", 1, tmp_path, TINY)
    assert policy.read_text() == "kept"
    prepare.prepare("chain", 1, tmp_path, replace(TINY, samples=2))
    assert policy.read_text() != "kept"


def test_properties(tmp_path, module):
    task = module.__name__.split(".")[-1]
    prepare.prepare(task, 1, tmp_path, TINY)
    rows = read(tmp_path / "data" / "test.jsonl")
    measured = properties.uncertainty(module, tmp_path / "models" / "policy", rows)
    size = len(module.VOCABULARY)
    # Two steps of training leave the policy nearly uniform everywhere.
    assert measured["entropy_decisions"] == pytest.approx(math.log(size), abs=0.1)
    assert measured["entropy_others"] == pytest.approx(math.log(size), abs=0.1)
    assert measured["decisions"] == pytest.approx(len(module.DECISIONS) / size, abs=0.1)
    assert properties.solutions(module, tmp_path / "models" / "policy", rows, samples=2) == {"right": 0, "distinct": 0}
