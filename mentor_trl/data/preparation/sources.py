"""Where problems come from: test sets, by name or path, and the answers and tokens of what they hold."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...rewards import ungradable
from ..cells import answer_of
from ..loading import DataError, file_type, load_dataset_dict, select_split
from ..problems import TEST_SETS, TestSet, rows_of


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

ALIASES = {"gpqa": "gpqa_diamond", "arc": "arc_challenge"}


def parse_test_set(spec: str, option: str) -> tuple[str, TestSet]:
    """
    Return the name of a test set, and where it is.

    `spec` is a name of [`~mentor_trl.data.problems.TEST_SETS`]; `NAME=PATH` for a Hub id, file or folder, whose rows
    have the form of the test set of that name where there is one; or a Hub id, file or folder alone.
    """
    name, has_path, path = spec.partition("=")
    name = ALIASES.get(name, name)
    if has_path:
        if not (name and path):
            raise DataError(f"`{option}` holds '{spec}'; write NAME=PATH, for example math500=math500.jsonl")
        # A copy of a known set keeps the form of its rows; its configuration and split are its own affair.
        return name, TestSet(path, form=TEST_SETS[name].form) if name in TEST_SETS else TestSet(path)
    if name in TEST_SETS:
        return name, TEST_SETS[name]
    if "/" in spec or file_type(Path(spec)) or Path(spec).exists():
        return Path(spec).stem, TestSet(spec)
    near = difflib.get_close_matches(spec, TEST_SETS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "or give NAME=PATH of a file, a folder or a Hub id"
    raise DataError(f"Unknown test set '{spec}' in `{option}`, known are {', '.join(TEST_SETS)}; {hint}")


def load_test_set(name: str, test_set: TestSet, option: str) -> "Dataset":
    """Load the rows of a test set."""
    try:
        return rows_of(test_set, load_dataset_dict(test_set.path, test_set.config))
    except DataError as error:
        raise DataError(f"Test set '{name}' of `{option}`: {error} (or give `{option}` {name}=PATH)") from error


def load_rows(args: Any, columns: Iterable[str] = ()) -> "tuple[DatasetDict, Dataset]":
    """Load the dataset that the options name, and its split `dataset_split`, which must have these columns."""
    if not args.dataset_name:
        raise DataError("No dataset is given; set `dataset_name` to a Hub id, a file or a folder")
    splits = load_dataset_dict(args.dataset_name, args.dataset_config)
    rows, name = select_split(splits, args.dataset_split, "dataset_split"), name_of(args)
    absent = next((column for column in columns if column not in rows.column_names), None)
    if absent:
        raise DataError(
            f"{name} has no column '{absent}', only {rows.column_names}; `mentor-trl data custom` makes a prompt "
            "dataset of it, and `mentor-trl data trajectories` the trajectories"
        )
    if len(rows) == 0:
        raise DataError(f"There are no rows in {name}; check the file, or choose another split")
    return splits, rows


def name_of(args: Any) -> str:
    """What error messages call the rows of [`load_rows`]."""
    return f"{args.dataset_name} (split '{args.dataset_split}')"


def check_counts(args: Any, *options: str) -> None:
    """Refuse what is to be 1 or more, where it is set."""
    for option in options:
        value = getattr(args, option)
        if value is not None and value < 1:
            raise DataError(f"`{option}` is {value}; it must be 1 or more")


def load_tokenizer(name: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that the option `tokenizer` names, a Hub id or a folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        absent = "" if Path(name).is_dir() else f"there is no folder {name}, and as a Hub id: "
        raise DataError(f"No tokenizer can be loaded from `tokenizer` {name!r}: {absent}{reason}") from error


def render_prompts(prompts: list[str | list[dict]], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the token ids of prompts (all text, or all messages) as `GRPOTrainer` makes them."""
    from jinja2 import TemplateError

    prompts = list(prompts)
    if not prompts or isinstance(prompts[0], str):
        return tokenizer(text=prompts)["input_ids"] if prompts else []
    if not tokenizer.chat_template:
        raise DataError(
            f"The prompts are messages, and the tokenizer {tokenizer.name_or_path!r} has no chat template; take "
            "another tokenizer, or make the prompts with `conversational` false"
        )
    # Arrow gives every message the keys of all of them; absent ones come back as None.
    prompts = [[{k: v for k, v in message.items() if v is not None} for message in prompt] for prompt in prompts]
    try:
        return tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    except TemplateError as error:
        raise DataError(
            f"The chat template of {tokenizer.name_or_path!r} refuses a prompt: {error}; change the messages (often "
            "the system prompt or the order of the roles), or take another tokenizer"
        ) from error


def answers_of(values: Iterable[Any], delimiter: str | None, column: str) -> list[str | None]:
    r"""
    Return the bare answers of a solution column, with `None` where a cell holds none.

    Where most cells have a `\boxed{}`, they are worked solutions, and one without a box has no answer. The others are
    read by [`~mentor_trl.data.cells.answer_of`].
    """
    values = list(values)
    boxed = [isinstance(value, str) and "\\boxed" in value for value in values]
    worked = delimiter is None and 2 * sum(boxed) > len(values)
    return [
        answer_of(value, delimiter, f"The answer ({column}) of row {index}") if box or not worked else None
        for index, (value, box) in enumerate(zip(values, boxed))
    ]


def count_unverifiable(dataset: "DatasetDict") -> list[tuple[str, str]]:
    """Count the answers of each split that cannot be graded, as facts of a report."""
    facts = []
    for split, rows in dataset.items():
        if "solution" not in rows.column_names:
            continue
        answers = list(rows["solution"])
        bad = ungradable(answers)
        example = f", as {answers[bad[0]]!r:.80}" if bad else ""
        name = f"answers of `{split}` that cannot be graded, which `accuracy_reward` skips"
        facts.append((name, f"{len(bad):,} of {len(answers):,}{example}"))
    return facts
