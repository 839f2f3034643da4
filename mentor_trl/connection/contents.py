"""What a server answers, read with suspicion: a proxy, another program or a broken server may answer in its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from .failures import Failed, KeyRefused, ServerError, WrongServer


def content(response: httpx.Response, key_advice: str) -> Any:
    """
    The JSON of an answer; `None` where it is empty. Raises [`Failed`] for 5xx, [`ServerError`] for a refusal, and
    [`WrongServer`] where no server of ours would refuse or answer so.
    """
    url, status = response.request.url, response.status_code
    text = " ".join(response.text[:2000].split())[:300]
    if status >= 500:
        raise Failed(f"{url} answered {status}: {text}")
    if status == 401:
        raise KeyRefused(f"{url} refuses the key ({text}). {key_advice}")
    if not 200 <= status < 300:
        error = ServerError if status in (400, 413, 422) else WrongServer
        raise error(f"{url} refused with {status}: {text}")
    try:
        return response.json() if response.content else None
    except (ValueError, RecursionError):
        kind = response.headers.get("content-type", "no content type")
        raise WrongServer(f"{url} answered {kind} and not JSON: {text}. Is a proxy in between?") from None


@contextmanager
def reading(url: str, path: str, error: type[ServerError] = ServerError) -> Iterator[None]:
    """Inside, an answer that is not of the shape that is read ends in an error that names the server."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as wrong:
        if isinstance(wrong, ServerError):
            raise
        what = f"no {wrong}" if isinstance(wrong, KeyError) else str(wrong)
        raise error(f"{url} answered {path} with something that cannot be used: {what}.") from wrong
