"""
From the rows of an evaluation set (on the Hub or in a local file) to a question and its answer.

The task files in `tasks/` name [`load_problems`] as their `custom_dataset`, so that lm-eval's own command line loads
the sets in the same way.
"""

import random
import re
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from mentor_trl.data.cells import answer_text, extract_solution
from mentor_trl.data.loading import COMPRESSIONS, FILE_FORMATS, DataError, load_dataset_dict
from mentor_trl.data.rows import prompt_text
from mentor_trl.rewards import extract_boxed


if TYPE_CHECKING:
    from datasets import Dataset


Row = dict[str, Any]

CHOICE_INSTRUCTION = "Answer with the letter of the correct choice."
QUESTION_COLUMNS = ("prompt", "problem", "question", "Problem", "Question", "instruction")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "ground_truth", "solution", "Answer", "Solution")
TASK_FOLDER = Path(__file__).with_name("tasks")
_DOLLAR = re.compile(r"(?<!\\)\$")


def test_sets() -> dict[str, dict[str, Any]]:
    """Where each evaluation set is, as its task file says: the arguments of [`load_problems`], by its name."""
    import yaml

    files = sorted(TASK_FOLDER.glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))["dataset_kwargs"] for file in files}


def load_problems(
    path: str,
    split: str,
    config: str | None = None,
    form: str = "short_answer",
    files: list[str] | None = None,
    data_dir: str | None = None,
    **_: Any,
) -> "dict[str, Dataset]":
    """
    Load an evaluation set.

    Args:
        path (`str`):
            Hub id of the set.
        split (`str`):
            Split to evaluate on. A local file that holds a single split is taken as it is.
        config (`str`, *optional*):
            Configuration name on the Hub.
        form (`str`, *optional*, defaults to `"short_answer"`):
            What the rows look like: `short_answer`, `gpqa`, `arc` or `mmlu_pro`.
        files (`list[str]`, *optional*):
            Names, without ending, that the set may have in `data_dir`.
        data_dir (`str`, *optional*):
            Folder of local files. If set, nothing is asked of the Hub.
        **_:
            What else lm-eval passes on (the metadata of the task).

    Returns:
        `dict[str, Dataset]`: one split, `test`, with the columns `question`, `answer` and `choices`; the last is the
        number of choices of a multiple-choice question and 0 elsewhere.

    Raises:
        [`~mentor_trl.data.DataError`]: if there is no such set, or if a row lacks its question or answer.
    """
    from datasets import Dataset

    if data_dir is None:
        where = f"{path} (split '{split}')"
        rows = _load_from_hub(path, config, split)
    else:
        file = _find_file(Path(data_dir).expanduser(), files or [path.rpartition("/")[2]])
        where = str(file)
        splits = load_dataset_dict(where, config)
        if split not in splits and len(splits) > 1:
            raise DataError(f"{where} has the splits {sorted(splits)}, but not '{split}'; name one of them so")
        rows = splits[split] if split in splits else next(iter(splits.values()))
    problems = [build_problem(form, row, index, where) for index, row in enumerate(rows)]
    if not problems:
        raise DataError(f"There are no rows in {where}")
    return {"test": Dataset.from_list(problems)}


def _load_from_hub(path: str, config: str | None, split: str) -> "Dataset":
    try:
        splits = load_dataset_dict(path, config)
    except DataError as error:
        raise DataError(
            f"{error}. Without a connection, put the set as a file into a folder and pass it as --data_dir. Gated "
            "sets (GPQA) need `hf auth login` and the consent of their authors"
        ) from error
    if split not in splits:
        raise DataError(f"{path} has no split '{split}', only {sorted(splits)}")
    return splits[split]


def _find_file(folder: Path, names: list[str]) -> Path:
    if not folder.is_dir():
        raise DataError(f"The folder {folder} (`data_dir`) does not exist")
    endings = ["", *(ending + packed for ending in FILE_FORMATS for packed in ("", *COMPRESSIONS))]
    for name in names:
        for path in (folder / f"{name}{ending}" for ending in endings):
            if path.exists():
                return path
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
    raise DataError(
        f"The folder {folder} (`data_dir`) holds no {names[0]} (a data file, as {names[0]}.jsonl, or a folder; also "
        f"taken: {', '.join(names[1:]) or 'no other name'}), only: {there}. Rename the file, or leave `data_dir` out "
        "to load the set from the Hub"
    )


