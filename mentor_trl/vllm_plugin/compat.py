"""Which vLLM the plugin fits: its version, and the names that the plugin replaces or calls."""

import importlib
import inspect

from packaging.version import Version


OLDEST, NEWEST = "0.31.0", "0.31.99"

# Module, qualified name, and the parameters that the plugin relies on
SYMBOLS = (
    ("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self",)),
    ("vllm.config.speculative", "SpeculativeConfig.verify_equal_vocab_size_if_draft_model", ("self",)),
    ("vllm.exceptions", "VLLMValidationError", ("message",)),
    ("vllm.v1.engine.input_processor", "InputProcessor._validate_params", ("self", "params", "supported_tasks")),
)
WORKER_SYMBOLS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.__init__", ("self", "vllm_config", "device")),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata")),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._input_fits_in_drafter", ("self", "common_attn_metadata")),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._get_draft_token_ids_cpu", ("self",)),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._get_positions", ("self", "num_tokens")),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._raise_if_vocab_size_mismatch", ("self",)),
    (
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer._sample_from_logits",
        ("self", "logits", "sampling_metadata"),
    ),
    ("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer._set_positions", ("self", "num_tokens")),
    ("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer._get_slot_mapping", ("self", "num_tokens")),
    (
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata",
        ("self", "common_attn_metadata"),
    ),
    (
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer._determine_batch_execution_and_padding",
        ("self", "num_tokens"),
    ),
    ("vllm.forward_context", "set_forward_context", ("attn_metadata", "vllm_config", "num_tokens")),
    ("vllm.v1.outputs", "SamplerOutput", ("sampled_token_ids", "logprobs_tensors")),
    (
        "vllm.v1.outputs",
        "LogprobsTensors",
        ("logprob_token_ids", "logprobs", "selected_token_ranks"),
    ),
    ("vllm.model_executor.model_loader.reload.layerwise", "initialize_layerwise_reload", ("model",)),
    ("vllm.model_executor.model_loader.reload.layerwise", "finalize_layerwise_reload", ()),
)


class IncompatibleVLLM(RuntimeError):
    """The installed vLLM is not one that the plugin fits."""


def check_version() -> str:
    """
    Raises:
        [`IncompatibleVLLM`]: if it is outside the range that was tested.
    """
    import vllm

    version = Version(vllm.__version__)
    if not Version(OLDEST) <= Version(version.base_version) <= Version(NEWEST):
        raise IncompatibleVLLM(
            f"vLLM {version} is installed, and mixed rollouts were tested with {OLDEST} to {NEWEST} only; in another "
            f"version they might be sampled wrongly. Install it with `pip install 'vllm>={OLDEST},<={NEWEST}'`."
        )
    return str(version)


def check_symbols(symbols=SYMBOLS) -> None:
    """
    Raises:
        [`IncompatibleVLLM`]: naming the first name of vLLM that is missing or has other parameters.
    """
    for module, name, parameters in symbols:
        try:
            target = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            found = tuple(inspect.signature(target).parameters)
        except (ImportError, AttributeError) as error:
            raise IncompatibleVLLM(f"This vLLM has no `{module}.{name}` ({error}). {_FIX}") from error
        missing = [parameter for parameter in parameters if parameter not in found]
        if missing:
            raise IncompatibleVLLM(f"`{module}.{name}` of this vLLM takes {found} and not {missing}. {_FIX}")


_FIX = f"Install a vLLM from {OLDEST} to {NEWEST} that is not patched."
