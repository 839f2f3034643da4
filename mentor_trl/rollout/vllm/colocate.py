"""Engine in process: one vLLM engine whose target is the expert and whose draft is the policy."""

import io
import os
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ...vllm_plugin.shared_options import engine_options
from ...vllm_server.options import engine_environment
from ..serving.inner_llm import InnerLLM
from ..types import MixedRequest, MixedRollout, Progress
from .wire import assemble, check_engine_context, extra_args, match_record, record_keys, sampling_params


class ColocateSampler(InnerLLM):
    """
    Samples mixed rollouts with an in-process vLLM engine.

    Args:
        policy (`str`):
            Model id or folder of the policy.
        expert (`str`):
            Model id or folder of the expert.
        num_tokens (`int`, *optional*):
            Number of ids that the tokenizer defines; ids from there on are never sampled.
        draft_length (`int`, *optional*, defaults to `8`):
            Tokens that the policy drafts between two passes of the expert.
        sentence_ids (`Iterable[int]`, *optional*):
            Ids behind which a sentence may begin, for the branch rule `"sentence"`. By default those of the engine's
            tokenizer.
        **engine_kwargs:
            Further arguments of `vllm.LLM`.

    Example:
    ```python
    sampler = ColocateSampler("Qwen/Qwen2.5-3B", "open-r1/OpenR1-Qwen-7B", gpu_memory_utilization=0.5)
    with sampler.session() as session:
        rollout = session.sample(MixedRequest(prompt_ids, [0.5] * len(prompt_ids), 256, (tokenizer.eos_token_id,)))
    ```
    """

    def __init__(
        self,
        policy: str,
        expert: str,
        num_tokens: int | None = None,
        draft_length: int = 8,
        sentence_ids: Iterable[int] | None = None,
        **engine_kwargs: Any,
    ):
        os.environ.update(engine_environment(cpu=not torch.cuda.is_available()))
        from ...vllm_plugin.hooks import install

        # An installation without its entry point (a source tree on the path) would else be a stock engine
        install()
        tensor_parallel = engine_kwargs.pop("tensor_parallel_size", 1)
        options = engine_options(policy, expert, num_tokens, draft_length, tensor_parallel, sentence_ids)
        options["speculative_config"] |= engine_kwargs.pop("speculative_config", {})
        super().__init__({**options, **engine_kwargs})

    def sample(self, request: MixedRequest, progress: Progress | None = None) -> MixedRollout:
        """
        Sample a request.

        Args:
            request ([`MixedRequest`]):
                Rows to sample. Its `seed` does not repeat a run: vLLM's draws depend on how rows are batched.

        Returns:
            [`MixedRollout`], in the order of the request.

        Raises:
            [`SetupError`]: if a row does not fit the context of the engine.
            `ValueError`: if a model's logits are NaN.
        """
        from vllm import SamplingParams

        check_engine_context(request, self.info["max_model_len"])
        started = time.perf_counter()
        keys = record_keys(len(request.prompt_ids))
        common = sampling_params(request)
        params = [
            SamplingParams(**common, detokenize=False, extra_args=extra_args(request, row, key))
            for row, key in enumerate(keys)
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in request.prompt_ids]
        outputs = self.llm.generate(prompts, params, use_tqdm=partial(_bar, progress) if progress else False)
        completions = [list(output.outputs[0].token_ids) for output in outputs]
        if progress:
            progress(0, sum(map(len, completions)))
        records = self.llm.collective_rpc("mentor_take_records", args=(keys,))[0]["rows"]
        values = [
            match_record(record, ids, len(prompt), row)
            for row, (record, ids, prompt) in enumerate(zip(records, completions, request.prompt_ids))
        ]
        return assemble(request, completions, values, {"seconds": time.perf_counter() - started})


def _bar(progress: Progress, rows: Iterable | None = None, **kwargs: Any) -> Any:
    """What vLLM takes for tqdm: nothing around the rows that it adds, and a bar for those that are finished."""
    return _Bar(progress, **kwargs) if rows is None else rows


class _Bar(tqdm):
    """A bar that nobody sees, and that passes on how many rows are finished."""

    def __init__(self, progress: Progress, **kwargs: Any):
        super().__init__(**kwargs | {"file": io.StringIO()})
        self.progress = progress

    def update(self, n: float | None = 1) -> bool | None:
        self.progress(n, 0)
        return super().update(n)
