"""From what a vLLM engine recorded to a rollout."""

import torch

from ...objective.mixture import mixture_logps
from ..types import BOOL_RECORDS, RECORDS, MixedRequest, MixedRollout


COLUMNS = ("entropies", "weights", "logps", "expert_logps", "branch", "replaced")


def policy_values(logps: list[float]) -> torch.Tensor:
    """Records `(T, 6)` of a completion of the plain policy, of which only the log-probabilities are known."""
    values = torch.zeros(len(logps), len(COLUMNS))
    values[:, COLUMNS.index("logps")] = torch.tensor(logps)
    for name in ("entropies", "expert_logps"):
        values[:, COLUMNS.index(name)] = torch.nan
    return values


def assemble(
    request: MixedRequest, completions: list[list[int]], values: list[torch.Tensor], stats: dict[str, float]
) -> MixedRollout:
    """
    Build a rollout.

    Args:
        request ([`MixedRequest`]):
            What was asked for.
        completions (`list[list[int]]`):
            Token ids of each completion.
        values (`list[torch.Tensor]`):
            For each row the `(T, 6)` records of its tokens.
        stats (`dict[str, float]`):
            Counts of the sampling.

    Raises:
        `ValueError`: if a model's logits were NaN.
    """
    longest = max(map(len, completions), default=0)
    stacked = torch.full((len(completions), longest, len(COLUMNS)), torch.nan)
    for row, (ids, numbers) in enumerate(zip(completions, values)):
        if numbers[:, 1:3].isnan().any():
            raise ValueError(
                f"The policy's logits are NaN in row {row}. Its weights are broken or its data type overflows: check "
                "the checkpoint, lower the learning rate, or serve it in bfloat16 or float32."
            )
        if numbers[:, 3][numbers[:, 4] == 1.0].isnan().any():
            raise ValueError(f"The expert's logits are NaN in row {row}. Check its checkpoint, or its data type.")
        stacked[row, : len(ids)] = numbers
    records = dict(zip(COLUMNS, stacked.unbind(-1)))
    for name in BOOL_RECORDS:
        records[name] = records[name] == 1.0
    records["mixed_logps"] = mixture_logps(records["logps"], records["expert_logps"], records["weights"])
    counts = {"tokens": sum(map(len, completions)), "replaced": int(records["replaced"].sum())}
    return MixedRollout(completions, **{name: records[name] for name in RECORDS}, stats={**counts, **stats})
