"""Advantages of on-policy and mixed rollouts (Eq. 10 and 11 of [MENTOR](https://huggingface.co/papers/2510.04140))."""

import torch
from trl.trainer.utils import nanstd


MIXED_SCALES = ("range", "std", "group_std")
"""What the advantages of mixed rows are divided by."""


def mixed_policy_advantages(
    rewards_N: torch.Tensor,
    mixed_N: torch.Tensor,
    num_generations: int,
    alpha: float,
    reward_range: float = 1.0,
    scale_rewards: str = "group",
    mixed_scale: str = "range",
) -> torch.Tensor:
    r"""
    Advantages over complete groups of `num_generations` consecutive rows.

    On-policy rows are normalized as in [`~trl.GRPOTrainer`], with statistics over the on-policy rows only. Mixed rows
    get alpha * max(0, R - mean(G_on)) / R_range: a mixed rollout that fails is ignored, not punished. Without mixed
    rows this is TRL's own computation. A group of mixed rows only has their mean as its baseline.

    Undefined cases: a row whose reward is NaN (every reward function returned `None`) has advantage 0 and enters no
    statistic; where every on-policy reward of a group is NaN, the whole group has advantage 0; where a single one is
    left, the on-policy standard deviation is undefined and that row has advantage 0.

    Args:
        rewards_N (`torch.Tensor` of shape `(N,)`):
            Rewards of all processes, NaN where undefined.
        mixed_N (`torch.Tensor` of shape `(N,)`, `bool`):
            Whether a row was drawn from the mixed policy.
        num_generations (`int`):
            Rows of a group.
        alpha (`float`):
            Current weight of the mixed advantages.
        reward_range (`float`, *optional*, defaults to `1.0`):
            R_range.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            TRL's scaling of the on-policy rows: `"group"`, `"batch"` (standard deviation over all on-policy rows) or
            `"none"`.
        mixed_scale (`str`, *optional*, defaults to `"range"`):
            What the mixed advantages are divided by: `"range"`, R_range; `"std"`, the standard deviation of the
            rewards of the group's baseline, the on-policy rows, plus 1e-4; `"group_std"`, that of all its rows, plus
            1e-4.

    Returns:
        `torch.Tensor` of shape `(N,)`.

    Example:
    ```python
    >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    >>> mixed = torch.tensor([False, False, True, True])
    >>> mixed_policy_advantages(rewards, mixed, num_generations=4, alpha=1.0)
    tensor([ 0.7070, -0.7070,  0.5000,  0.0000])
    ```
    """
    baseline_N = rewards_N.masked_fill(~baseline_rows(mixed_N, num_generations), torch.nan)
    baseline_G = baseline_N.view(-1, num_generations)
    spread = lambda rewards_G: nanstd(rewards_G, dim=1).repeat_interleave(num_generations, dim=0) + 1e-4
    mean_N = torch.nanmean(baseline_G, dim=1).repeat_interleave(num_generations, dim=0)

    advantages_N = baseline_N - mean_N
    if scale_rewards == "group":
        advantages_N = advantages_N / spread(baseline_G)
    elif scale_rewards == "batch":
        advantages_N = advantages_N / (nanstd(baseline_N) + 1e-4)
    elif scale_rewards != "none":
        raise ValueError(f"Unknown scale_rewards {scale_rewards!r}; choose 'group', 'batch' or 'none'.")

    if mixed_scale not in MIXED_SCALES:
        raise ValueError(
            f"Unknown scale of mixed advantages {mixed_scale!r}; choose one of {', '.join(map(repr, MIXED_SCALES))}."
        )
    if mixed_scale == "range":
        scale = reward_range
    else:
        scale = spread(baseline_G if mixed_scale == "std" else rewards_N.view(-1, num_generations))
    guided_N = alpha * (rewards_N - mean_N).clamp(min=0.0) / scale
    return torch.where(mixed_N, guided_N, advantages_N).nan_to_num(nan=0.0)


def baseline_rows(mixed_N: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Rows whose rewards are the baseline of their group: the on-policy ones, or all where none is.

    Example:
    ```python
    >>> baseline_rows(torch.tensor([False, True, True, True]), num_generations=2)
    tensor([ True, False,  True,  True])
    ```
    """
    mixed_G = mixed_N.view(-1, num_generations)
    return (~mixed_G | mixed_G.all(dim=1, keepdim=True)).flatten()
