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


def reverse_kl(policy_logps: torch.Tensor, expert_logps: torch.Tensor, top_k: int = 0) -> torch.Tensor:
    r"""
    KL(p || s) of distributions over a vocabulary, in nats, with its gradient.

    The gradient is sum_v (log p - log s) grad p, whose other part sums to 0. A log ratio is bounded to +-20 nats, so
    that tokens which the expert never writes have a finite one, as in [`distillation_advantages`].

    Args:
        policy_logps (`torch.Tensor` of shape `(..., V)`):
            log p, in nats.
        expert_logps (`torch.Tensor` of shape `(..., V)`):
            log s, in nats; -inf is allowed.
        top_k (`int`, *optional*, defaults to `0`):
            If positive, the divergence is that of k + 1 outcomes: the policy's k likeliest tokens, and all others.

    Returns:
        `torch.Tensor` of shape `(...)`.

    Example:
    ```python
    >>> p, s = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    >>> reverse_kl(p, s), reverse_kl(p, s, top_k=1)
    (tensor(0.1733), tensor(0.1438))
    ```
    """
    if 0 < top_k < policy_logps.size(-1):
        support = policy_logps.topk(top_k, dim=-1).indices
        policy_logps, expert_logps = (_with_rest(logps.gather(-1, support)) for logps in (policy_logps, expert_logps))
    gap = (policy_logps - expert_logps).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (policy_logps.exp() * torch.where(policy_logps.isneginf(), torch.zeros_like(gap), gap)).sum(dim=-1)


def _with_rest(logps: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, and behind them that of all other tokens."""
    total = logps.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logps, torch.log(-torch.expm1(total))], dim=-1)


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
