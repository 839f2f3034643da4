"""Which vLLM the plugin fits: its version, and the names that the plugin replaces or calls."""

import inspect
from pkgutil import resolve_name

from packaging.version import Version


OLDEST, NEWEST = "0.31.0", "0.31.99"

_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RELOAD = "vllm.model_executor.model_loader.reload.layerwise"

# Names, and the parameters that the plugin relies on
SYMBOLS = {
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": ("self",),
    "vllm.config.speculative:SpeculativeConfig.verify_equal_vocab_size_if_draft_model": ("self",),
    "vllm.exceptions:VLLMValidationError": ("message",),
    "vllm.v1.engine.input_processor:InputProcessor._validate_params": ("self", "params", "supported_tasks"),
}
WORKER_SYMBOLS = {
    f"{_RUNNER}.__init__": ("self", "vllm_config", "device"),
    f"{_RUNNER}._sample": ("self", "logits", "spec_decode_metadata"),
    f"{_RUNNER}.sample_tokens": ("self", "grammar_output"),
    f"{_RUNNER}._input_fits_in_drafter": ("self", "common_attn_metadata"),
    f"{_RUNNER}._get_draft_token_ids_cpu": ("self",),
    f"{_RUNNER}._get_positions": ("self", "num_tokens"),
    "vllm.v1.spec_decode.draft_model:DraftModelProposer._raise_if_vocab_size_mismatch": ("self",),
    f"{_PROPOSER}._sample_from_logits": ("self", "logits", "sampling_metadata"),
    f"{_PROPOSER}._set_positions": ("self", "num_tokens"),
    f"{_PROPOSER}._get_slot_mapping": ("self", "num_tokens"),
    f"{_PROPOSER}.build_per_group_and_layer_attn_metadata": ("self", "common_attn_metadata"),
    f"{_PROPOSER}._determine_batch_execution_and_padding": ("self", "num_tokens"),
    "vllm.forward_context:set_forward_context": ("attn_metadata", "vllm_config", "num_tokens"),
    "vllm.v1.outputs:SamplerOutput": ("sampled_token_ids", "logprobs_tensors"),
    "vllm.v1.outputs:LogprobsTensors": ("logprob_token_ids", "logprobs", "selected_token_ranks"),
    f"{_RELOAD}:initialize_layerwise_reload": ("model",),
    f"{_RELOAD}:finalize_layerwise_reload": (),
}


class IncompatibleVLLM(RuntimeError):
    """The installed vLLM is not one that the plugin fits."""


def check_version() -> None:
    """Raise [`IncompatibleVLLM`] if the installed version is outside the range that was tested."""
    import vllm

    version = Version(vllm.__version__)
    if not Version(OLDEST) <= Version(version.base_version) <= Version(NEWEST):
        raise IncompatibleVLLM(
            f"vLLM {version} is installed, and mixed rollouts were tested with {OLDEST} to {NEWEST} only; in another "
            f"version they might be sampled wrongly. Install it with `pip install 'vllm>={OLDEST},<={NEWEST}'`."
        )


def check_symbols(symbols: dict[str, tuple[str, ...]] = SYMBOLS) -> None:
    """Raise [`IncompatibleVLLM`] naming the first name of vLLM that is missing or has other parameters."""
    fix = f"Install a vLLM from {OLDEST} to {NEWEST} that is not patched."
    for name, parameters in symbols.items():
        try:
            found = tuple(inspect.signature(resolve_name(name)).parameters)
        except (ImportError, AttributeError) as error:
            raise IncompatibleVLLM(f"This vLLM has no `{name}` ({error}). {fix}") from error
        missing = [parameter for parameter in parameters if parameter not in found]
        if missing:
            raise IncompatibleVLLM(f"`{name}` of this vLLM takes {found} and not {missing}. {fix}")
