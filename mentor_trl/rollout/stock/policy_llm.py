"""The policy in a vLLM engine of this process, which requests of coroutines reach one by one."""

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Coroutine
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch

from ...connection.background import background_loop
from ...vllm_server.options import engine_environment, policy_engine_options
from ..serving.inner_llm import InnerLLM
from ..types import MixedRequest
from .segments import as_segment, branch_settings, segment_settings
from .stock_rows import Segment, Truncation


T = TypeVar("T")


class EngineRequests:
    """
    Requests of coroutines to a vLLM engine. The engine runs in the thread that calls [`drive`], which is to be the one
    that built it; coroutines run beside it.

    Args:
        llm (`vllm.LLM`):
            Engine.
    """

    def __init__(self, llm):
        self.engine = llm.llm_engine
        self.wake = threading.Event()
        self._arrived: SimpleQueue = SimpleQueue()
        self._waiting: dict[str, asyncio.Future] = {}
        self._names = itertools.count()

    async def complete(self, prompt_ids: list[int], params, **kwargs: Any):
        """The finished `vllm.RequestOutput` of a request."""
        future = asyncio.get_running_loop().create_future()
        self._arrived.put((list(prompt_ids), params, kwargs, future))
        self.wake.set()
        return await future

    def turn(self) -> bool:
        """Take what has arrived and run a step; returns whether there was anything to do."""
        while True:
            try:
                prompt_ids, params, kwargs, future = self._arrived.get_nowait()
            except Empty:
                break
            name = f"mentor-{next(self._names)}"
            self._waiting[name] = future
            try:
                self.engine.add_request(name, {"prompt_token_ids": prompt_ids}, params, **kwargs)
            except Exception as error:
                _settle(self._waiting.pop(name), lambda future, error=error: future.set_exception(error))
        if not self.engine.has_unfinished_requests():
            return False
        for output in self.engine.step():
            if output.finished:
                future = self._waiting.pop(output.request_id)
                _settle(future, lambda future, output=output: future.set_result(output))
        return True

    def abort(self) -> None:
        """Give up all requests."""
        if self._waiting:
            self.engine.abort_request(list(self._waiting))
        self._waiting.clear()


def _settle(future: asyncio.Future, settle: Callable[[asyncio.Future], None]) -> None:
    future.get_loop().call_soon_threadsafe(lambda: None if future.done() else settle(future))


def drive(engines: list[EngineRequests], call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What a coroutine returns that makes requests to engines, which run in this thread meanwhile."""
    wake = threading.Event()
    for engine in engines:
        engine.wake = wake
    result = asyncio.run_coroutine_threadsafe(call(), background_loop())
    result.add_done_callback(lambda _: wake.set())
    try:
        while not result.done():
            wake.clear()
            if not any([engine.turn() for engine in engines]):
                wake.wait()
        return result.result()
    finally:
        result.cancel()
        for engine in engines:
            engine.abort()


class PolicyLLM(InnerLLM):
    """
    The policy in a vLLM engine of this process, with the processor that ends requests at branch points.

    Args:
        policy (`str`):
            Model id or folder of the policy.
        **engine_kwargs:
            Further arguments of `vllm.LLM`.

    Raises:
        `RuntimeError`: if the engine does not branch.
    """

    def __init__(self, policy: str, **engine_kwargs: Any):
        cpu = not torch.cuda.is_available()
        os.environ.update(engine_environment(cpu))
        super().__init__(policy_engine_options(policy, cpu=cpu) | engine_kwargs)
        if not self.info["branches"]:
            raise RuntimeError(f"The engine of {policy!r} does not branch: it was built without our logits processor.")
        self.requests = EngineRequests(self.llm)
        self.lora_request: Any = None

    def load_adapter(self, folder: str, version: str) -> None:
        """Let a LoRA adapter take the place of the one before, under another name and number."""
        from vllm.lora.request import LoRARequest

        former = self.lora_request
        self.lora_request = LoRARequest(version, 1 if former is None else former.lora_int_id + 1, folder)
        if former is not None:
            self.llm.llm_engine.remove_lora(former.lora_int_id)

    # Rows

    def deal(self, request: MixedRequest, rows: list[int]) -> None:
        """All rows are sampled here."""

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What a coroutine returns that asks for segments."""
        return drive([self.requests], call)

    def lost_rows(self, rows: list[int]) -> list[int]:
        """Rows that may have been sampled with other weights: none."""
        return []

    async def segment(
        self, request: MixedRequest, row: int, prefix: list[int], limit: int, truncation: Truncation
    ) -> Segment:
        """See [`~mentor_trl.rollout.stock.stock_rows.PolicyEngine`]."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        branch_id = self.info["branch_id"]
        params = SamplingParams(
            **segment_settings(request, row, len(prefix), limit, branch_id, truncation),
            extra_args=branch_settings(request, row),
            output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=False,
        )
        output = (await self.requests.complete(prefix, params, lora_request=self.lora_request)).outputs[0]
        ids = list(output.token_ids)
        logps = [entry[index].logprob for entry, index in zip(output.logprobs, ids)]
        return as_segment(ids, logps, branch_id)
