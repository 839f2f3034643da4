"""Verifiable rewards."""

from .accuracy import accuracy_reward, format_reward
from .answers import THINK_END, THINK_START, extract_boxed


__all__ = ["THINK_END", "THINK_START", "accuracy_reward", "extract_boxed", "format_reward"]
