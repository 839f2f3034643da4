"""The method as pure tensor functions: no model, no trainer, no I/O."""

from .advantages import MIXED_SCALES, baseline_rows, mixed_policy_advantages
from .coins import coin_uniforms, request_seed
from .correction import CORRECTIONS, correction_weights, fold_correction
from .distillation import (
    DISTILLATION_LOSSES,
    DISTILLATIONS,
    distillation_advantages,
    preference_weights,
    reverse_kl,
    score_gap,
)
from .gap import Gap, success_rates
from .mixture import (
    BRANCH_RULES,
    acceptance_probability,
    branch_weight,
    couple,
    draw_coin,
    entropy_from_logps,
    match_vocabulary,
    mixture_logps,
    residual,
)
from .schedule import ALPHA_SCHEDULES, SCHEDULES, alpha_at, entropy_threshold
from .sentences import near_sentence_end, sentence_endings
from .shaping import shaping_weights


__all__ = [
    "ALPHA_SCHEDULES",
    "BRANCH_RULES",
    "CORRECTIONS",
    "DISTILLATIONS",
    "DISTILLATION_LOSSES",
    "MIXED_SCALES",
    "Gap",
    "SCHEDULES",
    "acceptance_probability",
    "alpha_at",
    "baseline_rows",
    "branch_weight",
    "coin_uniforms",
    "correction_weights",
    "couple",
    "distillation_advantages",
    "draw_coin",
    "entropy_from_logps",
    "entropy_threshold",
    "fold_correction",
    "match_vocabulary",
    "mixed_policy_advantages",
    "mixture_logps",
    "near_sentence_end",
    "preference_weights",
    "request_seed",
    "residual",
    "reverse_kl",
    "score_gap",
    "sentence_endings",
    "shaping_weights",
    "success_rates",
]
