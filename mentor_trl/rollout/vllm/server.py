"""Client of a `mentor-trl serve` server: one vLLM engine that speaks for policy and expert."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import torch

from ...version import __version__
from ...vllm_plugin.options import INCOMPLETE
from ..types import EngineError, MixedRequest, MixedRollout
from .wire import (
    assemble,
    check_engine_context,
    extra_args,
    match_record,
    policy_values,
    record_keys,
    sampling_params,
)


T = TypeVar("T")


class ServerError(EngineError):
    """The server failed in spite of all attempts, or refused a request."""


class WrongServer(ServerError):
    """Something answers, but it is not the server that the rollouts need."""


class WeightsLost(ServerError):
    """The server does not have the policy's current weights, and only the trainer can send them again."""


@dataclass(frozen=True)
class Patience:
    """
    How long a client keeps trying. A request that the server refuses (4xx) is never repeated.

    Args:
        connect (`float`, *optional*, defaults to `10.0`):
            Seconds to connect, per attempt.
        read (`float`, *optional*, defaults to `1800.0`):
            Seconds to wait for an answer, per attempt. A completion is answered when it is finished.
        attempts (`int`, *optional*, defaults to `5`):
            Attempts at a call, and at bringing a batch of rows together.
        back_off (`float`, *optional*, defaults to `1.0`):
            Seconds before the second attempt; doubled before each further one.
        recovery (`float`, *optional*, defaults to `300.0`):
            Seconds that a server may take to come back after it stopped answering.
    """

    connect: float = 10.0
    read: float = 1800.0
    attempts: int = 5
    back_off: float = 1.0
    recovery: float = 300.0

    @property
    def timeout(self) -> httpx.Timeout:
        return httpx.Timeout(self.read, connect=self.connect)


