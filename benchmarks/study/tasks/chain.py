"""
The rare skill: the quickstart's chain of three steps modulo 10, written by experts of several strengths.

A step that is worked out is right, a guess is right one time in five. The base knows both ways, the policy hardly ever
works, and an expert differs from it in how often it does.
"""

import random
from dataclasses import dataclass
from typing import Any

from examples.quickstart import task
from examples.quickstart.task import VOCABULARY, Problem, build_tokenizer, exact_answer_reward, sample_problem


__all__ = [
    "DECISIONS",
    "STYLES",
    "VOCABULARY",
    "build_tokenizer",
    "describe",
    "reward",
    "sample_problem",
    "write_response",
]

DECISIONS = ("guess", "work")


@dataclass(frozen=True)
class Style(task.Style):
    """
    How a response is written.

    Args:
        repeat (`float`):
            Probability that a `wait` is followed by another, again and again.
    """

    repeat: float = 0.0


STYLES = {
    "base": Style(work=0.5),
    "policy": Style(work=0.01),
    "weak": Style(work=0.6),
    "barely": Style(work=0.12),
    "strong": Style(work=1.0),
    "other": Style(work=1.0, ok=0.02, wait=0.9, repeat=0.4),
}


def write_response(problem: Problem, style: Style, rng: random.Random) -> str:
    """Write a response in a given style."""
    words = []
    for word in task.write_response(problem, style, rng).split():
        words.append(word)
        while word == "wait" and len(words) < 30 and rng.random() < style.repeat:
            words.append(word)
    return " ".join(words)


def reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    """Reward function for TRL: 1 where the stated answer is the solution, else 0."""
    return exact_answer_reward(completions, solution)


def describe(prompt: str, completion: str) -> dict[str, Any]:
    """
    Say how a response is written.

    >>> describe("4 +7 *3 -9 :", "ok guess 1 work 1 *3 = 3 guess 8 answer 1 3 8")["work"]
    0.3333333333333333
    """
    words = completion.split()
    steps = max(words.count("work") + words.count("guess"), 1)
    return {
        "work": words.count("work") / steps,
        "habits": (words.count("ok") + words.count("wait")) / steps,
        "wait": words.count("wait") / steps,
        "solution": task.read_answer(completion),
    }
