"""
What the methods share in which the expert scores tokens that the policy wrote. Rows are sampled, and rewarded, by an
algorithm inside: plain GRPO, or MENTOR with `num_mixed_generations`.
"""

from typing import Any

import torch

from ..config import MentorGRPOConfig
from ..training.batch import Credit, RolloutBatch, Scored
from ..training.metrics import PREFIX
from .base import Algorithm, Context, Rollouts
from .mentor import Mentor
from .requirements import refuse_components, refuse_multimodal


PLAIN = "or set `distillation='none'`"


class Distillation(Algorithm):
    """
    See [`Algorithm`]. A method says in `credit` what the expert's scores are worth.

    Attributes:
        option (`str`):
            Value of `distillation` that asks for the method.
    """

    option: str
    needs_expert = True
    needs_scores = True
    needs_policy_logps = True
    text_only = "rows that an expert scores"

    def __init__(self, args: MentorGRPOConfig):
        super().__init__(args)
        self.inner = (Mentor if Mentor.chosen(args) else Algorithm)(args)
        self.sources = self.inner.sources
        self.tags = list(dict.fromkeys([*self.inner.tags, *self.tags]))

    @classmethod
    def chosen(cls, args: MentorGRPOConfig) -> bool:
        return args.distillation == cls.option

    def check(self, train_dataset, eval_dataset, **components) -> None:
        refuse_components(components, f"`distillation='{self.option}'`", PLAIN)
        self.inner.check(train_dataset, eval_dataset, **components)
        super().check(train_dataset, eval_dataset, **components)

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        refuse_multimodal(context.multimodal, "distillation", "none")
        self.inner.prepare(context)

    def plan(self, inputs: list[dict[str, Any]], first: int) -> RolloutBatch:
        return self.inner.plan(inputs, first)

    def rollout(self, prompt_ids: list[list[int]], batch: RolloutBatch, rollouts: Rollouts) -> RolloutBatch:
        return self.inner.rollout(prompt_ids, batch, rollouts)

    def observe(self, batch: RolloutBatch, scored: Scored) -> dict[str, float] | None:
        return self.inner.observe(batch, scored)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])

    def drawn_from_policy(self, batch: RolloutBatch, scored: Scored) -> torch.Tensor:
        """Tokens that the policy drew by itself, `(B, T)` `bool`: all but the branch points of mixed rows."""
        drawn = scored.mask_B_T.clone()
        part = batch.part("mixed")
        if part is not None:
            branch = part.rollout.padded(drawn.size(1)).branch[:, : drawn.size(1)]
            drawn[part.rows] &= ~branch.to(drawn.device)
        return drawn

    def expert_logps(self, batch: RolloutBatch, like_B_T: torch.Tensor, rows: list[int] | None = None) -> torch.Tensor:
        """log s of the tokens of some rows (all if not given), in the shape of a tensor; NaN elsewhere."""
        rows = list(range(len(like_B_T))) if rows is None else rows
        logps = torch.full(like_B_T.shape, torch.nan, device=like_B_T.device)
        if rows:
            prompts, completions = ([ids[row] for row in rows] for ids in (batch.prompt_ids, batch.completion_ids))
            scores = self.context.expert.score(prompts, completions, self.args.temperature)
            logps[rows, : scores.size(1)] = scores.to(logps)
        return logps

    def total(self, value: torch.Tensor | float) -> float:
        """A sum over all processes."""
        return self.context.processes.reduce(torch.tensor([float(value)]), "sum").item()


def named(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of distillation under their full names."""
    return {f"{PREFIX}distillation/{name}": value for name, value in metrics.items()}


def added(credit: Credit, terms_B_T: torch.Tensor, mask_B_T: torch.Tensor, processes) -> Credit:
    """Advantages and a term of their own for each token. A row's, for the logs, has the mean of its terms."""
    advantages = credit.advantages.unsqueeze(1) if credit.advantages.dim() == 1 else credit.advantages
    means_B = (terms_B_T * mask_B_T).sum(dim=1) / mask_B_T.sum(dim=1).clamp(min=1)
    rows_N = credit.advantages_N + processes.gather(means_B).to(credit.advantages_N)
    return credit._replace(advantages=advantages + terms_B_T, advantages_N=rows_N)


def without_reward(credit: Credit) -> Credit:
    """The same rows, worth nothing by their rewards."""
    nothing = torch.zeros_like(credit.advantages)
    return credit._replace(advantages=nothing, advantages_N=torch.zeros_like(credit.advantages_N))
