"""What guidance is worth: the paired difference of mixed and on-policy rewards."""

import math
from dataclasses import dataclass

import torch


Z_95 = 1.6448536269514722
"""One-sided 95% quantile of the normal distribution."""


def group_means(values_N: torch.Tensor, rows_N: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Mean of each group over some of its rows, `(groups,)`; NaN is left out."""
    values_N = values_N.masked_fill(~rows_N, torch.nan)
    return values_N.view(-1, num_generations).nanmean(dim=1)


def success_rates(rewards_N: torch.Tensor, rows: int, success_reward: float) -> torch.Tensor:
    """Share of successes among each `rows` consecutive rewards, float64 on the CPU; NaN where none is defined."""
    rewards_N = rewards_N.cpu()
    successes_N = (rewards_N >= success_reward).double().masked_fill(rewards_N.isnan(), torch.nan)
    return group_means(successes_N, torch.ones_like(rewards_N, dtype=torch.bool), rows)


@dataclass
class Gap:
    """
    Paired difference of rewards by group, mixed minus on-policy, over exponentially weighted rollout batches.

    All groups of a batch have the same weight, which falls by `smoothing` with every later batch that has any. So the
    estimates are weighted means over groups, and their standard error follows from the weights.

    Args:
        smoothing (`float`, *optional*, defaults to `0.8`):
            Factor of the weights of earlier batches, in [0, 1).
        reward_range (`float`, *optional*, defaults to `1.0`):
            Largest possible difference.
        groups (`float`, *optional*, defaults to `0.0`), squares (`float`, *optional*, defaults to `0.0`):
            Sums of the groups' weights and of their squares.
        sums (`dict[str, float]`, *optional*):
            Weighted sums over groups: of the on-policy and mixed mean reward, of their difference and its square, and
            of the share of on-policy successes.
        lowest (`float`, *optional*, defaults to `0.0`):
            The lowest reward seen, or 0.
    """

    smoothing: float = 0.8
    reward_range: float = 1.0
    groups: float = 0.0
    squares: float = 0.0
    sums: dict[str, float] | None = None
    lowest: float = 0.0

    def add(
        self, rewards_N: torch.Tensor, mixed_N: torch.Tensor, num_generations: int, success_reward: float = 0.5
    ) -> bool:
        """
        Take in a batch of complete groups of `num_generations` consecutive rows. A row without a reward (NaN) does not
        count, nor does a group without rewards of both kinds. Returns whether any group counted.
        """
        rewards_N, mixed_N = rewards_N.cpu().double(), mixed_N.cpu()
        on = group_means(rewards_N, ~mixed_N, num_generations)
        mixed = group_means(rewards_N, mixed_N, num_generations)
        on_policy_N = rewards_N.masked_fill(mixed_N, torch.nan)
        success = success_rates(on_policy_N, num_generations, success_reward)
        valid = ~(mixed - on).isnan()
        if not valid.any():
            return False
        finite = rewards_N[~rewards_N.isnan()]
        self.lowest = min(self.lowest, finite.min().item())
        difference = mixed - on
        new = {"on": on, "mixed": mixed, "difference": difference, "square": difference**2, "success": success}
        old = self.sums or dict.fromkeys(new, 0.0)
        self.sums = {name: self.smoothing * old[name] + values[valid].sum().item() for name, values in new.items()}
        count = valid.sum().item()
        self.groups = self.smoothing * self.groups + count
        self.squares = self.smoothing**2 * self.squares + count
        return True

    def mean(self, name: str) -> float:
        """Weighted mean over groups: `"on"`, `"mixed"`, `"difference"` or `"success"`. NaN without any group."""
        return math.nan if self.sums is None else self.sums[name] / self.groups

    @property
    def effective(self) -> float:
        """How many equally weighted groups would be as good."""
        return self.groups**2 / self.squares if self.squares else 0.0

    @property
    def standard_error(self) -> float:
        """Standard error of the mean difference; infinite where a single group is known."""
        if self.sums is None or self.effective < 1.0 + 1e-9:
            return math.inf
        variance = max(self.sums["square"] / self.groups - self.mean("difference") ** 2, 0.0)
        return math.sqrt(variance / (self.effective - 1.0))

    @property
    def half_width(self) -> float:
        """
        Half width of the one-sided 95% bounds.

        Differences that are all equal have no standard error, yet say little where they are few: rare successes are
        still to come. So two more groups count, whose differences are the largest and the smallest possible.
        """
        if not self.effective:
            return math.inf
        return Z_95 * math.hypot(self.standard_error, math.sqrt(2.0) * self.reward_range / self.effective)

    @property
    def upper(self) -> float:
        """Upper 95% bound of the mean difference."""
        return self.mean("difference") + self.half_width if self.effective else math.inf

    @property
    def lower(self) -> float:
        """Lower 95% bound of the mean difference."""
        return self.mean("difference") - self.half_width if self.effective else -math.inf

    @property
    def gain(self) -> float:
        """
        Share of the mixed reward that guidance brings, in [0, 1]: max(0, 1 - on / mixed) with rewards from 0, and
        (mixed - on) / reward_range where rewards below 0 have been seen. 1 before the first batch, and as long as no
        on-policy row has succeeded.
        """
        if self.sums is None or self.mean("success") == 0.0:
            return 1.0
        on, mixed = self.mean("on"), self.mean("mixed")
        if self.lowest < 0.0:
            share = (mixed - on) / self.reward_range
        else:
            share = 1.0 - on / mixed if mixed > 0.0 else 0.0
        return min(max(share, 0.0), 1.0)

    def state_dict(self) -> dict:
        return {"groups": self.groups, "squares": self.squares, "sums": self.sums, "lowest": self.lowest}

    def load_state_dict(self, state: dict) -> None:
        self.groups, self.squares, self.lowest = state["groups"], state["squares"], state["lowest"]
        self.sums = state["sums"] and dict(state["sums"])
