r"""
In-process engine: speculative sampling from the mixed policy with transformers models.

In a round the policy drafts up to K tokens a row, each with its entropy, weight w and coin z ~ Bernoulli(w). Rows
without a branch point (z = 1) commit their drafts unseen. If any row has one, the expert reads the drafts of all rows
in a single pass, and only at branch points are its distribution computed and the draft coupled with it; the first
replaced draft ends the row's round. There is no bonus token: behind a draft that stands, the policy drafts the next.
So the rows are exact samples of the mixed policy at every draft length, and at w = 0 of the policy.

Each model has a key-value cache whose rows have their own lengths; a prefix enters it once. Where a model's state
cannot be rolled back (linear attention, state space, and hybrids of them), drafts are single tokens: rows advance in
lockstep, and a model reads nothing that does not stand.

An expert that does not couple (on a server) draws from s itself: a row's drafts end at its first branch point, and the
expert is asked once a round for all rows that have come to one.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from ...errors import SetupError
from ...experts.compatibility import check_context, text_model
from ...experts.port import Expert
from ..types import MixedRequest, MixedRollout, Progress
from .decoder import inference
from .decoding_check import check_decoding
from .drafting import Drafting, RequestRun
from .in_process import InProcessExpert
from .lockstep import RAGGED, Ability


logger = logging.getLogger(__name__)


class LocalSampler:
    """
    Samples mixed rollouts in process.

    Args:
        expert ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Frozen expert, or an [`~mentor_trl.experts.port.Expert`] elsewhere. Without one only the plain policy
            (gamma = inf) can be sampled.
        num_tokens (`int`, *optional*):
            Number of ids that the tokenizer defines; the expert never emits an id from there on.
        rollout_batch_size (`int`, *optional*, defaults to `64`):
            Rows sampled at once. Finished rows are replaced by waiting ones.
        draft_length (`int`, *optional*, defaults to `8`):
            Tokens the policy drafts between two consultations of the expert.
        adaptive_draft_length (`bool`, *optional*, defaults to `False`):
            Whether to choose the draft length, up to `draft_length`, from the acceptance measured in the request.

    Example:
    ```python
    sampler = LocalSampler(expert)
    with sampler.session(policy) as session:
        rollout = session.sample(MixedRequest(prompt_ids, [0.5] * len(prompt_ids), 256, (tokenizer.eos_token_id,)))
    ```
    """

    def __init__(
        self,
        expert=None,
        num_tokens: int | None = None,
        rollout_batch_size: int = 64,
        draft_length: int = 8,
        adaptive_draft_length: bool = False,
    ):
        self.expert = expert
        self.num_tokens = num_tokens
        self.drafting = Drafting(rollout_batch_size, draft_length, adaptive_draft_length)
        self._lockstep_is_told = False

    def abilities(self, policy=None) -> dict[str, Ability]:
        """
        How the rows of policy and expert can advance, by their names, of those that are models in this process.

        Raises:
            [`SetupError`]: if a model's decoding differs from its forward pass.
        """
        models = {"policy": policy, "expert": self.expert}
        models = {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}
        abilities = {name: check_decoding(model, name) for name, model in models.items()}
        reasons = [
            f"the {name} ({type(text_model(models[name])).__name__}) cannot be rolled back: {ability.reason}"
            for name, ability in abilities.items()
            if not ability.ragged
        ]
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if reasons and first and not self._lockstep_is_told:
            rows = "Mixed rows" if abilities.get("policy", RAGGED).ragged else "Rows"
            logger.warning(f"{rows} advance in lockstep, one token a pass, because {'; '.join(reasons)}.")
            self._lockstep_is_told = True
        return abilities

    @contextmanager
    def session(
        self,
        policy,
        autocast: Callable[[], AbstractContextManager] | None = None,
        float32_head: bool = False,
    ) -> Iterator["LocalSession"]:
        """
        Hold the policy's current weights. Requests inside share the key-value caches of their prompts, which are freed
        on exit. Dropout is off inside, and the modules' modes are restored on exit.

        Args:
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Policy, not wrapped for distribution.
            autocast (`Callable[[], AbstractContextManager]`, *optional*):
                Makes the mixed-precision context of the trainer's forward passes.
            float32_head (`bool`, *optional*, defaults to `False`):
                Whether the policy's LM head runs in float32 (TRL's `cast_lm_head_to_fp32`).

        Raises:
            [`SetupError`]: if a model's decoding differs from its forward pass.
        """
        abilities = self.abilities(policy)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for name, ability in abilities.items():
                stack.enter_context(inference({"policy": policy, "expert": self.expert}[name], **ability.attention))
            yield LocalSession(self, policy, abilities, autocast, float32_head)


class LocalSession:
    """What [`LocalSampler.session`] yields."""

    def __init__(self, sampler: LocalSampler, policy, abilities: dict[str, Ability], autocast, float32_head: bool):
        self.drafting = sampler.drafting
        self.policy = abilities["policy"].decoder(policy, autocast=autocast, float32_head=float32_head)
        self.expert: Expert | None = sampler.expert
        if "expert" in abilities:
            size, ability = self.policy.vocab_size, abilities["expert"]
            self.expert = InProcessExpert(sampler.expert, size, sampler.num_tokens, autocast, ability=ability)

    def sample(self, request: MixedRequest, progress: Progress | None = None) -> MixedRollout:
        """
        Sample a request. Rows of the plain policy (gamma = inf) take no place in the expert's cache.

        Args:
            request ([`MixedRequest`]):
                Rows to sample.
            progress (`Callable[[int, int], None]`, *optional*):
                Called after each round with the rows finished and the tokens committed in it.

        Returns:
            [`MixedRollout`], in the order of the request.

        Raises:
            [`SetupError`]: if a row does not fit the context of a model, or if log s is asked for at every token of an
            expert that is asked at branch points only.
            `ValueError`: if mixed rows are asked for without an expert,
            or if a model's logits are NaN.
        """
        if not request.plain and self.expert is None:
            raise ValueError("The request has mixed rows (gamma < inf), and the sampler has no expert.")
        lengths = [len(ids) for ids in request.prompt_ids]
        check_context(lengths, request.max_new_tokens, self.policy.max_length, "the policy's")
        if not request.plain:
            if request.score_all and not self.expert.couples:
                raise SetupError(
                    f"The expert ({self.expert.name}) draws its tokens itself and is asked at branch points only, so "
                    "log s at every token (`score_all`) is not known. Set `correction_level` to 'conditional', or "
                    "load the expert in this process."
                )
            check_context(lengths, request.max_new_tokens, self.expert.max_length, "the expert's")
        return RequestRun(self.policy, self.expert, request, self.drafting, progress).run()
