"""The options that a run was started with: as a config file that starts it again, and as one that may be published."""

import json
import os
import re
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import PreTrainedModel

from ..config import MentorGRPOConfig
from ..files import write_whole


FILE = "recipe.yaml"
PUBLISHED = "assets/recipe.yaml"
# Where this run happened to run, rather than how
_SITE = re.compile(r"env|\w+_base_url|vllm_server_host")
_SECRET_NAME = re.compile(r"(^|[_-])(token|key|secret|password|credentials?)$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})|://[^/\s]*@")


def without_secrets(options: dict[str, Any], publish: bool = False) -> tuple[dict[str, Any], list[str]]:
    """
    Take out of options what must not be written down: tokens, keys, passwords, and texts that look like one or hold an
    address with a password. To `publish` them, the machine is hidden as well: absolute paths are cut to their last
    part, `env` and the addresses of servers are left out. Returns what is kept, and the names of the rest.

    >>> without_secrets({"model_name_or_path": "/home/ada/qwen", "hub_token": "hf_x", "seed": 1}, publish=True)
    ({'model_name_or_path': 'qwen', 'seed': 1}, ['hub_token'])
    """
    kept, left_out = {}, []
    for name, value in options.items():
        value = _plain(value)
        values = value if isinstance(value, list) else [value]
        texts = [one for one in values if isinstance(one, str)]
        secret = value is not None and _SECRET_NAME.search(name) or any(map(_SECRET_TEXT.search, texts))
        if secret or publish and _SITE.fullmatch(name):
            left_out.append(name)
            continue
        parts = []
        for part in values:
            if isinstance(part, dict):
                part, inner = without_secrets(part, publish)
                left_out += [f"{name}.{one}" for one in inner]
            parts.append(_last_part(part) if publish else part)
        kept[name] = parts if values is value else parts[0]
    return kept, left_out


def script_recipe(args: MentorGRPOConfig, model: Any, expert: str | None, rewards: Sequence[Any]) -> dict[str, Any]:
    """
    The options of `mentor-trl train` for a run that was started from Python. They lack the dataset, and what has no
    option: a model or reward function without a name.
    """
    options = {**args.given, "output_dir": args.output_dir, "model_name_or_path": model.config._name_or_path or None}
    if args.expert_base_url is None:
        options["expert_model_name_or_path"] = args.expert_model_name_or_path or expert
    options["reward_funcs"] = [name for name in map(_reward_name, rewards) if name] or None
    options["reward_model_name_or_path"] = next((one.config._name_or_path for one in rewards if _is_model(one)), None)
    lora = getattr(model, "active_peft_config", None)
    if isinstance(lora, LoraConfig):
        options |= {"use_peft": True, "lora_r": lora.r, "lora_alpha": lora.lora_alpha}
    return {name: value for name, value in options.items() if value is not None}


def _is_model(reward: Any) -> bool:
    return isinstance(reward, PreTrainedModel)


def _reward_name(function: Any) -> str | None:
    """What `reward_funcs` of the command line calls a function."""
    if _is_model(function):
        return None
    function = getattr(function, "function", function)  # of a checked one
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    if not name or "<" in name:
        return None
    if module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", None) or "__main__").stem
    return name if module.startswith("mentor_trl.rewards") else f"{module}.{name}"


def names_dataset(recipe: dict[str, Any]) -> bool:
    """Whether a recipe says what is trained on."""
    return bool(recipe.get("dataset_name") or recipe.get("datasets"))


def save(options: dict[str, Any], folder: str | Path) -> Path:
    """Write `recipe.yaml`, which starts the run again here, and `assets/recipe.yaml`, which may be published."""
    options = {name: value for name, value in options.items() if name != "resume_from_checkpoint"}
    for name, publish in ((PUBLISHED, True), (FILE, False)):
        kept, left_out = without_secrets(options, publish)
        head = f"# Launch: mentor-trl train --config {name}\n"
        head += "" if names_dataset(options) else "# The run was started from Python: set `dataset_name` first\n"
        head += f"# Left out: {', '.join(sorted(left_out))}\n" if left_out else ""
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(kept, sort_keys=True, allow_unicode=True, width=119)
        write_whole(path, f"{head}\n{text}")
    return path


def _plain(value: Any) -> Any:
    """A value as YAML writes it; a mapping that was given as JSON text becomes one."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, (dict, list, str, bool, int, float, type(None))) else str(value)


def _last_part(value: Any) -> Any:
    if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)) and "\n" not in value:
        return Path(value).name
    return value
