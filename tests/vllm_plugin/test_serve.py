"""A real server: started, sampled from, given new weights, killed and restarted."""

import json
import math
import sys
import threading
import time

import httpx
import pytest

from helpers import make_letter_tokenizer
from mentor_trl.connection.client import Patience
from mentor_trl.connection.failures import KeyRefused, ServerError, WrongServer
from mentor_trl.rollout import MixedRequest
from mentor_trl.rollout.serving.weights import write_weights
from mentor_trl.rollout.vllm.server import ServerSampler
from mentor_trl.vllm_server.keys import default_key_file, read_key
from server_process import SERVER_OPTIONS, free_port, serving, serving_models
from statistics_helpers import Tree, labelled, misfit, sequences
from vllm_helpers import check_records, make_model


pytestmark = [pytest.mark.vllm, pytest.mark.shared_engine, pytest.mark.slow]

PATIENCE = Patience(connect=5.0, read=120.0, attempts=5, back_off=0.5, recovery=240.0)
PROMPT = [3, 1, 2]


@pytest.fixture(scope="module")
def policy():
    return make_model(seed=12)


@pytest.fixture(scope="module")
def expert():
    return make_model(seed=13)


@pytest.fixture(scope="module")
def server(policy, expert, folders, tmp_path_factory):
    tokenizer = make_letter_tokenizer("abcd")
    for folder in (folders(policy), folders(expert)):
        tokenizer.save_pretrained(folder)
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving_models(folders(policy), folders(expert), log, "--draft-length", "4") as started:
        yield started


@pytest.fixture(scope="module")
def sampler(server):
    return ServerSampler(server.url, num_tokens=4, patience=PATIENCE)


def test_health(server, sampler, folders, policy, expert, capsys):
    from mentor_trl.cli.main import main

    for command in (["health", server.url], ["serve", "--check", server.url]):
        assert main(command) == 0
        info = json.loads(capsys.readouterr().out)
        assert info["policy"] == folders(policy) and info["expert"] == folders(expert)
        assert info["num_tokens"] == 4 and info["draft_length"] == 4 and info["weights_version"] == "initial"
    assert "vllm serve" in server.log.read_text()


def test_exact_over_http(sampler, policy, expert):
    gammas = [2.0, 1.2, math.inf] * 400
    request = MixedRequest([PROMPT] * 1200, gammas, 4, (0,), score_all=True)
    rollout = sampler.sample(request)
    trees = [Tree(policy, expert, request, row) for row in range(3)]
    rows = labelled(rollout)
    assert misfit((rows[k::3], trees[k].joint(trees[k].outcomes)) for k in range(3)) <= 1.0
    assert misfit((sequences(rollout)[k::3], trees[k].policy()) for k in range(2)) > 3.0
    assert misfit((sequences(rollout)[k::3], trees[k].expert()) for k in range(2)) > 3.0
    check_records(policy, expert, request, rollout)


def test_64_rows_at_once(sampler, policy, expert):
    request = MixedRequest([PROMPT * (1 + row % 5) for row in range(64)], [2.0] * 64, 40, (0,), score_all=True)
    rollout = sampler.sample(request)
    check_records(policy, expert, request, rollout)
    assert all(ids[-1] == 0 or len(ids) == 40 for ids in rollout.completion_ids)


def test_requests_are_refused_with_the_reason(server, sampler):
    body = {"model": sampler.served_name, "prompt": PROMPT, "top_p": 0.9}
    answer = httpx.post(f"{server.url}/v1/completions", headers=server.headers, json=body, timeout=30.0)
    assert answer.status_code == 400 and "cannot honour top_p=0.9" in answer.text


