"""A recipe as the file that `mentor-trl train --config` takes, with its launch command and short comments."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .choices import NUM_GENERATIONS, accumulation
from .hardware import Hardware
from .memory import FOUR_BIT, Load


METHODS = {"mentor": "MENTOR", "grpo": "GRPO", "opd": "On-policy distillation", "gats": "GATS"}
METHODS |= {"distilled_rl": "Distilled RL"}
# Models below this many weights learn nothing in a first run at the learning rate of large ones
SMALL = 100e6
COMMENTS = {
    "alpha_schedule": "mixed rollouts count less and less, and end after expert_decay_steps batches",
    "branch_share": "the expert speaks at one position in twelve, each of which is a request",
    "correction_exponent": "0 is the paper: no correction of the expert's tokens",
    "expert_load_in_4bit": "needs bitsandbytes",
    "extend_stop_tokens": "the expert ends with tokens that do not end the policy's completions",
    "gradient_accumulation_steps": "times per_device_train_batch_size: rows of a step on a process",
    "load_in_4bit": "needs bitsandbytes",
    "log_rollout_records": "for `mentor-trl plot rollout`",
    "max_steps": "a first run; more for a result",
    "num_mixed_generations": "of these; the expert takes part in them",
    "report_to": "or trackio, wandb, swanlab, tensorboard",
    "rollout_batch_size": "rows that are sampled at once",
}


@dataclass(frozen=True)
class Plan:
    """
    What was decided.

    Attributes:
        method (`str`): One of [`METHODS`].
        load ([`Load`]): The models, lengths and sparing settings.
        hardware ([`Hardware`]): The devices.
        prompts (`int`): Number of training prompts.
        expert (`str`, *optional*): Name of the expert, where there is one.
        expert_url (`str`, *optional*): Address of its server.
        extend_stops (`bool`): Whether the expert has stop tokens of its own.
        data (`dict`): Options of the data block.
        output_dir (`str`): Folder of the run.
        trust_remote_code (`bool`): Whether repositories may bring code.
    """

    method: str
    load: Load
    hardware: Hardware
    prompts: int
    expert: str | None
    expert_url: str | None
    extend_stops: bool
    data: dict[str, Any]
    output_dir: str
    trust_remote_code: bool = False

    @property
    def mixed(self) -> bool:
        """Whether the expert speaks in rollouts."""
        return self.method in ("mentor", "gats")

    def model_options(self) -> dict[str, Any]:
        load, options = self.load, {"model_name_or_path": self.load.policy.name}
        options["dtype"] = "bfloat16" if load.policy_bytes < 4 else "float32"
        if self.method != "grpo":
            key = "expert_base_url" if self.expert_url else "expert_model_name_or_path"
            options[key] = self.expert_url or self.expert
        if self.extend_stops:
            options["extend_stop_tokens"] = True
        if load.expert is not None and load.expert_bytes == FOUR_BIT:
            options["expert_load_in_4bit"] = True
        if load.lora:
            options |= {"use_peft": True, "lora_r": load.lora, "lora_alpha": 2 * load.lora}
            options["lora_target_modules"] = "all-linear"
        if load.policy_bytes == FOUR_BIT:
            options["load_in_4bit"] = True
        if self.trust_remote_code:
            options["trust_remote_code"] = True
        return options

    def trainer_options(self) -> dict[str, Any]:
        load, gpu, tiny = self.load, bool(self.hardware.gpus), self.load.policy.parameters < SMALL
        steps = 200 if gpu else 50 if tiny else 8  # on a CPU minutes, not hours
        options = {
            "beta": 0.0,
            "bf16": gpu,
            "epsilon": 0.2,
            "epsilon_high": 0.28,
            "gradient_accumulation_steps": accumulation(load, self.hardware, self.prompts),
            "gradient_checkpointing": load.checkpointing,
            "learning_rate": 1e-4 if tiny else 1e-5 if load.lora else 1e-6,
            "log_rollout_records": NUM_GENERATIONS,
            "logging_steps": 1,
            "loss_type": "dapo",
            "lr_scheduler_type": "constant",
            "max_completion_length": load.completion,
            "max_grad_norm": 1.0,
            "max_steps": steps,
            "num_generations": NUM_GENERATIONS,
            "num_mixed_generations": NUM_GENERATIONS // 2 if self.mixed else 0,
            "output_dir": self.output_dir,
            "per_device_train_batch_size": load.batch,
            "report_to": "none",
            "rollout_batch_size": load.rows,
            "save_steps": steps // 2,
            "seed": 42,
            "temperature": 1.0,
        }
        if gpu:
            launch = "zero2" if load.shards > 1 else "multi_gpu" if self.hardware.gpus > 1 else "single_gpu"
            options |= {"accelerate_config": launch, "num_processes": self.hardware.gpus}
        else:
            options["use_cpu"] = True
        options["reward_weights"] = reward_weights(self.data["reward_funcs"])
        return options | self._guidance(steps)

    def _guidance(self, steps: int) -> dict[str, Any]:
        options: dict[str, Any] = {"distillation": self.method} if self.method not in ("mentor", "grpo") else {}
        if not self.mixed:
            return options
        options |= {"alpha": 1.0, "alpha_schedule": "cosine", "expert_decay_steps": steps * 3 // 5}
        options |= {"correction": "temper", "correction_exponent": 0.25, "entropy_quantile": 0.95}
        if self.expert_url:
            options |= {"branch_rule": "random", "branch_share": 0.08}
        return options

    def text(self, path: str) -> str:
        """The file, as it is written to `path`."""
        blocks = {"Model": self.model_options(), "Data": self.data, "Trainer": self.trainer_options()}
        parts = [f"# {name} arguments\n{_lines(options)}" for name, options in blocks.items()]
        return "\n\n".join([self._header(path), *parts]) + "\n"

    def _header(self, path: str) -> str:
        name = lambda given: Path(str(given)).name
        expert = "" if self.method == "grpo" else f" with the expert {name(self.expert or self.expert_url)}"
        title = f"{METHODS[self.method]} of {name(self.load.policy.name)}{expert} on {name(self.data['dataset_name'])}"
        lines = textwrap.wrap(f"{title}, for {self.hardware}.", 117)
        if self.expert_url and self.expert:
            port = self.expert_url.rpartition(":")[2].split("/")[0]
            serve = f"vllm serve {self.expert} --logprobs-mode processed_logprobs --generation-config vllm"
            lines += ["", "The expert, on its machine:", "", f"  {serve} \\", f"      --port {port}"]
        lines += ["", "Try it on one small batch, then launch it:", ""]
        lines += [f"  mentor-trl train --config {path}{flag}" for flag in (" --dry_run", "")]
        return "\n".join(f"# {line}".rstrip() for line in lines)


def reward_weights(names: list[str]) -> list[float]:
    """The accuracy counts most; rewards of one's own count alike."""
    return [0.9, 0.1] if names == ["accuracy_reward", "format_reward"] else [1.0] * len(names)


def _lines(options: dict[str, Any]) -> str:
    lines = []
    for name in sorted(options):
        value = options[name]
        text = f"{value:.1e}".replace("e-0", "e-") if isinstance(value, float) and 0 < value < 1e-3 else _plain(value)
        comment = COMMENTS.get(name)
        lines.append(f"{name}: {text}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines)


def _plain(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()
