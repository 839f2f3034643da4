"""The options that a run was started with, as a config file that may be published."""

import json
import os
import re
from enum import Enum
from pathlib import Path
from typing import Any


FILE = "recipe.yaml"
# Where this run happened to run, rather than how
_SITE = {"env", "resume_from_checkpoint", "vllm_server_base_url", "vllm_server_host"}
_SECRET_NAME = re.compile(r"(^|[_-])(token|key|secret|password|credentials?)$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})|://[^/\s]*@")


def publishable(options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    Take out of options what must not be published: secrets, and where on a machine things lie.

    Args:
        options (`dict[str, Any]`):
            Options by name, as a config file holds them.

    Returns:
        `tuple[dict[str, Any], list[str]]`: the options, in which an absolute path is cut to its last part, and the
        names of those that were left out: tokens, keys, passwords, texts that look like one or hold an address with a
        password, `env`, and the addresses of servers.

    ```python
    >>> publishable({"model_name_or_path": "/home/ada/qwen", "hub_token": "hf_x", "seed": 1})
    ({'model_name_or_path': 'qwen', 'seed': 1}, ['hub_token'])

    ```
    """
    kept, left_out = {}, []
    for name, value in options.items():
        value = _plain(value)
        if name in _SITE or _is_secret(name, value):
            left_out.append(name)
        elif isinstance(value, dict):
            kept[name], inner = publishable(value)
            left_out += [f"{name}.{one}" for one in inner]
        elif isinstance(value, list):
            parts = [publishable(one) if isinstance(one, dict) else (_without_folders(one), []) for one in value]
            kept[name] = [part for part, _ in parts]
            left_out += [f"{name}.{one}" for _, inner in parts for one in inner]
        else:
            kept[name] = _without_folders(value)
    return kept, left_out


def to_yaml(options: dict[str, Any]) -> str:
    """
    Write options as a config file of `mentor-trl train`.

    Args:
        options (`dict[str, Any]`):
            Options by name.
    """
    import yaml

    kept, left_out = publishable(options)
    head = "# Launch: mentor-trl train --config recipe.yaml\n"
    if left_out:
        head += f"# Left out: {', '.join(sorted(left_out))}\n"
    return head + "\n" + yaml.safe_dump(kept, sort_keys=True, allow_unicode=True, width=119)


def save(options: dict[str, Any], folder: str | Path) -> Path:
    """
    Save options to `recipe.yaml` in a folder.

    Args:
        options (`dict[str, Any]`):
            Options by name.
        folder (`str` or `Path`):
            Folder, which is made if there is none.
    """
    path = Path(folder, FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(options), encoding="utf-8")
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


def _is_secret(name: str, value: Any) -> bool:
    if value is None:
        return False
    texts = value if isinstance(value, list) else [value]
    found = any(_SECRET_TEXT.search(text) for text in texts if isinstance(text, str))
    return found or bool(_SECRET_NAME.search(name))


def _without_folders(value: Any) -> Any:
    if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)) and "\n" not in value:
        return Path(value).name
    return value
