"""What the training model says of rows that an engine sampled."""

from typing import TYPE_CHECKING

import torch
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad


if TYPE_CHECKING:
    from ..trainer import MentorGRPOTrainer


@torch.no_grad()
def policy_entropies(
    trainer: "MentorGRPOTrainer", prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> torch.Tensor:
    """
    Entropies of the policy before every token, by a forward pass of the training model. All processes make the same
    number of passes, which sharded models need.

    Args:
        trainer ([`MentorGRPOTrainer`]):
            Trainer.
        prompt_ids, completion_ids (`list[list[int]]`):
            Tokens of this process's rows; there may be none.

    Returns:
        `torch.Tensor` of shape `(tokens of all rows,)`: entropies in nats, at the sampling temperature.
    """
    device, size = trainer.accelerator.device, trainer.args.per_device_train_batch_size
    rows = len(completion_ids)
    most = int(trainer._reduce(torch.tensor([float(rows)]), "max").item())
    if most == 0:
        return torch.empty(0, device=device)
    filler = [trainer._tokenizer.pad_token_id]
    prompts = prompt_ids + [filler] * (most - rows)
    completions = completion_ids + [filler] * (most - rows)

    def padded(ids: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [torch.tensor(row, device=device) for row in ids]
        tokens = pad(tensors, padding_value=trainer._tokenizer.pad_token_id, padding_side=side)
        mask = pad([torch.ones_like(tensor) for tensor in tensors], padding_value=0, padding_side=side)
        return tokens, mask

    (prompt, prompt_mask), (completion, mask) = padded(prompts, "left"), padded(completions, "right")
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        # TRL's own, as the trainer's keeps what it computes for the loss
        _, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            trainer.model,
            torch.cat([prompt, completion], dim=1),
            torch.cat([prompt_mask, mask], dim=1),
            completion.size(1),
            batch_size=size,
            compute_entropy=True,
        )
    return entropies[:rows][mask[:rows].bool()]
