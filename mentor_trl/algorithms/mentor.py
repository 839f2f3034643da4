"""
[MENTOR](https://huggingface.co/papers/2510.04140): some rows of each group are drawn from the mixed policy
m = (1 - w) p + w s, whose weight w follows the policy's entropy.

On-policy rows come first, their entropies give the threshold gamma, and mixed rows follow; or all come at once, under
the gamma of the batch before. Mixed rows have advantages of their own (Eq. 11), and their expert tokens are corrected
for being off-policy.
"""

import math
import warnings
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..config import MentorGRPOConfig
from ..errors import SetupError
from ..objective import correction_weights, fold_correction, mixed_policy_advantages, sentence_endings
from ..rollout.types import MixedRequest, MixedRollout, mixed_rows
from ..training.batch import Credit, Part, RolloutBatch, Scored, scatter
from ..training.metrics import PREFIX, guidance_metrics, share_without_spread, speed_metric
from .base import Algorithm, Context, Rollouts
from .guidance import Guidance
from .papers import MENTOR_PAPER
from .requirements import refuse_components, refuse_multimodal, uses_fsdp, warn_of_kl


PLAIN = "or set `num_mixed_generations=0` for plain GRPO"


class Mentor(Algorithm):
    """MENTOR; see [`Algorithm`]."""

    name = "MENTOR"
    tags = ["trl", "mentor"]
    paper = MENTOR_PAPER
    sources = ("on_policy", "mixed")
    needs_expert = True
    text_only = "mixed rollouts"

    def __init__(self, args: MentorGRPOConfig):
        super().__init__(args)
        self.guidance = Guidance(
            schedule=args.alpha_schedule,
            alpha_0=args.alpha,
            decay_steps=args.expert_decay_steps,
            quantile=args.entropy_quantile,
            minimum=args.entropy_threshold_min,
            fixed=args.entropy_threshold,
        )
        self._range_warned = False

    @classmethod
    def chosen(cls, args: MentorGRPOConfig) -> bool:
        return args.num_mixed_generations > 0

    def check(self, train_dataset, eval_dataset, **components) -> None:
        refuse_components(components, "mixed rollouts", PLAIN)
        if not self.args.use_vllm:
            _check_sharding(self.args)
        super().check(train_dataset, eval_dataset, **components)

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        refuse_multimodal(context.multimodal, "num_mixed_generations")
        warn_of_kl(self.args.beta, "mixed")

    @property
    def over(self) -> bool:
        return self.guidance.over

    def plan(self, inputs: list[dict[str, Any]], first: int) -> RolloutBatch:
        alpha, args = self.guidance.alpha, self.args
        if alpha == 0.0:
            return super().plan(inputs, first)
        mixed_B = mixed_rows(first, len(inputs), args.num_generations, args.num_mixed_generations)
        return RolloutBatch(self.sources, mixed_B.long(), alpha=alpha)

    def rollout(self, prompt_ids: list[list[int]], batch: RolloutBatch, rollouts: Rollouts) -> RolloutBatch:
        if batch.alpha == 0.0:
            return super().rollout(prompt_ids, batch, rollouts)
        rows = [(batch.source_B == index).nonzero().flatten().tolist() for index in (0, 1)]
        prompts = [[prompt_ids[row] for row in part] for part in rows]
        with rollouts.session() as session:
            sample = self._sample_at_once if self._threshold_is_known else self._sample_in_turn
            gamma, sampled = sample(prompts, session, rollouts)
        self.needs_policy_logps = not self.context.processes.everywhere(sampled[1].logps_at_branches)
        count, pairs = len(prompt_ids), list(zip(rows, sampled))
        completion_ids = scatter([(part, rollout.completion_ids) for part, rollout in pairs], count)
        logps = None
        if self.args.use_vllm:
            logps = scatter([(part, rollout.policy_logps()) for part, rollout in pairs], count)
        parts = tuple(Part(source, part, rollout) for source, (part, rollout) in zip(self.sources, pairs))
        return batch.sampled(prompt_ids, completion_ids, logps, parts, gamma=gamma)

    @property
    def _threshold_is_known(self) -> bool:
        return self.args.entropy_threshold_from == "previous" and self.guidance.gamma is not None

    def _sample_in_turn(self, prompts, session, rollouts: Rollouts) -> tuple[float, list[MixedRollout]]:
        """On-policy rows, gamma from their entropies, then mixed rows."""
        with rollouts.profile("mentor.on_policy"), rollouts.progress(len(prompts[0]), "On-policy rows") as progress:
            request = self._request(prompts[0], [math.inf] * len(prompts[0]), 0, rollouts)
            on_policy = session.sample(request, progress)
        self.guidance.update(self._entropies(prompts[0], on_policy, rollouts))
        gamma = self.guidance.gamma
        with rollouts.profile("mentor.mixed"), rollouts.progress(len(prompts[1]), "Mixed rows") as progress:
            mixed = session.sample(self._request(prompts[1], [gamma] * len(prompts[1]), 1, rollouts), progress)
        return gamma, [on_policy, mixed]

    def _sample_at_once(self, prompts, session, rollouts: Rollouts) -> tuple[float, list[MixedRollout]]:
        """All rows under the gamma of the batch before, and the next one's from this batch's on-policy rows."""
        gamma, counts = self.guidance.gamma, [len(part) for part in prompts]
        gammas = [math.inf] * counts[0] + [gamma] * counts[1]
        with rollouts.profile("mentor.rollouts"), rollouts.progress(len(gammas), "Rows") as progress:
            request = self._request(prompts[0] + prompts[1], gammas, 0, rollouts)
            sampled = session.sample(request, progress).split(counts)
        self.guidance.update(self._entropies(prompts[0], sampled[0], rollouts))
        return gamma, sampled

    def _entropies(self, prompt_ids, on_policy: MixedRollout, rollouts: Rollouts) -> torch.Tensor:
        """Entropies of the on-policy tokens of all processes: the engine's, or those of the training model."""
        processes = self.context.processes
        if processes.everywhere(on_policy.entropies is not None):
            entropies = on_policy.entropies[on_policy.mask]
        else:
            entropies = rollouts.entropies(prompt_ids, on_policy.completion_ids)
        return processes.gather_tokens(entropies)

    def _request(self, prompt_ids: list[list[int]], gamma: list[float], source: int, rollouts: Rollouts):
        args = self.args
        return MixedRequest(
            prompt_ids=prompt_ids,
            gamma=gamma,
            max_new_tokens=args.max_completion_length,
            stop_token_ids=tuple(rollouts.stop_token_ids),
            temperature=args.temperature,
            branch_rule=args.branch_rule,
            share=self._share,
            span=args.branch_span,
            sentence_ids=self._sentence_ids,
            seed=self.seed(source),
            score_all=args.correction_level == "mixture",
        )

    @property
    def _share(self) -> float:
        """Weight of the rules that do not look at the entropy."""
        if self.args.branch_share is not None:
            return self.args.branch_share
        return 1.0 if self.args.branch_rule == "sentence" else self.guidance.share

    @cached_property
    def _sentence_ids(self) -> tuple[int, ...]:
        if self.args.branch_rule != "sentence":
            return ()
        return tuple(sentence_endings(self.context.tokenizer))

    def seed(self, source: int) -> int:
        """Seed of the coming request for a source: of the run, the process and the batch."""
        entropy = [self.args.seed, self.context.processes.index, self.guidance.batches, source]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def credit(self, batch: RolloutBatch, scored: Scored) -> Credit:
        alpha = {f"{PREFIX}alpha": batch.alpha}
        if batch.alpha == 0.0:
            return super().credit(batch, scored)._replace(metrics=alpha)
        args, processes = self.args, self.context.processes
        self._check_reward_range(scored.rewards_N)
        mixed_N = scored.source_N == 1
        advantages_N = mixed_policy_advantages(
            scored.rewards_N, mixed_N, args.num_generations, batch.alpha, args.reward_range, args.scale_rewards
        )
        rollout = batch.part("mixed").rollout.padded(scored.mask_B_T.size(1))
        ratio, rho, where = self._correction(rollout, batch, scored)
        rho_B_T = torch.ones(scored.mask_B_T.shape, device=scored.mask_B_T.device)
        rho_B_T[batch.source_B.to(rho_B_T.device) == 1] = rho.to(rho_B_T.device)
        metrics = guidance_metrics(rollout, ratio, rho, where, processes.reduce)
        for part in batch.parts:
            metrics |= speed_metric(part.source, part.rollout.stats, processes)
        return Credit(
            advantages=fold_correction(advantages_N[scored.local], rho_B_T),
            advantages_N=advantages_N,
            metrics=metrics | {f"{PREFIX}gamma": batch.gamma} | alpha,
            weights_B_T=rho_B_T,
            no_spread=share_without_spread(scored.rewards_N, mixed_N, args.num_generations),
        )

    def _correction(
        self, rollout: MixedRollout, batch: RolloutBatch, scored: Scored
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Ratios r, weights rho and corrected tokens of the mixed rows, `(rows, T)` each.

        At a branch point p is that of the training model where TRL's engine-mismatch correction is on, which leaves
        these tokens to us, or where the engine does not know it. Elsewhere p is the engine's. A token of unknown p, in
        a row that the loss leaves out, is not corrected.
        """
        args, logps = self.args, rollout.logps
        if args.use_vllm and args.vllm_importance_sampling_correction:
            # Where a row is left out (`mask_truncated_completions`), TRL computes them without its tokens
            known = scored.policy_logps_B_T.where(scored.mask_B_T, torch.nan)[batch.source_B == 1].to(logps)
            logps = torch.where(rollout.branch & ~known.isnan(), known, logps)
        if args.correction_level == "mixture":
            log_ratio, where = logps - rollout.mixed_logps, rollout.mask
        else:
            log_ratio, where = logps - rollout.expert_logps, rollout.branch & ~logps.isnan()
        rho = correction_weights(
            log_ratio,
            where,
            kind=args.correction,
            cap=args.correction_cap,
            floor=args.correction_floor,
            exponent=args.correction_exponent,
            constant=args.correction_constant,
        )
        return log_ratio.exp(), rho, where

    def _check_reward_range(self, rewards_N: torch.Tensor) -> None:
        finite = rewards_N[rewards_N.isfinite()]
        spread = (finite.max() - finite.min()).item() if finite.numel() else 0.0
        if spread > self.args.reward_range * (1 + 1e-6) and not self._range_warned:
            self._range_warned = True
            warnings.warn(
                f"Rewards of this batch differ by {spread:.4g}, more than `reward_range={self.args.reward_range}`, so "
                "mixed advantages exceed alpha. Set `reward_range` to the largest possible difference.",
                stacklevel=2,
            )

    def observe(self, batch: RolloutBatch, scored: Scored) -> None:
        self.guidance.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return self.guidance.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.guidance.load_state_dict(state)


def _check_sharding(args: MentorGRPOConfig) -> None:
    if uses_fsdp(args):
        raise SetupError(
            "FSDP is not supported with mixed rollouts in process: processes make different numbers of forward "
            "passes, which deadlocks its collectives. Set `use_vllm=True`, use DDP or DeepSpeed "
            f"(`accelerate_config: zero3`), {PLAIN}."
        )
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and not args.ds3_gather_for_generation:
        raise SetupError(
            "ZeRO-3 with `ds3_gather_for_generation=False` is not supported with mixed rollouts in process: "
            "processes make different numbers of forward passes, which deadlocks. Set it to True, set "
            f"`use_vllm=True`, {PLAIN}."
        )
