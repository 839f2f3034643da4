"""Training data: prompts, answers, expert trajectories and hints."""

from mentor_trl.rewards.answers import extract_solution

from .hints import add_hint, add_hints, cut_hint
from .loading import DataError, load_dataset_dict, select_split
from .rows import MENTOR_SYSTEM_PROMPT, build_prompt_dataset, load_prompt_datasets


__all__ = [
    "DataError",
    "MENTOR_SYSTEM_PROMPT",
    "add_hint",
    "add_hints",
    "build_prompt_dataset",
    "cut_hint",
    "extract_solution",
    "load_dataset_dict",
    "load_prompt_datasets",
    "select_split",
]
