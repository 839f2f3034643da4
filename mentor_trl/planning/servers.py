"""Whether servers answer, asked once and without patience."""

from functools import partial
from typing import Any

import httpx

from ..connection.addresses import addresses
from ..connection.client import Client, Patience
from ..connection.failures import Failed
from ..errors import EngineError
from ..experts.remote import KEY_ADVICE, expert_key
from ..rollout.serving.policy_server import PolicyServer
from .checks import Check


SECONDS = 10.0


def check_expert_server(urls: str, key_file: str | None = None, missing: str = "note") -> list[Check]:
    """Whether the servers of an expert answer; where one does not, the verdict is `missing`."""
    return [_answer(url, "expert's server", missing, partial(_models, url, key_file)) for url in addresses(urls)]


def check_policy_server(urls: str, key_file: str | None = None) -> list[Check]:
    """Whether servers of a policy, alone or with its expert, answer."""
    return [_answer(url, "policy's server", "no", partial(_policy, url, key_file)) for url in addresses(urls)]


def check_health(urls: str) -> list[Check]:
    """Whether servers answer at all."""
    return [_answer(url, "policy's server", "no", partial(_health, url)) for url in addresses(urls)]


def _answer(url: str, what: str, missing: str, ask: Any) -> Check:
    try:
        return Check(what, f"{url}: {ask()}")
    except (EngineError, Failed, httpx.HTTPError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        advice = f"Start it, or correct the address ({reason})."
        return Check(what, f"{url} does not answer", missing, advice)


def _patience() -> Patience:
    return Patience(connect=SECONDS, read=SECONDS, attempts=1, recovery=0.0)


def _health(url: str) -> str:
    httpx.get(f"{url}/health", timeout=SECONDS).raise_for_status()
    return "answers"


def _models(url: str, key_file: str | None) -> str:
    client = Client(url, _patience(), partial(expert_key, url, key_file), KEY_ADVICE)
    served = client.run(client.ask("/v1/models", "GET"))["data"][0]
    length = served.get("max_model_len")
    return served["id"] + (f", context {length:,}" if length else "")


def _policy(url: str, key_file: str | None) -> str:
    info = PolicyServer(url, patience=_patience(), api_key_file=key_file).info
    return " and ".join(str(info[name]) for name in ("policy", "expert") if info.get(name))
