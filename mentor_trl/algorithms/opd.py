"""
[On-policy distillation](https://huggingface.co/papers/2306.13649): the policy writes, and each of its tokens is worth
log s - log p, so that the reverse KL divergence to the expert falls. Alone, or beside the reward.
"""

from ..objective import distillation_advantages
from ..training.batch import Credit, RolloutBatch, Scored
from .distillation import Distillation, added, named, without_reward
from .papers import OPD_PAPER


class Opd(Distillation):
    """On-policy distillation; see [`Distillation`]. Tokens that the expert drew itself have no term."""

    name = "OPD"
    tags = ["trl", "opd"]
    paper = OPD_PAPER
    option = "opd"

    @property
    def rewarded(self) -> bool:
        """Whether rewards count beside the expert."""
        return self.args.distillation_reward

    def coefficient(self, scored: Scored) -> float:
        """Weight of distillation in a batch."""
        return self.args.distillation_coef

    def credit(self, batch: RolloutBatch, scored: Scored) -> Credit:
        credit = self.inner.credit(batch, scored)
        coefficient = self.coefficient(scored)
        if not self.rewarded:
            credit = without_reward(credit)
        metrics = {"coef": coefficient}
        if coefficient > 0.0:
            where_B_T = self.drawn_from_policy(batch, scored)
            logs_B_T = self.expert_logps(batch, scored.policy_logps_B_T)
            terms_B_T = distillation_advantages(logs_B_T, scored.policy_logps_B_T, where_B_T)
            credit = added(credit, coefficient * terms_B_T, scored.mask_B_T, self.context.processes)
            total = self.totals(
                tokens=where_B_T.sum(),
                gap=terms_B_T.sum(),
                impossible=logs_B_T[where_B_T].isinf().sum(),
                scored=sum(map(len, batch.completion_ids)),
            )
            count = max(total["tokens"], 1.0)
            metrics |= {"reverse_kl": -total["gap"] / count, "impossible": total["impossible"] / count}
            metrics["expert_tokens"] = total["scored"]
        return credit._replace(metrics=credit.metrics | named(metrics))
