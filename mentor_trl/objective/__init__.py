"""The method as pure tensor functions: no model, no trainer, no I/O."""

from .advantages import mixed_policy_advantages
from .correction import correction_weights, fold_correction
from .mixture import (
    acceptance_probability,
    branch_weight,
    couple,
    draw_coin,
    entropy_from_logps,
    match_vocabulary,
    mixture_logps,
    posterior_coin,
    posterior_replaced,
    residual,
)
from .schedule import alpha_at, entropy_threshold
from .shaping import shaping_weights


__all__ = [
    "acceptance_probability",
    "alpha_at",
    "branch_weight",
    "correction_weights",
    "couple",
    "draw_coin",
    "entropy_from_logps",
    "entropy_threshold",
    "fold_correction",
    "match_vocabulary",
    "mixed_policy_advantages",
    "mixture_logps",
    "posterior_coin",
    "posterior_replaced",
    "residual",
    "shaping_weights",
]
