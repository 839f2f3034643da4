"""Replicas of a policy that are right, wrong, killed and restarted."""

import re
from contextlib import ExitStack

import pytest
import torch

from fake_server import serving
from mentor_trl.connection.client import Patience
from mentor_trl.connection.failures import ServerError, WeightsLost, WrongServer
from mentor_trl.errors import SetupError
from mentor_trl.rollout.stock.replicas import PolicyReplicas
from mentor_trl.rollout.stock.stock_sampler import StockSampler
from policy_server import PolicyStandIn
from statistics_helpers import forward_logps, make_peaked_model
from stock_helpers import EnumeratedExpert
from test_exactness import CASES


PATIENCE = Patience(connect=5.0, read=5.0, attempts=3, back_off=0.01, recovery=2.0)
MODELS = {"initial": make_peaked_model(seed=0), "v1": make_peaked_model(seed=7)}
EXPERT = make_peaked_model(seed=1)
REQUEST = CASES["ragged-prompts"].request(rows=24, max_new_tokens=6)


@pytest.fixture
def fakes():
    return [PolicyStandIn(MODELS) for _ in range(2)]


@pytest.fixture
def urls(fakes):
    with ExitStack() as stack:
        yield [stack.enter_context(serving(fake)) for fake in fakes]


@pytest.fixture
def sampler(urls):
    return StockSampler(PolicyReplicas(urls, patience=PATIENCE), EnumeratedExpert(EXPERT))


def sample(sampler, request=REQUEST):
    with sampler.session() as session:
        return session.sample(request)


def check(rollout, model, request=REQUEST):
    """All tokens of the policy are those of this model."""
    for row, (prompt, ids) in enumerate(zip(request.prompt_ids, rollout.completion_ids)):
        where = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
        due = forward_logps(model, torch.tensor([prompt + ids]))[0, where].gather(1, torch.tensor(ids).unsqueeze(1))
        ours = ~rollout.branch[row, : len(ids)]
        torch.testing.assert_close(rollout.logps[row, : len(ids)][ours], due[:, 0].float()[ours])


def rows_of(fake) -> int:
    return sum(path == "/v1/completions" for path, _ in fake.calls)


def test_rows_of_a_prompt_stay_together_and_servers_get_as_many(fakes, sampler):
    for fake in fakes:
        fake.calls.clear()
    rollout = sample(sampler)
    check(rollout, MODELS["initial"])
    prompts = [{tuple(body["prompt"][:3]) for path, body in fake.calls if path == "/v1/completions"} for fake in fakes]
    assert len(prompts[0] & prompts[1]) <= 4 and all(rows_of(fake) > 12 for fake in fakes)
    assert sample(sampler).completion_ids == rollout.completion_ids


@pytest.mark.parametrize("trouble", [500, "drop", "restart"])
def test_no_token_of_other_weights(trouble, fakes, sampler):
    """A replica fails in the middle of a batch, with its weights or without: rows are those of a quiet run."""
    for server in sampler.policy.servers:
        server.load_policy("folder", "v1")
    quiet = sample(sampler)
    check(quiet, MODELS["v1"])
    fakes[1].script["/v1/completions"] = [200] * 7 + [trouble]
    rollout = sample(sampler)
    check(rollout, MODELS["v1"])
    assert rollout.completion_ids == quiet.completion_ids and not fakes[1].script["/v1/completions"]
    assert fakes[1].version == "v1"


def test_rows_of_a_server_that_was_restarted_between_two_requests(fakes, sampler):
    """Nothing failed, but half of the tokens may be of its first weights."""
    for server in sampler.policy.servers:
        server.load_policy("folder", "v1")
    quiet, segment, asked = sample(sampler), fakes[0].complete, []

    def restarting(body):
        asked.append(body)
        if len(asked) == 9:
            fakes[0].restart()
        return segment(body)

    fakes[0].complete = restarting
    rollout = sample(sampler)
    check(rollout, MODELS["v1"])
    assert rollout.completion_ids == quiet.completion_ids


def test_weights_that_only_the_trainer_can_send(fakes, sampler):
    for server in sampler.policy.servers:
        server.receive_policy(lambda: None, "initial")
        server._pushed = None, "v1"
    with pytest.raises(WeightsLost, match="'v1'"):
        sample(sampler)


def test_a_replica_that_stays_dead(fakes, sampler):
    fakes[1].script["/health"] = [503] * 10**4
    fakes[1].script["/v1/completions"] = ["drop"] * 10**4
    with pytest.raises(ServerError, match="No server answers"):
        sample(sampler)


def test_adapters_are_loaded_again_where_they_are_lost(fakes, sampler):
    for version in ("a1", "a2"):
        for server in sampler.policy.servers:
            server.load_adapter(f"folder/{version}", version)
    assert [fake.adapters for fake in fakes] == [{"a2": "folder/a2"}] * 2
    fakes[0].restart()
    sample(sampler)
    assert fakes[0].adapters == {"a2": "folder/a2"}
    fakes[1].version = "v1"
    sampler.policy.servers[1].recover()
    with pytest.raises(WrongServer, match="'v1'.*Restart it"):
        sampler.policy.servers[1].load_adapter("folder/a3", "a3")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"branches": False}, WrongServer, "no logits processor that ends requests"),
        ({"late": 1}, SetupError, "does not branch where it should"),
        ({"digest": "d1"}, WrongServer, r"no replica of .* first weights \(digest\) is 'd1' and not 'd0'"),
    ],
)
def test_servers_that_are_no_replicas(change, error, message, fakes, urls):
    vars(fakes[1]).update(change)
    with pytest.raises(error, match=message) as raised:
        PolicyReplicas(", ".join(urls), patience=PATIENCE)
    assert re.search(re.escape(urls[1]), str(raised.value))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"branches": False}, WrongServer, "no logits processor"),
        ({"late": 1}, SetupError, "does not branch where it should"),
        ({"digest": "d1"}, WrongServer, "restarted as another server"),
        ({"version": "v1"}, WrongServer, "different weights"),
    ],
)
def test_servers_that_come_back_as_others(change, error, message, fakes, sampler):
    fakes[1].restart()
    vars(fakes[1]).update(change)
    with pytest.raises(error, match=message):
        sample(sampler)


def test_tables_of_sentences_are_compared(fakes, sampler):
    sampler.policy.check_sentences(())
    with pytest.raises(WrongServer, match="another table of sentence ends"):
        sampler.policy.check_sentences((2,))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"token_ids": [9], "logprobs": {"token_logprobs": [-1.0]}}, r"the token ids of row \d+ are \[9\]"),
        ({"token_ids": [0, 1], "logprobs": {"token_logprobs": [-1.0, -1.0]}}, r"row \d+ went on with 2 tokens"),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "went on with 0 tokens"),
        ({"token_ids": [4], "logprobs": {"token_logprobs": []}}, "1 tokens and 0 log-probabilities"),
        ({"token_ids": None}, "cannot be used"),
        ({}, "cannot be used: no 'token_ids'"),
    ],
    ids=str,
)
def test_answers_that_are_no_segments(choice, message, fakes, sampler):
    for fake in fakes:
        fake.complete = lambda body: {"choices": [choice]}
    with pytest.raises(ServerError, match=message):
        sample(sampler)
