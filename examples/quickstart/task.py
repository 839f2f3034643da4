"""The quickstart's task: three steps of single-digit arithmetic modulo 10, and every way our models write them down.

A prompt such as `4 + 7 * 3 - 9 :` is a chain read from left to right; its answer is the list of the three running values,
`1 3 4`. A response does one step after the other and then states the answer:

    ok guess 1 work 1 * 3 = 3 wait guess 5 answer 1 3 5

There are two ways to do a step. `guess` writes the value at once and is often wrong; `work` spells the step out first and
is nearly always right. `ok` and `wait` are habits: they may precede a step and change nothing. Everything a response needs
was learned in pretraining; the policy merely almost never chooses `work`, which is what reinforcement learning has to find.
"""

import random
import re
from dataclasses import dataclass

OPERANDS = {"+": range(1, 10), "-": range(1, 10), "*": (3, 7, 9)}  # units modulo 10 only: every answer is equally likely
NUM_STEPS = 3
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
OPERATIONS = [f"{operator}{operand}" for operator, operands in OPERANDS.items() for operand in operands]
VOCABULARY = [PAD, EOS, UNKNOWN, *"0123456789", *OPERATIONS, "=", ":", "guess", "work", "ok", "wait", "answer"]


@dataclass(frozen=True)
class Problem:
    """A chain: the first value and `NUM_STEPS` pairs of operator and operand."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        chain = " ".join(f"{operator}{operand}" for operator, operand in self.steps)
        return f"{self.start} {chain} :"

    @property
    def values(self) -> list[int]:
        """The running values, one a step."""
        values, value = [], self.start
        for operator, operand in self.steps:
            value = apply(operator, value, operand)
            values.append(value)
        return values

    @property
    def solution(self) -> str:
        return " ".join(map(str, self.values))


@dataclass(frozen=True)
class Style:
    """How a writer responds: the chance that a step is worked out, that a habit word precedes it, and that a guess is right."""

    work: float
    ok: float = 0.5
    wait: float = 0.25
    guess_right: tuple[tuple[str, float], ...] = (("+", 0.6), ("-", 0.5), ("*", 0.15))


def apply(operator: str, left: int, right: int) -> int:
    """
    One step modulo 10.

    >>> apply("-", 3, 9), apply("*", 7, 3)
    (4, 1)
    """
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def sample_problem(rng: random.Random) -> Problem:
    steps = []
    for _ in range(NUM_STEPS):
        operator = rng.choice(tuple(OPERANDS))
        steps.append((operator, rng.choice(OPERANDS[operator])))
    return Problem(rng.randrange(10), tuple(steps))


def sample_distinct(rng: random.Random, count: int, exclude: set[Problem] = frozenset()) -> list[Problem]:
    """`count` different problems, none of them in `exclude`."""
    chosen: dict[Problem, None] = {}
    while len(chosen) < count:
        problem = sample_problem(rng)
        if problem not in exclude:
            chosen[problem] = None
    return list(chosen)


def write_response(problem: Problem, style: Style, rng: random.Random) -> str:
    """A response in a given style; a wrong guess is carried into the steps that follow it."""
    guess_right = dict(style.guess_right)
    words, values, value = [], [], problem.start
    for operator, operand in problem.steps:
        words += ["ok"] * (rng.random() < style.ok) + ["wait"] * (rng.random() < style.wait)
        right = apply(operator, value, operand)
        if rng.random() < style.work:
            words += ["work", str(value), f"{operator}{operand}", "="]
        else:
            words.append("guess")
            if rng.random() >= guess_right[operator]:
                right = rng.choice([digit for digit in range(10) if digit != right])
        value = right
        words.append(str(value))
        values.append(str(value))
    return " ".join([*words, "answer", *values])


def read_answer(response: str) -> str | None:
    """
    The running values that a response states after its first `answer`, or `None` where it states none.

    >>> read_answer("guess 1 guess 3 guess 5 answer 1 3 5")
    '1 3 5'
    >>> read_answer("ok ok ok") is None
    True
    """
    stated = re.search(r"\banswer((?: \d)+)\s*$", response)
    return stated.group(1).strip() if stated else None


def exact_answer_reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    """Reward function for TRL: 1 where the stated answer is the solution, else 0."""
    return [float(read_answer(text) == right) for text, right in zip(completions, solution, strict=True)]


def build_tokenizer():
    """A word-level tokenizer over the task's two dozen words: no chat template, padding on the left for generation."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left",
        clean_up_tokenization_spaces=False,
    )
