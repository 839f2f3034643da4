r"""
Grading of completions: the last `\boxed{}` after `</think>`, compared by math-verify, or a letter for choices.

The functions have the signatures that lm-eval's task files ask for. All completions of a set are graded in one batch,
so that the worker processes of [`~mentor_trl.rewards.grading.Grader`] share the work.
"""

import re
from collections.abc import Sequence
from statistics import fmean

from mentor_trl.rewards.accuracy import accuracy_reward
from mentor_trl.rewards.answers import final_answer, gold_answer
from mentor_trl.rewards.grading import get_grader


CORRECT, WRONG, NO_ANSWER = "correct", "wrong", "no answer"

_STYLE = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|boldsymbol|mbox)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:,]|$)")


def choice_letter(answer: str) -> str | None:
    r"""
    Return the letter that an answer to a multiple-choice question gives, or `None`.

    >>> [choice_letter(answer) for answer in ("B", r"\text{(b) } 12", "C. a prime", "A prime", "12")]
    ['B', 'B', 'C', None, None]
    """
    match = _LETTER.match(_STYLE.sub(r"\1", answer).replace("$", "").strip())
    return match[1].upper() if match else None


def grade_choice(completion: str, letter: str) -> str:
    r"""
    Grade an answer to a multiple-choice question.

    Args:
        completion (`str`):
            Completion that gives a letter in its last `\boxed{}` after `</think>`.
        letter (`str`):
            Letter of the correct choice.

    Returns:
        `str`: `"correct"`, `"wrong"` or `"no answer"`.
    """
    answer = final_answer(completion)
    if answer is None:
        return NO_ANSWER
    return CORRECT if choice_letter(answer) == letter else WRONG


def grade_math(completions: Sequence[str], answers: Sequence[str]) -> list[str]:
    r"""
    Grade short answers by [`~mentor_trl.rewards.rules.RULES`] and math-verify.

    Args:
        completions (`Sequence[str]`):
            Completions.
        answers (`Sequence[str]`):
            The correct answer of each.

    Returns:
        `list[str]`: for each completion `"correct"`, `"wrong"`, `"no answer"`, `"timeout"`, `"crash"` (of the
        verifier) or `"unparseable solution"` (wrong, and the correct answer cannot be parsed).
    """
    columns: dict[str, list] = {}
    accuracy_reward(list(completions), list(answers), log_extra=columns.__setitem__)
    return columns["accuracy_verdict"]


def grade_by_math_verify(completions: Sequence[str], answers: Sequence[str]) -> list[int]:
    r"""
    Grade short answers with math-verify alone, without our rules: a figure to compare with other harnesses.

    Args:
        completions (`Sequence[str]`):
            Completions.
        answers (`Sequence[str]`):
            The correct answer of each.

    Returns:
        `list[int]`: for each completion 1 where math-verify takes the content of its last `\boxed{}` after `</think>`
        for the answer, else 0.
    """
    given = [final_answer(completion) or "" for completion in completions]
    verdicts = get_grader().grade(zip((gold_answer(answer) or "" for answer in answers), given), rules=False)
    return [int(verdict.correct is True) for verdict in verdicts]


def grade_responses(resps: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    """
    Grade all completions of a set; lm-eval's `filter_fn`.

    Args:
        resps (`Sequence[Sequence[str]]`):
            Completions of each problem.
        docs (`Sequence[dict]`):
            Problems, as [`~mentor_trl.data.problems.load_problems`] returns them.

    Returns:
        `list[list[str]]`: a verdict in place of each completion.
    """
    pairs = [(text, doc) for texts, doc in zip(resps, docs) for text in texts]
    short = [(text, doc["answer"]) for text, doc in pairs if not doc["choices"]]
    graded = iter(grade_math(*zip(*short)) if short else ())
    verdicts = iter([grade_choice(text, doc["answer"]) if doc["choices"] else next(graded) for text, doc in pairs])
    return [[next(verdicts) for _ in texts] for texts in resps]


def process_results(doc: dict, results: list[list[str]]) -> dict[str, float]:
    """
    Average the verdicts of one problem; lm-eval's `process_results`.

    Args:
        doc (`dict`):
            Problem.
        results (`list[list[str]]`):
            The verdicts of its completions, as the only item.

    Returns:
        `dict[str, float]`: `accuracy`, the share of correct completions.
    """
    return {"accuracy": fmean(verdict == CORRECT for verdict in results[0])}
