"""What an expert's log-probabilities make of the policy's tokens."""

import math

import torch

from .correction import MAX_LOG_RATIO


DISTILLATIONS = ("none", "opd", "gats", "distilled_rl")
DISTILLATION_LOSSES = ("sampled", "top_k", "full")


def _log_ratio(expert_logps: torch.Tensor, policy_logps: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    log_ratio = (expert_logps - policy_logps).detach().float()
    return torch.where(where, log_ratio, torch.zeros_like(log_ratio)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def distillation_advantages(
    expert_logps_B_T: torch.Tensor, policy_logps_B_T: torch.Tensor, where_B_T: torch.Tensor
) -> torch.Tensor:
    """
    Advantages A = log s - log p of tokens that the policy drew: the gradient of -A log p is in expectation that of the
    reverse KL divergence KL(p || s) at each prefix.

    Args:
        expert_logps_B_T (`torch.Tensor` of shape `(B, T)`):
            log s of the tokens, in nats. -inf is allowed: A is bounded to +-20 nats.
        policy_logps_B_T (`torch.Tensor` of shape `(B, T)`):
            log p of the tokens under the policy that drew them.
        where_B_T (`torch.Tensor` of shape `(B, T)`, `bool`):
            Tokens that count; A is 0 elsewhere, where both may be NaN.

    Returns:
        `torch.Tensor` of shape `(B, T)`, detached.

    Example:
    ```python
    >>> logs, logp = torch.tensor([[0.5, 0.0, torch.nan]]).log(), torch.tensor([[0.25, 0.5, 0.5]]).log()
    >>> distillation_advantages(logs, logp, torch.tensor([[True, True, False]]))
    tensor([[  0.6931, -20.0000,   0.0000]])
    ```
    """
    return _log_ratio(expert_logps_B_T, policy_logps_B_T, where_B_T)


def preference_weights(
    expert_logps_B_T: torch.Tensor, policy_logps_B_T: torch.Tensor, where_B_T: torch.Tensor, clip: float = 3.0
) -> torch.Tensor:
    r"""
    Weights of [Distilled RL](https://huggingface.co/papers/2607.17247): s / p of each token, clipped to
    [1 / clip, clip] and divided by its geometric mean over the row.

    Args:
        expert_logps_B_T (`torch.Tensor` of shape `(B, T)`):
            log s of the tokens, in nats; -inf is allowed.
        policy_logps_B_T (`torch.Tensor` of shape `(B, T)`):
            log p of the tokens under the policy that drew them.
        where_B_T (`torch.Tensor` of shape `(B, T)`, `bool`):
            Tokens that are weighed, whose geometric mean in each row is then 1; the weight is 1 elsewhere.
        clip (`float`, *optional*, defaults to `3.0`):
            Bound of the ratio, at least 1.

    Returns:
        `torch.Tensor` of shape `(B, T)`, detached.

    Example:
    ```python
    >>> logs, logp = torch.tensor([[0.8, 0.1, 0.3]]).log(), torch.tensor([[0.2, 0.1, 0.9]]).log()
    >>> preference_weights(logs, logp, torch.tensor([[True, True, True]]))
    tensor([[3.0000, 1.0000, 0.3333]])
    ```
    """
    bound = math.log(clip)
    log_ratio = _log_ratio(expert_logps_B_T, policy_logps_B_T, where_B_T).clamp(-bound, bound)
    mean_B = log_ratio.sum(dim=1) / where_B_T.sum(dim=1).clamp(min=1)
    return torch.where(where_B_T, (log_ratio - mean_B.unsqueeze(1)).exp(), torch.ones_like(log_ratio))


def score_gap(student: float, teacher: float) -> float:
    """
    GATS's weight of distillation, max(1 - student / teacher, 0). Without a positive score of the teacher there is
    nothing to compare with, and the weight is 1.

    Example:
    ```python
    >>> [score_gap(0.2, 0.8), score_gap(0.9, 0.8), score_gap(0.0, 0.0)]
    [0.75, 0.0, 1.0]
    ```
    """
    return max(1.0 - student / teacher, 0.0) if teacher > 0.0 else 1.0
