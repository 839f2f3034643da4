"""Engines that sample on-policy and mixed rollouts."""

from .local.sampler import LocalSampler
from .types import MixedRequest, MixedRollout, MixedSampler, mixed_rows


__all__ = ["LocalSampler", "MixedRequest", "MixedRollout", "MixedSampler", "mixed_rows"]
