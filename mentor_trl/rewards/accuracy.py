r"""
Reward functions for mathematical reasoning with verifiable answers: accuracy of the final `\boxed{}` and format.

They have the signature of TRL's reward functions. MENTOR weights them 0.9 and 0.1 (`reward_weights` of the trainer's
configuration).
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from .answers import THINK_END, THINK_START, completion_text, final_answer, gold_answer, is_gradable
from .grading import Verdict, get_grader


_NO_ANSWER = "[no boxed answer]"
# Towers of exponents, factorials, binomials, long numbers and long texts.
_MAY_HANG = re.compile(r"\^[^^]*\^|!|\\d?binom|\^\s*\{?-?\d{4}|\d{9}|(?s:.{400})")


def _describe(answer: str | None, gold: str | None, verdict: Verdict | None) -> str:
    if gold is None or (verdict is not None and verdict.correct is None):
        return "unparseable solution"
    if answer is None:
        return "no answer"
    return verdict.failure or ("correct" if verdict.correct else "wrong")


def accuracy_reward(
    completions: list[str] | list[list[dict]],
    solution: list[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function that checks the final answer of each completion with math-verify.

    The answer is the content of the last `\boxed{}` after the last `</think>`, or of the whole completion when it has
    no `</think>`; without such a box the reward is 0. The verification runs in worker processes ([`~grading.Grader`]),
    so that it works on any thread, and a completion that makes the verifier hang, crash or run out of memory costs
    nothing but its own reward.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, as strings or as lists of messages.
        solution (`list[str]`):
            Gold answers: bare (`72`, `\frac43`, `1,234`), with math delimiters, as a full solution that ends in a
            `\boxed{}`, or in GSM8K's notation (`... #### 72`). It is the dataset column `solution`.
        log_extra (`callable`, *optional*):
            Logs the columns `accuracy_answer`, the extracted answer, and `accuracy_verdict` (`correct`, `wrong`, `no
            answer`, `timeout`, `crash` or `unparseable solution`) to the completions table. Provided by the trainer.
        log_metric (`callable`, *optional*):
            Logs `mentor/verifier_failures`, the number of completions of this call whose verification hung or crashed,
            and `mentor/unparseable_solutions`, the number of those skipped. Provided by the trainer, which averages
            both over processes: they are numbers of completions per process and batch.
        **kwargs:
            Other dataset columns and what else the trainer passes. Not used.

    Returns:
        `list[float | None]`:
            1.0 for a correct answer, 0.0 for any other, and `None`, which makes the trainer skip the reward, when the
            gold answer cannot be parsed.

    Example:
    ```python
    >>> from mentor_trl.rewards import accuracy_reward

    >>> completions = [r"<think>1 + 1</think> It is \boxed{2}.", r"<think>1 + 1</think> It is \boxed{3}."]
    >>> accuracy_reward(completions, solution=["2", "2"])
    [1.0, 0.0]
    ```
    """
    if solution is None:
        raise ValueError(
            "accuracy_reward needs the gold answers in a dataset column named `solution`, and there is none. Rename "
            'the column that holds them, e.g. dataset.rename_column("answer", "solution"). '
            f"It was called with: {', '.join(sorted(kwargs)) or 'no other column'}."
        )
    answers = [final_answer(completion_text(completion)) for completion in completions]
    golds = [gold_answer(gold) for gold in solution]
    # A completion without an answer is graded too, against an empty one: whether its solution can be parsed decides
    # between 0 and None, and the rows of a group must agree on that.
    pairs = [(gold, answer or "") for gold, answer in zip(golds, answers, strict=True)]
    graded = iter(get_grader().grade(pair for pair in pairs if pair[0] is not None))
    verdicts = [next(graded) if gold is not None else None for gold in golds]

    rewards = [None if v is None or v.correct is None else float(v.correct) for v in verdicts]
    if log_extra is not None:
        log_extra("accuracy_answer", [answer or _NO_ANSWER for answer in answers])
        log_extra("accuracy_verdict", [_describe(*row) for row in zip(answers, golds, verdicts, strict=True)])
    if log_metric is not None:
        log_metric("mentor/verifier_failures", float(sum(v is not None and v.failure is not None for v in verdicts)))
        log_metric("mentor/unparseable_solutions", float(sum(reward is None for reward in rewards)))
    return rewards


def ungradable(solutions: Iterable[Any]) -> list[int]:
    r"""
    Finds the solutions that [`accuracy_reward`] skips, because they hold no answer, no readable one, or one that keeps
    the verifier busy for longer than its timeout. Given the cells of a solution column, it returns their indices.

    Example:
    ```python
    >>> from mentor_trl.rewards import ungradable

    >>> ungradable(["72", "", r"\frac{1}{", "No solution", None])
    [1, 2, 4]
    ```
    """
    golds = [gold_answer(solution) for solution in solutions]
    # Everything else that can be graded is parsed in no time.
    slow = [gold for gold in dict.fromkeys(golds) if gold and _MAY_HANG.search(gold)]
    verdicts = get_grader().grade((gold, gold) for gold in slow)
    failed = {gold for gold, verdict in zip(slow, verdicts, strict=True) if verdict.correct is None}
    return [index for index, gold in enumerate(golds) if not gold or gold in failed or not is_gradable(gold)]


def ungradable_warning(solutions: Iterable[Any]) -> str | None:
    """Says which cells of a solution column [`accuracy_reward`] will skip, and what to do; `None` if it skips none."""
    solutions = list(solutions)
    indices = ungradable(solutions)
    if not indices:
        return None
    examples = ", ".join(f"row {index}: {str(solutions[index])[-60:]!r}" for index in indices[:3])
    return (
        f"{len(indices)} of {len(solutions)} solutions cannot be graded: `accuracy_reward` is None for their rows, "
        f"which then learn nothing from it ({examples}). Correct or remove these rows; the answer is the last "
        "`\\boxed{}`, what follows `####`, or the whole text of the column `solution`."
    )


def format_reward(completions: list[str] | list[list[dict]], **kwargs) -> list[float]:
    r"""
    Reward function that checks that the whole response has the form `<think>...</think>...\boxed{...}...`.

    The response must begin with `<think>` (white space before it is allowed), hold exactly one `<think>` and one
    `</think>`, and have a complete, non-empty `\boxed{}` after `</think>`; the thought itself may be empty. A chat
    template that writes `<think>` into the prompt takes it out of the response, which then has not this form.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, as strings or as lists of messages. Reasoning that the trainer has parsed into a field of its
            own (`reasoning_content` or `thinking`) counts as a think block.
        **kwargs:
            Dataset columns and what else the trainer passes. Not used.

    Returns:
        `list[float]`:
            1.0 for a response of this form, 0.0 for any other.

    Example:
    ```python
    >>> from mentor_trl.rewards import format_reward

    >>> format_reward([r"<think>1 + 1</think> It is \boxed{2}.", r"It is \boxed{2}."])
    [1.0, 0.0]
    ```
    """
    return [float(_has_format(completion_text(completion))) for completion in completions]


def _has_format(text: str) -> bool:
    one_thought = text.count(THINK_START) == text.count(THINK_END) == 1
    return one_thought and text.lstrip().startswith(THINK_START) and final_answer(text) is not None
