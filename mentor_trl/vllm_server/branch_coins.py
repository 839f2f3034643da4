"""Where the rows of a batch branch, in plain tensor operations that never wait for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..objective import branch_weight, coin_uniforms
from .branch_requests import BranchOptions


BY_ENTROPY = ("entropy", "threshold")


@dataclass(frozen=True)
class BranchTensors:
    """Options of N rows, and the branch rules that occur."""

    gamma: torch.Tensor  # `(N,)`
    share: torch.Tensor  # `(N,)`
    temperature: torch.Tensor  # `(N,)`
    seeds: torch.Tensor  # `(N,)`
    rules: dict[str, torch.Tensor]  # for each rule, the `(N,)` `bool` mask of its rows

    @classmethod
    def of(
        cls, rows: Sequence[BranchOptions], temperatures: Sequence[float], device: torch.device | str = "cpu"
    ) -> "BranchTensors":
        return cls(
            on_device([row.gamma for row in rows], torch.float32, device),
            on_device([row.share for row in rows], torch.float32, device),
            on_device(temperatures, torch.float32, device),
            on_device([row.seed for row in rows], torch.int64, device),
            {
                rule: on_device([row.rule == rule for row in rows], torch.bool, device)
                for rule in sorted({row.rule for row in rows})
            },
        )

    @property
    def need_entropy(self) -> bool:
        return any(rule in self.rules for rule in BY_ENTROPY)


def on_device(values: Sequence, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A tensor of host values. From pinned memory, or else the copy waits for what the device is doing."""
    pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


def branch_coins(
    logits: torch.Tensor | None, rows: BranchTensors, positions: torch.Tensor, near: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Coins of the next tokens of N rows, `(N,)` `bool`: `True` at branch points.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`):
            The policy's logits, -inf where an id is never sampled. Not read if `rows` need no entropy.
        rows ([`BranchTensors`]):
            Options of the rows.
        positions (`torch.Tensor` of shape `(N,)`):
            Lengths of the prefixes.
        near (`torch.Tensor` of shape `(N,)`, *optional*):
            Which tokens are the first of a sentence; for the rule `"sentence"`.
    """
    entropy = torch.zeros_like(rows.gamma)
    if rows.need_entropy:
        probs = (logits.float() / rows.temperature.unsqueeze(-1)).softmax(dim=-1)
        entropy = torch.special.entr(probs).sum(dim=-1)
    weight = torch.zeros_like(entropy)
    for rule, mask in rows.rules.items():
        weight = torch.where(mask, branch_weight(entropy, rows.gamma, rule, rows.share, near), weight)
    return coin_uniforms(rows.seeds, positions) < weight
