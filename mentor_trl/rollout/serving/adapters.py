"""LoRA adapters as a server of the base model loads them."""

import shutil
from pathlib import Path

from accelerate.utils import is_peft_model

from ...errors import SetupError


def check_adapter(policy) -> None:
    """
    Check that vLLM can load a policy's adapter.

    Raises:
        [`SetupError`]: naming what it cannot.
    """
    if not is_peft_model(policy):
        raise SetupError(
            "`vllm_weight_sync='adapter'` hands over a LoRA adapter, and the policy has none. Train with `use_peft` "
            "(`peft_config`), or set it to 'auto'."
        )
    config = policy.active_peft_config
    refused = {
        f"peft_type={config.peft_type.value}": config.peft_type.value != "LORA",
        "use_dora": getattr(config, "use_dora", False),
        f"modules_to_save={getattr(config, 'modules_to_save', None)}": getattr(config, "modules_to_save", None),
        f"bias={getattr(config, 'bias', None)!r}": getattr(config, "bias", "none") != "none",
        "rank_pattern": getattr(config, "rank_pattern", None),
        "alpha_pattern": getattr(config, "alpha_pattern", None),
        f"r={getattr(config, 'r', 0)}": getattr(config, "r", 0) > 512,
        "trainable_token_indices": getattr(config, "trainable_token_indices", None),
    }
    found = [name for name, refuse in refused.items() if refuse]
    if found:
        raise SetupError(
            f"vLLM does not load an adapter with {', '.join(found)}. Train a plain LoRA without, or set "
            "`vllm_weight_sync` to 'auto', which hands over merged weights."
        )


def write_adapter(policy, folder: Path) -> None:
    """Write a policy's adapter. The folder appears under its name only when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)
    policy.save_pretrained(partial, selected_adapters=[policy.active_adapter], save_embedding_layers=False)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
