"""Training data: prompts, answers, expert trajectories and hints."""

from .loading import (
    MENTOR_SYSTEM_PROMPT,
    DataError,
    MentorScriptArguments,
    add_hints,
    build_prompt_dataset,
    extract_solution,
    load_dataset_dict,
    load_prompt_datasets,
    select_split,
)


__all__ = [
    "DataError",
    "MENTOR_SYSTEM_PROMPT",
    "MentorScriptArguments",
    "add_hints",
    "build_prompt_dataset",
    "extract_solution",
    "load_dataset_dict",
    "load_prompt_datasets",
    "select_split",
]
