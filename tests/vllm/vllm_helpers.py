"""Samplers of saved tiny models."""

from pathlib import Path
from typing import Any

from mentor_trl.rollout.colocate import ColocateSampler
from statistics_helpers import make_peaked_model


ENGINE_OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 2**24,
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
    """Makes each engine once."""

    def __init__(self, folders: Folders):
        self.folders = folders
        self.made: dict[tuple, ColocateSampler] = {}

    def __call__(self, policy, expert, **options: Any) -> ColocateSampler:
        paths = self.folders(policy), self.folders(expert)
        key = *paths, *sorted(options.items())
        if key not in self.made:
            self.made[key] = ColocateSampler(*paths, **{**ENGINE_OPTIONS, **options})
        return self.made[key]
