"""Engines that sample on-policy and mixed rollouts."""

from .local.sampler import LocalSampler
from .types import MixedRequest, MixedRollout, MixedSampler, mixed_rows
from .vllm.colocate import ColocateSampler
from .vllm.server import ServerSampler


__all__ = [
    "ColocateSampler",
    "LocalSampler",
    "MixedRequest",
    "MixedRollout",
    "MixedSampler",
    "ServerSampler",
    "mixed_rows",
]
