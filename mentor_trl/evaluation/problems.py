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

from mentor_trl.data.loading import FILE_FORMATS, DataError, extract_solution, load_dataset_dict
from mentor_trl.rewards.answers import extract_boxed, gold_answer


if TYPE_CHECKING:
    from datasets import Dataset


Row = dict[str, Any]

CHOICE_INSTRUCTION = "Answer with the letter of the correct choice."
_QUESTIONS = ("problem", "question")
_DOLLAR = re.compile(r"(?<!\\)\$")


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
    problems = [_build(form, row, index, where) for index, row in enumerate(rows)]
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
    for name in names:
        for path in [folder / name, *(folder / f"{name}{ending}" for ending in FILE_FORMATS)]:
            if path.exists():
                return path
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
    raise DataError(
        f"The folder {folder} (`data_dir`) holds no {names[0]} ({', '.join(FILE_FORMATS)} or a folder; also taken: "
        f"{', '.join(names[1:]) or 'no other name'}), only: {there}. Rename the file, or leave `data_dir` out to load "
        "the set from the Hub"
    )


def _build(form: str, row: Row, index: int, where: str) -> Row:
    try:
        question, answer, choices = FORMS[form](row, index)
    except KeyError as error:
        raise DataError(
            f"Row {index} of {where} has no {error}, only the columns {sorted(row)}; the form '{form}' needs it"
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


def _short_answer(row: Row, index: int) -> tuple[str, str, list[str]]:
    question = next((row[name] for name in _QUESTIONS if row.get(name)), None)
    if question is None:
        raise KeyError("problem")
    return str(question), _answer_of(row), []


def _answer_of(row: Row) -> str:
    answer = row.get("answer", row.get("final_answer"))
    if answer is None or answer == "":
        # Minerva, and AIME24 in one of its forms, keep the answer inside the solution.
        return extract_boxed(row["solution"]) or ""
    if isinstance(answer, (list, tuple)):
        answer = [_DOLLAR.sub("", str(part)) for part in answer]
    return extract_solution(str(answer), "####") or gold_answer(answer) or ""


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
