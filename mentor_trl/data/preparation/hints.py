"""
QuestA (https://huggingface.co/papers/2507.13266): the beginning of a solution goes into the question as a hint.

Hints belong to training alone. The model is evaluated on the plain question.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mentor_trl.data.loading import DataError, load_dataset_dict, select_split
from mentor_trl.errors import SetupError
from mentor_trl.rewards.answers import THINK_END, THINK_START, extract_boxed

from .report import Report
from .sources import load_tokenizer


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
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
    Return the first part of an expert's solution.

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

    Returns:
        `str`: the beginning, stripped; empty where nothing is left.

    Example:
    ```python
    >>> from mentor_trl.data.preparation import cut_hint

    >>> cut_hint("<think>2 + 3 is 5.</think> It is 5.", fraction=0.5)
    '2 + 3 is 5'
    >>> cut_hint("<think>2 + 3 is 5.</think> It is 5.", fraction=0.5, part="solution")
    'It i'
    ```
    """
    if not 0 <= fraction <= 1:
        raise SetupError(f"The fraction of a hint is {fraction}; it must lie between 0 and 1")
    if part == "solution":
        text = trajectory.rpartition(THINK_END)[2]
    elif part == "trajectory":
        text = trajectory.replace(THINK_START, "").replace(THINK_END, "")
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
        fraction (`float`, *optional*, defaults to `0.5`):
            Share of the solution to show.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer that counts the share, otherwise characters are counted.
        part (`str`, *optional*, defaults to `"trajectory"`):
            What the share is of; see [`cut_hint`].

    Returns:
        `str` or `list[dict]`: a new prompt of the same kind.

    Example:
    ```python
    >>> from mentor_trl.data.preparation import add_hint

    >>> add_hint("What is 2 + 3?", "<think>2 + 3 is 5.</think> It is 5.")
    'What is 2 + 3?\n\n## Hint: Partial Solution\n\n2 + 3 is 5'
    ```
    """
    hint = cut_hint(trajectory or "", fraction, tokenizer, part)
    return append_hint(prompt, hint)


def append_hint(prompt: str | list[dict], hint: str) -> str | list[dict]:
    """Append a hint that is already cut; an empty one leaves the prompt as it is."""
    if isinstance(prompt, str):
        return f"{prompt}{_section(hint)}"
    messages = [dict(message) for message in prompt]
    users = [message for message in messages if message.get("role") == "user"]
    if not users:
        raise SetupError(f"A hint needs a user message to stand in, and the prompt has none: {prompt!r:.200}")
    content = users[-1]["content"]
    if isinstance(content, str):
        users[-1]["content"] = f"{content}{_section(hint)}"
    elif hint:
        users[-1]["content"] = [*content, {"type": "text", "text": _section(hint)}]
    return messages


def _section(hint: str) -> str:
    return f"\n\n{HINT_HEADER}\n\n{hint}" if hint else ""


@dataclass
class HintArguments:
    """
    Arguments of `mentor-trl data hints`.

    Args:
        dataset_name (`str`, *optional*):
            Dataset with the columns `prompt` and `trajectory`: Hub id, file, or folder that `mentor-trl data` made.
        dataset_config (`str`, *optional*):
            Configuration of a Hub dataset.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split whose prompts get hints. The other splits stay as they are.
        fraction (`float`, *optional*, defaults to `0.5`):
            Share of the trajectory to show.
        part (`str`, *optional*, defaults to `"trajectory"`):
            What the share is of: the whole response (`trajectory`), or what follows `</think>` (`solution`).
        tokenizer (`str`, *optional*):
            Hub id or folder of the tokenizer that counts the share. If not set, characters are counted.
        drop_without_trajectory (`bool`, *optional*, defaults to `False`):
            Whether to drop rows that get no hint, instead of keeping the plain question.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset with the columns `prompt` and `trajectory`: Hub id, file, or folder that `mentor-trl "
            "data` made."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split whose prompts get hints. The other splits stay as they are."}
    )
    fraction: float = field(default=0.5, metadata={"help": "Share of the trajectory to show."})
    part: HintPart = field(
        default="trajectory",
        metadata={
            "help": "What the share is of: the whole response (trajectory), or what follows </think> (solution)."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of the tokenizer that counts the share. If not set, characters are counted."
        },
    )
    drop_without_trajectory: bool = field(
        default=False,
        metadata={"help": "Whether to drop rows that get no hint, instead of keeping the plain question."},
    )


def prepare_hints(args: HintArguments) -> "tuple[DatasetDict, Report]":
    """
    Put hints into the prompts of one split.

    Args:
        args ([`HintArguments`]):
            The data set and the hints.

    Returns:
        `tuple[DatasetDict, Report]`: all splits, the one of `args.dataset_split` with hints in `prompt` and the column
        `hint` (`str` or `None`); and the counts.

    Raises:
        [`~mentor_trl.data.DataError`]: naming the option or column that is wrong.
    """
    if not args.dataset_name:
        raise DataError("No dataset is given; set `dataset_name` to one with the columns `prompt` and `trajectory`")
    if not 0 < args.fraction <= 1:
        raise DataError(f"`fraction` is {args.fraction}; it must be above 0 and up to 1")
    splits = load_dataset_dict(args.dataset_name, args.dataset_config)
    rows = select_split(splits, args.dataset_split, "dataset_split")
    for column in ("prompt", "trajectory"):
        if column not in rows.column_names:
            raise DataError(
                f"{args.dataset_name} has no column '{column}', only {rows.column_names}; `mentor-trl data "
                "trajectories` makes trajectories for a prompt dataset"
            )
    if "hint" in rows.column_names:
        raise DataError(f"{args.dataset_name} has a column `hint`: its prompts hold hints already; begin without them")
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    report = Report(loaded=len(rows))
    hinted = _hint_rows(rows, args, tokenizer)
    hints = list(hinted["hint"])
    if args.drop_without_trajectory:
        report.steps.append(("no trajectory to take a hint from", sum(hint is None for hint in hints)))
        hinted = hinted.select([index for index, hint in enumerate(hints) if hint is not None])
    if not any(hints):
        raise DataError(f"No row of {args.dataset_name} has a trajectory, so there is nothing to take hints from")
    report.facts += _facts(hints)
    splits[args.dataset_split] = hinted
    return splits, report


def _hint_rows(rows: "Dataset", args: HintArguments, tokenizer: "PreTrainedTokenizerBase | None") -> "Dataset":
    from datasets import Features, Value

    def row_of(row: dict) -> dict:
        hint = cut_hint(row["trajectory"] or "", args.fraction, tokenizer, args.part)
        return {"prompt": append_hint(row["prompt"], hint), "hint": hint or None}

    features = Features({**rows.features, "hint": Value("string")})
    return rows.map(row_of, features=features, load_from_cache_file=False, desc="Adding hints")


def _facts(hints: list[str | None]) -> list[tuple[str, str]]:
    given = [hint for hint in hints if hint is not None]
    return [
        ("prompts with a hint", f"{len(given):,} of {len(hints):,}"),
        ("hints that hold a complete `\\boxed{}`", f"{sum(extract_boxed(hint) is not None for hint in given):,}"),
        ("longest hint", f"{max(map(len, given)):,} characters"),
    ]
