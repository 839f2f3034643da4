"""Sample a model's responses to the evaluation prompts, and compare two models prompt by prompt."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart.task import exact_answer_reward


@dataclass(frozen=True)
class Evaluation:
    """
    What sampled responses to P prompts, K to each, look like.

    Args:
        correct (`np.ndarray` of shape `(P, K)`):
            1 where a response states the solution, else 0.
        entropy (`float`):
            Mean entropy of the model's next-token distributions, in nats.
        length (`float`):
            Mean length in tokens, the end of the sequence included.
        work (`float`):
            Share of the steps that are worked out.
        habits (`float`):
            Number of `ok` and `wait` a step.
    """

    correct: np.ndarray
    entropy: float
    length: float
    work: float
    habits: float

    @property
    def accuracy(self) -> np.ndarray:
        """Share of right responses, of shape `(P,)`: pass@1."""
        return self.correct.mean(axis=1)

    @property
    def solved(self) -> np.ndarray:
        """Whether any of the K responses is right, of shape `(P,)`: pass@K."""
        return self.correct.max(axis=1)


@dataclass
class Run:
    """
    A finished run.

    Args:
        arm (`str`):
            Name of its recipe.
        seed (`int`):
            Seed of its training.
        checkpoints (`dict[int, Path]`):
            Folder of each checkpoint, by step.
        history (`list[dict]`):
            What the trainer logged, a step an entry.
        curve (`dict[int, Evaluation]`):
            Evaluation of each checkpoint, by step; empty until someone fills it.
    """

    arm: str
    seed: int
    checkpoints: dict[int, Path]
    history: list[dict]
    curve: dict[int, Evaluation] = field(default_factory=dict)

    @classmethod
    def read(cls, arm: str, seed: int, folder: Path) -> "Run":
        checkpoints = {int(path.name.split("-")[-1]): path for path in folder.glob("checkpoint-*")}
        checkpoints = dict(sorted(checkpoints.items()))
        state = json.loads((checkpoints[max(checkpoints)] / "trainer_state.json").read_text())
        return cls(arm, seed, checkpoints, state["log_history"])

    @property
    def seconds(self) -> float:
        """Time of all steps together, without starting up and saving."""
        return sum(entry.get("step_time", 0.0) for entry in self.history)


def read_prompts(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def evaluate(model_path: Path, rows: list[dict[str, str]], num_samples: int = 8, seed: int = 0) -> Evaluation:
    """
    Sample `num_samples` responses to each prompt at temperature 1.

    Args:
        model_path (`Path`):
            Folder of the model and its tokenizer.
        rows (`list[dict[str, str]]`):
            Prompts and solutions.
        num_samples (`int`, *optional*, defaults to `8`):
            Number of responses to a prompt.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    torch.manual_seed(seed)
    rows = [row for row in rows for _ in range(num_samples)]
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=48,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    logps = torch.stack(output.logits, dim=1).log_softmax(-1)
    mask = ids != tokenizer.pad_token_id
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    correct = np.array(exact_answer_reward(texts, [row["solution"] for row in rows]))
    count = lambda *words: sum(text.split().count(word) for text in texts for word in words)
    steps = max(count("work", "guess"), 1)
    return Evaluation(
        correct=correct.reshape(-1, num_samples),
        entropy=-(logps.exp() * logps).sum(-1)[mask].mean().item(),
        length=mask.sum(1).float().mean().item(),
        work=count("work") / steps,
        habits=count("ok", "wait") / steps,
    )


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """
    Return the mean of `ours - theirs` and the half-width of its 95% interval.

    The interval is a normal one over the prompts, on which both were evaluated. It says how well these models are told
    apart, not how much training varies from seed to seed.

    Args:
        ours, theirs (`np.ndarray` of shape `(P,)`):
            A number for each prompt.

    >>> paired_difference(np.array([1.0, 0.5, 1.0, 0.5]), np.array([0.0, 0.5, 0.0, 0.5]))
    (0.5, 0.5658032638058332)
    """
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    half_width = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
    return float(difference.mean()), float(half_width)


def area_under_curve(steps: list[int], values: list[np.ndarray]) -> np.ndarray:
    """
    Return the mean height of a curve, by the trapezoid rule.

    >>> area_under_curve([0, 10, 30], [np.array([0.0]), np.array([1.0]), np.array([1.0])])
    array([0.83333333])
    """
    return np.trapezoid(np.stack(values), x=steps, axis=0) / (steps[-1] - steps[0])
