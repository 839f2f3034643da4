"""A real server: started, sampled from, given new weights, killed and restarted."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from helpers import make_letter_tokenizer
from mentor_trl.rollout import MixedRequest
from mentor_trl.rollout.server import Patience, ServerError, ServerSampler, WrongServer
from mentor_trl.rollout.weights import write_weights
from statistics_helpers import Tree, labelled, misfit, sequences
from vllm_helpers import check_records, make_model


pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS = {
    "--dtype": "float32",
    "--max-model-len": "64",
    "--kv-cache-memory-bytes": str(2**24),
    "--gpu-memory-utilization": "0.05",
}
PATIENCE = Patience(connect=5.0, read=120.0, attempts=5, back_off=0.5, recovery=240.0)
PROMPT = [3, 1, 2]


@pytest.fixture(scope="module")
def policy():
    return make_model(seed=12)


@pytest.fixture(scope="module")
def expert():
    return make_model(seed=13)


class Server:
    """A command that serves on a port of this machine, in a process group of its own."""

    def __init__(self, command: list[str], log):
        self.command, self.log = command, log
        self.start()

    def start(self):
        environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(command: list[str], log):
    server = Server(command, log)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(policy, expert, folders, tmp_path_factory):
    tokenizer = make_letter_tokenizer("abcd")
    for folder in (folders(policy), folders(expert)):
        tokenizer.save_pretrained(folder)
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    options = [word for option in OPTIONS.items() for word in option]
    command = [
        sys.executable,
        "-m",
        "mentor_trl.cli",
        "serve",
        "--policy",
        folders(policy),
        "--expert",
        folders(expert),
    ]
    with serving([*command, "--port", str(port), "--draft-length", "4", "--enforce-eager", *options], log) as started:
        started.url = f"http://127.0.0.1:{port}"
        yield started


@pytest.fixture(scope="module")
def sampler(server):
    try:
        return ServerSampler(server.url, num_tokens=4, patience=PATIENCE)
    except ServerError as error:
        raise AssertionError(server.log.read_text()[-4000:]) from error


def test_health(server, sampler, folders, policy, expert, capsys):
    from mentor_trl.cli import main

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
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30.0)
    assert answer.status_code == 400 and "cannot honour top_p=0.9" in answer.text


def test_new_weights(server, sampler, policy, expert, tmp_path):
    digest = lambda: httpx.post(
        f"{server.url}/collective_rpc", json={"method": "mentor_digest", "args": ["expert"]}, timeout=30.0
    ).json()
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
    rollout = sampler.sample(request)
    striker.join()
    assert len(rollout.completion_ids) == 1500 and rollout.mask.any(1).all()
    assert misfit([(sequences(rollout), Tree(newer, expert, request).mixed())]) <= 1.0
    check_records(newer, expert, request, rollout)
    log = server.log.read_text()
    assert log.count("vllm serve") == 2 and sampler.check()["weights_version"] == "v4"


def test_a_plain_server_is_named(expert, folders, tmp_path):
    port = free_port()
    options = [word for option in OPTIONS.items() for word in option]
    command = [sys.executable, "-m", "mentor_trl.scripts.serve", folders(expert), "--host", "127.0.0.1"]
    with serving([*command, "--port", str(port), "--enforce-eager", *options], tmp_path / "log.txt"):
        with pytest.raises(WrongServer, match="not a MENTOR server"):
            ServerSampler(f"http://127.0.0.1:{port}", patience=PATIENCE)
