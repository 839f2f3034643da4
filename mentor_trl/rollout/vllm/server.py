"""Client of a `mentor-trl serve` server: one vLLM engine that speaks for policy and expert."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...connection.addresses import checked_address
from ...connection.client import Client, Patience
from ...connection.contents import reading
from ...connection.failures import TRANSIENT, Exhausted, Failed, KeyRefused, ServerError, WeightsLost, WrongServer
from ...vllm_server.keys import key_of
from ...vllm_server.options import INCOMPLETE
from ..types import MixedRequest, MixedRollout, Progress
from . import replies
from .wire import assemble, check_engine_context, extra_args, match_record, record_keys, sampling_params


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
        api_key_file (`str`, *optional*):
            File with the server's key. If not given, the key is in `MENTOR_TRL_API_KEY`, or, for a server on this
            machine, where `mentor-trl serve` has put it.

    Raises:
        [`ServerError`]: if no server answers in time, or [`WrongServer`], if it is not a MENTOR server, speaks for
            another vocabulary, or runs another version of this package.
        [`SetupError`]: if the address is none, or the file holds no key.

    Example:
    ```python
    sampler = ServerSampler("http://127.0.0.1:8000")
    with sampler.session() as session:
        rollout = session.sample(MixedRequest(prompt_ids, [0.5] * len(prompt_ids), 256, (tokenizer.eos_token_id,)))
    ```
    """

    kind: str | None = "mixed"

    def __init__(
        self,
        url: str,
        num_tokens: int | None = None,
        patience: Patience | None = None,
        concurrency: int = 1024,
        api_key_file: str | None = None,
    ):
        self.client = Client(
            url, patience, partial(key_of, checked_address(url), api_key_file), concurrency=concurrency
        )
        self.url, self.patience, self.headers = self.client.url, self.client.patience, self.client.headers
        self.num_tokens = num_tokens
        self._pushed: tuple[str | None, str] | None = None
        self._first: dict[str, Any] | None = None
        self.info = self._first = self.wait()
        with reading(self.url, "/v1/models", WrongServer):
            self.served_name = self._ask("/v1/models", "GET")["data"][0]["id"]

    @contextmanager
    def session(self) -> Iterator["ServerSampler"]:
        """
        Hold the policy's current weights, see [`load_policy`][ServerSampler.load_policy]. Makes sure on entry that the
        server answers, has them, and is not paused by a push that was cut off.
        """
        self._recover()
        yield self

    def check(self) -> dict[str, Any]:
        """Ask once what the server is: models, versions, vocabulary, draft length, context and weights."""
        return self.client.run(self._check())

    async def _check(self) -> dict[str, Any]:
        info = await _server_info(self.client, known=self._first is not None)
        replies.check_info(info, self.url, self.kind, self.num_tokens)
        if self._first is not None:
            replies.check_same(self._first, info, self.url)
        return info

    def wait(self) -> dict[str, Any]:
        """[`check`][ServerSampler.check], for as long as a server may take to come up."""
        return self.client.run(self.client.wait(self._check, replies.ADVICE))

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
                return self._replace(lambda: self._call("mentor_load_policy", *self._pushed))
            except Exhausted:
                if attempt == self.patience.attempts:
                    raise
            self.info = self.wait()

    def receive_policy(self, send: Callable[[], None], version: str) -> None:
        """
        Replace the policy's weights by a transfer that does not go through a folder: `send` makes it while the server
        is paused. One that is restarted afterwards raises [`WeightsLost`] until this is called again.
        """
        self._pushed = None, version
        self.info = self.wait()

        def receive() -> None:
            self._call("mentor_name_weights", INCOMPLETE)
            send()
            self._call("mentor_name_weights", version)

        self._replace(receive)

    def _replace(self, load: Callable[[], None]) -> None:
        """Change weights while no request runs, and leave nothing of the old ones in the prefix cache."""
        self._ask("/pause", params={"mode": "wait"})
        try:
            load()
            self._ask("/reset_prefix_cache")
        finally:
            self._ask("/resume")
        self.info = {**self.info, "weights_version": self._pushed[1]}

    def _ask(self, path: str, method: str = "POST", **kwargs: Any) -> Any:
        return self.client.run(self.client.retried(self.client.ask, path, method, **kwargs))

    def _call(self, method: str, *args: Any) -> Any:
        return self.client.run(self.client.retried(self.client.call, method, *args))

    def sample(self, request: MixedRequest, progress: Progress | None = None) -> MixedRollout:
        """
        Sample a request. Rows that a failing server loses are sampled again, each by a single server process and with
        the current weights, so that every row is whole.

        Args:
            request ([`MixedRequest`]):
                Rows to sample. Its `seed` does not repeat a run: vLLM's draws depend on how rows are batched.

        Returns:
            [`MixedRollout`], in the order of the request.

        Raises:
            [`ServerError`]: if the server refuses a row, answers something else than a row, as where a model's logits
                are NaN, or fails longer than [`Patience`] allows.
            [`SetupError`]: if a row does not fit the server's context.
        """
        check_engine_context(request, self.info["max_model_len"])
        started = time.perf_counter()
        done: dict[int, tuple[list[int], torch.Tensor]] = {}
        for attempt in itertools.count():
            missing = [row for row in range(len(request.prompt_ids)) if row not in done]
            if not missing:
                break
            if attempt == self.patience.attempts:
                raise ServerError(
                    f"{len(missing)} of {len(request.prompt_ids)} rows could not be sampled in {attempt} attempts at "
                    f"{self.url}. Look at the server's log."
                )
            if attempt:
                self._recover()
            done |= self.client.run(self._sample_rows(request, missing, progress))
        completions, values = zip(*(done[row] for row in sorted(done))) if done else ((), ())
        with reading(self.url, "/v1/completions"):
            rollout = assemble(request, list(completions), list(values), {"seconds": time.perf_counter() - started})
        return rollout if self.info["kind"] == "mixed" else replace(rollout, entropies=None)

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
            self._ask("/resume")

    async def _sample_rows(
        self, request: MixedRequest, rows: list[int], progress: Progress | None
    ) -> dict[int, tuple[list[int], torch.Tensor]]:
        """Rows that came through, as token ids and records `(T, 6)`."""
        keys = record_keys(len(rows))

        async def complete(row: int, key: str) -> tuple[list[int], torch.Tensor | None] | None:
            try:
                answer = await self.client.ask("/v1/completions", json=self._body(request, row, key))
            except TRANSIENT:
                return None
            with reading(self.url, "/v1/completions"):
                completed = replies.completion(answer, self.info, request, row)
            if progress and completed:
                progress(1, len(completed[0]))
            return completed

        completed = await asyncio.gather(*map(complete, rows, keys))
        mixed = self.info["kind"] == "mixed"
        method, args = ("mentor_take_records", [keys]) if mixed else ("mentor_info", [])
        try:
            found = await self.client.retried(self.client.call, method, *args)
        except Exhausted:
            return {}
        with reading(self.url, method):
            # A server that was restarted in the middle has lost the name of the weights with the weights
            if self._pushed is not None and found["weights_version"] != self._pushed[1]:
                return {}
            came = {row: pair for row, pair in zip(rows, completed) if pair is not None}
            if not mixed:
                return came
            if len(found["rows"]) != len(rows):
                raise ValueError(f"{len(found['rows'])} records of {len(rows)} rows")
            return {
                row: (came[row][0], match_record(record, came[row][0], len(request.prompt_ids[row]), row))
                for row, record in zip(rows, found["rows"])
                if row in came and record is not None
            }

    def _body(self, request: MixedRequest, row: int, key: str) -> dict[str, Any]:
        mixed = self.info["kind"] == "mixed"
        return {
            "model": self.served_name,
            "prompt": list(request.prompt_ids[row]),
            "return_token_ids": True,
            **({"vllm_xargs": extra_args(request, row, key)} if mixed else {"logprobs": 0}),
            **sampling_params(request),
        }


class PolicyServerSampler(ServerSampler):
    """
    Samples the plain policy on a server that holds it alone (`mentor-trl serve` without `--expert`), at the speed of
    vLLM without drafts. Its rollouts have no entropies: a server does not return them.
    """

    kind = "policy"


class AnyServer(ServerSampler):
    """A server of either kind, to look at."""

    kind = None


async def _server_info(client: Client, known: bool) -> dict[str, Any]:
    health = await client.response("/health", "GET")
    if health.status_code >= 500:
        raise ServerError(f"{client.url} is not healthy: {health.status_code} {health.text[:300]}")
    try:
        info = replies.check_fields(await client.call("mentor_info"), client.url)
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
            f"{client.url} is not a MENTOR server, or its dev endpoints are off ({error}). {replies.ADVICE}."
        ) from error
