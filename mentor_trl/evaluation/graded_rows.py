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
from mentor_trl.rewards.spelling import clean


CORRECT, WRONG, NO_ANSWER = "correct", "wrong", "no answer"

_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:,]|$)")


def choice_letter(answer: str) -> str | None:
    r"""
    Return the letter that an answer to a multiple-choice question gives, or `None`.

    >>> [choice_letter(answer) for answer in ("B", r"\text{(b) } 12", "C. a prime", "A prime", "12")]
    ['B', 'B', 'C', None, None]
    """
    match = _LETTER.match(clean(answer))
    return match[1].upper() if match else None


def grade_choice(completion: str, letter: str) -> str:
    """Grade the answer to a multiple-choice question by the letter of the correct choice."""
    answer = final_answer(completion)
    if answer is None:
        return NO_ANSWER
    return CORRECT if choice_letter(answer) == letter else WRONG


def grade_math(completions: Sequence[str], answers: Sequence[str]) -> list[str]:
    """
    Grade short answers as [`accuracy_reward`] does, whose verdicts these are. An `"unparseable solution"` counts as
    wrong.
    """
    columns: dict[str, list] = {}
    accuracy_reward(list(completions), list(answers), log_extra=columns.__setitem__)
    return columns["accuracy_verdict"]


def grade_by_math_verify(completions: Sequence[str], answers: Sequence[str]) -> list[int]:
    """Grade short answers with math-verify alone: 1 where it takes a completion's answer for the right one, else 0."""
    given = [final_answer(completion) or "" for completion in completions]
    verdicts = get_grader().grade(zip((gold_answer(answer) or "" for answer in answers), given), rules=False)
    return [int(verdict.correct is True) for verdict in verdicts]


def grade_responses(resps: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    """Put a verdict in place of each completion of a set; lm-eval's `filter_fn`."""
    pairs = [(text, doc) for texts, doc in zip(resps, docs) for text in texts]
    short = [(text, doc["answer"]) for text, doc in pairs if not doc["choices"]]
    graded = iter(grade_math(*zip(*short)) if short else ())
    verdicts = iter([grade_choice(text, doc["answer"]) if doc["choices"] else next(graded) for text, doc in pairs])
    return [[next(verdicts) for _ in texts] for texts in resps]


def process_results(doc: dict, results: list[list[str]]) -> dict[str, float]:
    """Average the verdicts of one problem, the only item of `results`; lm-eval's `process_results`."""
    return {"accuracy": fmean(verdict == CORRECT for verdict in results[0])}
