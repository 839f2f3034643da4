"""What goes to a mixed-policy vLLM engine for a request, and a rollout from what it recorded."""

import uuid
from typing import Any

import torch

from ...experts.compatibility import check_context
from ...objective import mixture_logps
from ...vllm_plugin.records import VALUES, unpack
from ...vllm_plugin.shared_options import RECORD, SCORE
from ...vllm_server.options import GAMMA, RULE, SHARE, SPAN
from ..types import BOOL_RECORDS, RECORDS, MixedRequest, MixedRollout


def assemble(
    request: MixedRequest, completions: list[list[int]], values: list[torch.Tensor], stats: dict[str, float]
) -> MixedRollout:
    """A rollout of completions and their `(T, 6)` records; a `ValueError` if a model's logits were NaN."""
    longest = max(map(len, completions), default=0)
    stacked = torch.full((len(completions), longest, len(VALUES)), torch.nan)
    for row, (ids, numbers) in enumerate(zip(completions, values)):
        column = dict(zip(VALUES, numbers.unbind(-1)))
        if column["weights"].isnan().any() or column["logps"].isnan().any():
            raise ValueError(
                f"The policy's logits are NaN in row {row}. Its weights are broken or its data type overflows: check "
                "the checkpoint, lower the learning rate, or serve it in bfloat16 or float32."
            )
        if column["expert_logps"][column["branch"] == 1.0].isnan().any():
            raise ValueError(f"The expert's logits are NaN in row {row}. Check its checkpoint, or its data type.")
        stacked[row, : len(ids)] = numbers
    records = dict(zip(VALUES, stacked.unbind(-1)))
    for name in BOOL_RECORDS:
        records[name] = records[name] == 1.0
    records["mixed_logps"] = mixture_logps(records["logps"], records["expert_logps"], records["weights"])
    counts = {"tokens": sum(map(len, completions)), "replaced": int(records["replaced"].sum())}
    return MixedRollout(completions, **{name: records[name] for name in RECORDS}, stats={**counts, **stats})


def record_keys(rows: int) -> list[str]:
    """Keys of a request's rows that no other request of any process has."""
    name = uuid.uuid4().hex
    return [f"{name}-{row}" for row in range(rows)]


def sampling_params(request: MixedRequest) -> dict[str, Any]:
    """vLLM's sampling parameters. Stop ids are explicit: the expert's own never decide where a row ends."""
    return {
        "temperature": request.temperature,
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": list(request.stop_token_ids),
        "ignore_eos": True,
    }


def extra_args(request: MixedRequest, row: int, key: str) -> dict[str, Any]:
    """Entries of a row that the plugin reads."""
    return {
        GAMMA: str(request.gamma[row]),
        RULE: request.branch_rule,
        SHARE: request.share,
        **({SPAN: request.span} if request.branch_rule == "sentence" else {}),
        RECORD: key,
        SCORE: int(request.score_all),
    }


def match_record(record: dict | None, ids: list[int], start: int, row: int) -> torch.Tensor:
    """Records `(T, 6)` of a completion; a `RuntimeError` if the engine did not record exactly these tokens."""
    if record is None:
        raise RuntimeError(f"The engine has no records of row {row}. Was it restarted while the row was sampled?")
    first, tokens, values = unpack(record)
    if values.size(0) != len(tokens) or (values == torch.inf).any():
        raise RuntimeError(f"The engine's records of row {row} are broken: {values.size(0)} of {len(tokens)} tokens.")
    if first != start or tokens[: len(ids)] != ids:
        raise RuntimeError(
            f"The engine's records of row {row} begin at token {first} with {tokens[:8]}, and the completion at "
            f"{start} with {ids[:8]}. Please report this with the versions of vLLM and mentor-trl."
        )
    return values[: len(ids)]


def check_engine_context(request: MixedRequest, limit: int) -> None:
    """Raise [`SetupError`] if a row may outgrow the engine's context."""
    lengths = [len(ids) for ids in request.prompt_ids]
    check_context(lengths, request.max_new_tokens, limit, "the engine's", "serve with a larger `--max-model-len`")
