"""Off-policy correction of expert tokens, folded into per-token advantages."""

import math

import torch


# exp(20) is 5e8: far beyond any cap in use, and far from overflow in float32
MAX_LOG_RATIO = 20.0


def _temper(log_ratio: torch.Tensor, cap: float, exponent: float, **_) -> torch.Tensor:
    return (exponent * log_ratio.clamp(max=math.log(cap))).exp()


def _clip(log_ratio: torch.Tensor, cap: float, floor: float, **_) -> torch.Tensor:
    return log_ratio.exp().clamp(floor, cap)


def _mask(log_ratio: torch.Tensor, cap: float, **_) -> torch.Tensor:
    ratio = log_ratio.exp()
    return torch.where(ratio <= cap, ratio, torch.zeros_like(ratio))


def _saturate(log_ratio: torch.Tensor, constant: float, **_) -> torch.Tensor:
    ratio = log_ratio.exp()
    return ratio / (ratio + constant)


CORRECTIONS = {"temper": _temper, "clip": _clip, "mask": _mask, "saturate": _saturate}
"""Weight rho of a log importance ratio, by kind."""


def correction_weights(
    log_ratio_B_T: torch.Tensor,
    where_B_T: torch.Tensor,
    kind: str = "temper",
    cap: float = 1.0,
    floor: float = 0.0,
    exponent: float = 0.25,
    constant: float = 0.1,
) -> torch.Tensor:
    """
    Weights rho >= 0 from log importance ratios log r.

    | kind | rho |
    | --- | --- |
    | `"temper"` | min(cap, r)^exponent: exponent 0 is no correction, 1 truncated importance sampling |
    | `"clip"` | r clipped to [floor, cap] |
    | `"mask"` | r where r <= cap, else 0 |
    | `"saturate"` | r / (r + constant) |

    Args:
        log_ratio_B_T (`torch.Tensor` of shape `(B, T)`):
            log r: log p - log s at branch points (level `"conditional"`) or log p - log m (level `"mixture"`), in
            nats. Values outside `where_B_T` are not read and may be NaN. Clamped to +-20 before exponentiation.
        where_B_T (`torch.Tensor` of shape `(B, T)`, `bool`):
            Tokens to correct; the weight is 1 elsewhere.
        kind (`str`, *optional*, defaults to `"temper"`):
            Kind of correction.
        cap (`float`, *optional*, defaults to `1.0`):
            Upper bound of r (`inf`: none).
        floor (`float`, *optional*, defaults to `0.0`):
            Lower bound of r with `"clip"`.
        exponent (`float`, *optional*, defaults to `0.25`):
            Exponent of `"temper"`.
        constant (`float`, *optional*, defaults to `0.1`):
            Constant of `"saturate"`.

    Returns:
        `torch.Tensor` of shape `(B, T)`, detached.

    Raises:
        `ValueError`: if there is no such kind.

    Example:
    ```python
    >>> log_ratio = torch.tensor([[0.0625, 4.0, torch.nan]]).log()
    >>> correction_weights(log_ratio, torch.tensor([[True, True, False]]), exponent=0.25)
    tensor([[0.5000, 1.0000, 1.0000]])
    ```
    """
    if kind not in CORRECTIONS:
        raise ValueError(f"Unknown correction {kind!r}; choose one of {', '.join(map(repr, CORRECTIONS))}.")
    log_ratio = log_ratio_B_T.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho = CORRECTIONS[kind](log_ratio, cap=cap, floor=floor, exponent=exponent, constant=constant)
    return torch.where(where_B_T, rho, torch.ones_like(rho))


def fold_correction(advantages: torch.Tensor, rho_B_T: torch.Tensor) -> torch.Tensor:
    """
    Per-token advantages A_it = rho_it A_i. As rho >= 0 is detached, it multiplies TRL's clipped term unchanged.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`):
            Advantages of the rollouts or of their tokens.
        rho_B_T (`torch.Tensor` of shape `(B, T)`):
            Correction weights, 1 where there is nothing to correct.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    return (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages) * rho_B_T
