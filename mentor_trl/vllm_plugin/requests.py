"""What a request to a mixed-policy engine may ask for."""

import math
from dataclasses import dataclass
from typing import Any

from ..objective import BRANCH_RULES
from ..vllm_server.options import GAMMA, RULE, SHARE, SPAN
from .shared_options import RECORD, SCORE


NAMES = (GAMMA, RULE, SHARE, SPAN, RECORD, SCORE)
# Parameters, and the values at which they leave the models' distributions alone
NEUTRAL = {
    **dict.fromkeys(("top_p", "repetition_penalty"), (1,)),
    **dict.fromkeys(("min_p", "presence_penalty", "frequency_penalty", "min_tokens"), (0,)),
    "top_k": (-1, 0),
    **dict.fromkeys(("logit_bias", "allowed_token_ids", "bad_words"), (None, {}, [])),
    **dict.fromkeys(("structured_outputs", "prompt_logprobs", "seed"), (None,)),
}


@dataclass(frozen=True)
class RowOptions:
    """How a row is sampled."""

    gamma: float = math.inf  # entropy threshold in nats; `inf` is the plain policy
    rule: str = "entropy"  # see [`~mentor_trl.objective.branch_weight`]
    share: float = 0.0  # weight of the rules `"random"` and `"sentence"`
    span: int = 1  # first tokens of a sentence
    record: str | None = None  # key under which the engine keeps the per-token records until they are fetched
    score: bool = False  # whether log s is recorded at every token with w > 0 rather than at branch points only


def parse_row(extra_args: dict[str, Any] | None) -> RowOptions:
    """Read `SamplingParams.extra_args` (`vllm_xargs` over HTTP); a `ValueError` names the entry that is wrong."""
    extra = {name: value for name, value in (extra_args or {}).items() if name.startswith("mentor")}
    unknown = sorted(extra.keys() - set(NAMES))
    if unknown:
        raise ValueError(f"Unknown entries {unknown}; a request knows {list(NAMES)}.")
    try:
        gamma, share, span = float(extra.get(GAMMA, math.inf)), float(extra.get(SHARE, 0.0)), int(extra.get(SPAN, 1))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{GAMMA}`, `{SHARE}` and `{SPAN}` must be numbers ('inf' is one): {error}.") from error
    if not gamma > 0.0:
        raise ValueError(f"`{GAMMA}` is {gamma}; it must be positive (inf for the plain policy).")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`{SHARE}` is {share}; it must be in [0, 1].")
    if span < 1:
        raise ValueError(f"`{SPAN}` is {span}; it must be at least 1.")
    rule = extra.get(RULE, "entropy")
    if rule not in BRANCH_RULES:
        raise ValueError(f"`{RULE}` is {rule!r}; choose one of {list(BRANCH_RULES)}.")
    return RowOptions(gamma, rule, share, span, extra.get(RECORD), bool(int(extra.get(SCORE, 0))))


def check_params(params) -> None:
    """
    Refuse `SamplingParams` that the engine could not sample exactly, rather than ignore them. A `ValueError` names the
    parameters, their values and what to change.
    """
    row = parse_row(params.extra_args)
    given = {name: getattr(params, name) for name in NEUTRAL}
    refused = [f"{name}={value!r}" for name, value in given.items() if value not in NEUTRAL[name]]
    if refused:
        raise ValueError(
            f"A mixed-policy engine samples from the models' own distributions at a temperature, and cannot honour "
            f"{', '.join(refused)}. Leave these out, or ask a plain vLLM server."
        )
    if params.temperature < 1e-5:
        raise ValueError(
            f"temperature={params.temperature} is greedy decoding, for which there is no mixed policy. Set a positive "
            "temperature, or ask a plain vLLM server."
        )
    if params.logprobs not in (None, 0):
        raise ValueError(
            f"logprobs={params.logprobs}: the engine knows log m of the sampled token only. Set logprobs=0."
        )
    if row.record is not None and params.n != 1:
        raise ValueError(f"n={params.n} with `{RECORD}`: send one request per row, each with its own key.")
