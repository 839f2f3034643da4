"""The forward pass of one loss, whose log-probabilities some weights depend on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..objective import fold_correction
from .batch import Reweighed
from .metrics import PREFIX, token_metrics


@dataclass
class LossPass:
    """
    What the forward pass of one loss gives; it lives as long as that loss.

    Args:
        inputs (`dict[str, Any]`):
            Batch of the loss, a copy: its advantages and ratios may be reweighed.
        reweigh (`Callable`):
            [`~mentor_trl.algorithms.Algorithm.reweigh`].
    """

    inputs: dict[str, Any]
    reweigh: Callable[[dict[str, Any], torch.Tensor], Reweighed | None]
    logps_B_T: torch.Tensor | None = None
    entropies_B_T: torch.Tensor | None = None
    reweighed: Reweighed | None = None

    def done(self, logps_B_T: torch.Tensor, entropies_B_T: torch.Tensor) -> None:
        """Take the pass's results, and reweigh the inputs: the loss reads advantages and ratios only now."""
        self.logps_B_T, self.entropies_B_T = logps_B_T.detach(), entropies_B_T.detach()
        if "mentor_source" not in self.inputs:  # evaluation
            return
        self.reweighed = self.reweigh(self.inputs, self.logps_B_T)
        if self.reweighed is None:
            return
        self.inputs["advantages"] = fold_correction(self.inputs["advantages"], self.reweighed.weights_B_T)
        old = self.inputs.get("old_per_token_logps")
        if old is not None:
            rows = self.reweighed.rows_B.unsqueeze(1)
            self.inputs["old_per_token_logps"] = torch.where(rows, self.logps_B_T, old)

    def metrics(self, sources: tuple[str, ...], reduce: Callable[[torch.Tensor, str], torch.Tensor]) -> dict:
        """Entropy, KL divergence and weights of the tokens of each source."""
        values = {"entropy": self.entropies_B_T}
        reference = self.inputs.get("ref_per_token_logps")
        if reference is not None:
            log_ratio = reference - self.logps_B_T
            values["kl"] = log_ratio.exp() - log_ratio - 1
        if self.reweighed is not None:
            values[self.reweighed.name] = self.reweighed.weights_B_T
        mask, source_B = self.inputs["completion_mask"], self.inputs["mentor_source"]
        metrics = token_metrics(sources, source_B, values, mask, reduce)
        if self.reweighed is not None:
            metrics.pop(f"{PREFIX}{sources[0]}/{self.reweighed.name}", None)  # 1 everywhere
        return metrics