class ServerSampler:
    """
    Samples mixed rollouts on a server.

    Args:
        url (`str`):
            Address of the server, as `http://127.0.0.1:8000`.
        num_tokens (`int`, *optional*):
            Number of ids that the policy's tokenizer defines, which the server must know.
        patience ([`Patience`], *optional*):
            Time-outs and retries.
        concurrency (`int`, *optional*, defaults to `1024`):
            Rows that are sent at once.

    Raises:
        [`ServerError`]: if no server answers in time, or [`WrongServer`], if it is not a MENTOR server, speaks for
            another vocabulary, or runs another version of this package.

    Example:
    ```python
    sampler = ServerSampler("http://127.0.0.1:8000")
    with sampler.session() as session:
        rollout = session.sample(MixedRequest(prompt_ids, [0.5] * len(prompt_ids), 256, (tokenizer.eos_token_id,)))
    ```
    """

    kind: str | None = "mixed"

    def __init__(
        self, url: str, num_tokens: int | None = None, patience: Patience | None = None, concurrency: int = 1024
    ):
        self.url = url.rstrip("/")
        self.num_tokens = num_tokens
        self.patience = patience or Patience()
        self.concurrency = concurrency
        self._pushed: tuple[str | None, str] | None = None
        self.info = self.wait()
        self.served_name = self._run(lambda client: _get(client, "/v1/models"))["data"][0]["id"]

    @contextmanager
    def session(self) -> Iterator["ServerSampler"]:
        """
        Hold the policy's current weights, see [`load_policy`][ServerSampler.load_policy]. Makes sure on entry that the
        server answers, has them, and is not paused by a push that was cut off.
        """
        self._recover()
        yield self

    def check(self) -> dict[str, Any]:
        """
        Ask once what the server is.

        Returns:
            `dict[str, Any]`: models, versions, vocabulary, draft length, context and weights of the server.
        """
        info = self._run(_server_info)
        _check_info(info, self.url, self.kind, self.num_tokens)
        return info

    def wait(self) -> dict[str, Any]:
        """[`check`][ServerSampler.check], for as long as a server may take to come up."""
        deadline, pause = time.monotonic() + self.patience.recovery, self.patience.back_off
        while True:
            try:
                return self.check()
            except (ServerError, httpx.TransportError) as error:
                # A 5xx speaks of a stock server only where none has answered before
                failing = hasattr(self, "info") and isinstance(error.__cause__, _Failed)
                if isinstance(error, WrongServer) and not failing:
                    raise
                if time.monotonic() + pause > deadline:
                    raise ServerError(
                        f"No server answers at {self.url} ({type(error).__name__}: {error}), after "
                        f"{self.patience.recovery:.0f} s of trying. Start one with `mentor-trl serve --policy ... "
                        "--expert ...`, and look at its log if it was running."
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, 30.0)

    def load_policy(self, folder: str, version: str) -> None:
        """
        Replace the policy's weights on the server; the expert's stay as they are.

        Args:
            folder (`str`):
                Folder of safetensors files that the server sees under this name, see
                [`~mentor_trl.rollout.vllm.weights.write_weights`]. It must stay until the next call: a server that was
                restarted is given these weights again.
            version (`str`):
                Name of these weights, another one than before.
        """
        self._pushed = str(folder), version
        for attempt in range(1, self.patience.attempts + 1):
            try:
                return self._push()
            except ServerError as error:
                if attempt == self.patience.attempts or not isinstance(
                    error.__cause__, (httpx.TransportError, _Failed)
                ):
                    raise
            self.info = self.wait()

    def receive_policy(self, send: Callable[[], None], version: str) -> None:
        """
        Replace the policy's weights by a transfer that does not go through a folder. A server that is restarted
        afterwards raises [`WeightsLost`] until this is called again.

        Args:
            send (`Callable`):
                Makes the transfer, between the server's pause and its going on.
            version (`str`):
                Name of these weights, another one than before.
        """
        self._pushed = None, version
        self.info = self.wait()

        def receive() -> None:
            self._call("mentor_name_weights", INCOMPLETE)
            send()
            self._call("mentor_name_weights", version)

        self._replace(receive)

    def _push(self) -> None:
        self._replace(lambda: self._call("mentor_load_policy", *self._pushed))

    def _replace(self, load: Callable[[], None]) -> None:
        """Change weights while no request runs, and leave nothing of the old ones in the prefix cache."""
        post = lambda path, **kwargs: self._run(lambda client: self._retried(lambda: _post(client, path, **kwargs)))
        post("/pause", params={"mode": "wait"})
        try:
            load()
            post("/reset_prefix_cache")
        finally:
            post("/resume")
        self.info = {**self.info, "weights_version": self._pushed[1]}

    def _call(self, method: str, *args: Any) -> Any:
        return self._run(lambda client: self._retried(lambda: _rpc(client, method, *args)))

    def sample(self, request: MixedRequest) -> MixedRollout:
        """
        Sample a request. Rows that a failing server loses are sampled again, each by a single server process and with
        the current weights, so that every row is whole.

        Args:
            request ([`MixedRequest`]):
                Rows to sample. Its `seed` does not repeat a run: vLLM's draws depend on how rows are batched.

        Returns:
            [`MixedRollout`], in the order of the request.

        Raises:
            [`ServerError`]: if the server refuses a row, or fails longer than [`Patience`] allows.
            [`SetupError`]: if a row does not fit the server's context.
            `ValueError`: if a model's logits are NaN.
        """
        check_engine_context(request, self.info["max_model_len"])
        started = time.perf_counter()
        done: dict[int, tuple[list[int], torch.Tensor]] = {}
        for attempt in range(self.patience.attempts):
            missing = [row for row in range(len(request.prompt_ids)) if row not in done]
            if not missing:
                break
            if attempt:
                self._recover()
            done |= self._run(lambda client, rows=missing: self._sample_rows(client, request, rows))
        else:
            if len(done) < len(request.prompt_ids):
                raise ServerError(
                    f"{len(request.prompt_ids) - len(done)} of {len(request.prompt_ids)} rows could not be sampled in "
                    f"{self.patience.attempts} attempts at {self.url}. Look at the server's log."
                )
        completions, values = zip(*(done[row] for row in sorted(done))) if done else ((), ())
        return assemble(request, list(completions), list(values), {"seconds": time.perf_counter() - started})

    def _recover(self) -> None:
        """Wait until the server answers, and give it the current weights if it does not have them."""
        self.info = self.wait()
        if self._pushed is not None and self.info["weights_version"] != self._pushed[1]:
            if self._pushed[0] is None:
                raise WeightsLost(
                    f"{self.url} has the weights {self.info['weights_version']!r} and not {self._pushed[1]!r}: it was "
                    "restarted, or a transfer was cut off."
                )
            self.load_policy(*self._pushed)
        elif self.info["paused"]:
            self._run(lambda client: self._retried(lambda: _post(client, "/resume")))

    async def _sample_rows(self, client: httpx.AsyncClient, request: MixedRequest, rows: list[int]):
        """Rows that came through, as completions and records."""
        keys = dict(zip(rows, record_keys(len(rows))))
        slots = asyncio.Semaphore(self.concurrency)

        async def complete(row: int) -> list[int] | None:
            async with slots:
                try:
                    answer = await _post(client, "/v1/completions", json=self._body(request, row, keys[row]))
                except (httpx.TransportError, _Failed):
                    return None
            return answer["choices"][0]["token_ids"]

        completions = dict(zip(rows, await asyncio.gather(*(complete(row) for row in rows))))
        try:
            found = await self._retried(lambda: _rpc(client, "mentor_take_records", list(keys.values())))
        except ServerError as error:
            if isinstance(error, WrongServer) or not isinstance(error.__cause__, (httpx.TransportError, _Failed)):
                raise
            return {}
        if self._pushed is not None and found["weights_version"] != self._pushed[1]:
            return {}
        records = dict(zip(rows, found["rows"]))
        whole = [row for row in rows if completions[row] is not None and records[row] is not None]
        return {
            row: (
                completions[row],
                match_record(records[row], completions[row], len(request.prompt_ids[row]), row),
            )
            for row in whole
        }

    def _body(self, request: MixedRequest, row: int, key: str) -> dict[str, Any]:
        params = sampling_params(request, row, key)
        params.pop("detokenize")
        return {
            "model": self.served_name,
            "prompt": list(request.prompt_ids[row]),
            "return_token_ids": True,
            "vllm_xargs": extra_args(request, row, key),
            **params,
        }

    async def _retried(self, call: Callable[[], Awaitable[T]]) -> T:
        """A call, repeated after transport errors and 5xx with doubled pauses."""
        pause = self.patience.back_off
        for attempt in range(1, self.patience.attempts + 1):
            try:
                return await call()
            except (httpx.TransportError, _Failed) as error:
                if attempt == self.patience.attempts:
                    raise ServerError(
                        f"{self.url} failed {attempt} times in a row, last with {type(error).__name__}: {error}"
                    ) from error
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def _run(self, call: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        async def run() -> T:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=self.url, timeout=self.patience.timeout, limits=limits) as client:
                return await call(client)

        # A thread of its own, since the caller may have an event loop
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(asyncio.run, run()).result()


