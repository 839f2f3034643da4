"""
The visible fork: each of three steps can be tried in six ways, and five of the ways are dead ends.

A prompt is a chain such as `4 +7 *3 -9 :`, as in the quickstart. A reply does one step after the other, and names the
way before it goes it; then it states the running values:

    try blue 4 +7 = 1 try black 1 *3 = 3 try white 3 -9 = 4 answer 1 3 4

Which way leads on depends on the operation alone; any other leaves the value as it is, and the rest of the reply is
lost. Everything but the ways follows from what stands before it. So the ways are where a model that does not know them
is uncertain, and nowhere else: a policy that chooses them blindly gets through one time in 216.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

from benchmarks.study.tasks.words import SPECIAL, whole_reply, word_tokenizer
from examples.quickstart.task import OPERATIONS, apply
from examples.quickstart.task import Problem as Chain
from examples.quickstart.task import sample_problem as sample_chain


WAYS = ("red", "blue", "green", "gold", "white", "black")
DECISIONS = WAYS
VOCABULARY = [*SPECIAL, *"0123456789", *OPERATIONS, "=", ":", "try", "ok", "wait", "answer", *WAYS]


@dataclass(frozen=True)
class Problem(Chain):
    """A chain whose solution names the way of each step and its value."""

    @property
    def solution(self) -> str:
        values = super().solution.split()
        return " ".join(f"{right_way(*step)} {value}" for step, value in zip(self.steps, values))


@dataclass(frozen=True)
class Style:
    """
    How a reply is written.

    Args:
        knows (`float`):
            Probability that a step goes the right way for sure; else the way is drawn blindly.
        ok, wait (`float`):
            Probabilities that the habit words precede a step.
    """

    knows: float = 0.0
    ok: float = 0.01
    wait: float = 0.01


STYLES = {
    "base": Style(knows=0.5, ok=0.1, wait=0.1),
    "policy": Style(),
    "weak": Style(knows=0.6),
    "barely": Style(knows=0.13),
    "strong": Style(knows=1.0),
    "other": Style(knows=1.0, ok=0.5, wait=0.9),
}


def right_way(operator: str, operand: int) -> str:
    """
    Return the way that leads on.

    >>> right_way("+", 7), right_way("-", 9)
    ('blue', 'white')
    """
    return WAYS[("+-*".index(operator) + operand) % len(WAYS)]


def sample_problem(rng: random.Random) -> Problem:
    chain = sample_chain(rng)
    return Problem(chain.start, chain.steps)


def write_response(problem: Problem, style: Style, rng: random.Random) -> str:
    """Write a reply in a given style."""
    words, values, value = [], [], problem.start
    for operator, operand in problem.steps:
        words += ["ok"] * (rng.random() < style.ok) + ["wait"] * (rng.random() < style.wait)
        right = right_way(operator, operand)
        way = right if rng.random() < style.knows else rng.choice(WAYS)
        words += ["try", way, str(value), f"{operator}{operand}", "="]
        value = apply(operator, value, operand) if way == right else value
        values.append(str(value))
        words.append(values[-1])
    return " ".join([*words, "answer", *values])


def read_solution(reply: str) -> str | None:
    """
    Return the ways that a reply goes and the values it comes to, or `None` where its answer states other values.

    >>> read_solution("try blue 4 +7 = 1 wait try black 1 *3 = 3 answer 1 3")
    'blue 1 black 3'
    >>> read_solution("try blue 4 +7 = 1 answer 2") is None
    True
    """
    steps = re.findall(r"\btry (\w+) \d \S+ = (\d)", reply)
    answer = re.search(r"\banswer((?: \d)+)$", reply.strip())
    if not answer or answer.group(1).split() != [value for _, value in steps]:
        return None
    return " ".join(f"{way} {value}" for way, value in steps)


def reward(prompts: list[str], completions: list[str], solution: list[str], **kwargs) -> list[float]:
    """Reward function for TRL: 1 where every step goes the right way and the answer is right, else 0."""
    replies = map(whole_reply, prompts, completions)
    return [float(read_solution(reply) == right) for reply, right in zip(replies, solution)]


def describe(prompt: str, completion: str) -> dict[str, Any]:
    """
    Say how often a reply goes the right way, and how it is written.

    >>> describe("4 +7 *3 -9 :", "try blue 4 +7 = 1 ok try red 1 *3 = 1 try red 1 -9 = 1 answer 1 1 1")["right_way"]
    0.3333333333333333
    """
    reply = whole_reply(prompt, completion)
    steps = re.findall(r"\btry (\w+) \d ([-+*])(\d)\b", reply)
    words = reply.split()
    right = sum(way == right_way(operator, int(operand)) for way, operator, operand in steps)
    return {
        "right_way": right / max(len(steps), 1),
        "habits": (words.count("ok") + words.count("wait")) / max(len(steps), 1),
        "solution": read_solution(reply),
    }


def build_tokenizer():
    return word_tokenizer(VOCABULARY)
