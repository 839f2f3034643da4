"""Mixed rollouts from Python with stock vLLM engines."""

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch

from ...errors import EngineError, SetupError
from ...experts.compatibility import check_context
from ...objective.coins import coin_uniforms
from ..types import MixedRequest, MixedRollout, Progress
from .stock_rows import NO_TRUNCATION, PolicyEngine, Row, RowSampler, SpeakingExpert, Truncation, assembled


T = TypeVar("T")
ATTEMPTS = 5
PROBES, PROBE_LENGTH = 64, 8


class PolicyHost(PolicyEngine, Protocol):
    """Where a policy is: engines of this process, or servers."""

    info: dict[str, Any]

    def session(self) -> AbstractContextManager[Any]:
        """Hold the policy's current weights."""
        ...

    def deal(self, request: MixedRequest, rows: list[int]) -> None:
        """Before a `run`: rows of which segments will be asked for."""
        ...

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What a coroutine returns that asks for segments."""
        ...

    def lost_rows(self, rows: list[int]) -> list[int]:
        """After a `run`: rows that may have been sampled with other weights than the current ones."""
        ...


class StockSampler:
    """
    Samples mixed rollouts with stock vLLM: the policy up to a branch point, the expert there.

    Args:
        policy ([`~mentor_trl.rollout.stock.replicas.PolicyReplicas`] or
        [`~mentor_trl.rollout.stock.policy_llm.PolicyLLM`]):
            The policy's engines.
        expert ([`~mentor_trl.experts.remote.RemoteExpert`], *optional*):
            The expert. Without one only the plain policy (gamma = inf) can be sampled.
        top_p (`float`, *optional*, defaults to `1.0`), top_k (`int`, *optional*, defaults to `0`),
        min_p (`float`, *optional*, defaults to `0.0`):
            Truncation of both models' tempered distributions, as vLLM understands it. w remains a function of the
            policy's whole distribution, and log-probabilities are those after truncation.

    Example:
    ```python
    expert = RemoteExpert("http://127.0.0.1:8001", tokenizer)
    sampler = StockSampler(PolicyReplicas("http://127.0.0.1:8000"), expert)
    with sampler.session() as session:
        rollout = session.sample(MixedRequest(prompt_ids, [0.5] * len(prompt_ids), 256, (tokenizer.eos_token_id,)))
    ```
    """

    def __init__(
        self,
        policy: PolicyHost,
        expert: SpeakingExpert | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
    ):
        self.policy, self.expert, self.truncation = policy, expert, Truncation(top_p, top_k, min_p)

    @contextmanager
    def session(self) -> Iterator["StockSampler"]:
        """Hold the policy's current weights."""
        with self.policy.session():
            yield self

    def sample(self, request: MixedRequest, progress: Progress | None = None) -> MixedRollout:
        """
        Sample a request. Rows of an engine that fails are sampled again, with the current weights. The same request on
        the same weights gives the same rows, up to the engines' numerics, whatever else they sample.

        Args:
            request ([`MixedRequest`]):
                Rows to sample; `score_all` is not possible.

        Returns:
            [`MixedRollout`], in the order of the request, without entropies, weights, log m and replacements; log p is
            NaN at branch points.

        Raises:
            [`SetupError`]: if a row does not fit the context of an engine.
            [`EngineError`]: if engines fail longer than they may.
            `ValueError`: if mixed rows are asked for without an expert or with `score_all`, or a model's logits are
            NaN.
        """
        self._check(request)
        started, done = time.perf_counter(), {}
        rows = RowSampler(self.policy, self.expert, self.truncation)
        for attempt in itertools.count():
            missing = [row for row in range(len(request.prompt_ids)) if row not in done]
            if not missing:
                break
            if attempt == ATTEMPTS:
                raise EngineError(
                    f"{len(missing)} of {len(request.prompt_ids)} rows could not be sampled in {attempt} attempts. "
                    "Look at the logs of the policy's servers."
                )
            if attempt:
                with self.policy.session():
                    pass
            done |= self._attempt(rows, request, missing, progress)
        return assembled(request, [done[row] for row in sorted(done)], started)

    def _attempt(self, rows: RowSampler, request, missing: list[int], progress) -> dict[int, Row]:
        self.policy.deal(request, missing)
        found = self.policy.run(lambda: rows.sample(request, missing, progress))
        lost = set(self.policy.lost_rows(missing))
        return {row: value for row, value in found.items() if value is not None and row not in lost}

    def _check(self, request: MixedRequest) -> None:
        if request.score_all:
            raise ValueError(
                "`score_all` asks for log s at every token, and this expert is asked at branch points only."
            )
        if not request.plain and self.expert is None:
            raise ValueError("The request has mixed rows (gamma < inf), and the sampler has no expert.")
        lengths = [len(ids) for ids in request.prompt_ids]
        limit = self.policy.info["max_model_len"]
        check_context(lengths, request.max_new_tokens, limit, "the policy's engine's", "serve it with a larger one")
        mixed = [length for length, gamma in zip(lengths, request.gamma) if gamma < math.inf]
        if mixed:
            limit = self.expert.max_length
            check_context(mixed, request.max_new_tokens, limit, "the expert's", "serve it with a larger one")


def check_branching(policy: PolicyEngine, run: Callable, num_tokens: int, where: str) -> None:
    """
    Check that an engine branches where the coins say so: many rows of unequal prompts at once, each of which must stop
    at the very position that is predicted.

    Raises:
        [`SetupError`]: naming the first row that does not.
    """
    prompts = [[(3 * row + at) % num_tokens for at in range(1 + row % 7)] for row in range(PROBES)]
    request = MixedRequest(prompts, [1.0] * PROBES, PROBE_LENGTH, (), branch_rule="random", share=0.5, seed=PROBES)

    async def probe():
        segments = (policy.segment(request, row, prompts[row], PROBE_LENGTH, NO_TRUNCATION) for row in range(PROBES))
        return await asyncio.gather(*segments)

    for row, segment in enumerate(run(probe)):
        positions = len(prompts[row]) + torch.arange(PROBE_LENGTH)
        heads = coin_uniforms(torch.full_like(positions, request.row_seeds[row]), positions) < 0.5
        due = int(heads.int().argmax()) if heads.any() else PROBE_LENGTH
        found = len(segment.token_ids)
        if found != due or segment.branched != bool(heads.any()):
            raise SetupError(
                f"{where} does not branch where it should: a row with {len(prompts[row])} prompt tokens went on for "
                f"{found} tokens{' to a branch point' if segment.branched else ''}, and {due} were due. Start it with "
                "`mentor-trl serve --policy`, or with the line that this prints."
            )
