"""What a request to an engine that branches may ask for."""

import math
from dataclasses import dataclass
from typing import Any

from ..objective import BRANCH_RULES
from .options import GAMMA, RULE, SEED, SHARE, SPAN


NAMES = (GAMMA, RULE, SHARE, SPAN, SEED)
GREEDY = 1e-5
# Parameters, and the values at which they leave the policy's distribution, or the place where a row ends, alone.
# Truncation (top_p, top_k, min_p) is not among them: it applies to what is drawn, and w does not depend on it.
NEUTRAL = {
    **dict.fromkeys(("n", "repetition_penalty"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_tokens"), (0,)),
    **dict.fromkeys(("logit_bias", "allowed_token_ids", "bad_words", "stop"), (None, {}, [])),
    **dict.fromkeys(("structured_outputs", "thinking_token_budget", "repetition_detection"), (None,)),
}


@dataclass(frozen=True)
class BranchOptions:
    """Where a row branches."""

    gamma: float = math.inf  # entropy threshold in nats; `inf` is the plain policy
    rule: str = "entropy"  # see [`~mentor_trl.objective.branch_weight`]
    share: float = 0.0  # weight of the rules `"random"` and `"sentence"`
    span: int = 1  # first tokens of a sentence
    seed: int = 0  # of the row's coins


def parse_branching(extra_args: dict[str, Any] | None) -> BranchOptions:
    """Read `SamplingParams.extra_args` (`vllm_xargs` over HTTP); a `ValueError` names the entry that is wrong."""
    extra = {name: value for name, value in (extra_args or {}).items() if name.startswith("mentor")}
    unknown = sorted(extra.keys() - set(NAMES))
    if unknown:
        raise ValueError(f"Unknown entries {unknown}; a request to a server of a policy knows {list(NAMES)}.")
    gamma, share = _number(extra, GAMMA, float, math.inf), _number(extra, SHARE, float, 0.0)
    span, seed = _number(extra, SPAN, int, 1), _number(extra, SEED, int, 0)
    rule = extra.get(RULE, "entropy")
    if not gamma > 0.0:
        raise ValueError(f"`{GAMMA}` is {gamma}; it must be positive (inf for the plain policy).")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`{SHARE}` is {share}; it must be in [0, 1].")
    if rule not in BRANCH_RULES:
        raise ValueError(f"`{RULE}` is {rule!r}; choose one of {list(BRANCH_RULES)}.")
    if span < 1:
        raise ValueError(f"`{SPAN}` is {span}; it must be at least 1.")
    if not 0 <= seed < 2**62:
        raise ValueError(f"`{SEED}` is {seed}; it must be in [0, 2^62).")
    if gamma < math.inf and SEED not in extra:
        raise ValueError(f"A request with `{GAMMA}` needs `{SEED}`, a number of its row: coins depend on it alone.")
    return BranchOptions(gamma, rule, share, span, seed)


def _number(extra: dict[str, Any], name: str, kind: type, default):
    value = extra.get(name, default)
    try:
        if isinstance(value, (bool, list)) or (kind is int and isinstance(value, float)):
            raise ValueError("of another type")
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` is {value!r}; it must be {'an integer' if kind is int else 'a number'}.") from None


def check_branching(params) -> None:
    """
    Refuse `SamplingParams` under which a row would not be one of the mixed policy, rather than ignore them. A
    `ValueError` names the parameters, their values and what to change. Requests without gamma may ask for anything.
    """
    options = parse_branching(params.extra_args)
    if options.gamma == math.inf:
        return
    given = {name: getattr(params, name, allowed[0]) for name, allowed in NEUTRAL.items()}
    refused = [f"{name}={value!r}" for name, value in given.items() if value not in NEUTRAL[name]]
    if refused:
        raise ValueError(
            f"A request with `{GAMMA}` samples from the policy's own distribution until a branch point, and cannot "
            f"honour {', '.join(refused)}. Leave these out (for `stop`, use `stop_token_ids`), or leave `{GAMMA}` out."
        )
    if params.temperature < GREEDY:
        raise ValueError(
            f"temperature={params.temperature} is greedy decoding, for which there is no mixed policy. Set a positive "
            f"temperature, or leave `{GAMMA}` out."
        )
