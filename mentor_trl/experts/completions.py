"""Requests for completions of token ids to a stock vLLM server, and its answers."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from ..connection.failures import Failed


PATH = "/v1/completions"
# What is not set comes from the server's generation config
NEUTRAL = {
    "n": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
    "stop_token_ids": [],
    "logprobs": 0,
    # ids stand among the log-probabilities; `return_token_ids` would send the prompt back, too
    "return_tokens_as_token_ids": True,
}


class Truncated(Protocol):
    """What is cut off of the expert's tempered distribution before a token is drawn."""

    top_p: float
    top_k: int
    min_p: float


def completion_body(model: str, prompt: Sequence[int], count: int, **settings: Any) -> dict[str, Any]:
    """Request for `count` tokens behind a prompt."""
    return {"model": model, "prompt": list(prompt), "max_tokens": count, **NEUTRAL, **settings}


def truncation_settings(truncation: Truncated | None) -> dict[str, Any]:
    """Settings of a request by which the expert is truncated."""
    if truncation is None:
        return {}
    return {"top_p": truncation.top_p, "top_k": truncation.top_k, "min_p": truncation.min_p}


def only_choice(answer: Any) -> dict[str, Any]:
    """The one completion of an answer; [`Failed`] where the server gave it up."""
    (choice,) = answer["choices"]
    if choice["finish_reason"] not in ("stop", "length"):
        raise Failed(f"a completion ended by {choice['finish_reason']!r}")
    return choice


def drawn(answer: Any, count: int, stop_token_ids: Sequence[int]) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of a completion; a `ValueError` if they are not what was asked for."""
    logprobs = only_choice(answer)["logprobs"]
    ids = [_token_id(name) for name in logprobs["tokens"]]
    logps = [_finite(logp) for logp in logprobs["token_logprobs"]]
    if len(logps) != len(ids):
        raise ValueError(f"{len(ids)} tokens and {len(logps)} log-probabilities")
    ends = [at for at, index in enumerate(ids) if index in stop_token_ids]
    due = ends[0] + 1 if ends else count
    if len(ids) != due:
        raise ValueError(f"{len(ids)} tokens where {due} were due: {ids[-8:]}")
    return ids, logps


def top_logps(answer: Any) -> dict[int, float]:
    """Log-probabilities of several ids in the place of the first token."""
    return {
        _token_id(name): _finite(logp) for name, logp in only_choice(answer)["logprobs"]["top_logprobs"][0].items()
    }


def prompt_logps(answer: Any, prompt: Sequence[int]) -> list[float]:
    """Log-probabilities of all ids of a prompt but the first."""
    entries = only_choice(answer)["prompt_logprobs"]
    if len(entries) != len(prompt):
        raise ValueError(f"{len(entries)} log-probabilities of a prompt of {len(prompt)} tokens")
    return [_finite(entry[str(index)]["logprob"]) for entry, index in zip(entries[1:], prompt[1:])]


def _token_id(name: str) -> int:
    word, _, number = name.partition(":")
    if word != "token_id" or not number.isdecimal():
        raise ValueError(f"{name[:40]!r} where an id of a token was due")
    return int(number)


def _finite(logp: Any) -> float:
    if type(logp) not in (float, int) or not math.isfinite(logp) or logp > 1e-3:
        raise ValueError(f"{logp!r} where a log-probability was due; a model's logits may be NaN")
    return float(logp)
