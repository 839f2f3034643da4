"""The methods: who samples which row of a rollout batch, and what its tokens are worth."""

from ..config import MentorGRPOConfig
from .base import Algorithm, Context, Rollouts
from .distilled_rl import DistilledRL
from .gats import Gats
from .luffy import Luffy
from .mentor import Mentor
from .opd import Opd


# The first that a configuration asks for; the last is plain GRPO
ALGORITHMS: tuple[type[Algorithm], ...] = (Opd, Gats, DistilledRL, Mentor, Luffy, Algorithm)


def algorithm_of(args: MentorGRPOConfig) -> type[Algorithm]:
    """The algorithm that a configuration asks for."""
    return next(algorithm for algorithm in ALGORITHMS if algorithm.chosen(args))


__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Context",
    "DistilledRL",
    "Gats",
    "Luffy",
    "Mentor",
    "Opd",
    "Rollouts",
    "algorithm_of",
]
