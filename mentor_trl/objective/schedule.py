"""How much the expert is heard: the weight alpha of mixed advantages and the entropy threshold gamma."""

import math

import torch


ALPHA_SCHEDULES = {
    "cosine": lambda k, K: (1.0 + math.cos(math.pi * k / K)) / 2.0,
    "linear": lambda k, K: 1.0 - k / K,
    "constant": lambda k, K: 1.0,
}
"""alpha / alpha_0 at rollout batch k of the decay's K."""
SCHEDULES = (*ALPHA_SCHEDULES, "adaptive")
"""`"adaptive"` follows the rewards instead, see [`~mentor_trl.objective.Gap`]."""


def alpha_at(batch: int, schedule: str = "cosine", alpha: float = 1.0, decay_steps: int = 120) -> float:
    """
    alpha at a rollout batch.

    Args:
        batch (`int`):
            Number of rollout batches generated so far, 0 at the first.
        schedule (`str`, *optional*, defaults to `"cosine"`):
            `"cosine"`: alpha_0 (1 + cos(pi k / K)) / 2. `"linear"`: alpha_0 (1 - k / K). Both are 0 from K on.
            `"constant"`: alpha_0.
        alpha (`float`, *optional*, defaults to `1.0`):
            alpha_0.
        decay_steps (`int`, *optional*, defaults to `120`):
            K, in rollout batches.

    Returns:
        `float`.

    Raises:
        `ValueError`: if there is no such schedule.

    Example:
    ```python
    >>> [alpha_at(k, decay_steps=4) for k in (0, 2, 4)]
    [1.0, 0.5, 0.0]
    ```
    """
    if schedule not in ALPHA_SCHEDULES:
        raise ValueError(
            f"Unknown alpha schedule {schedule!r}; choose one of {', '.join(map(repr, ALPHA_SCHEDULES))}."
        )
    if schedule != "constant" and batch >= decay_steps:
        return 0.0
    return alpha * ALPHA_SCHEDULES[schedule](batch, decay_steps)


def entropy_threshold(
    entropies: torch.Tensor, quantile: float = 0.95, minimum: float = 0.1, fixed: float | None = None
) -> float:
    """
    gamma: a quantile (linearly interpolated) of token entropies, bounded from below.

    Args:
        entropies (`torch.Tensor` of shape `(N,)`):
            Entropies of the on-policy tokens of a rollout batch over all processes, in nats, at least one.
        quantile (`float`, *optional*, defaults to `0.95`):
            Quantile in [0, 1].
        minimum (`float`, *optional*, defaults to `0.1`):
            Lower bound in nats. A quantile of 0 nats would send every token to the expert.
        fixed (`float`, *optional*):
            Returned as it is, when set.

    Returns:
        `float`, in nats.
    """
    if fixed is not None:
        return fixed
    if entropies.numel() == 0:
        raise ValueError("The entropy threshold needs at least one on-policy token, and the rollout batch has none.")
    # torch.quantile refuses inputs of more than 16M elements
    ordered = entropies.cpu().double().sort().values
    position = quantile * (ordered.numel() - 1)
    low = math.floor(position)
    high = min(low + 1, ordered.numel() - 1)
    value = torch.lerp(ordered[low], ordered[high], position - low).item()
    return max(value, minimum)
