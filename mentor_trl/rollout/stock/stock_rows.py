"""
Rows of the mixed policy m = (1 - w) p + w s from two engines that know nothing of each other.

At a branch point (coin z = 1) the token of m is a sample of s, whatever the policy would have drawn. So the policy's
engine samples alone until its processor finds a branch point and ends the request; the expert's engine gives the token
there; the policy's goes on behind it. Each row is a coroutine, and the joint law of its tokens is that of m.
"""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from ...objective.coins import coin_uniforms
from ..types import MixedRequest, MixedRollout, Progress


@dataclass(frozen=True)
class Truncation:
    """What is cut off of the tempered distributions of both models before a token is drawn. The default is nothing."""

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


NO_TRUNCATION = Truncation()


class Segment(NamedTuple):
    """What the policy adds to a row, up to a stop id, a branch point or the limit."""

    token_ids: list[int]  # without the id that marks a branch point
    logps: list[float]
    branched: bool


class PolicyEngine(Protocol):
    """An engine of the policy with the branching processor."""

    async def segment(
        self, request: MixedRequest, row: int, prefix: list[int], limit: int, truncation: Truncation
    ) -> Segment | None:
        """Go on with a row, by at most `limit` tokens; `None` where the engine has lost the row."""
        ...


class SpeakingExpert(Protocol):
    """An expert that gives tokens of its own."""

    async def speak(
        self,
        prefix_ids: list[int],
        count: int,
        temperature: float,
        stop_token_ids: tuple[int, ...],
        row_seed: int,
        truncation: Truncation,
    ) -> tuple[list[int], list[float]]:
        """Up to `count` tokens ~ s behind a prefix, ended by a stop id, and their log s in nats."""
        ...


@dataclass
class Row:
    """A row in progress."""

    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    expert_logps: list[float] = field(default_factory=list)
    branch: list[bool] = field(default_factory=list)
    segments: int = 0
    consultations: int = 0

    def add(self, token_ids: list[int], logps: list[float], expert: bool) -> None:
        unknown = [math.nan] * len(token_ids)
        self.token_ids += token_ids
        self.logps += unknown if expert else logps
        self.expert_logps += logps if expert else unknown
        self.branch += [expert] * len(token_ids)


class RowSampler:
    """
    Samples the rows of a request.

    Args:
        policy ([`PolicyEngine`]):
            Engine of the policy.
        expert ([`SpeakingExpert`], *optional*):
            The expert; not needed for rows of the plain policy.
        truncation ([`Truncation`], *optional*):
            The same as the policy's engine is asked for.
    """

    def __init__(
        self, policy: PolicyEngine, expert: SpeakingExpert | None = None, truncation: Truncation = NO_TRUNCATION
    ):
        self.policy, self.expert, self.truncation = policy, expert, truncation

    async def sample(
        self, request: MixedRequest, rows: list[int], progress: Progress | None = None
    ) -> dict[int, Row | None]:
        """The rows of a request with these numbers; `None` for one that the policy's engine has lost."""
        tasks = {row: asyncio.ensure_future(self._row(request, row, progress)) for row in rows}
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return {row: task.result() for row, task in tasks.items()}

    async def _row(self, request: MixedRequest, number: int, progress: Progress | None) -> Row | None:
        row = Row(list(request.prompt_ids[number]))
        coins = KnownCoins(request, number)
        while True:
            due = coins.run(row)
            if not due:
                segment = await self._segment(request, number, row)
                if segment is None:
                    return None
                due = coins.run(row) or int(segment.branched)
            if due and not _ended(row, request):
                await self._consult(request, number, row, due)
            if _ended(row, request):
                break
        if progress:
            progress(1, len(row.token_ids))
        return row

    async def _segment(self, request: MixedRequest, number: int, row: Row) -> Segment | None:
        left = request.max_new_tokens - len(row.token_ids)
        segment = await self.policy.segment(request, number, row.prompt + row.token_ids, left, self.truncation)
        if segment is None:
            return None
        row.segments += 1
        if not (segment.branched or segment.token_ids):
            raise RuntimeError(f"The policy's engine added nothing to row {number}, and named no branch point.")
        if any(math.isnan(logp) for logp in segment.logps):
            raise ValueError(
                f"The policy's logits are NaN in row {number}. Its weights are broken or its data type overflows: "
                "check the checkpoint, lower the learning rate, or serve it in bfloat16 or float32."
            )
        row.add(segment.token_ids, segment.logps, expert=False)
        return segment

    async def _consult(self, request: MixedRequest, number: int, row: Row, count: int) -> None:
        token_ids, logps = await self.expert.speak(
            row.prompt + row.token_ids,
            count,
            request.temperature,
            request.stop_token_ids,
            request.row_seeds[number],
            self.truncation,
        )
        row.consultations += 1
        row.add(token_ids, logps, expert=True)


def _ended(row: Row, request: MixedRequest) -> bool:
    ids = row.token_ids
    return len(ids) == request.max_new_tokens or bool(ids and ids[-1] in request.stop_token_ids)


class KnownCoins:
    """
    Coins of a row that are known without the policy: those of the rules that do not look at its entropy. Neighbouring
    branch points are then one request to the expert, and the first one none to the policy.

    Args:
        request ([`~mentor_trl.rollout.MixedRequest`]):
            Request.
        row (`int`):
            Number of the row.
    """

    def __init__(self, request: MixedRequest, row: int):
        self.request = request
        self.first = len(request.prompt_ids[row])
        plain = request.gamma[row] == math.inf
        weight = {"always": 1.0, "random": request.share, "sentence": request.share}.get(request.branch_rule)
        self.heads: list[bool] | None = None  # by position in the completion, where the rule has its weight
        if weight is not None and not plain:
            positions = self.first + torch.arange(request.max_new_tokens)
            seeds = torch.full_like(positions, request.row_seeds[row])
            self.heads = (coin_uniforms(seeds, positions) < torch.tensor(weight)).tolist()
        self.sentence_ids = set(request.sentence_ids) if request.branch_rule == "sentence" else None

    def run(self, row: Row) -> int:
        """How many tokens from here on are branch points for sure, whatever they are."""
        if self.heads is None:
            return 0
        start, count = len(row.token_ids), 0
        recent = (row.prompt[-self.request.span :] + row.token_ids)[-self.request.span :]
        while start + count < len(self.heads) and self.heads[start + count] and self._has_weight(recent[count:]):
            count += 1
        return count

    def _has_weight(self, recent: list[int]) -> bool:
        return self.sentence_ids is None or not self.sentence_ids.isdisjoint(recent)


def assembled(request: MixedRequest, rows: list[Row], started: float, **stats: float) -> MixedRollout:
    """A rollout of finished rows."""
    longest = max((len(row.token_ids) for row in rows), default=0)

    def padded(values: Callable[[Row], list], fill: float | bool) -> torch.Tensor:
        lists = [values(row) + [fill] * (longest - len(row.token_ids)) for row in rows]
        return torch.tensor(lists, dtype=torch.bool if isinstance(fill, bool) else torch.float32).view(-1, longest)

    records = {
        "logps": padded(lambda row: row.logps, math.nan),
        "expert_logps": padded(lambda row: row.expert_logps, math.nan),
        "branch": padded(lambda row: row.branch, False),
    }
    counts = {
        "tokens": sum(len(row.token_ids) for row in rows),
        "segments": sum(row.segments for row in rows),
        "consultations": sum(row.consultations for row in rows),
        "seconds": time.perf_counter() - started,
    }
    return MixedRollout([row.token_ids for row in rows], **records, stats=counts | stats)
