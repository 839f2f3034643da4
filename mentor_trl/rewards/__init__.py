"""Verifiable rewards."""

from .accuracy import accuracy_reward, format_reward, ungradable, ungradable_warning
from .answers import THINK_END, THINK_START, extract_boxed
from .rules import GRADER_VERSION


__all__ = [
    "GRADER_VERSION",
    "THINK_END",
    "THINK_START",
    "accuracy_reward",
    "extract_boxed",
    "format_reward",
    "ungradable",
    "ungradable_warning",
]
