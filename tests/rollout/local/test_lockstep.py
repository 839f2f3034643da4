import logging
import math

import pytest
import torch
from recurrent_models import JUDGED, MODELS, make_recurrent
from test_local import RAGGED, check_records, make_request, positions_of, watch
from transformers import LlamaModel

from mentor_trl.errors import SetupError
from mentor_trl.rollout import LocalSampler, MixedRequest
from mentor_trl.rollout.local import in_process
from mentor_trl.rollout.local.decoding_check import check_decoding
from mentor_trl.rollout.local.in_process import InProcessExpert
from statistics_helpers import Tree, forward_logps, labelled, make_peaked_model, misfit, sample_local, sequences


INF = math.inf
REFUSED = ["rwkv", "recurrent-gemma"]


# The check


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_what_cannot_be_rolled_back_advances_in_lockstep(name):
    model = make_recurrent(name).train()
    ability = check_decoding(model, "policy")
    assert not ability.ragged and ability.reason
    # chunks of these two do not go on where the cache ends
    assert ability.blocks == (name not in ("mamba", "jamba"))
    assert model.training


@pytest.mark.parametrize("name", REFUSED)
def test_what_fails_both_ways_is_refused_by_name_and_difference(name):
    model = make_recurrent(name)
    with pytest.raises(
        SetupError, match=rf"The expert \({type(model).__name__}\) .* differ by 0\.\d+ nats when it decod"
    ):
        check_decoding(model, "expert")


def test_a_state_that_hides_in_an_attention_cache_is_found():
    """It adds up what it has read, wrong tokens and padding included, and raises nothing."""

    class Remembering(LlamaModel):
        def forward(self, input_ids=None, past_key_values=None, **kwargs):
            outputs = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
            total = self.embed_tokens(input_ids).cumsum(1) + getattr(outputs.past_key_values, "total", 0.0)
            if outputs.past_key_values is not None:
                outputs.past_key_values.total = total[:, -1:]
            outputs.last_hidden_state = outputs.last_hidden_state + total
            return outputs

    model = make_peaked_model(0, vocab_size=12)
    check_decoding(make_peaked_model(0, vocab_size=12), "policy")
    model.model.__class__ = Remembering
    difference = r"differ by \d+(\.\d+)? nats when it decodes"
    with pytest.raises(SetupError, match=rf"{difference} each row by itself; .*{difference} all rows together"):
        check_decoding(model, "policy")


def test_one_line_of_log_names_the_models(caplog):
    policy, expert = make_recurrent("lfm2", vocab_size=12), make_recurrent("bloom", 1, vocab_size=12)
    sampler = LocalSampler(expert)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with sampler.session(policy) as session:
                session.sample(make_request(max_new_tokens=2))
        sample_local(make_peaked_model(0, vocab_size=12), None, make_request(gamma=INF))
    (line,) = (record.getMessage() for record in caplog.records if "lockstep" in record.getMessage())
    assert "policy (Lfm2ForCausalLM) cannot be rolled back" in line and "expert (BloomForCausalLM)" in line


# The law


ROLES = ["both", "policy", "expert"]


def make_pair(name, role, vocab_size=4):
    policy = make_peaked_model(0, vocab_size) if role == "expert" else make_recurrent(name, 0, vocab_size)
    expert = make_peaked_model(1, vocab_size) if role == "policy" else make_recurrent(name, 1, vocab_size)
    return policy, expert


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", JUDGED)
def test_joint_distribution_of_rows(name, role):
    policy, expert = make_pair(name, role)
    prompts = [[2], [1, 3, 3, 1, 2, 1], [3, 1]]
    request = MixedRequest(prompts * 700, [2.0] * 2100, 3, (0,), seed=1)
    rollout = sample_local(policy, expert, request, rollout_batch_size=1050)
    trees = [Tree(policy, expert, request, row) for row in range(3)]
    rows, marked = sequences(rollout), labelled(rollout)
    assert misfit((rows[i::3], tree.mixed()) for i, tree in enumerate(trees)) <= 1.0
    assert misfit((marked[i::3], tree.joint(tree.outcomes)) for i, tree in enumerate(trees)) <= 1.0
    assert misfit((rows[i::3], tree.policy()) for i, tree in enumerate(trees)) > 3.0
    assert misfit((rows[i::3], tree.expert()) for i, tree in enumerate(trees)) > 3.0


