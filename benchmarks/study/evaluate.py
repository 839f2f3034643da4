"""Sample a model's responses to the prompts of a task, and say how good and how different they are."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mentor_trl.evaluation.pass_at_k import pass_at_k


@torch.no_grad()
def evaluate(
    model_path: str | Path,
    rows: list[dict[str, str]],
    reward: Callable[..., list[float]],
    describe: Callable[[str, str], dict[str, Any]],
    num_samples: int = 8,
    max_new_tokens: int = 48,
    seed: int = 0,
    batch_size: int = 1024,
) -> dict[str, Any]:
    """
    Sample `num_samples` responses to each prompt at temperature 1.

    Args:
        model_path (`str` or `Path`):
            Folder of the model and its tokenizer.
        rows (`list[dict[str, str]]`):
            Prompts and solutions.
        reward (`Callable`):
            Reward function of the task; a response that gets 1 is right.
        describe (`Callable`):
            What a prompt and its response have: numbers, which are averaged, and `solution`, a key that is the same
            for the same solution.
        num_samples, max_new_tokens, seed, batch_size (`int`, *optional*):
            Of the sampling; the batch is in responses.

    Returns:
        `dict`: `accuracy`, `pass_at` by k, `entropy` (nats a token), `length` (tokens), `distinct` (different right
        solutions among the samples of a prompt), `describe` (means by name).
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    torch.manual_seed(seed)
    repeated = [row for row in rows for _ in range(num_samples)]
    texts, entropies, lengths = [], [], []
    for first in range(0, len(repeated), batch_size):
        part = _sample(model, tokenizer, repeated[first : first + batch_size], max_new_tokens)
        for values, new in zip((texts, entropies, lengths), part):
            values.extend(new)
    return judged(repeated, texts, entropies, lengths, num_samples, reward, describe)


def judged(
    rows: list[dict[str, str]],
    texts: list[str],
    entropies: list[float],
    lengths: list[int],
    num_samples: int,
    reward: Callable[..., list[float]],
    describe: Callable[[str, str], dict[str, Any]],
) -> dict[str, Any]:
    """What [`evaluate`] returns of responses, those of a prompt together, with their entropies (sums) and lengths."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    prompts = columns.pop("prompt")
    correct = np.array(reward(prompts=prompts, completions=texts, **columns)).reshape(-1, num_samples) >= 1.0
    described = [describe(prompt, text) for prompt, text in zip(prompts, texts)]
    return {
        "accuracy": float(correct.mean()),
        "pass_at": {str(k): _pass_at(correct, k) for k in _powers_of_two(num_samples)},
        "entropy": float(np.sum(entropies) / np.sum(lengths)),
        "length": float(np.mean(lengths)),
        "distinct": _distinct([one.get("solution") for one in described], correct),
        "describe": _means(described),
    }


def _sample(model, tokenizer, rows, max_new_tokens: int) -> tuple[list[str], list[float], list[int]]:
    """Responses, the sum of the entropies before their tokens, and their lengths with the end of the sequence."""
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    ended = (ids == tokenizer.eos_token_id).int()
    mask = ended.cumsum(1) - ended == 0
    entropies = torch.zeros(len(rows))
    for step, logits in enumerate(output.logits):
        logps = logits.float().log_softmax(-1)
        entropies += torch.special.entr(logps.exp()).sum(-1) * mask[:, step]
    return tokenizer.batch_decode(ids, skip_special_tokens=True), entropies.tolist(), mask.sum(1).tolist()


def _powers_of_two(limit: int) -> list[int]:
    """
    >>> _powers_of_two(12)
    [1, 2, 4, 8]
    """
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _pass_at(correct: np.ndarray, k: int) -> float:
    return float(np.mean([pass_at_k(correct.shape[1], int(row.sum()), k) for row in correct]))


def _distinct(keys: list[str | None], correct: np.ndarray) -> float:
    keys = np.array(keys, dtype=object).reshape(correct.shape)
    return float(np.mean([len(set(row[right]) - {None}) for row, right in zip(keys, correct)]))


def _means(described: list[dict[str, Any]]) -> dict[str, float]:
    values = defaultdict(list)
    for one in described:
        for name, value in one.items():
            if name != "solution":
                values[name].append(float(value))
    return {name: float(np.mean(column)) for name, column in values.items()}


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, str]]:
    """Rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()[:limit]]
