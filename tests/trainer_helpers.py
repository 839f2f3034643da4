"""Builders of tiny trainers, and what their tests compare."""

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from helpers import make_tiny_model, make_tiny_tokenizer
from mentor_trl import MentorGRPOConfig, MentorGRPOTrainer


# Tiny models gain nothing from threads, and wait for each other where cores are shared
torch.set_num_threads(1)

SETTINGS = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 8,
    "max_completion_length": 8,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}
# Wall-clock times, and what is computed from them
TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
TIMES += ("eval_samples_per_second", "eval_steps_per_second", "total_flos")


def tiny(seed: int):
    """Heads of 32, which vLLM's kernels for the CPU know."""
    return make_tiny_model(seed=seed, hidden_size=128)


def letters_reward(completions, **kwargs) -> list[float]:
    """About half of the random completions get it."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(sum(c.isalpha() for c in text) >= 4) for text in texts]


def prompts(count: int = 40) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(count)]})


def make_trainer(
    folder: Path | str,
    *,
    cls: type = MentorGRPOTrainer,
    config: type = MentorGRPOConfig,
    model=None,
    reward_funcs=letters_reward,
    train_dataset=None,
    processing_class=None,
    trainer_kwargs: dict[str, Any] | None = None,
    **settings,
):
    """A trainer of a tiny policy (seed 0), with a tiny expert (seed 1) unless told otherwise."""
    own = {"entropy_threshold_from": "current", "guide_prompts": "all"} if issubclass(config, MentorGRPOConfig) else {}
    args = config(str(folder), **{**SETTINGS, **own, **settings})
    kwargs = {"processing_class": processing_class or make_tiny_tokenizer(), **(trainer_kwargs or {})}
    mixed, distillation = getattr(args, "num_mixed_generations", 0), getattr(args, "distillation", "none")
    needs_expert = issubclass(cls, MentorGRPOTrainer) and (mixed > 0 or distillation != "none")
    if needs_expert and args.expert_model_name_or_path is None and "expert" not in kwargs:
        kwargs["expert"] = make_tiny_model(seed=1)
        kwargs.setdefault("expert_processing_class", make_tiny_tokenizer())
    model = make_tiny_model(seed=0) if model is None else model
    train_dataset = prompts() if train_dataset is None else train_dataset
    return cls(model, reward_funcs, args, train_dataset, **kwargs)


class RecordingTrainer(MentorGRPOTrainer):
    """Keeps what every training rollout batch was made of."""

    def __init__(self, *args, **kwargs):
        self.batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        algorithm, training = getattr(self.algorithm, "inner", self.algorithm), self.model.training
        guidance = getattr(algorithm, "guidance", None)
        alpha = guidance.alpha if guidance else 0.0
        output = super()._generate_and_score_completions(inputs)
        if training:
            part = self.batch.part("mixed")
            self.batches.append(
                {
                    **output,
                    "guided": output["mentor_source"] == 1,
                    "alpha": alpha,
                    "gamma": guidance and guidance.gamma,
                    "share": guidance and guidance.share,
                    "rewards": self._scored(output).rewards_N,
                    "rollout": part and part.rollout,
                    "prompt_tokens": self.batch.prompt_ids,
                    "global_step": self.state.global_step,
                    "row_advantages": list(self._logs["advantages"]),
                }
            )
        return output


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(trainer, without: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """The log without times."""
    skip = {*TIMES, *without}
    return [
        {k: v for k, v in entry.items() if k not in skip and not k.endswith("tokens_per_second")}
        for entry in trainer.state.log_history
    ]


def advantages_by_hand(
    rewards: list[float], num_generations: int, num_mixed: int, alpha: float, scale: str = "group", span: float = 1.0
) -> list[float]:
    """The paper's Eq. 10 and 11 row by row, without tensors."""

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan

    def on_policy(first: int) -> list[float]:
        rows = rewards[first : first + num_generations - num_mixed]
        return [r for r in rows if not math.isnan(r)]

    starts = range(0, len(rewards), num_generations)
    all_on_policy = [r for first in starts for r in on_policy(first)]
    result = []
    for first in starts:
        base = on_policy(first)
        for i, reward in enumerate(rewards[first : first + num_generations]):
            if math.isnan(reward) or not base:
                result.append(0.0)
                continue
            gain = reward - sum(base) / len(base)
            if i >= num_generations - num_mixed:
                result.append(alpha * max(0.0, gain) / span)
            else:
                scales = {"group": deviation(base), "batch": deviation(all_on_policy), "none": 1.0 - 1e-4}
                value = gain / (scales[scale] + 1e-4)
                result.append(0.0 if math.isnan(value) else value)
    return result
