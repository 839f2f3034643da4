"""
[On-policy distillation](https://huggingface.co/papers/2306.13649): the policy writes, and the reverse KL divergence to
the expert falls at every token of it. Alone, or beside the reward.

By the token that was drawn, which is worth log s - log p; or by the distributions, whose divergence is a term of the
loss.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..config import MentorGRPOConfig
from ..objective import distillation_advantages, reverse_kl
from ..training.batch import Credit, LossStates, LossTerm, RolloutBatch, Scored
from .papers import OPD_PAPER
from .requirements import refuse_shards
from .scored_rows import PLAIN, Distillation, added, named, without_reward


class Opd(Distillation):
    """
    On-policy distillation; see [`Distillation`]. By the token that was drawn, tokens that the expert drew itself have
    no term; by the distributions, every token has one, whoever drew it.
    """

    name = "OPD"
    tags = ["trl", "opd"]
    paper = OPD_PAPER
    option = "opd"

    def __init__(self, args: MentorGRPOConfig):
        super().__init__(args)
        self.sampled = args.distillation_loss == "sampled"
        self.weight = 0.0  # of distillation in the latest batch
        self.withdrawn = False

    @property
    def needs_policy_logps(self) -> bool:
        return self.inner.needs_policy_logps or (self.sampled and not self.withdrawn)

    @property
    def needs_states(self) -> bool:
        return not self.sampled and self.weight > 0.0

    @property
    def rewarded(self) -> bool:
        """Whether rewards count beside the expert."""
        return self.args.distillation_reward

    def check(self, train_dataset, eval_dataset, **components) -> None:
        if not self.sampled:
            what = f"`distillation_loss={self.args.distillation_loss!r}`"
            refuse_shards(self.args, what, f"Set it to 'sampled', use DDP or ZeRO-2, {PLAIN}.")
        super().check(train_dataset, eval_dataset, **components)

    def coefficient(self, scored: Scored) -> float:
        """Weight of distillation in a batch."""
        return self.args.distillation_coef

    def credit(self, batch: RolloutBatch, scored: Scored) -> Credit:
        credit = self.inner.credit(batch, scored)
        self.weight = self.coefficient(scored)
        if not self.rewarded:
            credit = without_reward(credit)
        metrics = {"coef": self.weight}
        if self.weight > 0.0:
            metrics["expert_tokens"] = self.total(float(sum(map(len, batch.completion_ids))))
            if self.sampled:
                credit, found = self._by_tokens(credit, batch, scored)
                metrics |= found
        return credit._replace(metrics=credit.metrics | named(metrics))

    def _by_tokens(self, credit: Credit, batch: RolloutBatch, scored: Scored) -> tuple[Credit, dict[str, float]]:
        where_B_T, logps_B_T = self.drawn_from_policy(batch, scored), scored.policy_logps_B_T
        logs_B_T = self.expert_logps(batch, logps_B_T)
        terms_B_T = distillation_advantages(logs_B_T, logps_B_T, where_B_T)
        credit = added(credit, self.weight * terms_B_T, scored.mask_B_T, self.context.processes)
        count = max(self.total(where_B_T.sum()), 1.0)
        impossible = self.total(logs_B_T[where_B_T].isinf().sum())
        return credit, {"reverse_kl": -self.total(terms_B_T.sum()) / count, "impossible": impossible / count}

    def loss_term(self, inputs: dict[str, Any], states: LossStates) -> LossTerm:
        mask_B_T = inputs["completion_mask"].bool()
        rows = mask_B_T.any(dim=1).nonzero().flatten().tolist()
        prompts, completions = (
            [inputs[f"{part}_ids"][row][inputs[f"{part}_mask"][row].bool()].tolist() for row in rows]
            for part in ("prompt", "completion")
        )
        values_B_T = torch.zeros(mask_B_T.shape, device=mask_B_T.device)
        if rows:
            distributions = self.context.expert.distributions(prompts, completions, self.args.temperature)
            values_B_T[mask_B_T] = self._divergences(states.hidden_B_T_D[mask_B_T], states, distributions)
        return LossTerm(values_B_T, self.weight, "reverse_kl")

    def _divergences(self, hidden: torch.Tensor, states: LossStates, distributions) -> torch.Tensor:
        """KL(p || s) before each of N tokens. Logits are held for a few tokens at a time, in the backward pass too."""
        top_k = self.args.distillation_top_k if self.args.distillation_loss == "top_k" else 0

        def divergence(hidden: torch.Tensor, part: slice) -> torch.Tensor:
            logps = (states.logits(hidden) / self.args.temperature).log_softmax(-1)
            return reverse_kl(logps, distributions(part).to(logps.device), top_k)

        parts = [slice(first, first + states.rows) for first in range(0, len(hidden), states.rows)]
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(divergence, hidden[part], part, **options) for part in parts])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"weight": self.weight, "withdrawn": self.withdrawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.weight, self.withdrawn = state["weight"], state["withdrawn"]
