"""Making training sets: prompts without the problems of the test sets, expert trajectories, and hints."""

from ..hints import add_hint, cut_hint
from .expert_responses import prepare_trajectories
from .hinted_prompts import prepare_hints
from .matching import normalize_problem
from .prompts import prepare_prompts
from .settings import PRESETS, HintArguments, PromptArguments, TrajectoryArguments


__all__ = [
    "HintArguments",
    "PRESETS",
    "PromptArguments",
    "TrajectoryArguments",
    "add_hint",
    "cut_hint",
    "normalize_problem",
    "prepare_hints",
    "prepare_prompts",
    "prepare_trajectories",
]
