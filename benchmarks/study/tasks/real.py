"""
A real model: SmolLM2-135M-Instruct and short sums, which it answers wrong 99 times in 100.

A prompt asks for `a + b - c` behind an example of a straight answer. The policy is the model as it is. The expert is
tuned from it, in a few dozen steps, to write the sum out:

    37 + 18 = 55, 55 - 6 = 49. Answer: 49

The model is a Hub id or a folder; where neither is to be had, the task is skipped.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.study.tasks.sizes import Phase, Settings


MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
END, PAD = "<|im_end|>", "<|endoftext|>"
JOINT = ""
EXAMPLE = ((7, 8, 3), "12")
SETTINGS = Settings(
    num_test_prompts=64,
    num_train_prompts=600,
    tuned=Phase(steps=40, learning_rate=1e-4, batch_size=16, warmup_steps=5),
    samples=2,
)


class ModelMissing(Exception):
    """The model of the task is neither on this machine nor on a Hub that can be reached."""


@dataclass(frozen=True)
class Problem:
    """A sum of two numbers, less a third."""

    numbers: tuple[int, int, int]

    @property
    def prompt(self) -> str:
        example, answer = EXAMPLE
        turns = (("user", ask(example)), ("assistant", answer), ("user", ask(self.numbers)))
        return "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in turns) + "<|im_start|>assistant\n"

    @property
    def solution(self) -> str:
        first, second, third = self.numbers
        return str(first + second - third)


@dataclass(frozen=True)
class Style:
    """
    How a reply is written.

    Args:
        work (`float`):
            Probability that the sum is written out; else the answer is stated straight, and is off by up to ten.
    """

    work: float


STYLES = {"strong": Style(work=1.0)}


def ask(numbers: tuple[int, int, int]) -> str:
    """
    >>> ask((7, 8, 3))
    'What is 7 + 8 - 3?'
    """
    return "What is {} + {} - {}?".format(*numbers)


def sample_problem(rng: random.Random) -> Problem:
    """Draw a problem whose answer is any of 60 numbers, all of them as likely."""
    answer, third = rng.randrange(10, 70), rng.randrange(2, 10)
    first = rng.randrange(3, answer + third - 2)
    return Problem((first, answer + third - first, third))


def write_response(problem: Problem, style: Style, rng: random.Random) -> str:
    """Write a reply in a given style."""
    first, second, third = problem.numbers
    answer = first + second - third
    if rng.random() >= style.work:
        return str(answer + rng.randrange(-10, 11))
    return f"{first} + {second} = {first + second}, {first + second} - {third} = {answer}. Answer: {answer}"


def read_answer(reply: str) -> str | None:
    """
    Return the last number of a reply.

    >>> read_answer("37 + 18 = 55, 55 - 6 = 49. Answer: 49."), read_answer("none")
    ('49', None)
    """
    numbers = re.findall(r"-?\d+", reply)
    return numbers[-1] if numbers else None


def reward(completions: list[str], solution: list[str], **kwargs) -> list[float]:
    """Reward function for TRL: 1 where the last number of a reply is the answer, else 0."""
    return [float(read_answer(text) == right) for text, right in zip(completions, solution)]


def describe(prompt: str, completion: str) -> dict[str, Any]:
    """
    Say whether a reply writes the sum out.

    >>> describe("", "37 + 18 = 55, 55 - 6 = 49. Answer: 49")
    {'work': 1.0, 'solution': '49'}
    """
    return {"work": float("=" in completion), "solution": read_answer(completion)}


def find_model(name: str | None = None) -> str:
    """
    Return the Hub id or folder of the model.

    Args:
        name (`str`, *optional*):
            Hub id or folder; SmolLM2-135M-Instruct on the Hub where it is left out.

    Raises:
        [`ModelMissing`]: where it is not to be had.
    """
    name = name or MODEL
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelMissing(
            f"{name!r} is neither a folder with a model nor to be had from the Hub; give a folder with --model"
        ) from error
    return name


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """
    Load the tokenizer of a model. A turn of the chat ends a reply, and padding is another token than that. Prompts are
    written as the template would, so it is left out.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = END, PAD, None
    return tokenizer


def load_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Load a model whose end of sequence is that of the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = (
            None,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
    return model
