"""Loading an expert."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub.utils import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import cached_file

from ..config import MentorGRPOConfig
from ..errors import SetupError
from ..random_state import untouched_rng


@contextmanager
def replicated_loading() -> Iterator[None]:
    """Under ZeRO-3, `from_pretrained` shards what it loads; inside, every process gets the whole model."""
    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config


def load_expert(
    model: str,
    revision: str | None = None,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    trust_remote_code: bool = False,
    **init_kwargs: Any,
) -> PreTrainedModel:
    """
    Load a frozen expert.

    Args:
        model (`str`):
            Model id, local folder, or PEFT adapter (merged into its base model, unless that is quantized).
        revision (`str`, *optional*):
            Revision of the model or adapter.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to quantize to 4 bits.
        load_in_8bit (`bool`, *optional*, defaults to `False`):
            Whether to quantize to 8 bits.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that the repository ships.
        **init_kwargs:
            Further arguments of `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`] in evaluation mode, without gradients.

    Raises:
        `SetupError`: if there is no model or adapter at `model`.
    """
    kwargs = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code, **init_kwargs}
    if load_in_4bit or load_in_8bit:
        kwargs |= _quantization(dtype, load_in_4bit, load_in_8bit)
    with untouched_rng(), replicated_loading():
        try:
            if is_adapter(model, revision):
                expert = _load_adapter(model, kwargs)
            else:
                expert = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        except (OSError, HFValidationError, RepositoryNotFoundError) as error:
            raise _not_found(model, error) from error
    return freeze(expert)


def _quantization(dtype: str, load_in_4bit: bool, load_in_8bit: bool) -> dict[str, Any]:
    if not torch.accelerator.is_available():
        raise SetupError(
            "`expert_load_in_4bit` and `expert_load_in_8bit` need an accelerator, and there is none. Leave them "
            "unset, or set `expert_dtype='bfloat16'` to save memory."
        )
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=True,
    )
    # A quantized model cannot be moved to its device afterwards
    return {"quantization_config": config, "device_map": {"": torch.accelerator.current_device_index()}}


def _not_found(name: str, error: Exception) -> SetupError:
    return SetupError(
        f"No expert could be loaded from `expert_model_name_or_path={name!r}`: {error}\nGive a model id of the Hub, "
        "or a folder that holds a model (config.json) or a PEFT adapter (adapter_config.json)."
    )


def check_expert_source(name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """
    Check that there is an expert to load, before anything large is.

    Raises:
        `SetupError`: if there is none.
    """
    if is_adapter(name, revision):
        return
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, HFValidationError, RepositoryNotFoundError) as error:
        raise _not_found(name, error) from error


def is_adapter(model: str, revision: str | None) -> bool:
    if os.path.isdir(model):
        return os.path.exists(os.path.join(model, "adapter_config.json"))
    try:
        return cached_file(model, "adapter_config.json", revision=revision) is not None
    except (OSError, EntryNotFoundError, LocalEntryNotFoundError):
        return False


def _load_adapter(model: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    from peft import AutoPeftModelForCausalLM

    expert = AutoPeftModelForCausalLM.from_pretrained(model, **kwargs)
    return expert if "quantization_config" in kwargs else expert.merge_and_unload()


def resolve_expert(
    source: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: MentorGRPOConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """The expert, its tokenizer and its name, from what a trainer was given."""
    if isinstance(source, str):
        name, revision = source, args.expert_model_revision
        expert = load_expert(
            source,
            revision=revision,
            dtype=args.expert_dtype,
            load_in_4bit=args.expert_load_in_4bit,
            load_in_8bit=args.expert_load_in_8bit,
            trust_remote_code=args.trust_remote_code,
            **(args.expert_model_init_kwargs or {}),
        )
    else:
        name, revision = expert_name(source), None
        if any(hasattr(parameter, "ds_id") for parameter in source.parameters()):
            raise SetupError(
                "The expert is sharded by ZeRO-3, and every process needs the whole of it. Pass its name, or load it "
                "with `mentor_trl.load_expert`."
            )
        expert = freeze(source)
    if tokenizer is None:
        tokenizer = load_expert_tokenizer(name, revision, args.trust_remote_code)
    return expert, tokenizer, name


def freeze(expert: PreTrainedModel) -> PreTrainedModel:
    """Evaluation mode, no gradients."""
    return expert.eval().requires_grad_(False)


def expert_name(expert) -> str | None:
    """Model id or folder that an instantiated expert came from."""
    if is_peft_model(expert):
        return expert.active_peft_config.base_model_name_or_path
    return getattr(expert.config, "_name_or_path", None) or None


def load_expert_tokenizer(
    name: str | None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """
    The expert's tokenizer, which proves that its tokens are the policy's.

    Raises:
        `SetupError`: if there is none to load.
    """
    reason = "the expert was passed as a model that names no origin"
    if name:
        for source in (name, adapter_base(name, revision)):
            if source is None:
                continue
            try:
                with untouched_rng():
                    return AutoTokenizer.from_pretrained(
                        source, revision=revision if source == name else None, trust_remote_code=trust_remote_code
                    )
            except (OSError, ValueError, KeyError) as error:
                reason = f"none can be loaded from {source!r} ({error})"
    raise SetupError(
        f"The expert's tokenizer is needed to check that its tokens are the policy's, but {reason}. Pass it as "
        "`expert_processing_class`, or save it in the expert's folder."
    )


def adapter_base(name: str, revision: str | None) -> str | None:
    """The model that an adapter belongs to; `None` for a model of its own."""
    if not is_adapter(name, revision):
        return None
    from peft import PeftConfig

    return PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path


def check_expert_given(args: MentorGRPOConfig, expert) -> None:
    """
    Check that there is exactly one expert. One on servers is there, and a server of policy and expert brings its own.

    Raises:
        [`SetupError`]: if there is none, or two.
    """
    served = args.expert_base_url is not None or (args.use_vllm and args.vllm_mode == "server")
    if expert is not None and args.expert_base_url is not None:
        raise SetupError(
            f"The expert is given twice, as `expert=` and as `expert_base_url={args.expert_base_url!r}`. Keep one."
        )
    if expert is None and args.expert_model_name_or_path is None and not served:
        raise SetupError(
            "No expert: set `expert_model_name_or_path`, pass `expert=` to the trainer, or set "
            "`num_mixed_generations=0` for plain GRPO."
        )
    if expert is not None and args.expert_model_name_or_path is not None:
        raise SetupError(
            "The expert is given twice, as `expert=` and as "
            f"`expert_model_name_or_path={args.expert_model_name_or_path!r}`. Keep one."
        )
