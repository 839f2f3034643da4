"""What a server of ours says of itself and of rows, read with suspicion."""

from typing import Any

import torch

from ...connection.failures import WrongServer
from ...version import __version__
from ...vllm_plugin.records import VALUES
from ..types import MixedRequest


ADVICE = "Start one with `mentor-trl serve --policy ... --expert ...`"
FIELDS: dict[str, type] = {
    "kind": str,
    "mentor_trl": str,
    "policy": str,
    "max_model_len": int,
    "weights_version": str,
    "policy_shape": dict,
    "dtype": str,
    "num_tokens": int,
    "expert": str,
    "expert_stop_ids": list,
}
ALWAYS = ("kind", "mentor_trl", "policy", "max_model_len", "weights_version")
# What a server that comes back must be as before, and how it is called in an error
IDENTITY = {
    "kind": "kind of server",
    "expert": "expert",
    "expert_digest": "expert's weights (digest)",
    "policy": "policy",
    "policy_shape": "shape of the policy",
    "policy_digest": "policy's first weights (digest)",
    "num_tokens": "number of tokens",
    "dtype": "data type",
}


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


def check_fields(info: Any, url: str) -> dict[str, Any]:
    """What a server says of itself; a [`WrongServer`] if it is incomplete, or of other types."""
    if isinstance(info, dict):
        wrong = [name for name in ALWAYS if name not in info]
        wrong += [name for name, kind in FIELDS.items() if name in info and type(info[name]) is not kind]
        if not wrong and info["kind"] in ("mixed", "policy"):
            return info
    raise WrongServer(f"{url} says of itself {str(info)[:200]!r}, which is not what a MENTOR server says.")


def check_info(info: dict[str, Any], url: str, kind: str | None, num_tokens: int | None) -> None:
    """Raise [`WrongServer`] if a server is not the one that is needed."""
    if kind is not None and info["kind"] != kind:
        serves = {"mixed": "a policy and its expert", "policy": "a policy alone"}
        option = {"mixed": "with", "policy": "without"}[kind]
        raise WrongServer(
            f"{url} serves {serves[info['kind']]}, and what is needed is {serves[kind]}. Start it with `mentor-trl "
            f"serve --policy ...` {option} --expert."
        )
    if info["mentor_trl"] != __version__:
        raise WrongServer(
            f"{url} runs mentor-trl {info['mentor_trl']} and this is {__version__}. Install the same version on both."
        )
    if kind == "mixed" and num_tokens is not None and info.get("num_tokens") != num_tokens:
        raise WrongServer(
            f"{url} samples {info.get('num_tokens')} token ids, and the policy's tokenizer defines {num_tokens}. "
            f"Serve that policy ({info['policy']!r} is served), or pass `--num-tokens {num_tokens}` to `mentor-trl "
            "serve`."
        )


def check_same(first: dict[str, Any], info: dict[str, Any], url: str) -> None:
    """Raise [`WrongServer`] if a server that was restarted is not the one that it was."""
    for name, what in IDENTITY.items():
        if first.get(name) != info.get(name):
            models = " and ".join(f"{model} {first[model]!r}" for model in ("policy", "expert") if model in first)
            raise WrongServer(
                f"{url} was restarted as another server: its {what} was {first.get(name)!r} and is now "
                f"{info.get(name)!r}. Restart it with the {models}, and the options that it had."
            )
