"""
The test sets: where each is, and from its rows (on the Hub or in a local file) to a question and its answer.

The task files of `mentor_trl/evaluation/tasks` name [`load_problems`] as their `custom_dataset`, so that lm-eval's own
command line loads the sets in the same way.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from mentor_trl.rewards import extract_boxed

from .cells import answer_of
from .loading import COMPRESSIONS, FILE_FORMATS, DataError, load_dataset_dict
from .rows import prompt_text


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


Row = dict[str, Any]

CHOICE_INSTRUCTION = "Answer with the letter of the correct choice."
QUESTION_COLUMNS = ("prompt", "problem", "question", "Problem", "Question", "instruction")
ANSWER_COLUMNS = ("answer", "final_answer", "expected_answer", "ground_truth", "solution", "Answer", "Solution")


@dataclass(frozen=True)
class TestSet:
    """A test set; of no `title`, `mentor-trl eval` does not know it."""

    __test__ = False  # not a test case of pytest

    path: str
    split: str | None = None  # that holds the problems; if not set, `test`, or the only one
    title: str | None = None
    files: tuple[str, ...] = ()  # names, without ending, in a folder of local files
    config: str | None = None
    form: str = "short_answer"  # of its rows: one of `FORMS`

    @property
    def on_hub(self) -> dict[str, str]:
        """`path`, `split` and, where there is one, `config`."""
        place = {"path": self.path, "split": self.split, "config": self.config}
        return {key: value for key, value in place.items() if value is not None}


TEST_SETS: dict[str, TestSet] = {
    "math500": TestSet("HuggingFaceH4/MATH-500", "test", "MATH500", ("math500", "math-500", "MATH-500")),
    "aime24": TestSet("HuggingFaceH4/aime_2024", "train", "AIME24", ("aime24", "aime_2024")),
    "aime25": TestSet("math-ai/aime25", "test", "AIME25", ("aime25", "aime_2025")),
    "amc23": TestSet("math-ai/amc23", "test", "AMC23", ("amc23", "amc")),
    "amc": TestSet("AI-MO/aimo-validation-amc", "train"),  # AMC 12 of 2022 and 2023
    "minerva": TestSet("math-ai/minervamath", "test", "Minerva", ("minerva_math", "minervamath", "minerva")),
    "olympiadbench": TestSet(
        "Hothan/OlympiadBench",
        "train",
        "OlympiadBench",
        ("olympiadbench", "OlympiadBench", "OE_TO_maths_en_COMP"),
        config="OE_TO_maths_en_COMP",
    ),
    "gpqa_diamond": TestSet(
        "Idavidrein/gpqa", "train", "GPQA-diamond", ("gpqa_diamond", "gpqa"), config="gpqa_diamond", form="gpqa"
    ),
    "arc_challenge": TestSet(
        "allenai/ai2_arc", "test", "ARC-challenge", ("arc_challenge", "ARC-Challenge"), "ARC-Challenge", form="arc"
    ),
    "mmlu_pro": TestSet("TIGER-Lab/MMLU-Pro", "test", "MMLU-Pro", ("mmlu_pro", "MMLU-Pro"), form="mmlu_pro"),
    "gsm8k": TestSet("openai/gsm8k", "test", "GSM8K", ("gsm8k_test", "gsm8k"), config="main"),
}


def load_problems(test_set: str, data_dir: str | None = None, **_: Any) -> "dict[str, Dataset]":
    """Load a test set for lm-eval: one split `test`, of columns `question`, `answer` and `choices` (how many)."""
    from datasets import Dataset

    found = TEST_SETS[test_set]
    if data_dir is None:
        where = f"{found.path} (split '{found.split}')"
        try:
            rows = rows_of(found, load_dataset_dict(found.path, found.config))
        except DataError as error:
            raise DataError(
                f"{error}. Without a connection, put the set as a file into a folder and pass it as --data_dir. Gated "
                "sets (GPQA) need `hf auth login` and the consent of their authors"
            ) from error
    else:
        where = str(find_file(Path(data_dir).expanduser(), found.files))
        rows = rows_of(replace(found, path=where), load_dataset_dict(where))
    problems = [build_problem(found.form, row, index, where) for index, row in enumerate(rows)]
    if not problems:
        raise DataError(f"There are no rows in {where}")
    return {"test": Dataset.from_list(problems)}


def rows_of(test_set: TestSet, splits: "DatasetDict") -> "Dataset":
    """Return the split that holds the problems: that of the set's name, or the only one."""
    split = test_set.split or "test"
    if split not in splits and len(splits) > 1:
        raise DataError(
            f"{test_set.path} has the splits {', '.join(splits)}, but not '{split}'; name one of them so, or give the "
            "path of the file that holds the test problems"
        )
    return splits[split] if split in splits else next(iter(splits.values()))


def find_file(folder: Path, names: tuple[str, ...]) -> Path:
    """Return the file or folder that has the first of these names (without ending) for which there is one."""
    if not folder.is_dir():
        raise DataError(f"The folder {folder} (`data_dir`) does not exist")
    endings = ["", *(ending + packed for ending in FILE_FORMATS for packed in ("", *COMPRESSIONS))]
    for path in (folder / f"{name}{ending}" for name in names for ending in endings):
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
    if choices:
        lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices))
        question = f"{question}\n\n{lines}\n\n{CHOICE_INSTRUCTION}"
    return {"question": question, "answer": answer, "choices": len(choices)}


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
