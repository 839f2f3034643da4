"""
The quickstart's task: three steps of single-digit arithmetic modulo 10, and the ways to write them down.

A prompt such as `4 +7 *3 -9 :` is a chain, read from left to right. Its answer is the list of the three running
values, `1 3 4`. A response does one step after the other, then states the answer:

    ok guess 1 work 1 *3 = 3 ok wait guess 8 answer 1 3 8

There are two ways to do a step. `guess` writes a value at once and knows only whether it is even or odd, so it is
right one time in five; `work` spells the step out first and is nearly always right. `ok` and `wait` are habits that
may precede a step and change nothing. Pretraining teaches all of this. What it leaves to reinforcement learning is the
choice: the policy can `work`, but hardly ever does.
"""

import random
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Factors are units modulo 10, so that every value stays equally likely: no answer is worth stating blindly.
OPERANDS = {"+": tuple(range(1, 10)), "-": tuple(range(1, 10)), "*": (3, 7, 9)}
OPERATIONS = [f"{operator}{operand}" for operator, operands in OPERANDS.items() for operand in operands]
NUM_STEPS = 3
PROMPT_LENGTH = NUM_STEPS + 2
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = [PAD, EOS, UNKNOWN, *"0123456789", *OPERATIONS, "=", ":", "guess", "work", "ok", "wait", "answer"]


@dataclass(frozen=True)
class Problem:
    """A first value, and `NUM_STEPS` pairs of an operator and an operand."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        return " ".join([str(self.start), *(f"{operator}{operand}" for operator, operand in self.steps), ":"])

    @property
    def solution(self) -> str:
        values = [self.start]
        for operator, operand in self.steps:
            values.append(apply(operator, values[-1], operand))
        return " ".join(map(str, values[1:]))


@dataclass(frozen=True)
class Style:
    """
    How a response is written.

    Args:
        work (`float`):
            Probability that a step is worked out, not guessed.
        ok, wait (`float`):
            Probabilities that the habit words precede a step.
    """

    work: float
    ok: float = 0.5
    wait: float = 0.25


def apply(operator: str, left: int, right: int) -> int:
    """
    Do one step, modulo 10.

    >>> apply("-", 3, 9), apply("*", 7, 3)
    (4, 1)
    """
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def sample_problem(rng: random.Random) -> Problem:
    operators = [rng.choice(tuple(OPERANDS)) for _ in range(NUM_STEPS)]
    return Problem(rng.randrange(10), tuple((operator, rng.choice(OPERANDS[operator])) for operator in operators))


def sample_distinct(rng: random.Random, count: int, exclude: Set[Problem] = frozenset()) -> list[Problem]:
    """Draw `count` different problems, none of them in `exclude`."""
    problems = {}  # a set that keeps the order
    while len(problems) < count:
        problem = sample_problem(rng)
        if problem not in exclude:
            problems[problem] = None
    return list(problems)


def write_response(problem: Problem, style: Style, rng: random.Random) -> str:
    """Write a response in a given style. A wrong guess is carried into the steps that follow it."""
    words, values, value = [], [], problem.start
    for operator, operand in problem.steps:
        words += ["ok"] * (rng.random() < style.ok) + ["wait"] * (rng.random() < style.wait)
        right = apply(operator, value, operand)
        if rng.random() < style.work:
            words += ["work", str(value), f"{operator}{operand}", "="]
            value = right
        else:
            words.append("guess")
            value = rng.choice(range(right % 2, 10, 2))
        values.append(str(value))
        words.append(values[-1])
    return " ".join([*words, "answer", *values])


def read_answer(response: str) -> str | None:
    """
    Return the values that a response states at its end, or `None` where it states none.

    >>> read_answer("guess 1 guess 3 guess 5 answer 1 3 5")
    '1 3 5'
    """
    answer = re.search(r"\banswer((?: \d)+)$", response.strip())
    return answer.group(1).strip() if answer else None


def exact_answer_reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    """Reward function for TRL: 1 where the stated answer is the solution, else 0."""
    return [float(read_answer(text) == right) for text, right in zip(completions, solution)]


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Build a tokenizer whose tokens are the task's words. It has no chat template: prompts are plain text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )
