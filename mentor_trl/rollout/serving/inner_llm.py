"""A vLLM engine in this process that holds the policy."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class InnerLLM:
    """
    A vLLM engine in this process with a worker extension of ours.

    Args:
        options (`dict`):
            Arguments of `vllm.LLM`.

    Raises:
        `RuntimeError`: if it is not the engine that was asked for.
    """

    def __init__(self, options: dict[str, Any]):
        from vllm import LLM

        self.llm = LLM(**options)
        self.info = next(info for info in self.llm.collective_rpc("mentor_info") if info is not None)
        if "error" in self.info:
            raise RuntimeError(f"The engine does not sample mixed rollouts: {self.info['error']}.")
        self.sleeps = bool(options.get("enable_sleep_mode"))
        self._asleep: set[str] = set()
        self._sleep()

    @contextmanager
    def session(self) -> Iterator[Any]:
        """
        Hold the policy's current weights, see [`load_tensors`][InnerLLM.load_tensors]. With `enable_sleep_mode` the
        engine is awake inside, and its memory is free outside.
        """
        self._wake("weights", "kv_cache")
        try:
            yield self
        finally:
            self._sleep()

    def _sleep(self) -> None:
        if self.sleeps:
            # Level 1 keeps the weights in the host's memory: level 2 drops them, and nobody would bring back those of
            # an expert, or the base of an adapter
            self.llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def _wake(self, *tags: str) -> None:
        tags = [tag for tag in tags if tag in self._asleep]
        if tags:
            torch.accelerator.memory.empty_cache()
            self.llm.wake_up(tags=tags)
            self._asleep -= set(tags)

    def load_policy(self, folder: str, version: str) -> None:
        """
        Replace the policy's weights, and nothing else.

        Args:
            folder (`str`):
                Folder of safetensors files with the names of a transformers checkpoint.
            version (`str`):
                Name of these weights.
        """
        self._wake("weights")
        for answer in self.llm.collective_rpc("mentor_load_policy", args=(str(folder), version)):
            if "error" in answer:
                raise ValueError(f"The policy's weights could not be replaced: {answer['error']}.")
        self.llm.reset_prefix_cache()

    def load_tensors(self, weights: Iterable[tuple[str, torch.Tensor]], version: str) -> None:
        """
        [`load_policy`][InnerLLM.load_policy] from tensors in memory. Only where the engine runs in this very process,
        as with `distributed_executor_backend="external_launcher"`.
        """
        self._wake("weights")
        weights = iter(weights)
        try:
            self.llm.collective_rpc("mentor_load_tensors", args=(weights, version))
        finally:
            for _ in weights:  # an adapter is merged as long as these last
                pass
        self.llm.reset_prefix_cache()
