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
from ..objective import (
    Gap,
    correction_weights,
    fold_correction,
    mixed_policy_advantages,
    sentence_endings,
    success_rates,
)
from ..rollout.types import MixedRequest, MixedRollout, mixed_rows
from ..training.batch import Credit, Part, RolloutBatch, Scored, scatter
from ..training.metrics import PREFIX, guidance_metrics, share_without_spread, speed_metric
from .base import Algorithm, Context, Rollouts
from .guidance import Guidance
from .papers import MENTOR_PAPER
from .requirements import refuse_components, refuse_multimodal, uses_fsdp, warn_of_kl
from .withdrawal import Withdrawal


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
            withdrawal=withdrawal_of(args) if args.alpha_schedule == "adaptive" else None,
        )
        self.attempt = 0  # the batch's, see `seed`
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

    @property
    def resting(self) -> bool:
        return not self.guidance.mixes

    def plan(self, inputs: list[dict[str, Any]], first: int) -> RolloutBatch:
        guidance, args = self.guidance, self.args
        if not guidance.mixes:
            return super().plan(inputs, first)
        mixed_B = mixed_rows(first, len(inputs), args.num_generations, args.num_mixed_generations)
        return RolloutBatch(self.sources, mixed_B.long(), alpha=guidance.alpha, mixes=True, probe=guidance.probe)

    def rollout(self, prompt_ids: list[list[int]], batch: RolloutBatch, rollouts: Rollouts) -> RolloutBatch:
        if not batch.mixes:
            self.needs_policy_logps = False
            return super().rollout(prompt_ids, batch, rollouts)
        self.attempt = batch.attempt
        rows = [(batch.source_B == index).nonzero().flatten().tolist() for index in (0, 1)]
        sample = self._sample_at_once if self._threshold_is_known else self._sample_in_turn
        with rollouts.session() as session:
            gamma, parts = sample(prompt_ids, rows, batch, session, rollouts)
        mixed, count = parts[-1], len(prompt_ids)
        self.needs_policy_logps = not self.context.processes.everywhere(mixed.rollout.logps_at_branches)
        completion_ids = scatter([(part.rows, part.rollout.completion_ids) for part in parts], count)
        logps = None
        if self.args.use_vllm:
            logps = scatter([(part.rows, part.rollout.policy_logps()) for part in parts], count)
        source_B = torch.zeros(count, dtype=torch.long)
        source_B[mixed.rows] = 1
        return batch.sampled(prompt_ids, completion_ids, logps, tuple(parts), gamma=gamma, source_B=source_B)

    @property
    def _threshold_is_known(self) -> bool:
        return self.args.entropy_threshold_from == "previous" and self.guidance.gamma is not None

    def _sample_in_turn(self, prompt_ids, rows, batch: RolloutBatch, session, rollouts: Rollouts):
        """
        On-policy rows, gamma from their entropies, then mixed rows; on-policy ones where a prompt needs no help. Where
        all rows are mixed, on-policy ones are sampled for gamma alone.
        """
        first, rest = rows
        prompts = [prompt_ids[row] for row in rows[self._heard]]
        with rollouts.profile("mentor.on_policy"), rollouts.progress(len(prompts), "On-policy rows") as progress:
            on_policy = session.sample(self._request(prompts, [math.inf] * len(prompts), 0, rollouts), progress)
        self.guidance.update(self._entropies(prompts, on_policy, rollouts))
        if self._heard == 1:
            (on_policy,) = on_policy.split([0])
        gamma, parts = self.guidance.gamma, [Part("on_policy", first, on_policy)]
        plain, mixed = [], rest
        failing = self.args.guide_prompts == "failing"
        if failing:
            guided_B = self._guided_rows(rollouts.rewards(first, prompts, on_policy.completion_ids), batch)
            plain, mixed = ([row for row in rest if guided_B[row] == guided] for guided in (False, True))
        prompts, gammas = [prompt_ids[row] for row in plain + mixed], [math.inf] * len(plain) + [gamma] * len(mixed)
        with rollouts.profile("mentor.mixed"), rollouts.progress(len(rest), "Mixed rows") as progress:
            sampled = session.sample(self._request(prompts, gammas, 1, rollouts), progress)
        if failing:
            others, sampled = sampled.split([len(plain), len(mixed)])
            parts.append(Part("on_policy", plain, others))
        if self._heard == 1:
            self.guidance.update(self._entropies(prompts, sampled, rollouts))
        return gamma, [*parts, Part("mixed", mixed, sampled)]

    def _sample_at_once(self, prompt_ids, rows, batch: RolloutBatch, session, rollouts: Rollouts):
        """All rows under the gamma of the batch before, and the next one's from the rows of this batch."""
        gamma, counts = self.guidance.gamma, [len(part) for part in rows]
        prompts, gammas = [prompt_ids[row] for row in rows[0] + rows[1]], [math.inf] * counts[0] + [gamma] * counts[1]
        with rollouts.profile("mentor.rollouts"), rollouts.progress(len(gammas), "Rows") as progress:
            sampled = session.sample(self._request(prompts, gammas, 0, rollouts), progress).split(counts)
        heard = [prompt_ids[row] for row in rows[self._heard]]
        self.guidance.update(self._entropies(heard, sampled[self._heard], rollouts))
        return gamma, [Part(*part) for part in zip(self.sources, rows, sampled)]

    def _guided_rows(self, rewards_N: torch.Tensor, batch: RolloutBatch) -> list[bool]:
        """
        Which rows of this process belong to prompts that get mixed rollouts, by the rewards of the first on-policy
        rows of all processes.
        """
        args, rows = self.args, len(batch.source_B)
        first = args.num_generations - args.num_mixed_generations
        success_G = success_rates(rewards_N, first, args.success_reward)
        guided_G = success_G == 0.0 if args.guide_below is None else success_G < args.guide_below
        if self.guidance.withdrawal is not None:
            always_G = self._compared(len(guided_G))
            guided_G = always_G if batch.probe else guided_G | always_G
        local = self.context.processes.local(rows // args.num_generations)
        return guided_G[local].repeat_interleave(args.num_generations).tolist()

    def _compared(self, groups: int) -> torch.Tensor:
        """Groups of this batch that have mixed rows whatever their rewards, `(groups,)` `bool`."""
        if self.args.guide_prompts == "all":
            return torch.ones(groups, dtype=torch.bool)
        count = max(1, round(self.args.guide_share * groups))
        draw = np.random.default_rng([self.args.seed, self.guidance.batches])  # the same on every process
        return torch.isin(torch.arange(groups), torch.tensor(draw.permutation(groups)[:count]))

    @property
    def _heard(self) -> int:
        """Source whose entropies give gamma: the policy, or the mixed rows where there are no others."""
        return int(self.args.num_mixed_generations == self.args.num_generations)

    def _entropies(self, prompt_ids, rollout: MixedRollout, rollouts: Rollouts) -> torch.Tensor:
        """Entropies of the policy at the tokens of all processes: the engine's, or those of the training model."""
        processes = self.context.processes
        if processes.everywhere(rollout.entropies is not None):
            entropies = rollout.entropies[rollout.mask]
        else:
            entropies = rollouts.entropies(prompt_ids, rollout.completion_ids)
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
        """Seed of the coming request for a source: of the run, the process, the batch and the attempt at it."""
        entropy = [self.args.seed, self.context.processes.index, self.guidance.batches, source]
        entropy += [self.attempt] * (self.attempt > 0)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def credit(self, batch: RolloutBatch, scored: Scored) -> Credit:
        alpha = {f"{PREFIX}alpha": batch.alpha}
        if not batch.mixes:
            return super().credit(batch, scored)._replace(metrics=alpha)
        args, processes = self.args, self.context.processes
        self._check_reward_range(scored.rewards_N)
        mixed_N = scored.source_N == 1
        advantages_N = mixed_policy_advantages(
            scored.rewards_N,
            mixed_N,
            args.num_generations,
            batch.alpha,
            args.reward_range,
            args.scale_rewards,
            args.mixed_advantage_scale,
        )
        rollout = batch.part("mixed").rollout.padded(scored.mask_B_T.size(1))
        ratio, rho, where = self._correction(rollout, batch, scored)
        rho_B_T = torch.ones(scored.mask_B_T.shape, device=scored.mask_B_T.device)
        rho_B_T[batch.source_B.to(rho_B_T.device) == 1] = rho.to(rho_B_T.device)
        metrics = guidance_metrics(rollout, ratio, rho, where, processes.reduce)
        for source in self.sources:
            metrics |= speed_metric(source, batch.part(source).rollout.stats, processes)
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
        scaled = self.args.mixed_advantage_scale == "range"
        if scaled and spread > self.args.reward_range * (1 + 1e-6) and not self._range_warned:
            self._range_warned = True
            warnings.warn(
                f"Rewards of this batch differ by {spread:.4g}, more than `reward_range={self.args.reward_range}`, so "
                "mixed advantages exceed alpha. Set `reward_range` to the largest possible difference.",
                stacklevel=2,
            )

    def observe(self, batch: RolloutBatch, scored: Scored) -> dict[str, float]:
        guidance, args = self.guidance, self.args
        metrics = {}
        if guidance.withdrawal is not None:
            groups = len(scored.rewards_N) // args.num_generations
            ignored_N = ~self._compared(groups).repeat_interleave(args.num_generations)
            rewards_N = scored.rewards_N.cpu().masked_fill(ignored_N, torch.nan)
            metrics = guidance.withdrawal.observe(rewards_N, scored.source_N.cpu() == 1, args.num_generations)
        if guidance.withdrawal is not None or args.guide_prompts == "failing":
            metrics |= self._savings(batch, scored.source_N == 1)
        guidance.batches += 1
        return {f"{PREFIX}guidance/{name}": value for name, value in metrics.items()}

    def _savings(self, batch: RolloutBatch, mixed_N: torch.Tensor) -> dict[str, float]:
        """What is not sampled with the expert, measured by the mixed rows of the same batch, or of the last one."""
        args, guidance = self.args, self.guidance
        lengths = [len(ids) for ids, source in zip(batch.completion_ids, batch.source_B.tolist()) if source == 1]
        tokens = self.context.processes.reduce(torch.tensor([float(sum(lengths))]), "sum").item()
        mixed = mixed_N.sum().item()
        guidance.row_tokens = tokens / mixed if mixed else guidance.row_tokens
        places = len(mixed_N) // args.num_generations * args.num_mixed_generations
        return {
            "guided_prompts": mixed / places,
            "expert_tokens": tokens,
            "expert_tokens_saved": (places - mixed) * guidance.row_tokens,
        }

    def state_dict(self) -> dict[str, Any]:
        return self.guidance.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.guidance.load_state_dict(state)


def withdrawal_of(args: MentorGRPOConfig) -> Withdrawal:
    """The rule of `alpha_schedule="adaptive"` at its start."""
    return Withdrawal(
        Gap(args.guidance_smoothing, args.reward_range),
        margin=args.guidance_margin,
        patience=args.guidance_patience,
        probe_every=args.guidance_probe_every,
        success_reward=args.success_reward,
        gap_exponent=args.guidance_gap_exponent,
    )


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
