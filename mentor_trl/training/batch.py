"""The record of a rollout batch on its way from the plan to the loss."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..rollout.types import MixedRollout


class Part(NamedTuple):
    """
    Rows of one source that an engine sampled.

    Args:
        source (`str`):
            Name of the source.
        rows (`list[int]`):
            Which of the batch's rows they are.
        rollout ([`~mentor_trl.rollout.MixedRollout`]):
            Their tokens and records.
    """

    source: str
    rows: list[int]
    rollout: MixedRollout


@dataclass(frozen=True)
class RolloutBatch:
    """
    A process's share of a rollout batch, B rows. Each stage returns a new record with more in it.

    Args:
        sources (`tuple[str, ...]`):
            Names of the algorithm's sources; the first is the policy.
        source_B (`torch.Tensor` of shape `(B,)`, `int64`):
            Source of each row, an index into `sources`.
        alpha (`float`, *optional*, defaults to `0.0`):
            Weight of guided rows.
        gamma (`float`, *optional*):
            Entropy threshold in nats, where there is one.
        payload (`Any`, *optional*):
            What else the plan holds, such as the texts of expert trajectories.
        prompt_ids, completion_ids (`list[list[int]]`):
            Tokens of the rows, once they are sampled.
        engine_logps (`list[list[float | None]]`, *optional*):
            Log-probabilities under the engine that sampled, `None` for tokens that the policy did not sample.
        parts (`tuple[Part, ...]`):
            What a mixed-policy engine recorded.
        rewards_N_F (`torch.Tensor` of shape `(N, F)`, *optional*):
            Rewards of all processes' rows by each function, NaN where undefined.
    """

    sources: tuple[str, ...]
    source_B: torch.Tensor
    alpha: float = 0.0
    gamma: float | None = None
    payload: Any = None
    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    engine_logps: list[list[float | None]] | None = None
    parts: tuple[Part, ...] = ()
    rewards_N_F: torch.Tensor | None = None

    def source_names(self) -> list[str]:
        """Source of each row, by name."""
        return [self.sources[index] for index in self.source_B.tolist()]

    def part(self, source: str) -> Part | None:
        """What the engine recorded of a source."""
        return next((part for part in self.parts if part.source == source), None)

    def sampled(self, prompt_ids, completion_ids, engine_logps, parts: tuple[Part, ...] = (), **changes):
        """The record with its rows."""
        changes |= {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "engine_logps": engine_logps}
        return replace(self, parts=parts, **changes)


@dataclass(frozen=True)
class Scored:
    """
    What TRL made of a rollout batch: N rows of all processes, of which `local` are this one's B.

    Args:
        rewards_N (`torch.Tensor` of shape `(N,)`):
            Weighted rewards, NaN where every function returned `None`.
        source_N (`torch.Tensor` of shape `(N,)`, `int64`):
            Sources.
        local (`slice`):
            Place of this process's rows.
        advantages_B (`torch.Tensor` of shape `(B,)`):
            TRL's own advantages.
        mask_B_T (`torch.Tensor` of shape `(B, T)`, `bool`):
            Tokens that the loss reads.
        policy_logps_B_T (`torch.Tensor` of shape `(B, T)`, *optional*):
            log p of the training model as it was when it sampled, at the sampling temperature, where TRL or the
            algorithm needs it.
    """

    rewards_N: torch.Tensor
    source_N: torch.Tensor
    local: slice
    advantages_B: torch.Tensor
    mask_B_T: torch.Tensor
    policy_logps_B_T: torch.Tensor | None = None


class Credit(NamedTuple):
    """
    What the rows of a batch are worth.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`):
            Advantages of this process's rows or tokens, as the loss takes them.
        advantages_N (`torch.Tensor` of shape `(N,)`):
            Advantages of all processes' rows, for the logs.
        metrics (`dict[str, float]`):
            Metrics, the same on every process.
        weights_B_T (`torch.Tensor` of shape `(B, T)`, *optional*):
            What the advantages of the rows were multiplied by, for the records.
        no_spread (`float`, *optional*):
            Share of groups without an advantage, where it is not TRL's.
    """

    advantages: torch.Tensor
    advantages_N: torch.Tensor
    metrics: dict[str, float]
    weights_B_T: torch.Tensor | None = None
    no_spread: float | None = None


class Reweighed(NamedTuple):
    """
    Weights that depend on the loss's own forward pass.

    Args:
        weights_B_T (`torch.Tensor` of shape `(B, T)`):
            Factors of the advantages, 1 on other rows.
        rows_B (`torch.Tensor` of shape `(B,)`, `bool`):
            Rows whose importance ratio is 1.
        name (`str`):
            Name of the weights among the metrics.
    """

    weights_B_T: torch.Tensor
    rows_B: torch.Tensor
    name: str


def scatter(parts: list[tuple[list[int], list[Any]]], count: int) -> list[Any]:
    """
    Put values back to the rows they belong to.

    >>> scatter([([0, 2], ["a", "c"]), ([1], ["b"])], 3)
    ['a', 'b', 'c']
    """
    values = [None] * count
    for rows, part in parts:
        for row, value in zip(rows, part, strict=True):
            values[row] = value
    return values
