"""What the training model says of rows that an engine sampled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from trl.trainer.utils import pad

from .processes import Processes


class TokenPass(NamedTuple):
    """Forward passes of the training model."""

    run: Callable  # TRL's `_get_per_token_logps_and_entropies` with the model bound
    pad_token_id: int
    batch_size: int


def policy_logps(run: Callable, output: dict[str, Any], batch_size: int) -> torch.Tensor:
    """log p of the completion tokens of what TRL made of a rollout batch, `(rows, T)`."""
    tokens, attention = (
        torch.cat([output[f"prompt_{what}"], output[f"completion_{what}"]], dim=1) for what in ("ids", "mask")
    )
    logps, _, _ = run(tokens, attention, output["completion_ids"].size(1), batch_size=batch_size)
    return logps


@torch.no_grad()
def policy_entropies(
    forward: TokenPass, processes: Processes, prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> torch.Tensor:
    """
    Entropies of the policy before every token, by a forward pass of the training model. All processes make the same
    number of passes, which sharded models need.
    """
    device, rows = processes.device, len(completion_ids)
    most = int(processes.reduce(torch.tensor([float(rows)]), "max").item())
    if most == 0:
        return torch.empty(0, device=device)
    filler = [[forward.pad_token_id]] * (most - rows)

    def padded(ids: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [torch.tensor(row, device=device) for row in ids]
        tokens = pad(tensors, padding_value=forward.pad_token_id, padding_side=side)
        mask = pad([torch.ones_like(tensor) for tensor in tensors], padding_value=0, padding_side=side)
        return tokens, mask

    (prompt, prompt_mask), (completion, mask) = (
        padded(prompt_ids + filler, "left"),
        padded(completion_ids + filler, "right"),
    )
    _, entropies, _ = forward.run(
        torch.cat([prompt, completion], dim=1),
        torch.cat([prompt_mask, mask], dim=1),
        completion.size(1),
        batch_size=forward.batch_size,
        compute_entropy=True,
    )
    return entropies[:rows][mask[:rows].bool()]