def build_problem(form: str, row: Row, index: int, where: str) -> Row:
    """Return `question`, `answer` and `choices` of a row of a set whose rows have this form."""
    try:
        question, answer, choices = FORMS[form](row, index)
    except DataError as error:
        raise DataError(f"Row {index} of {where} cannot be used: {error}") from error
    except KeyError as error:
        raise DataError(
            f"Row {index} of {where} has no {error}, only the columns {sorted(row)}; the form '{form}' needs it"
        ) from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"Row {index} of {where} is not as the form '{form}' needs it ({error}); fix the row"
        ) from error
    if not question.strip() or not answer.strip():
        raise DataError(f"Row {index} of {where} has an empty question or answer; fill it in or remove the row")
    if not choices:
        return {"question": question, "answer": answer, "choices": 0}
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices))
    return {
        "question": f"{question}\n\n{lines}\n\n{CHOICE_INSTRUCTION}",
        "answer": answer,
        "choices": len(choices),
    }


def answer_of(value: Any, delimiter: str | None = None, where: str = "The answer") -> str | None:
    r"""
    Return the bare answer that a cell holds, or `None` where it holds none.

    Args:
        value (`Any`):
            An answer as text or number, a list of answers, a worked solution that ends in `\boxed{}`, or GSM8K's.
        delimiter (`str`, *optional*):
            The answer is what follows the last occurrence of this text.
        where (`str`, *optional*, defaults to `"The answer"`):
            What the error message calls the cell.

    Raises:
        [`~mentor_trl.data.DataError`]: if the cell is no text, number or list of these.

    Example:
    ```python
    >>> from mentor_trl.evaluation.problems import answer_of

    >>> answer_of(27.0), answer_of(r"So it is $\boxed{\frac{1}{2}}$."), answer_of(["$3$", "5"]), answer_of("2 #### 2")
    ('27', '\\frac{1}{2}', '3, 5', '2')
    ```
    """
    if isinstance(value, (list, tuple)):
        value = [_DOLLAR.sub("", part) if isinstance(part, str) else part for part in value]
    text = answer_text(value, where) or ""
    if delimiter:
        return extract_solution(text, delimiter) or None
    if "\\boxed" in text or "\\fbox" in text:
        return extract_boxed(text)
    return extract_solution(text, "####") or text or None


def _short_answer(row: Row, index: int) -> tuple[str, str, list[str]]:
    question = next((row[name] for name in QUESTION_COLUMNS if row.get(name)), None)
    if question is None:
        raise KeyError("problem")
    answers = (answer_of(row[name]) for name in ANSWER_COLUMNS if name in row and name != "solution")
    answer = next(filter(None, answers), None)
    if answer is None:
        # Minerva, and AIME24 in one of its forms, keep the answer inside the solution.
        answer = extract_boxed(row["solution"] or "")
    return prompt_text(question), answer or "", []


def _gpqa(row: Row, index: int) -> tuple[str, str, list[str]]:
    choices = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    order = list(range(len(choices)))
    # The same order in every evaluation, whatever its seed: models are compared on the same prompts.
    random.Random(f"gpqa {index}").shuffle(order)
    return row["Question"].strip(), ascii_uppercase[order.index(0)], [choices[i].strip() for i in order]


def _arc(row: Row, index: int) -> tuple[str, str, list[str]]:
    choices = row["choices"]
    # A few questions number their choices 1 to 4.
    return row["question"], ascii_uppercase[choices["label"].index(row["answerKey"])], choices["text"]


def _mmlu_pro(row: Row, index: int) -> tuple[str, str, list[str]]:
    return row["question"], row["answer"], row["options"]


FORMS: dict[str, Callable[[Row, int], tuple[str, str, list[str]]]] = {
    "short_answer": _short_answer,
    "gpqa": _gpqa,
    "arc": _arc,
    "mmlu_pro": _mmlu_pro,
}
