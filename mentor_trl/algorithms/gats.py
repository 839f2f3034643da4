"""
GATS: GRPO and on-policy distillation, weighed by how far the policy's score is behind the expert's, and let go for
good when it is not behind any more.
"""

from typing import Any

from ..config import MentorGRPOConfig
from ..objective import score_gap
from ..training.batch import Credit, RolloutBatch, Scored
from .opd import Opd
from .scored_rows import named


class Gats(Opd):
    """
    GATS; see [`Opd`]. The policy's score is a moving average of the on-policy rewards; the expert's is
    `gats_reference` or, with mixed rows, a moving average of theirs.
    """

    name = "GATS"
    tags = ["trl", "gats"]
    paper = {}
    option = "gats"
    rewarded = True

    def __init__(self, args: MentorGRPOConfig):
        super().__init__(args)
        self.student: float | None = None
        self.teacher: float | None = args.gats_reference
        self.batches = 0  # heard so far

    @property
    def over(self) -> bool:
        return self.withdrawn and (not self.inner.needs_expert or self.inner.over)

    @property
    def resting(self) -> bool:
        return self.withdrawn and self.inner.resting

    def coefficient(self, scored: Scored) -> float:
        if self.withdrawn:
            return 0.0
        self.student = self._average(self.student, scored, 0)
        if self.args.gats_reference is None:
            self.teacher = self._average(self.teacher, scored, 1)
        if self.student is None or self.teacher is None:
            return self.args.distillation_coef
        gap = score_gap(self.student, self.teacher)
        self.batches += 1
        # Averages of a few batches are noise, and there is no way back
        self.withdrawn = gap == 0.0 and self.batches * (1.0 - self.args.gats_smoothing) > 1.0 - 1e-9
        return self.args.distillation_coef * gap

    def _average(self, before: float | None, scored: Scored, source: int) -> float | None:
        """A moving average with the rewards of a source, the same on every process."""
        rewards = scored.rewards_N[(scored.source_N == source) & scored.rewards_N.isfinite()]
        if not rewards.numel():
            return before
        now = rewards.double().mean().item()
        keep = self.args.gats_smoothing
        return now if before is None else keep * before + (1.0 - keep) * now

    def credit(self, batch: RolloutBatch, scored: Scored) -> Credit:
        credit = super().credit(batch, scored)
        values = {"student": self.student, "teacher": self.teacher, "withdrawn": float(self.withdrawn)}
        known = {name: value for name, value in values.items() if value is not None}
        return credit._replace(metrics=credit.metrics | named(known))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"student": self.student, "teacher": self.teacher, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.student, self.batches = state["student"], state["batches"]
        self.teacher = state["teacher"] if self.args.gats_reference is None else self.args.gats_reference
