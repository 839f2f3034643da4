"""Client of a `mentor-trl serve` server: one vLLM engine that speaks for policy and expert."""

import asyncio
import itertools
import time
from dataclasses import replace
from typing import Any

import torch

from ...connection.contents import reading
from ...connection.failures import TRANSIENT, Exhausted, ServerError
from ..serving.policy_server import PolicyServer
from ..types import MixedRequest, MixedRollout, Progress
from . import replies
from .wire import assemble, check_engine_context, extra_args, match_record, record_keys, sampling_params


class ServerSampler(PolicyServer):
    """
    Samples mixed rollouts on a server; arguments and errors are those of
    [`~mentor_trl.rollout.serving.policy_server.PolicyServer`].

    Example:
    ```python
    sampler = ServerSampler("http://127.0.0.1:8000")
    with sampler.session() as session:
        rollout = session.sample(MixedRequest(prompt_ids, [0.5] * len(prompt_ids), 256, (tokenizer.eos_token_id,)))
    ```
    """

    kind: str | None = "mixed"

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
                self.recover()
            done |= self.client.run(self._sample_rows(request, missing, progress))
        completions, values = zip(*(done[row] for row in sorted(done))) if done else ((), ())
        with reading(self.url, "/v1/completions"):
            rollout = assemble(request, list(completions), list(values), {"seconds": time.perf_counter() - started})
        return rollout if self.info["kind"] == "mixed" else replace(rollout, entropies=None)

    async def _sample_rows(
        self, request: MixedRequest, rows: list[int], progress: Progress | None
    ) -> dict[int, tuple[list[int], torch.Tensor]]:
        """Rows that came through, as token ids and records `(T, 6)`."""
        keys, slots = record_keys(len(rows)), asyncio.Semaphore(self.concurrency)

        async def complete(row: int, key: str) -> tuple[list[int], torch.Tensor | None] | None:
            async with slots:
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
