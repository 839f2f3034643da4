"""What an expert is asked, whatever holds it: a model in this process, a server, several of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True)
class Points:
    """
    Positions of rows in progress at which an expert is asked. B rows with up to K drafted tokens each, N points.

    Args:
        tokens (`torch.Tensor` of shape `(B, W)`):
            Token ids of the rows, prompt and drafts included.
        size (`torch.Tensor` of shape `(B,)`):
            Tokens of each row that are committed; its drafts stand behind them.
        length (`torch.Tensor` of shape `(B,)`):
            Drafts of each row.
        row, step (`torch.Tensor` of shape `(N,)`):
            Row and draft of each point, ascending.
        branch (`torch.Tensor` of shape `(N,)`, `bool`):
            Where the expert chooses the token. Elsewhere only its log-probability of the draft is asked for.
        draft (`torch.Tensor` of shape `(N,)`):
            Tokens drawn from the policy.
        policy_logps (`Callable`):
            Gives the policy's log-probabilities `(n, V)` at the points of a slice.
        temperature (`float`):
            Divides the expert's logits.
        generator (`torch.Generator`, *optional*):
            Source of randomness.
    """

    tokens: torch.Tensor
    size: torch.Tensor
    length: torch.Tensor
    row: torch.Tensor
    step: torch.Tensor
    branch: torch.Tensor
    draft: torch.Tensor
    policy_logps: Callable[[slice], torch.Tensor]
    temperature: float = 1.0
    generator: torch.Generator | None = None


class Spoken(NamedTuple):
    """
    What an expert says at N points.

    Args:
        tokens (`torch.Tensor` of shape `(N,)`):
            Committed tokens: exact samples of s at branch points, the drafts elsewhere.
        logps, expert_logps (`torch.Tensor` of shape `(N,)`):
            log p and log s of these tokens, in nats.
        replaced (`torch.Tensor` of shape `(N,)`, `bool`):
            Whether the token differs from its draft.
    """

    tokens: torch.Tensor
    logps: torch.Tensor
    expert_logps: torch.Tensor
    replaced: torch.Tensor


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