class PolicyServerSampler(ServerSampler):
    """
    Samples the plain policy on a server that holds it alone (`mentor-trl serve` without `--expert`), at the speed of
    vLLM without drafts. Its rollouts have no entropies: a server does not return them.

    Args:
        url, num_tokens, patience, concurrency:
            See [`ServerSampler`].
    """

    kind = "policy"

    async def _sample_rows(self, client: httpx.AsyncClient, request: MixedRequest, rows: list[int]):
        slots = asyncio.Semaphore(self.concurrency)

        async def complete(row: int) -> tuple[list[int], torch.Tensor] | None:
            async with slots:
                try:
                    answer = await _post(client, "/v1/completions", json=self._body(request, row, ""))
                except (httpx.TransportError, _Failed):
                    return None
            choice = answer["choices"][0]
            return choice["token_ids"], policy_values(choice["logprobs"]["token_logprobs"])

        found = dict(zip(rows, await asyncio.gather(*(complete(row) for row in rows))))
        try:
            info = await self._retried(lambda: _rpc(client, "mentor_info"))
        except ServerError as error:
            if isinstance(error, WrongServer) or not isinstance(error.__cause__, (httpx.TransportError, _Failed)):
                raise
            return {}
        # A server that was restarted in the middle has lost the name of the weights with the weights
        if self._pushed is not None and info["weights_version"] != self._pushed[1]:
            return {}
        return {row: values for row, values in found.items() if values is not None}

    def _body(self, request: MixedRequest, row: int, key: str) -> dict[str, Any]:
        body = super()._body(request, row, key)
        del body["vllm_xargs"]
        return {**body, "logprobs": 0}


