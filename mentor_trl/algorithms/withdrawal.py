"""Whether guidance is still worth its cost, by the rewards of the rows with and without it."""

import math
from dataclasses import dataclass, field

import torch

from ..objective import Gap


@dataclass
class Withdrawal:
    """
    Guidance that is withdrawn when it does not help any more, and may come back.

    It is withdrawn when for `patience` batches in a row the upper 95% bound of the difference mixed - on-policy was
    below `margin` times the reward range times the share of on-policy successes, which must be above 0: at a sparse
    start both rewards are 0, and guidance is needed most. From then on only probes, one batch in `probe_every`, have
    mixed rows, which are counted and do not enter the loss. Guidance is back when the lower 95% bound of what the
    probes saw is above that same value.

    Args:
        gap ([`~mentor_trl.objective.Gap`]):
            The difference; empty.
        margin (`float`, *optional*, defaults to `0.1`), patience (`int`, *optional*, defaults to `3`),
        probe_every (`int`, *optional*, defaults to `20`), success_reward (`float`, *optional*, defaults to `0.5`):
            See above, and [`~mentor_trl.objective.Gap.add`].
        gap_exponent (`float`, *optional*, defaults to `0.0`):
            alpha is alpha_0 times the gain of guidance to this power; with 0 it is alpha_0 until the withdrawal.
        withdrawn (`bool`, *optional*, defaults to `False`):
            Whether guidance is withdrawn.
        below (`int`, *optional*, defaults to `0`):
            Batches in a row whose upper bound was low.
        rested (`int`, *optional*, defaults to `0`):
            Batches since the withdrawal.
    """

    gap: Gap = field(default_factory=Gap)
    margin: float = 0.1
    patience: int = 3
    probe_every: int = 20
    success_reward: float = 0.5
    gap_exponent: float = 0.0
    withdrawn: bool = False
    below: int = 0
    rested: int = 0

    @property
    def probe(self) -> bool:
        """Whether the coming batch is a probe."""
        return self.withdrawn and self.probe_every > 0 and (self.rested + 1) % self.probe_every == 0

    @property
    def over(self) -> bool:
        """Whether guidance cannot come back."""
        return self.withdrawn and self.probe_every == 0

    def alpha(self, alpha_0: float) -> float:
        return 0.0 if self.withdrawn else alpha_0 * self.gap.gain**self.gap_exponent

    def observe(self, rewards_N: torch.Tensor, mixed_N: torch.Tensor, num_generations: int) -> dict[str, float]:
        """
        Hear the rewards of a batch of all processes, NaN in groups that are not to be compared, and decide about the
        next batch. Returns metrics.
        """
        metrics = {"withdrawn": float(self.withdrawn)}
        measured = self.gap.add(rewards_N, mixed_N, num_generations, self.success_reward)
        if measured:
            metrics |= {"difference": self.gap.mean("difference"), "success": self.gap.mean("success")}
            bounds = {"standard_error": self.gap.standard_error, "upper_bound": self.gap.upper}
            metrics |= {name: value for name, value in bounds.items() if math.isfinite(value)}
        threshold = self.margin * self.gap.reward_range * self.gap.mean("success")
        if self.withdrawn:
            self.rested += 1
            if measured and self.gap.lower > threshold:
                self.withdrawn, self.rested = False, 0
        elif measured:
            self.below = self.below + 1 if self.gap.upper < threshold and self.gap.mean("success") > 0.0 else 0
            if self.below >= self.patience:
                self.withdrawn, self.below = True, 0
                # Probes are about the policy as it is from now on
                self.gap = Gap(self.gap.smoothing, self.gap.reward_range, lowest=self.gap.lowest)
        return metrics

    def state_dict(self) -> dict:
        counts = {"withdrawn": self.withdrawn, "below": self.below, "rested": self.rested}
        return counts | {"gap": self.gap.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.withdrawn, self.below, self.rested = state["withdrawn"], state["below"], state["rested"]
        self.gap.load_state_dict(state["gap"])
