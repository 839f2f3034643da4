"""Making training sets: prompts without the problems of the test sets, expert trajectories, and hints."""

from .hints import HINT_HEADER, HintArguments, add_hint, cut_hint, prepare_hints
from .matching import normalize_problem
from .prompts import PRESETS, PromptArguments, prepare_prompts
from .sources import TEST_SETS, TestSet
from .trajectories import TrajectoryArguments, prepare_trajectories


__all__ = [
    "HINT_HEADER",
    "HintArguments",
    "PRESETS",
    "PromptArguments",
    "TEST_SETS",
    "TestSet",
    "TrajectoryArguments",
    "add_hint",
    "cut_hint",
    "normalize_problem",
    "prepare_hints",
    "prepare_prompts",
    "prepare_trajectories",
]