class AnyServer(ServerSampler):
    """A server of either kind, to look at."""

    kind = None


class _Failed(Exception):
    """The server answered 5xx."""


async def _post(client: httpx.AsyncClient, path: str, **kwargs: Any) -> Any:
    return _content(await client.post(path, **kwargs))


async def _get(client: httpx.AsyncClient, path: str) -> Any:
    return _content(await client.get(path))


def _content(response: httpx.Response) -> Any:
    if response.status_code >= 500:
        raise _Failed(f"{response.request.url} answered {response.status_code}: {response.text[:500]}")
    if response.status_code >= 400:
        error = WrongServer if response.status_code == 404 else ServerError
        raise error(f"{response.request.url} refused with {response.status_code}: {response.text[:2000]}")
    return response.json() if response.content else None


async def _rpc(client: httpx.AsyncClient, method: str, *args: Any) -> Any:
    """What the first worker answers to a method of the worker extension."""
    answer = await _post(client, "/collective_rpc", json={"method": method, "args": list(args)})
    for result in answer["results"]:
        if isinstance(result, dict) and "error" in result:
            raise ServerError(f"{client.base_url} could not run {method}: {result['error']}.")
    return answer["results"][0]


async def _server_info(client: httpx.AsyncClient) -> dict[str, Any]:
    try:
        await _get_health(client)
        info = await _rpc(client, "mentor_info")
    except WrongServer as error:
        raise WrongServer(
            f"{client.base_url} is not a MENTOR server, or its dev endpoints are off ({error}). Start it with "
            "`mentor-trl serve --policy ... --expert ...`."
        ) from error
    except _Failed as error:
        raise WrongServer(
            f"{client.base_url} is a vLLM server that does not sample mixed rollouts ({error}). Start it with "
            "`mentor-trl serve --policy ... --expert ...`."
        ) from error
    paused = await _get(client, "/is_paused")
    return {**info, "paused": paused["is_paused"]}


async def _get_health(client: httpx.AsyncClient) -> None:
    response = await client.get("/health")
    if response.status_code >= 500:
        raise ServerError(f"{client.base_url} is not healthy: {response.status_code} {response.text[:500]}")
    if response.status_code >= 400:
        raise WrongServer(f"/health answered {response.status_code}")


def _check_info(info: dict[str, Any], url: str, kind: str | None, num_tokens: int | None) -> None:
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
    if kind == "mixed" and num_tokens is not None and info["num_tokens"] != num_tokens:
        raise WrongServer(
            f"{url} samples {info['num_tokens']} token ids, and the policy's tokenizer defines {num_tokens}. Serve "
            f"that policy ({info['policy']!r} is served), or pass `--num-tokens {num_tokens}` to `mentor-trl serve`."
        )
