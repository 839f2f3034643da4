"""What a server of ours says of rows, read with suspicion."""

from typing import Any

import torch

from ...vllm_plugin.records import VALUES
from ..types import MixedRequest


def completion(
    answer: Any, info: dict[str, Any], request: MixedRequest, row: int
) -> tuple[list[int], torch.Tensor | None] | None:
    """
    Token ids of the one completion of an answer of the server that is `info`, and their records if it serves the
    policy alone; `None` where it gave the row up. A `ValueError` if they are no whole row of the request.
    """
    choice = answer["choices"][0]
    if choice.get("finish_reason") == "abort":
        return None
    ids = choice["token_ids"]
    limit = info.get("num_tokens") or info.get("policy_shape", {}).get("vocab_size") or 2**31
    if not isinstance(ids, list) or not all(type(index) is int and 0 <= index < limit for index in ids):
        raise ValueError(f"the token ids of row {row} are {str(ids)[:80]}")
    whole = len(ids) == request.max_new_tokens or (ids and ids[-1] in request.stop_token_ids)
    if len(ids) > request.max_new_tokens or not whole:
        raise ValueError(
            f"row {row} has {len(ids)} tokens where {request.max_new_tokens} or a stop id were due: {str(ids[-8:])}"
        )
    return ids, None if info["kind"] == "mixed" else _policy_values(choice["logprobs"]["token_logprobs"], ids, row)


def _policy_values(logps: list[float], ids: list[int], row: int) -> torch.Tensor:
    """Records `(T, 6)` of a completion of the plain policy, of which only the log-probabilities are known."""
    if len(logps) != len(ids):
        raise ValueError(f"row {row} has {len(ids)} tokens and {len(logps)} log-probabilities")
    column = torch.tensor(logps)
    if not column.isfinite().all():
        raise ValueError(f"the log-probabilities of row {row} are not all finite: {str(logps)[:80]}")
    known = {"logps": column, "entropies": torch.nan, "expert_logps": torch.nan}
    values = torch.zeros(len(ids), len(VALUES))
    for name, value in known.items():
        values[:, VALUES.index(name)] = value
    return values
