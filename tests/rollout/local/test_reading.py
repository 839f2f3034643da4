"""What the models of the in-process engine read, and how often."""

import math

import pytest
import torch
from test_decoder import random_ids
from test_local import RAGGED, check_records, make_request, positions_of, watch

from mentor_trl.rollout import LocalSampler
from mentor_trl.rollout.local import in_process
from mentor_trl.rollout.local.decoding_check import check_decoding
from statistics_helpers import make_peaked_model, sample_local, sequences


INF = math.inf


# The expert catches up


@pytest.mark.parametrize("draft_length", [1, 4])
def test_rarely_asked_expert_reads_in_chunks(monkeypatch, draft_length):
    monkeypatch.setattr(in_process, "MAX_CATCH_UP", 8)
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    shapes = watch(expert)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (30, 1, 7, 50, 30)]
    request = make_request(prompts, [60.0, 40.0, INF, 150.0, 60.0], 80)
    rollout = sample_local(policy, expert, request, draft_length=draft_length, rollout_batch_size=3)
    lengths = {len(prompt) - 1 for prompt in prompts}
    chunks = [tokens for _, tokens in shapes if tokens not in lengths]
    assert 8 in chunks and max(chunks) <= 8 + draft_length
    assert 3 <= rollout.branch.sum() <= 20
    check_records(policy, expert, request, rollout)


def test_rarely_asked_expert_with_long_rows():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (100, 3)]
    request = make_request(prompts, 500.0, 400, seed=13)
    rollout = sample_local(policy, expert, request)
    # more than one chunk is missing when the expert is first asked
    assert rollout.branch.any() and rollout.branch.any(0).int().argmax() > in_process.MAX_CATCH_UP
    check_records(policy, expert, request, rollout)


# Who computes what


def test_plain_rows_never_run_the_expert():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    shapes = watch(expert)
    request = make_request(gamma=INF)
    rollout = sample_local(policy, expert, request)
    assert shapes == [] and rollout.stats["expert_rounds"] == 0
    check_records(policy, expert, request, rollout)
    # and need none
    alone = sample_local(policy, None, request)
    assert alone.completion_ids == rollout.completion_ids


@pytest.mark.parametrize("draft_length, rule", [(1, "entropy"), (8, "entropy"), (8, "always")])
def test_expert_head_sees_branch_points_only(draft_length, rule):
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    rows = []
    check_decoding(expert, "expert")
    expert.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
    request = make_request(RAGGED * 4, 4.0, 16, branch_rule=rule)
    rollout = sample_local(policy, expert, request, draft_length=draft_length)
    branches, drafted = int(rollout.branch.sum()), rollout.stats["drafted"]
    if draft_length == 1:
        assert sum(rows) == branches < drafted == rollout.stats["tokens"]
    elif rule == "always":
        # all drafts are branch points, and all of a round are examined at once
        assert sum(rows) == drafted > rollout.stats["tokens"]
    else:
        assert branches <= sum(rows) < 0.7 * drafted


def test_a_prompt_is_computed_once():
    """3 prompts of 5 tokens, 8 rows each: 3 x 4 positions are prefilled, and each token of a row is read once."""
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    read, asked = watch(policy), watch(expert)
    prompts = [list(prompt) for prompt in random_ids(3, 5).tolist() for _ in range(8)]
    for size in (24, 6):
        read.clear(), asked.clear()
        request = make_request(prompts, 1e-6, 7)
        rollout = sample_local(policy, expert, request, draft_length=1, rollout_batch_size=size)
        for shapes in (read, asked):
            assert positions_of(shape for shape in shapes if shape[1] > 1) == 3 * 4
            assert positions_of(shape for shape in shapes if shape[1] == 1) == 24 * 7
        check_records(policy, expert, request, rollout)


def test_a_second_request_of_a_session_prefills_nothing():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    read, asked = watch(policy), watch(expert)
    prompts = [list(prompt) for prompt in random_ids(4, 5).tolist()]
    with LocalSampler(expert, draft_length=1).session(policy) as session:
        first = session.sample(make_request(prompts, 1e-6, 6))
        assert positions_of(shape for shape in read if shape[1] > 1) == 4 * 4
        assert positions_of(shape for shape in asked if shape[1] > 1) == 4 * 4
        read.clear(), asked.clear()
        request = make_request(prompts[::-1], 1e-6, 6, seed=1)
        second = session.sample(request)
    assert {tokens for _, tokens in read} == {tokens for _, tokens in asked} == {1}
    assert first.completion_ids != second.completion_ids
    check_records(policy, expert, request, second)


def test_requests_of_a_session_do_not_disturb_each_other():
    """
    Rows that end early move others to their slots, while the expert's cache may still hold prompts of an earlier
    request there.
    """
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    # inside a session the models attend as it needs them to; other ones tell what is right
    models = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    long = [random_ids(1, 20, seed=seed)[0].tolist() for seed in range(6)]
    generator = torch.Generator().manual_seed(0)
    with LocalSampler(expert, rollout_batch_size=4, draft_length=3).session(policy) as session:
        for turn in range(12):
            chosen = torch.randint(6, (6,), generator=generator).tolist()
            request = make_request([long[i] for i in chosen], 1.0, 5, stop_token_ids=(3,), seed=turn, score_all=True)
            check_records(*models, request, session.sample(request))
            # short rows that the expert never or rarely reads, of which some end early
            gamma = INF if turn % 2 else 60.0
            request = make_request([[1], [2, 5], [4], [6]], gamma, 8, stop_token_ids=(3, 5, 7, 9), seed=turn)
            check_records(*models, request, session.sample(request))


def test_seeds():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    first = sample_local(policy, expert, make_request(seed=4))
    again = sample_local(policy, expert, make_request(seed=4))
    other = sample_local(policy, expert, make_request(seed=5))
    assert first.completion_ids == again.completion_ids != other.completion_ids
    for name in ("logps", "expert_logps"):
        torch.testing.assert_close(getattr(first, name), getattr(again, name), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(first.branch, again.branch)
    # the global generator is neither read nor moved
    state = torch.random.get_rng_state()
    torch.manual_seed(123)
    assert sample_local(policy, expert, make_request(seed=4)).completion_ids == first.completion_ids
    torch.random.set_rng_state(state)
    sample_local(policy, expert, make_request(seed=4))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rows_of_equal_prompts_differ():
    policy, expert = make_peaked_model(0, vocab_size=12), make_peaked_model(1, vocab_size=12)
    rows = sequences(sample_local(policy, expert, make_request([[1, 2, 3]] * 50, 3.0)))
    assert len(set(rows)) > 40
