"""The forward pass of one loss, on which some weights and terms depend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel

from ..config import MentorGRPOConfig
from ..experts.compatibility import text_model
from ..objective import fold_correction
from ..rollout.local.decoder import Decoder
from .batch import LossStates, LossTerm, Reweighed
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
        loss_term (`Callable`, *optional*):
            [`~mentor_trl.algorithms.Algorithm.loss_term`].
    """

    inputs: dict[str, Any]
    reweigh: Callable[[dict[str, Any], torch.Tensor], Reweighed | None]
    loss_term: Callable[[dict[str, Any], LossStates], LossTerm | None] | None = None
    logps_B_T: torch.Tensor | None = None
    entropies_B_T: torch.Tensor | None = None
    reweighed: Reweighed | None = None
    term: LossTerm | None = None

    def loss(self, compute: Callable, model, args: MentorGRPOConfig, accelerator: Accelerator, accumulation: int):
        """TRL's loss, by `compute`, and the term beside it."""
        if self.loss_term is None or "mentor_source" not in self.inputs:
            return compute(model, self.inputs)
        decoder = Decoder(
            extract_model_from_parallel(model), autocast=accelerator.autocast, float32_head=args.cast_lm_head_to_fp32
        )
        with last_hidden_states(decoder.model) as caught:
            loss = compute(model, self.inputs)
        prompt = self.inputs["prompt_ids"].size(1)
        (hidden,) = caught
        states = LossStates(hidden[:, prompt - 1 : -1], decoder.logits, decoder.rows_per_chunk)
        self.term = self.loss_term(self.inputs, states)
        if self.term is None:
            return loss
        scale = args, accumulation, accelerator.num_processes
        return loss + self.term.weight * averaged(self.term.values_B_T, self.inputs, *scale)

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
        if self.term is not None:
            values[self.term.name] = self.term.values_B_T.detach()
        mask, source_B = self.inputs["completion_mask"], self.inputs["mentor_source"]
        metrics = token_metrics(sources, source_B, values, mask, reduce)
        if self.reweighed is not None:
            metrics.pop(f"{PREFIX}{sources[0]}/{self.reweighed.name}", None)  # 1 everywhere
        return metrics


@contextmanager
def last_hidden_states(model) -> Iterator[list[torch.Tensor]]:
    """Collect what the decoder of a model gives in each forward pass made inside, `(B, T, D)`."""
    caught: list[torch.Tensor] = []
    decoder = text_model(model).base_model
    hook = decoder.register_forward_hook(lambda module, inputs, output: caught.append(output.last_hidden_state))
    try:
        yield caught
    finally:
        hook.remove()


def averaged(
    values_B_T: torch.Tensor, inputs: dict[str, Any], args: MentorGRPOConfig, accumulation: int, processes: int
) -> torch.Tensor:
    """The mean of values of tokens, as TRL's loss of the same `loss_type` makes it in training."""
    mask = inputs["completion_mask"]
    masked = values_B_T * mask
    if args.loss_type in ("grpo", "sapo"):
        return (masked.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean() / accumulation
    if args.loss_type == "bnpo":
        return masked.sum() / mask.sum().clamp(min=1) / accumulation
    if args.loss_type == "dr_grpo":
        return masked.sum() / (len(masked) * args.max_completion_length) / accumulation
    if args.loss_type in ("dapo", "cispo"):
        tokens = inputs["num_items_in_batch"].clamp(min=1) / processes
        return masked.sum() / (tokens * accumulation / args.steps_per_generation)
    raise ValueError(f"`loss_type={args.loss_type!r}` has no mean over tokens; choose 'dapo'.")
