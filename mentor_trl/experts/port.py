"""What an expert is asked, whatever holds it: a model in this process, a server, several of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True)
class Points:
    """Positions of rows in progress at which an expert is asked. B rows with up to K drafted tokens each, N points."""

    tokens: torch.Tensor  # (B, W): ids of the rows, prompt and drafts included
    size: torch.Tensor  # (B,): tokens that are committed; the drafts stand behind them
    length: torch.Tensor  # (B,): drafts of each row
    row: torch.Tensor  # (N,): row of each point, ascending
    step: torch.Tensor  # (N,): draft of each point in its row, ascending
    branch: torch.Tensor  # (N,) bool: where the expert chooses the token; elsewhere it scores the draft
    draft: torch.Tensor  # (N,): tokens drawn from the policy
    policy_logps: Callable[[slice], torch.Tensor]  # log p (n, V) at the points of a slice
    temperature: float = 1.0
    generator: torch.Generator | None = None


class Spoken(NamedTuple):
    """What an expert says at N points."""

    tokens: torch.Tensor  # exact samples of s at branch points, the drafts elsewhere
    logps: torch.Tensor  # log p of these tokens, in nats
    expert_logps: torch.Tensor  # log s of these tokens, in nats
    replaced: torch.Tensor  # bool: whether the token differs from its draft


class Expert(Protocol):
    """A frozen model s over the policy's tokens."""

    name: str | None

    def consult(self, points: Points) -> Spoken:
        """Choose the tokens at branch points, and give log s at all points."""
        ...

    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> torch.Tensor:
        """log s of every token of given completions, `(rows, longest completion)` in nats, NaN behind their ends."""
        ...
