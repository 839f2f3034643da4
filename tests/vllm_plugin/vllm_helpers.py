"""Samplers of saved tiny models."""

from pathlib import Path
from typing import Any

import torch

from mentor_trl.rollout import MixedRequest, MixedRollout
from mentor_trl.rollout.vllm.colocate import ColocateSampler
from statistics_helpers import forward_logps, make_peaked_model


ENGINE_OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 2**26,
    "max_model_len": 64,
    "max_num_seqs": 256,
    "enforce_eager": True,
    "disable_log_stats": True,
}


def make_model(seed: int, **config):
    """A tiny Llama whose attention heads vLLM's CPU kernels know."""
    return make_peaked_model(seed=seed, head_dim=32, **config)


class Folders:
    """Saves each model once."""

    def __init__(self, root: Path):
        self.root = root
        self.saved: dict[int, tuple[Any, str]] = {}

    def __call__(self, model) -> str:
        if id(model) not in self.saved:
            folder = str(self.root / str(len(self.saved)))
            model.save_pretrained(folder)
            self.saved[id(model)] = model, folder
        return self.saved[id(model)][1]


class Engines:
    """Makes each engine once, and keeps all: one that is collected takes down the process groups of the others."""

    def __init__(self, folders: Folders):
        self.folders = folders
        self.made: dict[tuple, ColocateSampler] = {}
        self.keep: list[Any] = []

    def __call__(self, policy, expert, **options: Any) -> ColocateSampler:
        paths = self.folders(policy), self.folders(expert)
        key = *paths, *sorted(options.items())
        if key not in self.made:
            self.made[key] = ColocateSampler(*paths, **{**ENGINE_OPTIONS, **options})
        return self.made[key]


@torch.no_grad()
def check_records(policy, expert, request: MixedRequest, rollout: MixedRollout, tolerance: float = 2e-4) -> None:
    """
    Entropies and log-probabilities of every token against plain forward passes over the finished rows: what is stale
    or missing in a key-value cache shows here.
    """
    assert request.score_all
    for row, (prompt, ids) in enumerate(zip(request.prompt_ids, rollout.completion_ids)):
        tokens = torch.tensor([[*prompt, *ids]])
        where = slice(len(prompt) - 1, tokens.size(1) - 1)
        p = forward_logps(policy, tokens, request.temperature)[0, where]
        s = forward_logps(expert, tokens, request.temperature)[0, where]
        index, count = torch.tensor(ids).unsqueeze(1), len(ids)
        expected = {
            "entropies": torch.special.entr(p.exp()).sum(-1),
            "logps": p.gather(1, index)[:, 0],
            "expert_logps": s.gather(1, index)[:, 0],
        }
        for name, values in expected.items():
            found = getattr(rollout, name)[row, :count].double()
            asked = ~found.isnan()
            assert asked.all() or name == "expert_logps"
            torch.testing.assert_close(found[asked], values[asked], atol=tolerance, rtol=0, msg=f"{name} of row {row}")
        mixed = rollout.weights[row, :count] > 0.0
        assert torch.equal(mixed, ~rollout.expert_logps[row, :count].isnan())
