"""Engines that sample on-policy and mixed rollouts."""

from .colocate import ColocateSampler
from .local import LocalSampler
from .server import ServerSampler
from .types import MixedRequest, MixedRollout, MixedSampler, mixed_rows


__all__ = [
    "ColocateSampler",
    "LocalSampler",
    "MixedRequest",
    "MixedRollout",
    "MixedSampler",
    "ServerSampler",
    "mixed_rows",
]
