"""What a server of ours says of itself, read with suspicion."""

from typing import Any

from ...connection.client import Client
from ...connection.contents import reading
from ...connection.failures import Failed, KeyRefused, ServerError, WrongServer
from ...version import __version__


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
    "branch_id": "id that ends a request at a branch point",
    "sentences_digest": "table of sentence ends (digest)",
    "dtype": "data type",
}


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


async def server_info(client: Client, known: bool) -> dict[str, Any]:
    """What a server says of itself; `known` is whether it has answered before."""
    health = await client.response("/health", "GET")
    if health.status_code >= 500:
        raise ServerError(f"{client.url} is not healthy: {health.status_code} {health.text[:300]}")
    try:
        info = check_fields(await client.call("mentor_info"), client.url)
        paused = await client.ask("/is_paused", "GET")
        with reading(client.url, "/is_paused"):
            return {**info, "paused": bool(paused["is_paused"])}
    except KeyRefused:
        raise
    except (ServerError, Failed) as error:
        # A 5xx speaks of a stock server only where none has answered before
        if known and isinstance(error, Failed):
            raise ServerError(str(error)) from error
        raise WrongServer(
            f"{client.url} is not a MENTOR server, or its dev endpoints are off ({error}). {ADVICE}."
        ) from error
