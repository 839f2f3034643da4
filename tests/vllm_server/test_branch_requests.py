"""What a request may ask for, and its coins, without an engine."""

import math
from types import SimpleNamespace

import pytest
import torch

from mentor_trl.objective import branch_weight, coin_uniforms
from mentor_trl.vllm_server.branch_coins import BranchTensors, branch_coins
from mentor_trl.vllm_server.branch_requests import BranchOptions, check_branching, parse_branching
from mentor_trl.vllm_server.options import GAMMA, RULE, SEED, SHARE, SPAN


ROW = {GAMMA: "0.5", RULE: "sentence", SHARE: "0.25", SPAN: 3, SEED: str(2**62 - 1)}


def params(**given):
    """A stand-in for `vllm.SamplingParams`, of a version that has no newer parameters."""
    return SimpleNamespace(**{"extra_args": dict(ROW), "temperature": 1.0, "n": 1, **given})


def test_entries_are_read():
    assert parse_branching(ROW | {"other": 1}) == BranchOptions(0.5, "sentence", 0.25, 3, 2**62 - 1)
    assert parse_branching(None) == parse_branching({GAMMA: "inf", "other": 1}) == BranchOptions()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"mentor_gama": "1"}, r"Unknown entries \['mentor_gama'\]"),
        ({GAMMA: "0"}, "must be positive"),
        ({GAMMA: "nan"}, "must be positive"),
        ({GAMMA: "much"}, "'much'; it must be a number"),
        ({GAMMA: [1.0]}, r"\[1.0\]; it must be a number"),
        ({RULE: "sometimes"}, "'sometimes'; choose one of"),
        ({SHARE: 1.5}, r"must be in \[0, 1\]"),
        ({SHARE: "nan"}, r"must be in \[0, 1\]"),
        ({SPAN: 0}, "must be at least 1"),
        ({SPAN: 1.5}, "1.5; it must be an integer"),
        ({SEED: "-1"}, r"must be in \[0, 2\^62\)"),
        ({SEED: 2**62}, r"must be in \[0, 2\^62\)"),
        ({SEED: 1e9}, "must be an integer"),
        ({SEED: True}, "must be an integer"),
    ],
)
def test_entries_that_are_none(entries, message):
    with pytest.raises(ValueError, match=message):
        parse_branching(ROW | entries)


@pytest.mark.parametrize(
    "given",
    [
        {"n": 2},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"min_tokens": 1},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1]},
        {"bad_words": ["x"]},
        {"stop": ["x"]},
        {"structured_outputs": object()},
        {"thinking_token_budget": 5},
        {"repetition_detection": object()},
        {"temperature": 0.0},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_would_not_be_exact_is_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}=.*leave `{GAMMA}` out"):
        check_branching(params(**given))
    check_branching(params(**given, extra_args={GAMMA: "inf"}))
    check_branching(params(**given, extra_args=None))


def test_truncation_is_allowed():
    check_branching(params(top_p=0.9, top_k=5, min_p=0.1, seed=3, logprobs=0, bad_words=[], stop=[]))


def test_coins_of_a_batch_of_rules():
    torch.manual_seed(0)
    rules = ["entropy", "threshold", "random", "always", "sentence"]
    options = [BranchOptions(0.7 + 0.1 * row, rules[row % 5], 0.3, seed=row) for row in range(200)]
    temperatures = [0.5 + 0.01 * row for row in range(200)]
    logits, positions, near = torch.randn(200, 9), torch.arange(200) * 7, torch.arange(200) % 3 == 0
    logits[:, 4] = -math.inf
    found = branch_coins(logits, BranchTensors.of(options, temperatures), positions, near)
    for row, own in enumerate(options):
        probs = (logits[row].double() / temperatures[row]).softmax(-1)
        weight = branch_weight(torch.special.entr(probs).sum(), own.gamma, own.rule, own.share, near[row])
        coin = coin_uniforms(torch.tensor(own.seed), positions[row])
        assert abs(weight.item() - coin.item()) > 1e-5 and found[row].item() is (coin < weight).item()
    assert 0 < found.sum() < 200


def test_no_logits_are_read_where_no_entropy_is_needed():
    rows = BranchTensors.of([BranchOptions(1.0, "random", 0.5, seed=row) for row in range(50)], [1.0] * 50)
    positions = torch.arange(50)
    assert torch.equal(branch_coins(None, rows, positions), coin_uniforms(torch.arange(50), positions) < 0.5)
