"""MENTOR (https://huggingface.co/papers/2510.04140) on TRL: reinforcement learning in which an expert model takes
over single tokens of a rollout, the likelier the less certain the policy is."""

import importlib
from typing import TYPE_CHECKING

from .version import __version__


_EXPORTS = {
    "MentorGRPOConfig": "config",
    "MentorGRPOTrainer": "trainer",
    "accuracy_reward": "rewards",
    "format_reward": "rewards",
    "load_expert": "experts.load",
    "RemoteExpert": "experts.remote",
    "LocalSampler": "rollout",
    "MixedRequest": "rollout",
    "MixedRollout": "rollout",
    "MixedSampler": "rollout",
    "PolicyLLM": "rollout.stock.policy_llm",
    "PolicyReplicas": "rollout.stock.replicas",
    "StockSampler": "rollout.stock.stock_sampler",
    "ColocateSampler": "rollout.vllm.colocate",
    "ServerSampler": "rollout.vllm.server",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from .config import MentorGRPOConfig
    from .experts.load import load_expert
    from .experts.remote import RemoteExpert
    from .rewards.accuracy import accuracy_reward, format_reward
    from .rollout import LocalSampler, MixedRequest, MixedRollout, MixedSampler
    from .rollout.stock.policy_llm import PolicyLLM
    from .rollout.stock.replicas import PolicyReplicas
    from .rollout.stock.stock_sampler import StockSampler
    from .rollout.vllm.colocate import ColocateSampler
    from .rollout.vllm.server import ServerSampler
    from .trainer import MentorGRPOTrainer


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
