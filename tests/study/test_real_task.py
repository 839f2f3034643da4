"""The study's task for a real model, with a tiny one in its place."""

import doctest
import json
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import make_tiny_model, make_tiny_tokenizer


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.study import prepare  # noqa: E402
from benchmarks.study.tasks import real  # noqa: E402
from benchmarks.study.tasks.sizes import Phase  # noqa: E402


TINY = replace(real.SETTINGS, num_test_prompts=4, num_train_prompts=6, tuned=Phase(2, 1e-3, batch_size=2), samples=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tiny_tokenizer(chat_template=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", real.END, real.PAD]})
    tokenizer.save_pretrained(folder)
    make_tiny_model(vocab_size=len(tokenizer), hidden_size=8, layers=1).save_pretrained(folder)
    return str(folder)


def test_doctests():
    assert not doctest.testmod(real).failed


def test_answers_are_uniform_and_replies_right():
    rng = random.Random(0)
    problems = [real.sample_problem(rng) for _ in range(6000)]
    counts = Counter(problem.solution for problem in problems)
    assert len(counts) == 60 and max(counts.values()) < 150
    assert all(min(problem.numbers) > 0 for problem in problems)
    replies = [real.write_response(problem, real.STYLES["strong"], rng) for problem in problems]
    assert sum(real.reward(replies, [problem.solution for problem in problems])) == 6000


def test_only_the_expert_is_tuned(tmp_path, model):
    prepared = prepare.prepare("real", 1, tmp_path, TINY, model)
    assert list(prepared["pass_at_1"]) == ["policy", "expert_strong"]
    given, policy, expert = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (model, tmp_path / "models" / "policy", tmp_path / "models" / "expert_strong")
    )
    assert all(torch.equal(given[name], policy[name]) for name in given)
    assert any(not torch.equal(given[name], expert[name]) for name in given)
    assert AutoTokenizer.from_pretrained(tmp_path / "models" / "policy").eos_token == real.END
    row = json.loads((tmp_path / "data" / "train.jsonl").read_text().splitlines()[0])
    hinted = json.loads((tmp_path / "hints_strong" / "train.jsonl").read_text().splitlines()[0])
    hint = hinted["prompt"].removeprefix(row["prompt"])
    assert hint and row["trajectory_strong"].startswith(hint)
    assert prepare.prepare("real", 1, tmp_path, TINY, model) == prepared


def test_skipped_aloud_without_a_model(tmp_path, capsys, monkeypatch):
    missing = str(tmp_path / "nothing")
    with pytest.raises(real.ModelMissing, match="nothing' is neither a folder .* --model"):
        prepare.prepare("real", 1, tmp_path, model=missing)
    monkeypatch.setattr("sys.argv", ["prepare", "real", "--folder", str(tmp_path), "--model", missing])
    assert prepare.main() == 0
    assert capsys.readouterr().out.startswith("Skipped: ")
