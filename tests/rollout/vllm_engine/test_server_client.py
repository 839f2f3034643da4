"""The client of a server against a fake one that fails in every way a server can."""

import base64
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import mentor_trl
from fake_server import FakeServer, serving
from mentor_trl.cli.main import main
from mentor_trl.connection.client import Patience
from mentor_trl.connection.failures import KeyRefused, ServerError, WeightsLost, WrongServer
from mentor_trl.errors import SetupError
from mentor_trl.rollout import MixedRequest
from mentor_trl.rollout.serving.policy_server import PolicyServer
from mentor_trl.rollout.serving.weights import write_weights
from mentor_trl.rollout.vllm.server import PolicyServerSampler, ServerSampler


PATIENCE = Patience(connect=2.0, read=2.0, attempts=4, back_off=0.01, recovery=2.0)


class Fake(FakeServer):
    """A server whose rows are 1, 2, 3, ... of the policy. One that restarts forgets its records and weights."""

    def __init__(self):
        super().__init__()
        self.rows: dict[str, int] = {}
        self.version, self.paused = "initial", False
        self.info = {
            "kind": "mixed",
            "mentor_trl": mentor_trl.__version__,
            "vllm": "0",
            "policy": "p",
            "expert": "e",
            "num_tokens": 9,
        }

    def answer(self, path: str, body: dict):
        if path == "/v1/models":
            return {"data": [{"id": "p"}]}
        if path == "/is_paused":
            return {"is_paused": self.paused}
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        if path == "/v1/completions":
            assert not self.paused
            if self.info["kind"] == "policy":
                assert body["logprobs"] == 0 and "vllm_xargs" not in body
                ids = list(range(1, body["max_tokens"] + 1))
                return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": [-i / 10 for i in ids]}}]}
            with self.lock:
                self.rows[body["vllm_xargs"]["mentor_record"]] = len(body["prompt"])
            return {"choices": [{"token_ids": list(range(1, body["max_tokens"] + 1))}]}
        if path == "/collective_rpc":
            return {"results": [self.rpc(body["method"], body["args"])]}
        return {}

    def rpc(self, method: str, args: list):
        if method == "mentor_info":
            return {**self.info, "max_model_len": 64, "weights_version": self.version}
        if method in ("mentor_load_policy", "mentor_name_weights"):
            assert self.paused
            self.version = args[-1]
            return {"weights_version": self.version}
        ids, values = np.arange(1, 9, dtype=np.int32), np.zeros((8, 6), dtype=np.float32)
        values[:, 3] = np.nan
        record = {"tokens": base64.b64encode(ids).decode(), "values": base64.b64encode(values).decode()}
        rows = [{"start": self.rows.pop(key), **record} if key in self.rows else None for key in args[0]]
        return {"rows": rows, "weights_version": self.version}

    def restart(self):
        self.rows.clear()
        self.version, self.paused = "initial", False


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def url(fake):
    with serving(fake) as address:
        yield address


REQUEST = MixedRequest([[1, 2], [3], [4, 5, 6]] * 4, [2.0] * 12, 5, (0,))


def assert_whole(rollout):
    assert rollout.completion_ids == [[1, 2, 3, 4, 5]] * 12
    assert rollout.mask.all() and rollout.entropies.shape == (12, 5)


def test_rows_come_back_in_order(fake, url):
    assert_whole(ServerSampler(url, num_tokens=9, patience=PATIENCE).sample(REQUEST))
    bodies = [body for path, body in fake.calls if path == "/v1/completions"]
    assert sorted(map(tuple, (body["prompt"] for body in bodies))) == sorted(map(tuple, REQUEST.prompt_ids))
    assert len({body["vllm_xargs"]["mentor_record"] for body in bodies}) == 12
    assert all(body["ignore_eos"] and body["stop_token_ids"] == [0] and body["model"] == "p" for body in bodies)


@pytest.mark.parametrize("trouble", [500, 503, "drop", "hang", "restart"])
@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc"])
def test_lost_rows_are_sampled_again(trouble, path, fake, url):
    sampler = ServerSampler(url, patience=PATIENCE)
    fake.script[path] = [trouble]
    assert_whole(sampler.sample(REQUEST))
    assert not fake.rows


def test_a_restarted_server_gets_the_weights_again(fake, url):
    """No row of the first weights comes back, though the restarted server would have sampled some."""
    sampler = ServerSampler(url, patience=PATIENCE)
    sampler.load_policy("/shared/v1", "v1")
    fake.script["/v1/completions"] = [200, 200, "restart"]
    assert_whole(sampler.sample(REQUEST))
    assert fake.version == "v1" and not fake.paused
    loads = [body["args"] for path, body in fake.calls if body.get("method") == "mentor_load_policy"]
    assert loads == [["/shared/v1", "v1"]] * 2


