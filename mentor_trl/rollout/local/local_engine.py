"""The in-process engine of a trainer."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ...config import MentorGRPOConfig
from ...experts.compatibility import (
    check_context,
    check_stop_tokens,
    check_vocabulary,
    context_length,
    text_model,
    vocabulary_size,
)
from ...experts.load import check_expert_given, check_expert_source, resolve_expert
from ...experts.port import Expert
from ..host import Host
from ..serving.expert_servers import remote_expert
from .in_process import InProcessExpert
from .lockstep import Ability
from .sampler import LocalSampler, LocalSession


class LocalEngine:
    """
    [`~mentor_trl.rollout.types.Engine`] with transformers models.

    Args:
        sampler ([`LocalSampler`]):
            Sampler with its expert.
        expert ([`~mentor_trl.experts.port.Expert`]):
            The same expert, for other questions.
        unwrapped (`Callable[[], AbstractContextManager]`):
            The policy with its current weights.
        autocast (`Callable[[], AbstractContextManager]`):
            Makes the mixed-precision context of the forward passes.
        float32_head (`bool`):
            Whether the policy's LM head runs in float32.
        stop_token_ids (`list[int]`):
            Ids that end a completion.
    """

    def __init__(
        self,
        sampler: LocalSampler,
        expert: Expert,
        unwrapped: Callable[[], AbstractContextManager],
        autocast: Callable[[], AbstractContextManager],
        float32_head: bool,
        stop_token_ids: list[int],
    ):
        self.sampler, self.expert, self.expert_name = sampler, expert, expert.name
        self.unwrapped, self.autocast, self.float32_head = unwrapped, autocast, float32_head
        self.stop_token_ids = stop_token_ids
        self.remote = not isinstance(expert, InProcessExpert)
        self.home = None if self.remote else expert.decoder.device

    @contextmanager
    def session(self) -> Iterator[LocalSession]:
        """Hold the policy's current weights."""
        self._move_expert(self.home)
        with self.unwrapped() as policy, self.sampler.session(policy, self.autocast, self.float32_head) as session:
            yield session

    @property
    def released(self) -> bool:
        return self.expert is None

    def release_expert(self) -> None:
        """Free the expert's memory."""
        if self.expert is not None:
            self.sampler.expert = self.expert = None
            _empty_cache()

    def park_expert(self) -> None:
        """Move the expert to the CPU until the next session. One that is quantized or spread over devices stays."""
        if self.home is not None and self.home.type != "cpu" and self._move_expert(torch.device("cpu")):
            _empty_cache()

    def _move_expert(self, device: torch.device | None) -> bool:
        model = self.expert.model if isinstance(self.expert, InProcessExpert) else None
        if model is None or model.device == device:
            return False
        if getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False):
            return False
        model.to(device)
        return True


def _empty_cache() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


class LocalSetup:
    """
    [`~mentor_trl.rollout.host.EngineSetup`] of a [`LocalEngine`].

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration.
        expert, expert_tokenizer:
            Arguments of the trainer.
    """

    def __init__(self, args: MentorGRPOConfig, expert, expert_tokenizer):
        self.args, self.given, self.tokenizer = args, expert, expert_tokenizer
        self.source = expert if expert is not None else args.expert_model_name_or_path

    def check(self, model, quantization_config) -> None:
        check_expert_given(self.args, self.given)
        if isinstance(self.source, str):
            check_expert_source(self.source, self.args.expert_model_revision, self.args.trust_remote_code)

    def building(self) -> AbstractContextManager:
        return nullcontext()

    def build(self, host: Host) -> LocalEngine:
        """Load the expert, or reach its servers, and check that it fits the policy."""
        args, autocast = host.args, host.accelerator.autocast
        expert, stop = self._load(host) if args.expert_base_url is None else remote_expert(args, host)
        sampler = LocalSampler(
            expert,
            num_tokens=num_tokens(host.tokenizer),
            rollout_batch_size=args.rollout_batch_size,
            draft_length=args.draft_length,
            adaptive_draft_length=args.adaptive_draft_length,
        )
        self._check_length(host, host.policy, "policy")
        abilities = sampler.abilities(None if host.sharded else host.policy)
        if "expert" in abilities:
            expert = self._in_process(host, expert, abilities["expert"])
        return LocalEngine(sampler, expert, host.unwrapped, autocast, args.cast_lm_head_to_fp32, stop)

    def _load(self, host: Host) -> tuple[Any, list[int]]:
        """The expert's model, and the ids that end a completion of either source."""
        model, tokenizer, self.name = resolve_expert(self.source, self.tokenizer, host.args)
        check_vocabulary(host.policy, model, host.tokenizer, tokenizer)
        stop = check_stop_tokens(host.stop_token_ids, model, tokenizer, host.args.extend_stop_tokens)
        if getattr(model, "hf_device_map", None) is None:
            model.to(host.accelerator.device)
        self._check_length(host, model, "expert")
        return model, stop

    def _in_process(self, host: Host, model, ability: Ability) -> InProcessExpert:
        options = {"vocab_size": vocabulary_size(host.policy), "num_tokens": num_tokens(host.tokenizer)}
        return InProcessExpert(model, autocast=host.accelerator.autocast, name=self.name, ability=ability, **options)

    def _check_length(self, host: Host, model, who: str) -> None:
        limit, most = context_length(text_model(model).config.get_text_config()), host.args.max_completion_length
        check_context([host.longest_prompt()], most, limit, f"the {who}'s", f"choose another {who}")


def num_tokens(tokenizer) -> int:
    """Number of ids that a tokenizer defines."""
    return max(tokenizer.get_vocab().values()) + 1
