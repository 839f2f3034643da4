"""
[Distilled RL](https://huggingface.co/papers/2607.17247): in rows that did well, the tokens that the expert finds
likelier than the policy count more, and the others less.
"""

from ..objective import fold_correction, preference_weights
from ..training.batch import Credit, RolloutBatch, Scored
from .papers import DISTILLED_RL_PAPER
from .scored_rows import Distillation, named


class DistilledRL(Distillation):
    """
    Distilled RL; see [`Distillation`]. On-policy rows with a positive advantage are weighed, and only they are given
    to the expert; mixed rows have their own correction.
    """

    name = "Distilled RL"
    tags = ["trl", "distilled-rl"]
    paper = DISTILLED_RL_PAPER
    option = "distilled_rl"

    def credit(self, batch: RolloutBatch, scored: Scored) -> Credit:
        credit = self.inner.credit(batch, scored)
        mask_B_T = scored.mask_B_T
        rows_B = (credit.advantages_N[scored.local] > 0.0).to(mask_B_T.device)
        rows_B = rows_B & (batch.source_B.to(mask_B_T.device) == 0) & mask_B_T.any(dim=1)
        rows, where_B_T = rows_B.nonzero().flatten().tolist(), mask_B_T & rows_B.unsqueeze(1)
        logs_B_T = self.expert_logps(batch, scored.policy_logps_B_T, rows)
        clip = self.args.distillation_clip
        weights_B_T = preference_weights(logs_B_T, scored.policy_logps_B_T, where_B_T, clip)
        ratios = (logs_B_T - scored.policy_logps_B_T)[where_B_T].exp()
        metrics = {"expert_tokens": self.total(float(sum(len(batch.completion_ids[row]) for row in rows)))}
        tokens = self.total(where_B_T.sum())
        if tokens:
            clipped = (ratios > clip) | (ratios < 1.0 / clip)
            metrics["weight"] = self.total(weights_B_T[where_B_T].sum()) / tokens
            metrics["clipped"] = self.total(clipped.sum()) / tokens
        earlier = weights_B_T if credit.weights_B_T is None else credit.weights_B_T * weights_B_T
        return credit._replace(
            advantages=fold_correction(credit.advantages, weights_B_T),
            weights_B_T=earlier,
            metrics=credit.metrics | named(metrics),
        )