@pytest.mark.parametrize("path", ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"])
@pytest.mark.parametrize("trouble", [500, "drop", "restart"])
def test_interrupted_pushes_are_finished(path, trouble, fake, url):
    sampler = ServerSampler(url, patience=PATIENCE)
    fake.script[path] = [trouble]
    sampler.load_policy("/shared/v1", "v1")
    assert_whole(sampler.sample(REQUEST))
    assert fake.version == "v1" and not fake.paused


def test_a_push_that_was_cut_off_does_not_leave_the_server_paused(fake, url):
    fake.paused = True
    with ServerSampler(url, patience=PATIENCE).session() as session:
        assert not fake.paused
        assert_whole(session.sample(REQUEST))


def test_a_session_brings_the_weights_back(fake, url):
    sampler = ServerSampler(url, patience=PATIENCE)
    sampler.load_policy("/shared/v1", "v1")
    fake.restart()
    with sampler.session():
        assert fake.version == "v1"


def test_refused_rows_are_not_repeated(fake, url):
    sampler = ServerSampler(url, patience=PATIENCE)
    fake.script["/v1/completions"] = [400] * 12
    with pytest.raises(ServerError, match="refused with 400: .*scripted 400"):
        sampler.sample(REQUEST)
    assert sum(path == "/v1/completions" for path, _ in fake.calls) <= 12


def test_a_server_that_keeps_failing_is_given_up(fake, url):
    sampler = ServerSampler(url, patience=PATIENCE)
    fake.script["/v1/completions"] = [500] * 1000
    with pytest.raises(ServerError, match="12 of 12 rows could not be sampled in 4 attempts"):
        sampler.sample(REQUEST)


def test_a_dead_server_is_given_up():
    fake = Fake()
    with serving(fake) as url:
        sampler = ServerSampler(url, patience=PATIENCE)
    with pytest.raises(ServerError, match="No server answers.*mentor-trl serve"):
        sampler.sample(REQUEST)


def test_no_server_at_start():
    with pytest.raises(ServerError, match="No server answers at http://127.0.0.1:9.*after 0 s"):
        ServerSampler("http://127.0.0.1:9", patience=Patience(recovery=0.0))


def test_a_slow_start_is_waited_for(fake, url):
    fake.script["/health"] = [503, "drop", 503]
    assert ServerSampler(url, patience=PATIENCE).info["policy"] == "p"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mentor_trl": "0.0.1"}, "runs mentor-trl 0.0.1"),
        ({"num_tokens": 8}, "samples 8 token ids, and the policy's tokenizer defines 9"),
    ],
)
def test_wrong_servers_are_named(change, message, fake, url):
    fake.info |= change
    with pytest.raises(WrongServer, match=message):
        ServerSampler(url, num_tokens=9, patience=PATIENCE)


@pytest.mark.parametrize("status", [404, 500])
def test_plain_vllm_is_named(status, fake, url):
    fake.script["/collective_rpc"] = [status]
    with pytest.raises(WrongServer, match="mentor-trl serve"):
        ServerSampler(url, patience=PATIENCE)


def test_a_server_that_is_known_is_asked_again_after_5xx(fake, url):
    sampler = ServerSampler(url, patience=PATIENCE)
    fake.script["/collective_rpc"] = [500, 503]
    with sampler.session() as session:
        assert session.sample(MixedRequest([[1]], [1.0], 3, ())).completion_ids == [[1, 2, 3]]
    fake.script["/collective_rpc"] = [404]
    with pytest.raises(WrongServer, match="mentor-trl serve"), sampler.session():
        pass


def test_context_is_checked_before_anything_is_sent(fake, url):
    sampler = ServerSampler(url, patience=PATIENCE)
    with pytest.raises(ValueError, match="62 tokens"):
        sampler.sample(MixedRequest([[1] * 62], [1.0], 3, ()))