def test_strangers_are_refused(server, sampler, tmp_path):
    """A page of another origin, a caller without the key, and another user, who has no key either."""
    before = sampler.check()
    calls = [
        ("/collective_rpc", {"method": "save_sharded_state", "args": [str(tmp_path / "written")]}),
        ("/collective_rpc", {"method": "mentor_load_policy", "args": [str(tmp_path), "theirs"]}),
        ("/pause", {}),
        ("/v1/completions", {"model": sampler.served_name, "prompt": PROMPT}),
    ]
    for path, body in calls:
        for headers, status in (
            ({}, 401),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "http://evil.example", **server.headers}, 403),
            ({"Host": "evil.example", **server.headers}, 403),
        ):
            headers = {"Content-Type": "text/plain", **headers}
            answer = httpx.post(f"{server.url}{path}", headers=headers, content=json.dumps(body), timeout=30.0)
            assert answer.status_code == status, (path, headers)
            assert "access-control-allow-origin" not in answer.headers
    path, body = calls[0]
    answer = httpx.post(f"{server.url}{path}", headers=server.headers, json=body, timeout=30.0)
    assert answer.status_code == 403 and "save_sharded_state" in answer.text
    assert sampler.check() == before and not list(tmp_path.iterdir())
    key_file = default_key_file(int(server.url.rsplit(":", 1)[1]))
    assert key_file.stat().st_mode & 0o077 == 0 and read_key(key_file) not in server.log.read_text()
    assert str(key_file) in server.log.read_text()
    with pytest.raises(KeyRefused, match="vllm_server_api_key_file"):
        (tmp_path / "wrong").write_text("wrong")
        ServerSampler(server.url, patience=PATIENCE, api_key_file=str(tmp_path / "wrong"))


def test_new_weights(server, sampler, policy, expert, tmp_path):
    body = {"method": "mentor_digest", "args": ["expert"]}
    call = lambda: httpx.post(f"{server.url}/collective_rpc", headers=server.headers, json=body, timeout=30.0)
    digest = lambda: call().json()["results"]
    before, newer = digest(), make_model(seed=14)
    write_weights(newer.state_dict().items(), tmp_path / "v1")
    sampler.load_policy(str(tmp_path / "v1"), "v1")
    request = MixedRequest([PROMPT] * 1000, [2.0] * 1000, 3, (0,), score_all=True)
    rollout = sampler.sample(request)
    assert misfit([(sequences(rollout), Tree(newer, expert, request).mixed())]) <= 1.0
    assert misfit([(sequences(rollout), Tree(policy, expert, request).mixed())]) > 3.0
    check_records(newer, expert, request, rollout)
    assert digest() == before and sampler.check()["weights_version"] == "v1"
    with pytest.raises(ServerError, match="one shared folder"):
        sampler.load_policy(str(tmp_path / "nowhere"), "v2")
    (tmp_path / "v1").chmod(0o777)
    with pytest.raises(ServerError, match="can be written by other users"):
        sampler.load_policy(str(tmp_path / "v1"), "v2")
    (tmp_path / "v1").chmod(0o700)
    sampler.load_policy(str(tmp_path / "v1"), "v3")


def test_killed_and_restarted_in_the_middle(server, sampler, expert, tmp_path):
    """Every row comes back, from the weights that were pushed before the kill."""
    newer = make_model(seed=15)
    write_weights(newer.state_dict().items(), tmp_path / "v4")
    sampler.load_policy(str(tmp_path / "v4"), "v4")
    request = MixedRequest([PROMPT] * 1500, [2.0] * 1500, 3, (0,), score_all=True)

    def strike():
        time.sleep(1.5)
        server.kill()
        server.start()

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        rollout = sampler.sample(request)
    finally:
        striker.join()
    assert len(rollout.completion_ids) == 1500 and rollout.mask.any(1).all()
    assert misfit([(sequences(rollout), Tree(newer, expert, request).mixed())]) <= 1.0
    check_records(newer, expert, request, rollout)
    log = server.log.read_text()
    assert log.count("vllm serve") == 2 and sampler.check()["weights_version"] == "v4"


def test_a_plain_server_is_named(expert, folders, tmp_path):
    port = free_port()
    options = [word for option in SERVER_OPTIONS.items() for word in option]
    command = [sys.executable, "-m", "mentor_trl.cli.vllm_command", folders(expert), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--enforce-eager", *options]
    with serving(command, tmp_path / "log.txt", port) as server:
        server.wait_until_ready()
        with pytest.raises(WrongServer, match="not a MENTOR server"):
            ServerSampler(server.url, patience=PATIENCE)


def test_a_server_that_comes_back_with_another_expert_is_refused(policy, folders, server, sampler):
    """Under the name of the first, as when a folder is overwritten."""
    server.kill()
    other = make_model(seed=16)
    other.save_pretrained(server.command[server.command.index("--expert") + 1])
    server.start()
    with pytest.raises(WrongServer, match=r"restarted as another server: its expert's weights \(digest\) was"):
        with sampler.session():
            pass
