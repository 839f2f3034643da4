"""Where problems come from: the test sets by name, and the columns of a data set by their usual names."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mentor_trl.data.loading import FILE_FORMATS, DataError, extract_solution, load_dataset_dict, select_split
from mentor_trl.rewards.answers import gold_answer


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PROMPT_COLUMNS = ("prompt", "problem", "question", "Problem", "Question", "instruction")
SOLUTION_COLUMNS = ("answer", "final_answer", "expected_answer", "ground_truth", "solution", "Answer", "Solution")


@dataclass(frozen=True)
class TestSet:
    """
    A test set.

    Args:
        path (`str`):
            Hub id, file or folder.
        config (`str`, *optional*):
            Configuration of a Hub data set.
        split (`str`, *optional*):
            Split that holds the problems. If not set, `test`, or the only split.
        prompt_column (`str`, *optional*):
            Column of the problem. If not set, the first of the usual names.
        solution_column (`str`, *optional*):
            Column of the answer. If not set, the first of the usual names.
        solution_delimiter (`str`, *optional*):
            The answer is what follows the last occurrence of this text.
    """

    __test__ = False  # not a test case of pytest

    path: str
    config: str | None = None
    split: str | None = None
    prompt_column: str | None = None
    solution_column: str | None = None
    solution_delimiter: str | None = None


TEST_SETS: dict[str, TestSet] = {
    "math500": TestSet("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime24": TestSet("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": TestSet("math-ai/aime25", None, "test", "problem", "answer"),
    "amc23": TestSet("math-ai/amc23", None, "test", "question", "answer"),
    "amc": TestSet("AI-MO/aimo-validation-amc", None, "train", "problem", "answer"),
    "minerva": TestSet("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiadbench": TestSet("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer"),
    "gsm8k": TestSet("openai/gsm8k", "main", "test", "question", "answer", "####"),
    "gpqa": TestSet("Idavidrein/gpqa", "gpqa_diamond", "train", "Question", "Correct Answer"),
    "arc": TestSet("allenai/ai2_arc", "ARC-Challenge", "test", "question", "answerKey"),
    "mmlu_pro": TestSet("TIGER-Lab/MMLU-Pro", None, "test", "question", "answer"),
}
"""The test sets that can be named. `amc` is AMC 12 of 2022 and 2023, `amc23` that of 2023."""

MATH_TEST_SETS = ["math500", "aime24", "aime25", "amc23", "amc", "minerva", "olympiadbench"]


def parse_test_set(spec: str, option: str) -> tuple[str, TestSet]:
    """
    Return the name of a test set and where it is.

    Args:
        spec (`str`):
            A key of `TEST_SETS`; `NAME=PATH` for a Hub id, file or folder, which takes its columns from the test set
            of that name where there is one; or a Hub id, file or folder alone.
        option (`str`):
            Name of the option that `spec` comes from, for the error message.
    """
    name, has_path, path = spec.partition("=")
    if has_path:
        if not (name and path):
            raise DataError(f"`{option}` holds '{spec}'; write NAME=PATH, for example math500=math500.jsonl")
        known = TEST_SETS.get(name)
        # A copy of a known set keeps its column names; its configuration and split are its own affair.
        known = known and TestSet(path, None, None, known.prompt_column, None, known.solution_delimiter)
        return name, known or TestSet(path)
    if spec in TEST_SETS:
        return spec, TEST_SETS[spec]
    if "/" in spec or Path(spec).suffix.lower() in FILE_FORMATS or Path(spec).exists():
        return Path(spec).stem, TestSet(spec)
    near = difflib.get_close_matches(spec, TEST_SETS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "or give NAME=PATH of a file, a folder or a Hub id"
    raise DataError(f"Unknown test set '{spec}' in `{option}`, known are {', '.join(TEST_SETS)}; {hint}")


def describe(test_set: TestSet) -> str:
    """Return where a test set is, as one reads it."""
    parts = [test_set.config and f"configuration {test_set.config}", test_set.split and f"split {test_set.split}"]
    return ", ".join([test_set.path, *filter(None, parts)])


def load_test_set(name: str, test_set: TestSet, option: str) -> "Dataset":
    """
    Load the rows of a test set.

    Args:
        name (`str`):
            Its name, for error messages.
        test_set ([`TestSet`]):
            Where it is.
        option (`str`):
            Name of the option that asked for it, for the error message.
    """
    try:
        splits = load_dataset_dict(test_set.path, test_set.config)
    except DataError as error:
        raise DataError(f"Test set '{name}' of `{option}`: {error} (or give `{option}` {name}=PATH)") from error
    split = test_set.split or ("test" if "test" in splits else next(iter(splits)))
    if test_set.split is None and split != "test" and len(splits) > 1:
        raise DataError(
            f"Test set '{name}' ({test_set.path}) has the splits {', '.join(splits)} and none of them is 'test'; give "
            "the path of the file that holds the test problems"
        )
    return select_split(splits, split, option)


def find_column(columns: list[str], given: str | None, usual: tuple[str, ...], option: str, name: str) -> str:
    """
    Return the column that holds something: the given one, or the first of the usual names.

    Raises:
        [`~mentor_trl.data.DataError`]: naming the columns that there are and the option to set.
    """
    if given is not None and given in columns:
        return given
    found = [column for column in usual if column in columns]
    if given is None and found:
        return found[0]
    wanted = f"column '{given}'" if given else f"column named {' or '.join(usual)}"
    near = found or difflib.get_close_matches(given or usual[0], columns, n=1)
    mend = f"set `{option}`" + (f", for example --{option} {near[0]}" if near else " to the right one")
    raise DataError(f"There is no {wanted} in {name}, only {columns}; {mend}")


def load_tokenizer(name: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """
    Load the tokenizer that the option `tokenizer` names.

    Args:
        name (`str`):
            Hub id or folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that the repository ships.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"No tokenizer can be loaded from `tokenizer` {name!r}: {error}") from error


def answers_of(values: Iterable[Any], delimiter: str | None = None) -> list[str | None]:
    r"""
    Return the bare answers of a solution column, with `None` where a cell holds none.

    Where most cells have a `\boxed{}`, they are worked solutions, and one without a box has no answer.

    Args:
        values (`Iterable[Any]`):
            The cells; see [`answer_of`].
        delimiter (`str`, *optional*):
            The answer is what follows the last occurrence of this text.
    """
    values = list(values)
    boxed = [isinstance(value, str) and "\\boxed" in value for value in values]
    worked = delimiter is None and 2 * sum(boxed) > len(values)
    return [answer_of(value, delimiter) if box or not worked else None for value, box in zip(values, boxed)]


def answer_of(value: Any, delimiter: str | None = None) -> str | None:
    r"""
    Return the bare answer that a cell of the solution column holds, or `None` where it holds none.

    Args:
        value (`Any`):
            An answer as text or number, a list of answers, or a worked solution that ends in `\boxed{}`.
        delimiter (`str`, *optional*):
            The answer is what follows the last occurrence of this text.

    Example:
    ```python
    >>> from mentor_trl.data.preparation.sources import answer_of

    >>> answer_of(27.0), answer_of(r"So it is $\boxed{\frac{1}{2}}$."), answer_of(["3", "5"]), answer_of(" ")
    ('27', '\\frac{1}{2}', '3, 5', None)
    ```
    """
    if not delimiter:
        return gold_answer(value)
    if isinstance(value, list):
        parts = [answer_of(part, delimiter) for part in value]
        return ", ".join(parts) if parts and all(parts) else None
    return (extract_solution(value.strip(), delimiter) or None) if isinstance(value, str) else None
