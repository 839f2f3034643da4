"""State of the guidance over a run: alpha and gamma."""

from dataclasses import dataclass

import torch

from ..objective import alpha_at, branch_weight, entropy_threshold
from .withdrawal import Withdrawal


@dataclass
class Guidance:
    """
    State of the guidance over a run; everything of it that changes is in [`Guidance.state_dict`].

    Args:
        schedule (`str`, *optional*, defaults to `"cosine"`), alpha_0 (`float`, *optional*, defaults to `1.0`),
        decay_steps (`int`, *optional*, defaults to `120`):
            See [`~mentor_trl.objective.alpha_at`].
        quantile (`float`, *optional*, defaults to `0.95`), minimum (`float`, *optional*, defaults to `0.1`),
        fixed (`float`, *optional*):
            See [`~mentor_trl.objective.entropy_threshold`].
        batches (`int`, *optional*, defaults to `0`):
            Rollout batches generated so far.
        gamma (`float`, *optional*):
            Threshold from the last rollout batch with mixed rows, in nats.
        share (`float`, *optional*, defaults to `0.0`):
            Mean of min(1, H / gamma) over that batch's on-policy tokens: the weight of the branch rule `"random"`,
            where it is not set.
        row_tokens (`float`, *optional*, defaults to `0.0`):
            Mean length of the mixed rows of the last rollout batch that has any.
        withdrawal ([`~mentor_trl.algorithms.withdrawal.Withdrawal`], *optional*):
            Of the schedule `"adaptive"`: what alpha follows instead of the number of batches.
    """

    schedule: str = "cosine"
    alpha_0: float = 1.0
    decay_steps: int = 120
    quantile: float = 0.95
    minimum: float = 0.1
    fixed: float | None = None
    batches: int = 0
    gamma: float | None = None
    share: float = 0.0
    row_tokens: float = 0.0
    withdrawal: Withdrawal | None = None

    @property
    def alpha(self) -> float:
        """alpha of the coming rollout batch."""
        if self.withdrawal is not None:
            return self.withdrawal.alpha(self.alpha_0)
        return alpha_at(self.batches, self.schedule, self.alpha_0, self.decay_steps)

    @property
    def over(self) -> bool:
        """Whether no rollout is mixed from now on."""
        if self.withdrawal is not None:
            return self.alpha_0 == 0.0 or self.withdrawal.over
        return self.alpha_0 == 0.0 or (self.schedule != "constant" and self.batches >= self.decay_steps)

    @property
    def probe(self) -> bool:
        """Whether the mixed rows of the coming rollout batch are counted only."""
        return self.withdrawal is not None and self.withdrawal.probe

    @property
    def mixes(self) -> bool:
        """Whether the coming rollout batch has mixed rows. They are sampled to compare them even where alpha is 0."""
        if self.withdrawal is None or self.alpha_0 == 0.0:
            return self.alpha > 0.0
        return not self.withdrawal.withdrawn or self.probe

    def update(self, entropies: torch.Tensor) -> None:
        """Set gamma and the share from the on-policy token entropies, `(N,)` in nats, of all processes."""
        self.gamma = entropy_threshold(entropies, self.quantile, self.minimum, self.fixed)
        self.share = branch_weight(entropies.cpu().double(), self.gamma).mean().item() if entropies.numel() else 0.0

    def state_dict(self) -> dict:
        state = {"batches": self.batches, "gamma": self.gamma, "share": self.share, "row_tokens": self.row_tokens}
        return state if self.withdrawal is None else state | {"withdrawal": self.withdrawal.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.batches, self.gamma, self.share = state["batches"], state["gamma"], state["share"]
        self.row_tokens = state.get("row_tokens", 0.0)  # not in checkpoints of version 0.1
        if self.withdrawal is not None and "withdrawal" in state:
            self.withdrawal.load_state_dict(state["withdrawal"])
