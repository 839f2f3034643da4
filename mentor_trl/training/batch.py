"""The record of a rollout batch on its way from the plan to the loss."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..rollout.types import MixedRollout
from .processes import Processes


class Part(NamedTuple):
    """Rows of one source that an engine sampled."""

    source: str
    rows: list[int]  # which of the batch's rows they are
    rollout: MixedRollout


@dataclass(frozen=True)
class RolloutBatch:
    """A process's share of a rollout batch, B rows. Each stage returns a new record with more in it."""

    sources: tuple[str, ...]  # names; the first is the policy
    source_B: torch.Tensor  # int64, an index into `sources`
    alpha: float = 0.0  # weight of guided rows
    mixes: bool = False  # whether some process has rows that a mixed-policy engine samples with the expert
    probe: bool = False  # whether guided rows are counted and stay out of the loss
    gamma: float | None = None  # entropy threshold in nats, where there is one
    attempt: int = 0  # how many times rows of the batch have been sampled before (`dynamic_sampling`)
    payload: Any = None  # what else the plan holds, such as the texts of expert trajectories
    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    engine_logps: list[list[float | None]] | None = None  # None for tokens that the policy did not sample
    parts: tuple[Part, ...] = ()  # what a mixed-policy engine recorded
    rewards_N_F: torch.Tensor | None = None  # of all processes' rows by each function, NaN where undefined

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

    def completed(self, policy_logps_B_T: torch.Tensor | None, mask_B_T: torch.Tensor) -> "RolloutBatch":
        """The record with log p of the training model at the branch points where the engine does not know it."""
        if policy_logps_B_T is None:
            return self
        known = policy_logps_B_T.where(mask_B_T, torch.nan)
        parts = []
        for part in self.parts:
            logps, branch = part.rollout.logps, part.rollout.branch
            ours = known[part.rows, : logps.size(1)].to(logps)
            filled = torch.where(branch & logps.isnan(), ours, logps)
            parts.append(part._replace(rollout=replace(part.rollout, logps=filled)))
        return replace(self, parts=tuple(parts))


def leave_out(output: dict[str, Any], batch: RolloutBatch, processes: Processes) -> None:
    """Take the guided rows of a probe out of the loss of TRL's batch, and out of the tokens that it divides by."""
    if not batch.probe:
        return
    mask = output["completion_mask"]
    output["completion_mask"] = mask * (batch.source_B == 0).to(mask).unsqueeze(1)
    output["num_items_in_batch"] = processes.gather(output["completion_mask"].sum()).sum()


@dataclass(frozen=True)
class Scored:
    """What TRL made of a rollout batch: N rows of all processes, of which `local` are this one's B."""

    rewards_N: torch.Tensor  # weighted, NaN where every function returned `None`
    source_N: torch.Tensor
    local: slice
    advantages_B: torch.Tensor  # TRL's own
    mask_B_T: torch.Tensor  # tokens that the loss reads
    # log p of the training model as it was when it sampled, at the sampling temperature, where TRL or the algorithm
    # needs it
    policy_logps_B_T: torch.Tensor | None = None


class Credit(NamedTuple):
    """What the rows of a batch are worth."""

    advantages: torch.Tensor  # (B,) or (B, T): of this process's rows or tokens, as the loss takes them
    advantages_N: torch.Tensor  # of all processes' rows, for the logs
    metrics: dict[str, float]  # the same on every process
    weights_B_T: torch.Tensor | None = None  # what advantages of rows were multiplied by, for the records
    no_spread: float | None = None  # share of groups without an advantage, where it is not TRL's


class LossStates(NamedTuple):
    """What the policy's decoder said in the forward pass of a loss, with gradients."""

    hidden_B_T_D: torch.Tensor  # hidden states before each token of the completions
    logits: Callable[[torch.Tensor], torch.Tensor]  # float32 logits (N, V) of hidden states (N, D)
    rows: int  # hidden states whose logits are held at once


class LossTerm(NamedTuple):
    """What an algorithm adds to TRL's loss."""

    values_B_T: torch.Tensor  # of each token, averaged as TRL's loss averages tokens
    weight: float
    name: str  # of the values among the metrics


class Reweighed(NamedTuple):
    """Weights that depend on the loss's own forward pass."""

    weights_B_T: torch.Tensor  # factors of the advantages, 1 on other rows
    rows_B: torch.Tensor  # rows whose importance ratio is 1
    name: str  # of the weights among the metrics


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
