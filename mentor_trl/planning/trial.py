"""A dry run: the checks of a run's options, and the options of one tiny batch."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback
from trl import ModelConfig

from ..config import MentorGRPOConfig
from .checks import Check, check_lengths, check_memory, check_pair, check_solutions, prompt_length
from .choices import check_packages
from .hardware import Hardware, find_hardware
from .memory import FOUR_BIT, GIB, Load, room, shown
from .models import ModelFacts, read_model
from .servers import check_expert_server, check_health, check_policy_server


# Tokens of a completion, and groups of a batch that dynamic sampling may draw from
COMPLETION, SPARE_GROUPS = 16, 4


def check_run(args: MentorGRPOConfig, model_args: ModelConfig, dataset: Any, rewards: list[str]) -> list[Check]:
    """What can be known of a run from its options, before anything large is loaded."""
    policy = read_model(model_args.model_name_or_path, "policy", args.trust_remote_code, model_args.model_revision)
    checks, expert = [Check("policy", policy.described)], None
    if args.expert_model_name_or_path and _needs_expert(args):
        name, revision = args.expert_model_name_or_path, args.expert_model_revision
        expert = read_model(name, "expert", args.trust_remote_code, revision)
        checks += [Check("expert", expert.described), *check_pair(policy, expert, args.extend_stop_tokens)]
    checks += _check_servers(args)
    count = f"{len(dataset):,} prompts" if hasattr(dataset, "__len__") else "a stream of prompts"
    checks.append(Check("data", count))
    streamed = not hasattr(dataset, "__len__")
    solutions = dataset["solution"] if not streamed and "solution" in dataset.column_names else []
    checks.append(check_solutions(solutions, rewards))
    prompt = prompt_length(policy, dataset)
    checks.append(check_lengths(policy, expert, prompt, args.max_completion_length))
    checks.append(_check_output(args.output_dir))
    hardware = Hardware(0, find_hardware(0).memory) if args.device.type == "cpu" else find_hardware()
    load, limit = load_of(args, model_args, policy, expert, prompt, hardware), room(hardware.memory)
    ways = ["lower `per_device_train_batch_size`", "set `gradient_checkpointing: true`", "`use_peft: true`"]
    memory = check_memory(load, limit, "each GPU" if hardware.gpus else "the CPU", ways)
    verdict = "note" if memory.verdict == "no" else memory.verdict  # an estimate refuses nothing that can be tried
    return [*checks, Check(memory.what, memory.found, verdict, memory.advice), *check_packages(load)]


def _needs_expert(args: MentorGRPOConfig) -> bool:
    return args.num_mixed_generations > 0 or args.distillation != "none"


def _check_servers(args: MentorGRPOConfig) -> list[Check]:
    checks = []
    if args.expert_base_url and _needs_expert(args):
        checks += check_expert_server(args.expert_base_url, args.expert_api_key_file, missing="no")
    if not args.use_vllm or args.vllm_mode != "server":
        return checks
    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    if not args.num_mixed_generations:  # TRL's server
        return [*checks, *check_health(url)]
    urls = [one for one in (url, args.vllm_policy_server_base_url) if one]
    return checks + [check for one in urls for check in check_policy_server(one, args.vllm_server_api_key_file)]


def existing(folder: str) -> Path:
    """A folder, or the nearest one above it that there is."""
    path = Path(folder).expanduser().absolute()
    return path if path.exists() else existing(str(path.parent))


def _check_output(folder: str) -> Check:
    there = existing(folder)
    if there.is_dir() and os.access(there, os.W_OK):
        return Check("output_dir", folder)
    return Check("output_dir", folder, "no", f"{there} cannot be written; choose another `output_dir`.")


def load_of(
    args: MentorGRPOConfig,
    model_args: ModelConfig,
    policy: ModelFacts,
    expert: ModelFacts | None,
    prompt: int,
    hardware: Hardware,
) -> Load:
    """What the options of a run load onto one device."""
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if args.num_mixed_generations and not args.use_vllm:
        rows = min(rows, args.rollout_batch_size)
    colocated = args.use_vllm and args.vllm_mode == "colocate"
    mixed_precision = args.bf16 or args.fp16
    width = 2 if mixed_precision else 4
    plugin = args.deepspeed_plugin
    return Load(
        policy,
        None if args.use_vllm and args.num_mixed_generations else expert,
        prompt,
        args.max_completion_length,
        batch=args.per_device_train_batch_size,
        rows=0 if args.use_vllm else rows,
        checkpointing=args.gradient_checkpointing,
        lora=model_args.lora_r if model_args.use_peft else 0,
        policy_bytes=_bytes(policy, model_args.dtype, model_args.load_in_4bit, model_args.load_in_8bit),
        expert_bytes=_bytes(expert, args.expert_dtype, args.expert_load_in_4bit, args.expert_load_in_8bit),
        cache_bytes=width,
        compute_bytes=width,
        reference=args.beta > 0 and not model_args.use_peft,
        shards=args.world_size if plugin is not None and plugin.zero_stage >= 2 else 1,
        engine=args.vllm_gpu_memory_utilization * hardware.memory * GIB if colocated else 0.0,
        engine_sleeps=args.vllm_enable_sleep_mode,
    )


def _bytes(model: ModelFacts | None, dtype: str | None, four: bool, eight: bool) -> float:
    if model is None:
        return 0.0
    if four or eight:
        return FOUR_BIT if four else 1.1
    return model.checkpoint_bytes if dtype in (None, "auto") else float(getattr(torch, dtype).itemsize)


def trial_flags(args: MentorGRPOConfig, given: dict[str, Any], folder: str) -> list[str]:
    """Options behind those of a run that make it one step on whole groups of short completions, in another folder."""
    group = args.num_generations
    batch = min(args.per_device_train_batch_size, group)
    passes = group // math.gcd(batch, group)
    flags = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": passes,
        "num_iterations": 1,
        "max_steps": 1,
        "max_completion_length": min(args.max_completion_length, COMPLETION),
        "output_dir": folder,
        "logging_steps": 1,
        "log_rollout_records": 0,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        **dict.fromkeys(("push_to_hub", "log_completions", "load_best_model_at_end"), "false"),
        "disable_tqdm": "true",
    }
    if "generation_batch_size" in given:
        flags["generation_batch_size"] = batch * passes * args.world_size
    if "steps_per_generation" in given:
        flags["steps_per_generation"] = passes
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def few(dataset: Any, args: MentorGRPOConfig) -> Any:
    """The first prompts, as many as a trial takes."""
    count = SPARE_GROUPS * args.generation_batch_size // args.num_generations
    return dataset.select(range(min(count, len(dataset)))) if hasattr(dataset, "__len__") else dataset.take(count)


def try_batch(trainer: Any) -> str:
    """Make one step; returns what was done, for people."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    args, start = trainer.args, time.perf_counter()
    memory = _peak_memory(args.device)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    seconds = time.perf_counter() - start
    rows = args.generation_batch_size
    mixed = rows // args.num_generations * args.num_mixed_generations
    kinds = f"{rows} rollouts" + (f", {mixed} of them mixed" if mixed else "")
    names = {"reward": "reward", "loss": "loss", "grad_norm": "gradient norm"}
    numbers = ", ".join(f"{text} {logged[name]:.3g}" for name, text in names.items() if name in logged)
    peak = f", peak memory {shown(memory())}" if memory else ""
    length = f"up to {args.max_completion_length} tokens each (too few for most rewards)"
    return f"One step on {kinds}, {length}: {numbers}; {seconds:.1f} s{peak}."


def _peak_memory(device: torch.device) -> Callable[[], float] | None:
    """What reads the most memory that this process has had on its accelerator from now on."""
    if device.type == "cpu":
        return None
    torch.accelerator.memory.reset_peak_memory_stats()
    return torch.accelerator.memory.max_memory_allocated
