"""The policy on stock vLLM servers, one or several."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ...connection.addresses import addresses
from ...connection.client import Patience
from ...connection.contents import reading
from ...connection.failures import TRANSIENT, WrongServer
from ...vllm_server.token_table import TokenTable
from ..serving.policy_server import PolicyServer
from ..types import MixedRequest
from .segments import as_segment, branch_settings, segment_settings
from .stock_rows import Segment, Truncation
from .stock_sampler import check_branching


T = TypeVar("T")
# What must be the same of all replicas, and how it is called in an error
EQUAL = {
    "policy_shape": "shape of the policy",
    "policy_digest": "policy's first weights (digest)",
    "dtype": "data type",
    "num_tokens": "number of tokens",
    "branch_id": "id that ends a request at a branch point",
    "sentences_digest": "table of sentence ends (digest)",
}


class PolicyReplica(PolicyServer):
    """
    One server of the policy alone, with the processor that ends requests at branch points; see
    [`~mentor_trl.rollout.serving.policy_server.PolicyServer`]. Whether it branches where it should is checked at
    first, and after each restart.

    Raises:
        [`SetupError`]: if it does not.
    """

    kind = "policy"

    def __init__(self, url: str, *args: Any, **kwargs: Any):
        self._probed: str | None = None
        super().__init__(url, *args, **kwargs)
        self.slots = asyncio.Semaphore(self.concurrency)
        self._probe()

    def recover(self) -> None:
        super().recover()
        self._probe()

    def _probe(self) -> None:
        if not self.info.get("branches"):
            raise WrongServer(
                f"{self.url} has no logits processor that ends requests at branch points. Start it with `mentor-trl "
                "serve --policy`, or with the line that this prints."
            )
        if self._probed != self.info["instance"]:
            check_branching(self, lambda call: self.client.run(call()), self.info["num_tokens"], self.url)
            self._probed = self.info["instance"]

    async def segment(
        self, request: MixedRequest, row: int, prefix: list[int], limit: int, truncation: Truncation
    ) -> Segment | None:
        """See [`~mentor_trl.rollout.stock.stock_rows.PolicyEngine`]."""
        branch_id = self.info["branch_id"]
        body = {
            "model": self.model_name,
            "prompt": prefix,
            "return_token_ids": True,
            "vllm_xargs": branch_settings(request, row),
            **segment_settings(request, row, len(prefix), limit, branch_id, truncation),
        }
        async with self.slots:
            try:
                answer = await self.client.ask("/v1/completions", json=body)
            except TRANSIENT:
                return None
        with reading(self.url, "/v1/completions"):
            return self._segment(answer, request, row, limit, branch_id)

    def _segment(self, answer: Any, request: MixedRequest, row: int, limit: int, branch_id: int) -> Segment | None:
        choice = answer["choices"][0]
        if choice.get("finish_reason") == "abort":
            return None
        ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        known = self.info["num_tokens"]
        valid = lambda at: type(at) is int and (0 <= at < known or at == branch_id)
        if not isinstance(ids, list) or not all(map(valid, ids)):
            raise ValueError(f"the token ids of row {row} are {str(ids)[:80]}")
        ends = {*request.stop_token_ids, branch_id}
        whole = 0 < len(ids) <= limit and (ids[-1] in ends or len(ids) == limit) and not ends.intersection(ids[:-1])
        if not whole or len(logps) != len(ids):
            raise ValueError(
                f"row {row} went on with {len(ids)} tokens and {len(logps)} log-probabilities, where up to {limit} "
                f"were due: {str(ids[-8:])}"
            )
        return as_segment(ids, [float(logp) for logp in logps], branch_id)


class PolicyReplicas:
    """
    A policy on one or several servers. Rows are dealt to them by prompt, and a row stays where its prefix is cached.

    Args:
        urls (`str` or `Sequence[str]`):
            Addresses, in a text separated by commas.
        num_tokens (`int`, *optional*):
            Number of ids that the policy's tokenizer defines, which the servers must know.
        patience ([`~mentor_trl.connection.client.Patience`], *optional*):
            Time-outs and retries.
        concurrency (`int`, *optional*, defaults to `1024`):
            Requests that are sent to a server at once.
        api_key_file (`str`, *optional*):
            File with the servers' key. If not given, the key is in `MENTOR_TRL_API_KEY`, or, for a server on this
            machine, where `mentor-trl serve` has put it.

    Raises:
        [`ServerError`]: if no server answers in time, or [`WrongServer`], if one is not of a policy alone, or not the
            same as the others.
        [`SetupError`]: if a server does not branch where it should.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        num_tokens: int | None = None,
        patience: Patience | None = None,
        concurrency: int = 1024,
        api_key_file: str | None = None,
    ):
        self.servers = [PolicyReplica(url, num_tokens, patience, concurrency, api_key_file) for url in addresses(urls)]
        first = self.servers[0].info
        for server in self.servers[1:]:
            for name, what in EQUAL.items():
                if server.info.get(name) != first.get(name):
                    raise WrongServer(
                        f"{server.url} is no replica of {self.servers[0].url}: its {what} is "
                        f"{server.info.get(name)!r} and not {first.get(name)!r}. Serve the same policy on both."
                    )
        self.info = {**first, "max_model_len": min(server.info["max_model_len"] for server in self.servers)}
        self._places: dict[int, PolicyReplica] = {}
        self._held: dict[str, tuple] = {}

    @contextmanager
    def session(self) -> Iterator[None]:
        """Make sure that every server answers, branches, and has the current weights, before any row is sampled."""
        for server in self.servers:
            server.recover()
        self._held = {server.url: _held(server.info) for server in self.servers}
        versions = {server.url: server.info["weights_version"] for server in self.servers}
        if len(set(versions.values())) > 1:
            raise WrongServer(
                f"The replicas have different weights: {versions}. Give all of them the same, or restart."
            )
        yield

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What a coroutine returns that asks for segments."""
        return self.servers[0].client.run(call())

    def lost_rows(self, rows: list[int]) -> list[int]:
        """Rows of servers that were restarted meanwhile, or have other weights than at the beginning."""
        lost = []
        for server in self.servers:
            server.info = server.wait()
            if _held(server.info) != self._held.get(server.url, _held(server.info)):
                lost += [row for row in rows if self._places.get(row) is server]
        return lost

    def deal(self, request: MixedRequest, rows: list[int]) -> None:
        """Say which server samples which row: rows of one prompt together, and as many on each."""
        order: dict[tuple[int, ...], int] = {}
        key = lambda row: order.setdefault(tuple(request.prompt_ids[row]), len(order))
        dealt = sorted(rows, key=lambda row: (key(row), row))
        count = len(self.servers)
        self._places = {row: self.servers[at * count // len(dealt)] for at, row in enumerate(dealt)}

    async def segment(
        self, request: MixedRequest, row: int, prefix: list[int], limit: int, truncation: Truncation
    ) -> Segment | None:
        """See [`~mentor_trl.rollout.stock.stock_rows.PolicyEngine`]."""
        return await self._places[row].segment(request, row, prefix, limit, truncation)

    def check_sentences(self, sentence_ids: Sequence[int]) -> None:
        """Raise [`WrongServer`] if the servers find sentences to end elsewhere."""
        ours = TokenTable(0, 0, tuple(sentence_ids)).digest
        if self.info["sentences_digest"] != ours:
            raise WrongServer(
                f"{self.servers[0].url} has another table of sentence ends (digest {self.info['sentences_digest']}, "
                f"and here {ours}): its tokenizer is not the policy's. Serve the policy with its own tokenizer."
            )


def _held(info: dict[str, Any]) -> tuple:
    """What rows are samples of: a process and its weights."""
    return info["instance"], info["weights_version"]
