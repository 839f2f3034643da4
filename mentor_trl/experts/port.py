"""What an expert is asked, whatever holds it: a model in this process, a server, several of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True)
class Points:
    """
    Positions of rows in progress at which an expert is asked. B rows with up to K drafted tokens each, N points.

    The token that an expert chooses at point n follows `prefix(n)`.
    """

    tokens: torch.Tensor  # (B, W): ids of the rows, prompt and drafts included
    size: torch.Tensor  # (B,): tokens that are committed; the drafts stand behind them
    length: torch.Tensor  # (B,): drafts of each row
    row: torch.Tensor  # (N,): index of each point's row among the B, ascending
    step: torch.Tensor  # (N,): draft of each point in its row, ascending
    branch: torch.Tensor  # (N,) bool: where the expert chooses the token; elsewhere it scores the draft
    draft: torch.Tensor  # (N,): tokens drawn from the policy
    policy_logps: Callable[[slice], torch.Tensor]  # log p (n, V) at the points of a slice
    temperature: float = 1.0
    generator: torch.Generator | None = None
    rows: Sequence[int] = ()  # (B,): number of each row in the request
    row_seeds: Sequence[int] = ()  # (B,): seed of each row, below 2^62

    def prefix(self, point: int) -> list[int]:
        """Ids before a point: prompt, committed tokens, and the drafts before its own."""
        row = int(self.row[point])
        return self.tokens[row, : int(self.size[row] + self.step[point])].tolist()


class Spoken(NamedTuple):
    """What an expert says at N points."""

    tokens: torch.Tensor  # exact samples of s at branch points, the drafts elsewhere
    logps: torch.Tensor | None  # log p of these tokens, in nats; `None` from an expert that does not couple
    expert_logps: torch.Tensor  # log s of these tokens, in nats
    replaced: torch.Tensor | None  # bool: whether the token differs from its draft; `None` likewise


class Expert(Protocol):
    """
    A frozen model s over the policy's tokens.

    Args:
        name (`str`, *optional*):
            Model id or folder.
        couples (`bool`):
            Whether its tokens at branch points are coupled with the policy's drafts, so that few drafts are lost. It
            is then asked at all points of a round at once. An expert that does not couple draws from s itself, and is
            asked at the first branch point of a row only, where the row's drafts end.
        max_length (`int`, *optional*):
            Context in tokens; `None` where there is no limit.
    """

    name: str | None
    couples: bool
    max_length: int | None

    def consult(self, points: Points) -> Spoken:
        """Choose the tokens at branch points, and give log s at all points."""
        ...

    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> torch.Tensor:
        """log s of every token of given completions, `(rows, longest completion)` in nats, NaN behind their ends."""
        ...


class ReadableExpert(Expert, Protocol):
    """An expert whose whole distributions are at hand."""

    def distributions(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> Callable[[slice], torch.Tensor]:
        """
        Read given rows. What is returned gives log s `(n, V)` over the policy's vocabulary, in nats, before the tokens
        of a slice of all completions, one row behind the other.
        """
        ...