def test_written_weights(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from mentor_trl.rollout.serving import weights

    monkeypatch.setattr(weights, "SHARD_BYTES", 40)
    tensors = {f"layer.{i}": torch.full((4,), float(i)) for i in range(5)}
    tensors["tied"] = tensors["layer.0"]
    write_weights(tensors.items(), tmp_path / "v1")
    write_weights(tensors.items(), tmp_path / "v1")
    files = sorted((tmp_path / "v1").iterdir())
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert len(files) == 3 and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert list(tmp_path.iterdir()) == [tmp_path / "v1"]


def test_a_policy_alone(fake, url):
    fake.info = {**fake.info, "kind": "policy"}
    sampler = PolicyServerSampler(url, patience=PATIENCE)
    request = replace(REQUEST, gamma=[math.inf] * 12)
    rollout = sampler.sample(request)
    assert rollout.completion_ids == [[1, 2, 3, 4, 5]] * 12 and rollout.mask.all()
    assert rollout.entropies is None and rollout.expert_logps.isnan().all()
    torch.testing.assert_close(rollout.logps, torch.tensor([[-0.1, -0.2, -0.3, -0.4, -0.5]] * 12))
    torch.testing.assert_close(rollout.mixed_logps, rollout.logps)
    assert not rollout.branch.any() and not rollout.weights.any()


@pytest.mark.parametrize("trouble", [500, "drop", "hang", "restart"])
def test_rows_of_a_policy_that_was_restarted_are_sampled_again(trouble, fake, url):
    fake.info = {**fake.info, "kind": "policy"}
    sampler = PolicyServerSampler(url, patience=PATIENCE)
    sampler.load_policy("/shared/v1", "v1")
    fake.script["/v1/completions"] = [200, 200, trouble]
    rollout = sampler.sample(replace(REQUEST, gamma=[math.inf] * 12))
    assert rollout.mask.all() and fake.version == "v1"
    sampled = sum(path == "/v1/completions" for path, _ in fake.calls)
    assert sampled == (24 if trouble == "restart" else 13)


def test_servers_of_the_other_kind_are_named(fake, url):
    with pytest.raises(WrongServer, match="serves a policy and its expert.*without --expert"):
        PolicyServerSampler(url, patience=PATIENCE)
    fake.info = {**fake.info, "kind": "policy"}
    with pytest.raises(WrongServer, match="serves a policy alone.*with --expert"):
        ServerSampler(url, patience=PATIENCE)
    assert PolicyServer(url, patience=PATIENCE).info["kind"] == "policy"


def test_weights_that_did_not_go_through_a_folder(fake, url):
    """The server says that they are under way; lost ones are the trainer's business."""
    sampler, seen = ServerSampler(url, patience=PATIENCE), []
    sampler.receive_policy(lambda: seen.append((fake.version, fake.paused)), "v1")
    assert seen == [("incomplete", True)] and fake.version == "v1" and not fake.paused
    assert_whole(sampler.sample(REQUEST))
    fake.restart()
    with pytest.raises(WeightsLost, match="'initial' and not 'v1'"):
        with sampler.session():
            pass

    def broken():
        raise ServerError("cut off")

    with pytest.raises(ServerError, match="cut off"):
        sampler.receive_policy(broken, "v2")
    assert fake.version == "incomplete" and not fake.paused
    with pytest.raises(WeightsLost, match="'incomplete' and not 'v2'"):
        with sampler.session():
            pass


@pytest.mark.parametrize("field", ["expert", "policy", "num_tokens", "policy_shape", "expert_digest", "policy_digest"])
def test_a_server_that_comes_back_as_another_is_refused(field, fake, url):
    fake.info |= {"policy_shape": {"vocab_size": 9}, "expert_digest": "a1", "policy_digest": "b1"}
    sampler = ServerSampler(url, patience=PATIENCE)
    sampler.load_policy("/shared/v1", "v1")
    old = fake.info[field]
    fake.info[field] = new = {"num_tokens": 8, "policy_shape": {"vocab_size": 8}}.get(field, f"{old}2")
    fake.script["/v1/completions"] = [200, 200, "restart"]
    with pytest.raises(WrongServer, match=f"restarted as another.* was {re.escape(repr(old))} and is now") as refused:
        sampler.sample(REQUEST)
    assert repr(new) in str(refused.value) and "the policy 'p' and expert 'e'" in str(refused.value)
    assert fake.version == "initial"
    with pytest.raises(WrongServer, match="restarted as another"), sampler.session():
        pass


def test_a_server_of_another_kind_that_comes_back_is_refused(fake, url):
    sampler = PolicyServer(url, patience=PATIENCE)
    fake.info |= {"kind": "policy"}
    with pytest.raises(WrongServer, match="its kind of server was 'mixed' and is now 'policy'"):
        sampler.check()


def test_rows_that_the_server_gave_up_are_sampled_again(fake, url):
    """As where somebody else pauses it, or it shuts down in good order."""
    whole, given_up = fake.answer, [{"choices": [{"token_ids": [1, 2], "finish_reason": "abort"}]}] * 3
    fake.answer = lambda path, body: given_up.pop() if path == "/v1/completions" and given_up else whole(path, body)
    assert_whole(ServerSampler(url, patience=PATIENCE).sample(REQUEST))
    assert not given_up


def test_the_key_goes_with_every_request_and_is_looked_up_anew(fake, url, tmp_path, monkeypatch):
    for name in ("MENTOR_TRL_API_KEY", "MENTOR_TRL_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "key"
    file.write_text("one")
    fake.key = "one"
    sampler = ServerSampler(url, patience=PATIENCE, api_key_file=str(file))
    fake.key = "two"
    with pytest.raises(KeyRefused, match="vllm_server_api_key_file"):
        sampler.sample(REQUEST)
    file.write_text("two")  # as a server does that starts again
    assert_whole(sampler.sample(REQUEST))
    assert main(["health", url]) == 1
    assert main(["health", url, "--api-key-file", str(file)]) == 0
    monkeypatch.setenv("MENTOR_TRL_API_KEY", "two")
    assert_whole(ServerSampler(url, patience=PATIENCE).sample(REQUEST))
    with pytest.raises(SetupError, match="nowhere"):
        ServerSampler(url, patience=PATIENCE, api_key_file=str(tmp_path / "nowhere"))
