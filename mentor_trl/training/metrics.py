"""Metrics by source and of the mixed rollouts. docs/metrics.md lists every name."""

import math
from collections.abc import Callable

import torch
from trl.trainer.utils import nanstd

from ..objective import baseline_rows
from ..rollout.types import MixedRollout
from .batch import RolloutBatch, Scored
from .processes import Processes


PREFIX = "mentor/"


def row_metrics(
    sources: tuple[str, ...],
    source_N: torch.Tensor,
    rewards_N: torch.Tensor,
    rewards_per_func_N_F: torch.Tensor,
    func_names: list[str],
    advantages_N: torch.Tensor,
    lengths_N: torch.Tensor,
    truncated_N: torch.Tensor,
) -> dict[str, float]:
    """Means over the N rows of all processes by source. A source without rows has no metrics; NaN is undefined."""
    metrics = {}
    for index, source in enumerate(sources):
        rows = source_N == index
        if not rows.any():
            continue
        values = {
            "rows": rows.float().sum(),
            "reward": rewards_N[rows].nanmean(),
            "reward_std": nanstd(rewards_N[rows]),
            "length": lengths_N[rows].float().mean(),
            "truncated": truncated_N[rows].float().mean(),
            "advantage": advantages_N[rows].mean(),
            "advantage_nonzero": (advantages_N[rows] != 0.0).float().mean(),
        }
        for name, column in zip(func_names, rewards_per_func_N_F.unbind(1), strict=True):
            values[f"rewards/{name}"] = column[rows].nanmean()
        metrics |= {f"{PREFIX}{source}/{name}": value.item() for name, value in values.items()}
    return metrics


def batch_metrics(
    batch: RolloutBatch,
    scored: Scored,
    advantages_N: torch.Tensor,
    func_names: list[str],
    end_ids: list[int],
    processes: Processes,
) -> dict[str, float]:
    """[`row_metrics`] of a rollout batch."""
    ids = batch.completion_ids
    lengths_N = processes.gather(torch.tensor([len(row) for row in ids]))
    truncated_N = processes.gather(torch.tensor([row[-1] not in end_ids for row in ids]))
    rewards = scored.rewards_N, batch.rewards_N_F, func_names
    return row_metrics(batch.sources, scored.source_N, *rewards, advantages_N, lengths_N, truncated_N)


def share_without_spread(rewards_N: torch.Tensor, guided_N: torch.Tensor, num_generations: int) -> float:
    """Share of groups whose baseline's rewards, the on-policy ones, are all equal: these rows have no advantage."""
    baseline_N = rewards_N.masked_fill(~baseline_rows(guided_N, num_generations), torch.nan)
    std_G = nanstd(baseline_N.view(-1, num_generations), dim=1)
    return torch.isclose(std_G, torch.zeros_like(std_G)).float().mean().item()


def guidance_metrics(
    rollout: MixedRollout,
    ratio_B_T: torch.Tensor,
    rho_B_T: torch.Tensor,
    corrected_B_T: torch.Tensor,
    reduce: Callable[[torch.Tensor, str], torch.Tensor],
) -> dict[str, float]:
    """
    What the expert did in the mixed rows of a rollout batch. What needs a record that the engine does not have is left
    out.
    """
    mask, stats = rollout.mask, rollout.stats
    ratios, rhos = ratio_B_T[corrected_B_T], rho_B_T[corrected_B_T]
    sums = {
        "tokens": mask.sum(),
        "branch": rollout.branch.sum(),
        "corrected": corrected_B_T.sum(),
        "ratio": ratios.sum(),
        "small": (ratios < 0.1).sum(),
        "rho": rhos.sum(),
    }
    shares = {
        "branch_rate": ("branch", "tokens"),
        "importance_ratio/mean": ("ratio", "corrected"),
        "importance_ratio/below_0.1": ("small", "corrected"),
        "correction/mean": ("rho", "corrected"),
    }
    if rollout.weights is not None:
        sums["weight"] = rollout.weights[mask].sum()
        shares["weight"] = ("weight", "tokens")
    if "rounds" in stats:
        sums["rounds"] = stats["rounds"]
        shares["tokens_per_round"] = ("tokens", "rounds")
    if rollout.replaced is not None:
        replaced = rollout.replaced & corrected_B_T
        sums |= {
            "replaced": rollout.replaced.sum(),
            "corrected_replaced": replaced.sum(),
            "ratio_replaced": ratio_B_T[replaced].sum(),
            "rho_replaced": rho_B_T[replaced].sum(),
            **{name: stats.get(name, 0) for name in ("batch_rounds", "expert_rounds")},
        }
        shares |= {
            "replaced_rate": ("replaced", "tokens"),
            "importance_ratio/replaced_mean": ("ratio_replaced", "corrected_replaced"),
            "correction/replaced_mean": ("rho_replaced", "corrected_replaced"),
        }
    total = dict(zip(sums, reduce(torch.tensor([float(v) for v in sums.values()]), "sum").tolist(), strict=True))

    def share(part: str, whole: str) -> float:
        return total[part] / total[whole] if total[whole] else math.nan

    metrics = {name: share(*parts) for name, parts in shares.items()}
    if rollout.replaced is not None:
        metrics["acceptance"] = 1.0 - metrics["replaced_rate"]
        metrics["expert_calls_avoided"] = 1.0 - share("expert_rounds", "batch_rounds")
    for kind, default in (("min", math.inf), ("max", -math.inf)):
        extreme = getattr(ratios, kind)().item() if ratios.numel() else default
        extreme = reduce(torch.tensor([extreme]), kind).item()
        metrics[f"importance_ratio/{kind}"] = extreme if math.isfinite(extreme) else math.nan
    return {PREFIX + name: value for name, value in metrics.items()}


def speed_metric(source: str, stats: dict[str, float], processes: Processes) -> dict[str, float]:
    """Tokens a second that a process samples of a source; empty where no process has any."""
    values = torch.tensor([stats["tokens"], stats["seconds"]], dtype=torch.float32)
    tokens, seconds = processes.reduce(values, "sum")
    if not tokens > 0:
        return {}
    return {f"{PREFIX}{source}/tokens_per_second": (tokens / (seconds / processes.count)).item()}


def token_metrics(
    sources: tuple[str, ...],
    source_B: torch.Tensor,
    values_B_T: dict[str, torch.Tensor],
    mask_B_T: torch.Tensor,
    reduce: Callable[[torch.Tensor, str], torch.Tensor],
) -> dict[str, float]:
    """Means of per-token values over the tokens of each source. A source without tokens has no metrics."""
    rows = []
    for index in range(len(sources)):
        mask = mask_B_T.bool() & (source_B == index).unsqueeze(1)
        rows.append(torch.stack([mask.sum().float(), *(values[mask].float().sum() for values in values_B_T.values())]))
    metrics = {}
    for source, (tokens, *sums) in zip(sources, reduce(torch.stack(rows), "sum").tolist(), strict=True):
        if tokens:
            metrics |= {f"{PREFIX}{source}/{name}": total / tokens for name, total in zip(values_B_T, sums)}
    return metrics
