"""The order of calls by which weights reach a server over NCCL; the transfer itself needs GPUs."""

import pytest
import torch
from test_server_client import PATIENCE, Fake, serving
from trl.generation import vllm_client

from mentor_trl.connection.failures import ServerError
from mentor_trl.rollout.serving.nccl import DraftWeightClient, PolicyWeightClient, bounded
from mentor_trl.rollout.vllm.server import ServerSampler


pytestmark = pytest.mark.vllm

METADATA = [("a", "float32", [2]), ("b", "float32", [3])]


def weights():
    yield "a", torch.ones(2)
    yield "b", torch.ones(3)


@pytest.fixture
def joined(monkeypatch) -> list:
    """Communicators that were made; what is sent goes nowhere."""
    made = []

    def join(self, device):
        made.append(self)
        self.communicator = object()

    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", join)
    monkeypatch.setattr(vllm_client.VLLMClient, "close_communicator", lambda self: setattr(self, "communicator", None))
    monkeypatch.setattr(
        vllm_client, "packed_nccl_broadcast_producer", lambda iterator, **kwargs: [item for item in iterator]
    )
    return made


@pytest.mark.parametrize(
    ("kind", "start"),
    [(DraftWeightClient, "/start_draft_weight_update"), (PolicyWeightClient, "/start_weight_update")],
)
def test_calls_of_a_transfer(kind, start, joined, monkeypatch):
    """All of them bring the key, without which the server would answer 401."""
    monkeypatch.setenv("MENTOR_TRL_API_KEY", "secret")
    fake = Fake()
    fake.key = "secret"
    with serving(fake) as url:
        sampler = ServerSampler(url, patience=PATIENCE)
        client = kind(sampler, 51216, torch.device("cpu"))
        fake.calls.clear()
        client.push(METADATA, weights(), "v1")
        changes = [path if path != "/collective_rpc" else body["args"] for path, body in fake.calls]
        changes = [change for change in changes if change not in ([], "/health", "/is_paused")]
        assert changes == [
            "/pause",
            ["incomplete"],
            start,
            "/update_weights",
            "/finish_weight_update",
            ["v1"],
            "/reset_prefix_cache",
            "/resume",
        ]
        announced = next(body for path, body in fake.calls if path == "/update_weights")["update_info"]
        assert announced["names"] == ["a", "b"] and announced["shapes"] == [[2], [3]]
        client.push(METADATA, weights(), "v2")
        assert len(joined) == 1
        fake.restart()
        client.push(METADATA, weights(), "v3")
        assert len(joined) == 2 and fake.version == "v3"


def test_a_transfer_that_fails_leaves_the_weights_nameless_and_the_server_running(joined, monkeypatch):
    fake = Fake()
    with serving(fake) as url:
        sampler = ServerSampler(url, patience=PATIENCE)
        client = DraftWeightClient(sampler, 51216, torch.device("cpu"))

        def cut_off(**kwargs):
            raise RuntimeError("NCCL is unhappy")

        with monkeypatch.context() as patch:
            patch.setattr(vllm_client, "packed_nccl_broadcast_producer", cut_off)
            with pytest.raises(ServerError, match="could not be transferred: NCCL is unhappy"):
                client.push(METADATA, weights(), "v1")
        assert fake.version == "incomplete" and not fake.paused
        client.push(METADATA, weights(), "v1")
        assert fake.version == "v1" and len(joined) == 2


def test_a_transfer_whose_other_end_is_dead_has_an_end():
    with pytest.raises(ServerError, match="did not get through in 0 s"):
        bounded(lambda: torch.multiprocessing.Event().wait(5.0), 0.1)
