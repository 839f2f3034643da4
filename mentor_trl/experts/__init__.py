"""The expert: where it comes from, whether it fits the policy, and what it is asked."""

from .load import load_expert


__all__ = ["load_expert"]
