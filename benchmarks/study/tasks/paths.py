"""
Many ways that are all right: walks on a grid of eight by eight cells.

A prompt such as `3 4 to 5 1 :` gives a start and a goal, as row and column. A reply says one move after the other and
where it leads, and stops at the goal:

    down 4 4 left 4 3 down 5 3 left 5 2 left 5 1 done

Any walk of at most ten moves that ends at the goal is right: a prompt has from dozens to thousands of right replies,
up to 35 of them as short as can be. A policy that walks blindly comes across the goal now and then.
"""

import random
from dataclasses import dataclass
from typing import Any

from benchmarks.study.tasks.sizes import Settings
from benchmarks.study.tasks.words import SPECIAL, whole_reply, word_tokenizer


SIZE, MOST_MOVES, DISTANCES = 8, 10, (5, 6, 7)
SETTINGS = Settings(num_train_prompts=1000)  # there are 1,532 problems in all
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
DECISIONS = tuple(MOVES)
VOCABULARY = [*SPECIAL, *map(str, range(SIZE)), "to", ":", *MOVES, "ok", "wait", "done"]

Cell = tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """A start and a goal."""

    start: Cell
    goal: Cell

    @property
    def prompt(self) -> str:
        return "{} {} to {} {} :".format(*self.start, *self.goal)

    @property
    def solution(self) -> str:
        return "{} {}".format(*self.goal)


@dataclass(frozen=True)
class Style:
    """
    How a walk is written.

    Args:
        knows (`float`):
            Probability that a move is one that leads closer; else it is drawn blindly.
        rows_first (`float`):
            Probability that a move that leads closer is along the column where both ways would do; else either is as
            likely as the other.
        ok, wait (`float`):
            Probabilities that the habit words precede a move.
    """

    knows: float = 0.0
    rows_first: float = 0.0
    ok: float = 0.01
    wait: float = 0.01


STYLES = {
    "base": Style(knows=0.5, rows_first=0.2, ok=0.1, wait=0.1),
    "policy": Style(),
    "weak": Style(knows=0.45),
    "barely": Style(knows=0.13),
    "strong": Style(knows=1.0),
    "other": Style(knows=1.0, rows_first=1.0, ok=0.3, wait=0.5),
}


def step(cell: Cell, move: str) -> Cell | None:
    """
    Return where a move leads, or `None` where it leaves the grid.

    >>> step((0, 4), "down"), step((0, 4), "up")
    ((1, 4), None)
    """
    row, column = (at + by for at, by in zip(cell, MOVES[move]))
    return (row, column) if 0 <= row < SIZE and 0 <= column < SIZE else None


def distance(one: Cell, other: Cell) -> int:
    """
    Return how many moves two cells are apart.

    >>> distance((7, 4), (1, 2))
    8
    """
    return sum(abs(a - b) for a, b in zip(one, other))


def sample_problem(rng: random.Random) -> Problem:
    start = rng.randrange(SIZE), rng.randrange(SIZE)
    while distance(start, goal := (rng.randrange(SIZE), rng.randrange(SIZE))) not in DISTANCES:
        pass
    return Problem(start, goal)


def write_response(problem: Problem, style: Style, rng: random.Random) -> str:
    """Write a walk in a given style. It stops at the goal, and after the last move wherever it is."""
    words, cell = [], problem.start
    for _ in range(MOST_MOVES):
        if cell == problem.goal:
            break
        words += ["ok"] * (rng.random() < style.ok) + ["wait"] * (rng.random() < style.wait)
        move = choose(cell, problem.goal, style, rng)
        cell = step(cell, move)
        words += [move, *map(str, cell)]
    return " ".join([*words, "done"])


def choose(cell: Cell, goal: Cell, style: Style, rng: random.Random) -> str:
    moves = {move: place for move in MOVES if (place := step(cell, move))}
    if rng.random() >= style.knows:
        return rng.choice(tuple(moves))
    closer = [move for move, place in moves.items() if distance(place, goal) < distance(cell, goal)]
    along = [move for move in closer if move in ("up", "down")]
    return rng.choice(along if along and rng.random() < style.rows_first else closer)


def read_walk(prompt: str, reply: str) -> list[str] | None:
    """
    Return the moves of a walk from the start of a prompt to its goal, or `None` where the reply is no such walk.

    >>> read_walk("3 4 to 5 2 :", "down 4 4 left 4 3 wait down 5 3 left 5 2 done")
    ['down', 'left', 'down', 'left']
    >>> read_walk("3 4 to 5 2 :", "down 5 4 left 5 3 left 5 2 done") is None
    True
    """
    numbers = [int(word) for word in prompt.split() if word.isdigit()]
    cell, goal = tuple(numbers[:2]), tuple(numbers[2:4])
    words = [word for word in reply.split() if word not in ("ok", "wait")]
    moves, said = words[:-1:3], zip(words[1:-1:3], words[2:-1:3])
    if len(words) % 3 != 1 or words[-1] != "done" or len(moves) > MOST_MOVES:
        return None
    for move, place in zip(moves, said):
        if move not in MOVES or (cell := step(cell, move)) != tuple(
            int(one) if one.isdigit() else -1 for one in place
        ):
            return None
    return moves if cell == goal else None


def reward(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    """Reward function for TRL: 1 for a walk from start to goal, else 0."""
    replies = map(whole_reply, prompts, completions)
    return [float(read_walk(prompt, reply) is not None) for prompt, reply in zip(prompts, replies)]


def describe(prompt: str, completion: str) -> dict[str, Any]:
    """
    Say how a walk is written, and which one it is.

    >>> describe("3 4 to 5 2 :", "down 4 4 down 5 4 left 5 3 left 5 2 done")
    {'moves': 4, 'turns': 1, 'habits': 0.0, 'solution': 'down down left left'}
    """
    reply = whole_reply(prompt, completion)
    words = reply.split()
    moves = [word for word in words if word in MOVES]
    walk = read_walk(prompt, reply)
    return {
        "moves": len(moves),
        "turns": sum(one != other for one, other in zip(moves, moves[1:])),
        "habits": (words.count("ok") + words.count("wait")) / max(len(moves), 1),
        "solution": " ".join(walk) if walk else None,
    }


def build_tokenizer():
    return word_tokenizer(VOCABULARY)
