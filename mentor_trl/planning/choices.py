"""Settings that fit a machine: the first of a ladder, from the plainest to the most sparing."""

import importlib.util
import math
from collections.abc import Iterator

from .checks import Check
from .hardware import Hardware
from .memory import FOUR_BIT, LORA_RANK, Load, room
from .models import ModelFacts


NUM_GENERATIONS = 8
# Rows of an optimizer step, and tokens of a completion, where nothing else is asked for
ROWS = {"gpu": 64, "cpu": 16}
COMPLETION = {"gpu": 1024, "cpu": 128}
SHORTEST = 16


def completion_length(asked: int | None, prompt: int, models: list[ModelFacts], hardware: Hardware) -> int:
    """Tokens of a completion: what was asked for, or what fits into the contexts."""
    if asked is not None:
        return asked
    usual = COMPLETION["gpu" if hardware.gpus else "cpu"]
    spaces = [model.context - prompt for model in models if model.context]
    return max(SHORTEST, min([usual, *spaces]))


def first_load(
    policy: ModelFacts, expert: ModelFacts | None, prompt: int, completion: int, hardware: Hardware
) -> Load:
    """Full training, in the precision that the hardware is good at."""
    expert_bytes = expert.checkpoint_bytes if expert is not None else 0.0
    width = 2 if hardware.gpus else 4
    return Load(policy, expert, prompt, completion, expert_bytes=expert_bytes, cache_bytes=width, compute_bytes=width)


def fit(load: Load, hardware: Hardware) -> tuple[Load, float]:
    """The first settings that fit, or the most sparing ones; and the bytes that there are."""
    limit = room(hardware.memory)
    last = load
    for stage in _stages(load, hardware):
        for batch, checkpointing in ((8, False), (4, False), (8, True), (4, True), (2, True), (1, True)):
            for rows in (64, 32, 16, 8):
                last = stage.but(batch=batch, checkpointing=checkpointing, rows=rows)
                if last.peak() <= limit:
                    return last, limit
    return last, limit


def _stages(load: Load, hardware: Hardware) -> Iterator[Load]:
    adapter = load.but(lora=LORA_RANK, policy_bytes=2.0 if hardware.gpus else 4.0)
    yield load
    if hardware.gpus > 1:
        yield load.but(shards=hardware.gpus)
    yield adapter
    if hardware.gpus:  # bitsandbytes needs one
        small = adapter.but(expert_bytes=min(FOUR_BIT, load.expert_bytes))
        if load.expert is not None:
            yield small
        yield small.but(policy_bytes=FOUR_BIT)


def accumulation(load: Load, hardware: Hardware, prompts: int) -> int:
    """Passes that make an optimizer step of whole groups, of no more prompts than there are."""
    wanted = min(ROWS["gpu" if hardware.gpus else "cpu"], NUM_GENERATIONS * max(prompts, 1))
    rows = load.batch * hardware.processes
    unit = NUM_GENERATIONS // math.gcd(rows, NUM_GENERATIONS)
    return max(unit, wanted // rows // unit * unit)


def sparing(load: Load) -> list[str]:
    """What was done to fit, for people."""
    ways = []
    if load.shards > 1:
        ways.append(f"ZeRO-2 over {load.shards} GPUs")
    if load.lora:
        ways.append(f"LoRA of rank {load.lora}")
    if load.policy_bytes == FOUR_BIT:
        ways.append("policy in 4 bits")
    if load.expert is not None and load.expert_bytes == FOUR_BIT:
        ways.append("expert in 4 bits")
    if load.checkpointing:
        ways.append("gradient checkpointing")
    return [*ways, f"passes of {load.batch} rows", f"{load.rows} rows sampled at once"]


def check_packages(load: Load) -> list[Check]:
    """Packages that the settings need and this machine does not have."""
    needed = {"bitsandbytes": FOUR_BIT in (load.policy_bytes, load.expert_bytes), "deepspeed": load.shards > 1}
    missing = [name for name, wanted in needed.items() if wanted and importlib.util.find_spec(name) is None]
    return [Check("package", f"{name} is not here", "note", f"pip install {name}") for name in missing]


def remedies(load: Load, hardware: Hardware) -> list[str]:
    """What else can be done where the most sparing settings do not fit."""
    ways = []
    if load.expert is not None:
        ways.append("serve the expert elsewhere (--expert_base_url)")
    if load.completion > 2 * SHORTEST:
        ways.append(f"shorten completions (--max_completion_length {load.completion // 2})")
    ways.append("take a smaller policy")
    return [*ways, "use a larger GPU" if hardware.gpus else "use a GPU"]
