"""What a request to a mixed-policy engine may ask for."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..objective import BRANCH_RULES
from .options import GAMMA, RECORD, RULE, SCORE, SHARE


if TYPE_CHECKING:
    from vllm import SamplingParams


@dataclass(frozen=True)
class RowOptions:
    """
    How a row is sampled.

    Args:
        gamma (`float`, *optional*, defaults to `inf`):
            Entropy threshold in nats; `inf` is the plain policy.
        rule (`str`, *optional*, defaults to `"entropy"`):
            See [`~mentor_trl.objective.branch_weight`].
        share (`float`, *optional*, defaults to `0.0`):
            Weight of the rule `"random"`.
        record (`str`, *optional*):
            Key under which the engine keeps the per-token records until they are fetched.
        score (`bool`, *optional*, defaults to `False`):
            Whether log s is recorded at every token with w > 0 rather than at branch points only.
    """

    gamma: float = math.inf
    rule: str = "entropy"
    share: float = 0.0
    record: str | None = None
    score: bool = False

    @property
    def mixed(self) -> bool:
        return self.gamma != math.inf


def parse_row(extra_args: dict[str, Any] | None) -> RowOptions:
    """
    Read `SamplingParams.extra_args` (`vllm_xargs` over HTTP).

    Raises:
        `ValueError`: naming the entry that is unknown or out of range.
    """
    extra = {name: value for name, value in (extra_args or {}).items() if name.startswith("mentor")}
    unknown = sorted(extra.keys() - {GAMMA, RULE, SHARE, RECORD, SCORE})
    if unknown:
        raise ValueError(f"Unknown entries {unknown}; a request knows {[GAMMA, RULE, SHARE, RECORD, SCORE]}.")
    try:
        gamma, share = float(extra.get(GAMMA, math.inf)), float(extra.get(SHARE, 0.0))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{GAMMA}` and `{SHARE}` must be numbers ('inf' is one): {error}.") from error
    if not gamma > 0.0:
        raise ValueError(f"`{GAMMA}` is {gamma}; it must be positive (inf for the plain policy).")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"`{SHARE}` is {share}; it must be in [0, 1].")
    rule = extra.get(RULE, "entropy")
    if rule not in BRANCH_RULES:
        raise ValueError(f"`{RULE}` is {rule!r}; choose one of {list(BRANCH_RULES)}.")
    return RowOptions(gamma, rule, share, extra.get(RECORD), bool(int(extra.get(SCORE, 0))))


def check_params(params: "SamplingParams") -> None:
    """
    Refuse what the engine could not sample exactly, rather than ignore it.

    Raises:
        `ValueError`: naming the parameters, their values and what to change.
    """
    row = parse_row(params.extra_args)
    neutral = {
        "top_p": params.top_p == 1.0,
        "top_k": params.top_k in (-1, 0),
        "min_p": params.min_p == 0.0,
        "presence_penalty": params.presence_penalty == 0.0,
        "frequency_penalty": params.frequency_penalty == 0.0,
        "repetition_penalty": params.repetition_penalty == 1.0,
        "min_tokens": params.min_tokens == 0,
        "logit_bias": not params.logit_bias,
        "allowed_token_ids": not params.allowed_token_ids,
        "bad_words": not params.bad_words,
        "structured_outputs": params.structured_outputs is None,
        "prompt_logprobs": params.prompt_logprobs is None,
        "seed": params.seed is None,
    }
    refused = [f"{name}={getattr(params, name)!r}" for name, fine in neutral.items() if not fine]
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
