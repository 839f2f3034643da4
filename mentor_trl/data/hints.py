"""
QuestA (https://huggingface.co/papers/2507.13266): the beginning of a solution goes into the question as a hint.

Hints belong to training alone. The model is evaluated on the plain question.
"""

import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

from ..errors import SetupError
from .cells import cell, column_paths, find_column, text_of
from .loading import DataError


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

HINT_HEADER = "## Hint: Partial Solution"

HintPart = Literal["trajectory", "solution"]


def cut_hint(
    trajectory: str,
    fraction: float = 0.5,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    part: HintPart = "trajectory",
) -> str:
    """
    Return the first part of an expert's solution, stripped; it may be empty.

    Args:
        trajectory (`str`):
            The expert's whole response.
        fraction (`float`, *optional*, defaults to `0.5`):
            Share to return, from 0 to 1.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            If given, the share is of its tokens, otherwise of the characters. The number is rounded down.
        part (`str`, *optional*, defaults to `"trajectory"`):
            What the share is of: the whole response without its think tags (`"trajectory"`), or what follows
            `</think>` (`"solution"`), which QuestA's released data use.

    Raises:
        [`~mentor_trl.errors.SetupError`]: if `fraction`, `part` or the tokenizer cannot be used.

    Example:
    ```python
    >>> from mentor_trl.data import cut_hint

    >>> cut_hint("<think>2 + 3 is 5.</think> It is 5.", fraction=0.5)
    '2 + 3 is 5'
    >>> cut_hint("<think>2 + 3 is 5.</think> It is 5.", fraction=0.5, part="solution")
    'It i'
    ```
    """
    if not 0 <= fraction <= 1:
        raise SetupError(f"The fraction of a hint is {fraction}; it must lie between 0 and 1")
    if part == "solution":
        text = trajectory.rpartition("</think>")[2]
    elif part == "trajectory":
        text = re.sub("</?think>", "", trajectory)
    else:
        raise SetupError(f"The part that a hint is cut from is {part!r}; use 'trajectory' or 'solution'")
    text = text.strip()
    end = int(len(text) * fraction) if tokenizer is None else _end_of_tokens(text, fraction, tokenizer)
    return text[:end].strip()


def _end_of_tokens(text: str, fraction: float, tokenizer: "PreTrainedTokenizerBase") -> int:
    if not tokenizer.is_fast:
        raise SetupError("Only a fast tokenizer can cut hints by tokens; leave the tokenizer out to cut by characters")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    number = int(len(offsets) * fraction)
    return offsets[number - 1][1] if number else 0


def add_hint(
    prompt: str | list[dict],
    trajectory: str | None,
    fraction: float = 0.5,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    part: HintPart = "trajectory",
) -> str | list[dict]:
    r"""
    Append the beginning of an expert's solution to a question, under the heading `## Hint: Partial Solution`.

    Args:
        prompt (`str` or `list[dict]`):
            Prompt, as text or as messages. Of messages, the last one of the user gets the hint.
        trajectory (`str`, *optional*):
            The expert's whole response. Without one the prompt stays as it is.
        fraction, tokenizer, part:
            What is cut; see [`cut_hint`].

    Example:
    ```python
    >>> from mentor_trl.data import add_hint

    >>> add_hint("What is 2 + 3?", "<think>2 + 3 is 5.</think> It is 5.")
    'What is 2 + 3?\n\n## Hint: Partial Solution\n\n2 + 3 is 5'
    ```
    """
    return _append(prompt, cut_hint(trajectory or "", fraction, tokenizer, part))


def _append(prompt: str | list[dict], hint: str) -> str | list[dict]:
    section = f"\n\n{HINT_HEADER}\n\n{hint}" if hint else ""
    if isinstance(prompt, str):
        return prompt + section
    messages = [dict(message) for message in prompt]
    users = [message for message in messages if message.get("role") == "user"]
    if not users:
        raise SetupError(f"A hint needs a user message to stand in, and the prompt has none: {prompt!r:.200}")
    content = users[-1]["content"]
    if isinstance(content, str):
        users[-1]["content"] = content + section
    elif hint:
        users[-1]["content"] = [*content, {"type": "text", "text": section}]
    return messages


def add_hints(
    dataset: "Dataset",
    fraction: float = 0.5,
    trajectory_column: str = "trajectory",
    name: str = "the dataset",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    part: HintPart = "trajectory",
) -> "Dataset":
    """
    Append the first part of each row's expert trajectory to its prompt, as QuestA does. For training rows only. The
    hint stands in the column `hint` too (`None` where there is none).

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with a `prompt`, as [`build_prompt_dataset`] gives them.
        fraction (`float`, *optional*, defaults to `0.5`):
            Share of the trajectory; see [`cut_hint`].
        trajectory_column (`str`, *optional*, defaults to `"trajectory"`):
            Column of the trajectories, which stays. A row without one keeps its prompt; a warning counts them.
        name (`str`, *optional*, defaults to `"the dataset"`):
            What messages call the dataset.
        tokenizer, part:
            What is cut; see [`cut_hint`].

    Raises:
        [`DataError`]: if there is nothing to take hints from, or hints are there already.
    """
    from datasets import Features, Value

    if not 0.0 < fraction <= 1.0:
        raise DataError(f"`hint_fraction` is {fraction}; it must be above 0 and up to 1 (QuestA: 0.5), or unset")
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"Rows of {name} that have no trajectory for a hint cannot be counted in a stream; set "
            "`dataset_streaming` to false, or make the hints with `mentor-trl data hints`"
        )
    if "hint" in dataset.column_names:
        raise DataError(f"{name} has a column `hint`: its prompts hold hints already; unset `hint_fraction`")
    find_column(column_paths(dataset), (trajectory_column,), "dataset_trajectory_column", name)

    def row_of(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"The trajectory (column '{trajectory_column}') of row {index} of {name}"
        hint = cut_hint(text_of(cell(row, trajectory_column), where) or "", fraction, tokenizer, part)
        return {"prompt": _append(row["prompt"], hint), "hint": hint or None}

    features = Features({**dataset.features, "hint": Value("string")})
    hinted = dataset.map(row_of, with_indices=True, features=features, load_from_cache_file=False, desc="Adding hints")
    plain = sum(hint is None for hint in hinted["hint"])
    if plain == len(hinted):
        raise DataError(
            f"No row of {name} has a trajectory in the column '{trajectory_column}'; `mentor-trl data trajectories` "
            "makes them, or unset `hint_fraction`"
        )
    if plain:
        warnings.warn(
            f"{plain:,} of {len(hinted):,} rows of {name} have no trajectory, and keep the plain prompt.", stacklevel=2
        )
    return hinted
