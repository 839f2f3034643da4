"""The engine of a trainer behind TRL's vLLM backend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...experts.port import Expert
from ..types import MixedSampler
from .generation import PolicyGeneration


class ServedEngine:
    """
    [`~mentor_trl.rollout.types.Engine`] whose policy vLLM holds.

    Args:
        generation ([`~mentor_trl.rollout.serving.generation.PolicyGeneration`]):
            TRL's backend.
        sync_weights (`Callable[[], None]`):
            Gives it the current weights.
        stop_token_ids (`list[int]`):
            Ids that end a completion.
        expert_name (`str`, *optional*):
            Model id or folder of the expert.
        expert ([`~mentor_trl.experts.port.Expert`], *optional*):
            The expert, where it is not a part of the engine.
    """

    remote, released = True, False

    def __init__(
        self,
        generation: PolicyGeneration,
        sync_weights: Callable[[], None],
        stop_token_ids: list[int],
        expert_name: str | None,
        expert: Expert | None = None,
    ):
        self.generation, self.sync_weights, self.stop_token_ids = generation, sync_weights, stop_token_ids
        self.expert, self.expert_name = expert, expert_name
        generation.stop_token_ids = tuple(stop_token_ids)

    @contextmanager
    def session(self) -> Iterator[MixedSampler]:
        """Hold the policy's current weights."""
        self.sync_weights()
        with self.generation.session() as session:
            yield session

    def release_expert(self) -> None:
        """The expert is a part of the engine, or on servers of its own, which nobody asks any more."""

    def park_expert(self) -> None:
        """As above."""
