"""Options of an engine that holds policy and expert, and samples from the mixed policy. Imports nothing of vLLM."""

from collections.abc import Iterable
from typing import Any

from ..vllm_server.options import CONFIG_KEY


WORKER_EXTENSION = "mentor_trl.vllm_plugin.worker.MentorWorkerExtension"

# Keys of a request's `SamplingParams.extra_args` (`vllm_xargs` over HTTP) that this engine knows beside the others
RECORD, SCORE = "mentor_record", "mentor_score"


def engine_options(
    policy: str,
    expert: str,
    num_tokens: int | None = None,
    draft_length: int = 8,
    tensor_parallel_size: int = 1,
    sentence_ids: Iterable[int] | None = None,
) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM` for a mixed-policy engine: the policy becomes the draft model, the expert the target model,
    and `tensor_parallel_size` devices share each. Ids from `num_tokens` on are padding, which is never sampled; by
    default the smaller of the two vocabularies has none. Sentences begin behind `sentence_ids`; by default the engine
    reads them off its tokenizer.
    """
    tokens = {"num_tokens": num_tokens} | ({} if sentence_ids is None else {"sentence_ids": list(sentence_ids)})
    return {
        "model": expert,
        "speculative_config": {
            "method": "draft_model",
            "model": policy,
            "num_speculative_tokens": draft_length,
            "draft_sample_method": "probabilistic",
            "draft_tensor_parallel_size": tensor_parallel_size,
        },
        "tensor_parallel_size": tensor_parallel_size,
        "additional_config": {CONFIG_KEY: tokens},
        "worker_extension_cls": WORKER_EXTENSION,
        "generation_config": "vllm",
        "async_scheduling": False,
    }
