"""A client of one server: many small requests at once, from coroutines of any event loop and from plain code."""

import asyncio
import itertools
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx

from ..vllm_server.keys import key_of
from . import background
from .addresses import checked_address
from .contents import content, reading
from .failures import TRANSIENT, Exhausted, ServerError, WrongServer


T = TypeVar("T")
# uvicorn closes idle connections after 5 s: ours end earlier, so that none is used while it closes
IDLE_SECONDS = 2.0
KEY_ADVICE = (
    "`mentor-trl serve` says where its key is: name that file in `vllm_server_api_key_file` (`--api-key-file`), or "
    "set MENTOR_TRL_API_KEY to the key."
)


@dataclass(frozen=True)
class Patience:
    """How long a client keeps trying. A request that the server refuses (4xx) is never repeated."""

    connect: float = 10.0  # seconds to connect, per attempt
    read: float = 1800.0  # seconds to wait for an answer, per attempt: a completion is answered when it is finished
    attempts: int = 5  # at a call, and at bringing a batch of rows together
    back_off: float = 1.0  # seconds before the second attempt; doubled before each further one
    recovery: float = 300.0  # seconds that a server may take to come back after it stopped answering


class Client:
    """
    Requests to a server.

    Args:
        url (`str`):
            Address of the server, as `http://127.0.0.1:8000`.
        patience ([`Patience`], *optional*):
            Time-outs and retries.
        key (`Callable[[], str | None]`, *optional*):
            Gives the server's key, for each request anew: a server that was restarted may have another one. By default
            that of a server which `mentor-trl serve` has started.
        key_advice (`str`, *optional*):
            What to do where the server refuses the key.
        concurrency (`int`, *optional*, defaults to `1024`):
            Requests at once; further ones wait for their turn.

    Attributes:
        requests (`int`), sent (`int`), received (`int`):
            Requests so far, attempts that failed included, and the bytes of their contents and of the answers'.

    Raises:
        [`SetupError`]: if the address is none.
    """

    def __init__(
        self,
        url: str,
        patience: Patience | None = None,
        key: Callable[[], str | None] | None = None,
        key_advice: str = KEY_ADVICE,
        concurrency: int = 1024,
    ):
        self.url = checked_address(url)
        self.patience = patience or Patience()
        self.key = key or partial(key_of, self.url)
        self.key_advice = key_advice
        self.requests = self.sent = self.received = 0
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(self.patience.read, connect=self.patience.connect),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS),
        )
        self._slots = asyncio.Semaphore(concurrency)
        weakref.finalize(self, _close, self._http)

    def headers(self) -> dict[str, str]:
        """The header with the key, if there is one."""
        key = self.key()
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns, for callers that are no coroutines."""
        return background.run(coroutine)

    async def ask(self, path: str, method: str = "POST", **kwargs: Any) -> Any:
        """
        The JSON of an answer to one attempt.

        Args:
            path (`str`):
                Path, as `/v1/completions`.
            method (`str`, *optional*, defaults to `"POST"`):
                Method of HTTP.
            **kwargs:
                Further arguments of `httpx.AsyncClient.build_request`, as `json` or `params`.

        Raises:
            `httpx.TransportError` or [`Failed`]: if the server did not answer, or 5xx.
            [`ServerError`]: if it refused, or [`WrongServer`], if it is none of ours.
        """
        try:
            return content(await self.response(path, method, **kwargs), self.key_advice)
        except httpx.DecodingError as error:
            raise WrongServer(f"{self.url} answered {path} in an encoding that it is not: {error}.") from error

    async def response(self, path: str, method: str = "POST", **kwargs: Any) -> httpx.Response:
        """An answer as it is."""
        return await background.awaited(self._response(path, method, **kwargs))

    async def _response(self, path: str, method: str, **kwargs: Any) -> httpx.Response:
        async with self._slots:
            request = self._http.build_request(method, path, **kwargs)
            request.headers.update(self.headers())
            self.requests += 1
            self.sent += len(request.content)
            response = await self._http.send(request)
            self.received += response.num_bytes_downloaded
            return response

    async def call(self, method: str, *args: Any) -> Any:
        """What the first worker of vLLM answers to a method of its extension."""
        answer = await self.ask("/collective_rpc", json={"method": method, "args": list(args)})
        with reading(self.url, method):
            for result in answer["results"]:
                if isinstance(result, dict) and "error" in result:
                    raise ServerError(f"{self.url} could not run {method}: {result['error']}.")
            return answer["results"][0]

    async def retried(self, call: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """
        A call, repeated after transport errors and 5xx with doubled pauses.

        Raises:
            [`Exhausted`]: if every attempt failed.
        """
        for attempt in itertools.count(1):
            try:
                return await call(*args, **kwargs)
            except TRANSIENT as error:
                if attempt >= self.patience.attempts:
                    raise Exhausted(
                        f"{self.url} failed {attempt} times in a row, last with {type(error).__name__}: {error}"
                    ) from error
            await asyncio.sleep(self.patience.back_off * 2 ** (attempt - 1))

    async def wait(self, check: Callable[[], Awaitable[T]], advice: str) -> T:
        """
        What a check of the server returns, repeated for as long as a server may take to come up.

        Raises:
            [`WrongServer`]: at once, if the check does.
            [`ServerError`]: if it never passed, with the advice.
        """
        deadline, pause = time.monotonic() + self.patience.recovery, self.patience.back_off
        while True:
            try:
                return await check()
            except WrongServer:
                raise
            except (ServerError, *TRANSIENT) as error:
                if time.monotonic() + pause > deadline:
                    raise ServerError(
                        f"No server answers at {self.url} ({type(error).__name__}: {error}), after "
                        f"{self.patience.recovery:.0f} s of trying. {advice}, and look at its log if it was running."
                    ) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, 30.0)


def _close(http: httpx.AsyncClient) -> None:
    loop = background.background_loop()
    if not loop.is_closed():
        asyncio.run_coroutine_threadsafe(http.aclose(), loop)
