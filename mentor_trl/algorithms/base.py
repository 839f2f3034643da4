"""The seam for algorithms, and plain GRPO as its simplest case."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOTrainer

from ..config import MentorGRPOConfig
from ..errors import SetupError
from ..experts.port import Expert
from ..rollout.progress import SamplingProgress
from ..rollout.types import Engine, MixedSampler, Progress
from ..training.batch import Credit, LossStates, LossTerm, Reweighed, RolloutBatch, Scored
from ..training.processes import Processes
from .requirements import check_dataset, check_dynamic_sampling, refuse_multimodal


@dataclass(frozen=True)
class Context:
    """What an algorithm may know of the run, once the trainer is built."""

    args: MentorGRPOConfig
    tokenizer: Any
    stop_token_ids: Sequence[int]
    template: dict[str, Any]  # keyword arguments of `apply_chat_template`
    processes: Processes
    engine: Engine
    train_dataset: Any
    multimodal: bool = False  # whether prompts are processed as text and images

    @property
    def expert(self) -> Expert | None:
        """The expert, where the engine has it at hand."""
        return self.engine.expert


@dataclass(frozen=True)
class Rollouts:
    """Ways to sample the rows of a batch."""

    # TRL's own generation of all rows, from the policy: completions, and their log-probabilities or `None`
    generate: Callable[[], tuple[list[list[int]], list[list[float | None]] | None]]
    session: Callable[[], AbstractContextManager[MixedSampler]]  # of the mixed-policy engine
    # Entropies of the policy, (tokens,) in nats, by a forward pass of the training model over prompts and completions.
    # Collective.
    entropies: Callable[[list[list[int]], list[list[int]]], torch.Tensor]
    profile: Callable[[str], AbstractContextManager]  # times what happens inside under a name
    stop_token_ids: Sequence[int] = ()
    # Shows how far the sampling of so many rows of a name is; yields what a session's `sample` takes as `progress`
    progress: Callable[[int, str], AbstractContextManager[Progress]] = SamplingProgress
    # Weighted rewards of some of the rows, the same on each process, by their tokens of prompts and completions: those
    # of all processes, NaN where undefined. The reward functions then see the other rows alone. Collective.
    rewards: Callable[[list[int], list[list[int]], list[list[int]]], torch.Tensor] | None = None


class Algorithm:
    """
    Who samples which row of a rollout batch, and what its tokens are worth. As it stands it is plain GRPO; a method
    overrides what it does otherwise.

    The trainer calls, for each training batch and on all processes together: `plan`, `rollout`, TRL's rewards,
    `credit`, `observe`; and in each loss `reweigh`. What belongs to a batch travels in its
    [`~mentor_trl.training.batch.RolloutBatch`]; what an algorithm keeps of its own is in `state_dict`.

    Attributes:
        name, tags, paper:
            How model cards call it.
        sources (`tuple[str, ...]`):
            Names of the sources of rows; the first is the policy.
        needs_expert (`bool`):
            Whether the trainer is given an expert.
        needs_scores (`bool`):
            Whether it asks the expert for log s of given rows, which an engine must have at hand.
        needs_policy_logps (`bool`):
            Whether `credit` needs log p of every token, which TRL computes only in some settings.
        needs_states (`bool`):
            Whether there is a `loss_term`.
        text_only (`str`, *optional*):
            What it has that images do not go with.

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration.
    """

    name = GRPOTrainer._name
    tags = GRPOTrainer._tag_names
    paper = GRPOTrainer._paper
    sources: tuple[str, ...] = ("on_policy",)
    needs_expert = False
    needs_scores = False
    needs_policy_logps = False
    needs_states = False
    text_only: str | None = None

    def __init__(self, args: MentorGRPOConfig):
        self.args = args
        self.context: Context | None = None

    @classmethod
    def chosen(cls, args: MentorGRPOConfig) -> bool:
        """Whether the configuration asks for this algorithm."""
        return True

    def check(self, train_dataset, eval_dataset, **components) -> None:
        """
        Refuse what the algorithm does not support, before anything large is loaded.

        Args:
            train_dataset, eval_dataset:
                Arguments of the trainer.
            **components:
                Its `tools`, `rollout_func` and `environment_factory`.

        Raises:
            [`SetupError`]: naming what is wrong and what to change.
        """
        if components.get("environment_factory") is None:  # an environment may bring the prompts
            for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
                check_dataset(dataset, name, self.text_only)
        if self.args.dynamic_sampling:
            check_dynamic_sampling(train_dataset, components)

    def prepare(self, context: Context) -> None:
        """
        Take what the trainer has to offer; called once, when it is built.

        Raises:
            [`SetupError`]: if it lacks what the algorithm needs.
        """
        self.context = context
        if context.tokenizer.eos_token_id is None:
            raise SetupError(
                "The tokenizer has no end-of-sequence token, so no completion could end. Set `eos_token` on it, and "
                "save it with the model."
            )
        if self.args.dynamic_sampling:
            refuse_multimodal(context.multimodal, "dynamic_sampling")
        if self.needs_scores and context.expert is None:
            raise SetupError(
                f"{type(self).__name__} asks for log-probabilities of the expert at given tokens, and no expert is at "
                "hand in this process, as one engine of policy and expert holds it. Set `use_vllm=False`, or "
                "`num_mixed_generations=0` with `distillation`, or `expert_base_url`; and `needs_expert` if it is an "
                "algorithm of your own."
            )

    @property
    def over(self) -> bool:
        """Whether the expert is not needed any more."""
        return False

    @property
    def resting(self) -> bool:
        """Whether the coming batch does without the expert."""
        return False

    def spare(self, engine: Engine) -> None:
        """Free the expert of an engine, or move it out of the way, where it is not needed."""
        if self.over:
            engine.release_expert()
        elif self.resting:
            engine.park_expert()

    def plan(self, inputs: list[dict[str, Any]], first: int) -> RolloutBatch:
        """
        Decide the source of each row of this process, of which `first` is the global index of the first. Groups are
        `num_generations` consecutive rows of all processes.
        """
        return RolloutBatch(self.sources, torch.zeros(len(inputs), dtype=torch.long))

    def rollout(self, prompt_ids: list[list[int]], batch: RolloutBatch, rollouts: Rollouts) -> RolloutBatch:
        """Sample the planned rows behind the tokens of their prompts."""
        return batch.sampled(prompt_ids, *rollouts.generate())

    def credit(self, batch: RolloutBatch, scored: Scored) -> Credit:
        """
        Say what each row or token is worth. Products (rho A) and sums (A + log s - log p) alike are advantages of
        shape `(B, T)`.
        """
        return Credit(scored.advantages_B, self.context.processes.gather(scored.advantages_B), {})

    def reweigh(self, inputs: dict[str, Any], logps_B_T: torch.Tensor) -> Reweighed | None:
        """
        Weights that need the forward pass of the loss itself. Its batch has the sources of rows as `mentor_source`;
        its log-probabilities come detached.
        """
        return None

    def loss_term(self, inputs: dict[str, Any], states: LossStates) -> LossTerm | None:
        """A term that is added to the loss, from the forward pass of the loss itself; asked with `needs_states`."""
        return None

    def observe(self, batch: RolloutBatch, scored: Scored) -> dict[str, float] | None:
        """Hear the rewards of a batch, when it is done. What it returns is logged."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what [`state_dict`][Algorithm.state_dict] gave."""