# Records


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", [*JUDGED, "mamba", "jamba", "gpt-neo-local"])
def test_records_equal_plain_forward_passes(name, role):
    """Ragged prompts, rows that end early, plain rows in between, several chunks."""
    policy, expert = make_pair(name, role, 12)
    for score_all in (False, True):
        gamma = [1.5, 3.0, INF, 1.0, 2.0] * 2
        request = make_request(RAGGED + RAGGED[::-1], gamma, 9, score_all=score_all, stop_token_ids=(3, 8))
        rollout = sample_local(policy, expert, request, rollout_batch_size=6)
        check_records(policy, expert, request, rollout)
        assert rollout.branch.any() and rollout.replaced.any() and len({*map(len, rollout.completion_ids)}) > 1


@pytest.mark.parametrize("name", ["qwen3.5", "jamba"])
def test_rarely_asked_expert_catches_up(monkeypatch, name):
    monkeypatch.setattr(in_process, "MAX_CATCH_UP", 8)
    policy, expert = make_pair(name, "both", 12)
    shapes = watch(expert)
    request = make_request(gamma=[60.0, 40.0, INF, 90.0, 60.0], max_new_tokens=40, seed=2)
    rollout = sample_local(policy, expert, request)
    assert 1 <= rollout.branch.sum() <= 20
    steps = [tokens for _, tokens in shapes[1:]]
    assert max(steps) == (8 if name == "qwen3.5" else 1) and sum(steps) <= 40
    check_records(policy, expert, request, rollout)


def test_plain_rows_never_run_the_expert():
    policy, expert = make_pair("lfm2", "both", 12)
    shapes = watch(expert)
    request = make_request(gamma=INF)
    sample_local(policy, expert, request)
    # and a policy that can draft does, whatever the expert is
    assert sample_local(make_peaked_model(0, vocab_size=12), expert, request).stats["batch_rounds"] == 1
    assert shapes == []


def test_finished_rows_leave_the_batch_and_equal_prompts_are_read_once():
    policy, expert = make_pair("qwen3-next", "both", 12)
    read = watch(policy)
    request = make_request([[1, 2, 3]] * 32, 1.0, 30, stop_token_ids=(3, 5, 7, 9))
    rollout = sample_local(policy, expert, request)
    assert read[0] == (1, 3) and read[1][1] == 1
    assert 1.0 <= positions_of(read[1:]) / (rollout.stats["tokens"] - 32) < 1.6
    check_records(policy, expert, request, rollout)


def test_seeds():
    policy, expert = make_pair("falcon-h1", "both", 12)
    first, again, other = (sample_local(policy, expert, make_request(seed=seed)) for seed in (4, 4, 5))
    assert first.completion_ids == again.completion_ids != other.completion_ids
    torch.testing.assert_close(first.logps, again.logps, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["qwen3-next", "mamba2"])
def test_given_rows_are_scored(name):
    model = make_recurrent(name, vocab_size=12)
    expert = InProcessExpert(model, ability=check_decoding(model, "expert"))
    completions = [[1, 2, 3, 4], [5], [6, 7], [8] * 4, [9, 9, 1]]
    scores = expert.score(RAGGED, completions)
    for row, (prompt, ids) in enumerate(zip(RAGGED, completions)):
        logps = forward_logps(model, torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
        expected = logps.gather(1, torch.tensor(ids).unsqueeze(1))[:, 0].float()
        torch.testing.assert_close(scores[row, : len(ids)], expected, rtol=0, atol=1e-4)
        assert scores[row, len(ids) :].isnan().all()
