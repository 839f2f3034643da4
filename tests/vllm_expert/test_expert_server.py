"""The expert on a real stock vLLM server."""

import asyncio
import math
import sys
from contextlib import contextmanager

import pytest
import torch

from helpers import make_letter_tokenizer
from mentor_trl.connection.client import Patience
from mentor_trl.connection.failures import WrongServer
from mentor_trl.experts.remote import RemoteExpert
from mentor_trl.rollout import MixedRequest
from server_process import SERVER_OPTIONS, free_port, serving
from statistics_helpers import Tree, forward_logps, make_peaked_model, misfit


pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PATIENCE = Patience(connect=10.0, read=120.0, attempts=5, back_off=0.5, recovery=240.0)
PROMPT, LETTERS = [3, 1, 2], make_letter_tokenizer("abcd")


@pytest.fixture(scope="module")
def policy():
    return make_peaked_model(seed=12, head_dim=32)


@pytest.fixture(scope="module")
def expert():
    return make_peaked_model(seed=13, head_dim=32)


@pytest.fixture(scope="module")
def folder(expert, tmp_path_factory):
    """The expert with a generation config that would cut its distribution."""
    path = str(tmp_path_factory.mktemp("expert"))
    expert.generation_config.update(do_sample=True, top_k=1, temperature=0.3, eos_token_id=[0, 2])
    expert.save_pretrained(path)
    LETTERS.save_pretrained(path)
    return path


@contextmanager
def stock_server(folder, log, *options):
    port = free_port()
    command = [sys.executable, "-m", "mentor_trl.cli.vllm_command", folder, "--port", str(port), "--enforce-eager"]
    command += ["--host", "127.0.0.1", *(word for pair in SERVER_OPTIONS.items() for word in pair), *options]
    with serving(command, log, port) as started:
        started.wait_until_ready()
        yield started


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with stock_server(folder, log, "--logprobs-mode", "processed_logprobs", "--served-model-name", "e") as started:
        yield started


@pytest.fixture(scope="module")
def remote(server):
    tokenizer = make_letter_tokenizer("abcd")
    tokenizer.add_special_tokens({"additional_special_tokens": ["c", "d"]})
    return RemoteExpert(server.url, tokenizer, patience=PATIENCE)


def speak_all(remote, rows, count, temperature, stops=(0,)):
    async def all_rows():
        return await asyncio.gather(*(remote.speak(PROMPT, count, temperature, stops, row) for row in range(rows)))

    return asyncio.run(all_rows())


def test_what_it_is(remote, folder):
    assert (remote.served_name, remote.name, remote.max_length) == ("e", folder, 64)
    assert remote.stop_token_ids == [0, 2]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_follow_the_expert(temperature, remote, policy, expert):
    """700 rows of up to 3 tokens: the policy in the expert's place is found with near certainty."""
    tree = Tree(policy, expert, MixedRequest([PROMPT], [math.inf], 3, (0,), temperature=temperature))
    rows = speak_all(remote, 700, 3, temperature)
    found = [tuple(ids) for ids, _ in rows]
    assert misfit([(found, tree.expert())]) <= 1.0
    assert misfit([(found, tree.policy())]) > 3.0
    for ids, logps in rows:
        due = [math.log(tree.s[tuple(ids[:at])][index]) for at, index in enumerate(ids)]
        assert logps == pytest.approx(due, abs=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_a_forward_pass(temperature, remote, expert):
    prompts, completions = [[1], PROMPT], [[1, 2, 0], [3, 1] * 30 + [2]]
    scores = remote.score(prompts, completions, temperature)
    for row, (prompt, ids) in enumerate(zip(prompts, completions)):
        due = forward_logps(expert, torch.tensor([prompt + ids]), temperature)[0, len(prompt) - 1 : -1]
        due = due.gather(1, torch.tensor(ids).unsqueeze(1))[:, 0]
        torch.testing.assert_close(scores[row, : len(ids)].double(), due, atol=1e-3, rtol=0)


def test_killed_and_restarted_in_mid_batch(remote, server):
    async def interrupted():
        rows = [asyncio.ensure_future(remote.speak(PROMPT, 40, 1.0, (), row)) for row in range(64)]
        await asyncio.wait(rows, return_when=asyncio.FIRST_COMPLETED)
        server.kill()
        server.start()
        return await asyncio.gather(*rows)

    due = speak_all(remote, 64, 40, 1.0, ())
    rows = asyncio.run(interrupted())
    assert all(len(ids) == 40 for ids, _ in rows)
    assert sum(ids == before for (ids, _), (before, _) in zip(rows, due)) > 48  # the same seeds, up to numerics


def test_raw_log_probabilities_are_refused(folder, tmp_path):
    with stock_server(folder, tmp_path / "log.txt") as started:
        with pytest.raises(WrongServer, match="--logprobs-mode processed_logprobs"):
            RemoteExpert(started.url, LETTERS, patience=PATIENCE)
        assert RemoteExpert(started.url, LETTERS, patience=PATIENCE, needs_tempered=False).max_length == 64
