"""A stand-in for a mixed-policy server: the in-process engine with models of its own, fed through files."""

from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

from helpers import make_tiny_model
from mentor_trl.connection.client import Patience
from mentor_trl.connection.failures import ServerError
from mentor_trl.rollout import LocalSampler
from mentor_trl.rollout.vllm import backend as generation
from mentor_trl.vllm_server.options import model_shape
from trainer_helpers import RecordingTrainer, make_trainer


class StandIn:
    """What [`~mentor_trl.rollout.ServerSampler`] does for the trainer; `fails_at` names requests that fail."""

    fails_at: dict[int, type[ServerError]] = {}
    made: "list[StandIn]" = []
    expert_name = "hub/tiny-expert"

    def __init__(self, url, num_tokens, patience: Patience, api_key_file=None):
        self.url, self.num_tokens, self.patience, self.api_key_file = url, num_tokens, patience, api_key_file
        self.policy, self.expert = make_tiny_model(seed=5), make_tiny_model(seed=1)
        self.local = LocalSampler(self.expert, num_tokens=num_tokens)
        self.info = {
            "policy": "tiny-policy",
            "expert": self.expert_name,
            "policy_shape": model_shape(self.policy.config),
            "dtype": "float32",
            "expert_stop_ids": [2],
            "max_model_len": 2048,
            "weights_version": "initial",
        }
        self.requests, self.versions = [], []
        StandIn.made.append(self)

    @contextmanager
    def session(self):
        with self.local.session(self.policy) as session:
            self.inner = session
            yield self

    def sample(self, request, progress=None):
        self.requests.append(request)
        failure = self.fails_at.pop(len(self.requests), None)
        if failure is not None:
            raise failure("the server is gone")
        return self.inner.sample(request)

    def load_policy(self, folder, version):
        weights = {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}
        missing = self.policy.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys and not missing.missing_keys
        self.versions.append(version)
        self.info = {**self.info, "weights_version": version}


class PolicyStandIn(StandIn):
    """A server of the policy alone, which returns no entropies."""

    def __init__(self, url, patience: Patience, api_key_file=None):
        super().__init__(url, None, patience, api_key_file)
        del self.info["expert"], self.info["expert_stop_ids"]

    def sample(self, request, progress=None):
        rollout = super().sample(request)
        assert set(request.gamma) <= {float("inf")}
        rollout.entropies = None
        return rollout


@contextmanager
def stand_in(fails_at: dict[int, type[ServerError]] | None = None):
    """Inside, the trainer's server is a [`StandIn`]."""
    originals = generation.ServerSampler, generation.PolicyServerSampler
    StandIn.made, StandIn.fails_at = [], dict(fails_at or {})
    generation.ServerSampler, generation.PolicyServerSampler = StandIn, PolicyStandIn
    try:
        yield StandIn.made
    finally:
        generation.ServerSampler, generation.PolicyServerSampler = originals


def make_served_trainer(folder, cls=RecordingTrainer, **settings):
    return make_trainer(
        folder,
        cls=cls,
        **{"use_vllm": True, "vllm_mode": "server", "trainer_kwargs": {"expert": None}, **settings},
    )
