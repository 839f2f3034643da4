"""What a segment of a row asks of the policy's engine, in vLLM's sampling parameters."""

import math
from typing import Any

from ...objective.coins import request_seed
from ...vllm_server.options import GAMMA, RULE, SEED, SHARE, SPAN
from ..types import MixedRequest
from .stock_rows import Segment, Truncation


# Settings that a server may have defaults for: of every request, so that nothing but what is asked for applies
NEUTRAL = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


def segment_settings(
    request: MixedRequest, row: int, position: int, limit: int, branch_id: int, truncation: Truncation
) -> dict[str, Any]:
    """Sampling parameters of a row that goes on at a position."""
    return {
        "temperature": request.temperature,
        "top_p": truncation.top_p,
        "top_k": truncation.top_k,
        "min_p": truncation.min_p,
        "max_tokens": limit,
        "stop_token_ids": [*request.stop_token_ids, branch_id],
        "ignore_eos": True,
        "logprobs": 0,
        "seed": request_seed(request.row_seeds[row], position, "policy"),
        **NEUTRAL,
    }


def branch_settings(request: MixedRequest, row: int) -> dict[str, Any]:
    """Entries of a row that the processor reads; none for a row of the plain policy."""
    if request.gamma[row] == math.inf:
        return {}
    settings = {
        GAMMA: str(request.gamma[row]),
        RULE: request.branch_rule,
        SHARE: request.share,
        SEED: str(request.row_seeds[row]),
    }
    return settings | ({SPAN: request.span} if request.branch_rule == "sentence" else {})


def as_segment(token_ids: list[int], logps: list[float], branch_id: int) -> Segment:
    """A segment of what an engine sampled."""
    branched = bool(token_ids) and token_ids[-1] == branch_id
    end = len(token_ids) - branched
    return Segment(token_ids[:end], logps[:end], branched)
