"""Verifiable rewards."""

from .accuracy import THINK_END, THINK_START, accuracy_reward, extract_boxed, format_reward


__all__ = ["THINK_END", "THINK_START", "accuracy_reward", "extract_boxed", "format_reward"]
