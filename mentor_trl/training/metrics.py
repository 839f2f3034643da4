"""Metrics by source (on-policy, mixed or trajectory) and of the mixed rollouts. docs/metrics.md lists every name."""

import math
from collections.abc import Callable

import torch
from trl.trainer.utils import nanstd

from ..rollout.types import MixedRollout


PREFIX = "mentor/"
SOURCES = ("on_policy", "mixed")


def row_metrics(
    mixed_N: torch.Tensor,
    rewards_N: torch.Tensor,
    rewards_per_func_N_F: torch.Tensor,
    func_names: list[str],
    advantages_N: torch.Tensor,
    lengths_N: torch.Tensor,
    truncated_N: torch.Tensor,
    sources: tuple[str, str] = SOURCES,
) -> dict[str, float]:
    """
    Means over the rows of each source. A source without rows has no metrics.

    Args:
        mixed_N (`torch.Tensor` of shape `(N,)`, `bool`):
            Whether a row is mixed (or a trajectory); N rows of all processes.
        rewards_N (`torch.Tensor` of shape `(N,)`):
            Rewards, NaN where undefined.
        rewards_per_func_N_F (`torch.Tensor` of shape `(N, F)`):
            Rewards of each function, NaN where undefined.
        func_names (`list[str]`):
            Names of the F functions.
        advantages_N (`torch.Tensor` of shape `(N,)`):
            Advantages before correction.
        lengths_N (`torch.Tensor` of shape `(N,)`):
            Completion lengths in tokens.
        truncated_N (`torch.Tensor` of shape `(N,)`, `bool`):
            Whether a completion ran into the length limit.
        sources (`tuple[str, str]`, *optional*, defaults to `("on_policy", "mixed")`):
            Names of the rows that are not, and that are, in `mixed_N`.

    Returns:
        `dict[str, float]`.
    """
    metrics = {}
    for source, rows in zip(sources, (~mixed_N, mixed_N), strict=True):
        if not rows.any():
            continue
        values = {
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


def share_without_spread(rewards_N: torch.Tensor, mixed_N: torch.Tensor, num_generations: int) -> float:
    """Share of groups whose on-policy rewards are all equal: they give the on-policy rows no advantage."""
    on_policy_G = torch.where(mixed_N, torch.full_like(rewards_N, torch.nan), rewards_N).view(-1, num_generations)
    std_G = nanstd(on_policy_G, dim=1)
    return torch.isclose(std_G, torch.zeros_like(std_G)).float().mean().item()


def guidance_metrics(
    rollout: MixedRollout,
    ratio_B_T: torch.Tensor,
    rho_B_T: torch.Tensor,
    corrected_B_T: torch.Tensor,
    reduce: Callable[[torch.Tensor, str], torch.Tensor],
) -> dict[str, float]:
    """
    What the expert did in the mixed rows of a rollout batch.

    Args:
        rollout ([`MixedRollout`]):
            This process's mixed rows (B of them; none is fine).
        ratio_B_T, rho_B_T (`torch.Tensor` of shape `(B, T)`):
            Importance ratios r, and the weights rho that the correction makes of them.
        corrected_B_T (`torch.Tensor` of shape `(B, T)`, `bool`):
            Tokens that are corrected.
        reduce (`Callable`):
            Reduces a tensor over the processes by `"sum"`, `"min"` or `"max"`.

    Returns:
        `dict[str, float]`, the same on every process.
    """
    mask, stats = rollout.mask, rollout.stats
    ratios, rhos = ratio_B_T[corrected_B_T], rho_B_T[corrected_B_T]
    replaced = rollout.replaced & corrected_B_T
    sums = {
        "tokens": mask.sum(),
        "weight": rollout.weights[mask].sum(),
        "branch": rollout.branch.sum(),
        "replaced": rollout.replaced.sum(),
        "rounds": stats.get("rounds", 0),
        "batch_rounds": stats.get("batch_rounds", 0),
        "expert_rounds": stats.get("expert_rounds", 0),
        "corrected": corrected_B_T.sum(),
        "ratio": ratios.sum(),
        "small": (ratios < 0.1).sum(),
        "rho": rhos.sum(),
        "corrected_replaced": replaced.sum(),
        "ratio_replaced": ratio_B_T[replaced].sum(),
        "rho_replaced": rho_B_T[replaced].sum(),
    }
    total = dict(zip(sums, reduce(torch.tensor([float(v) for v in sums.values()]), "sum").tolist(), strict=True))

    def share(part: str, whole: str) -> float:
        return total[part] / total[whole] if total[whole] else math.nan

    metrics = {
        "weight": share("weight", "tokens"),
        "branch_rate": share("branch", "tokens"),
        "replaced_rate": share("replaced", "tokens"),
        "acceptance": 1.0 - share("replaced", "tokens"),
        "tokens_per_round": share("tokens", "rounds"),
        "expert_calls_avoided": 1.0 - share("expert_rounds", "batch_rounds"),
        "importance_ratio/mean": share("ratio", "corrected"),
        "importance_ratio/below_0.1": share("small", "corrected"),
        "importance_ratio/replaced_mean": share("ratio_replaced", "corrected_replaced"),
        "correction/mean": share("rho", "corrected"),
        "correction/replaced_mean": share("rho_replaced", "corrected_replaced"),
    }
    for kind, default in (("min", math.inf), ("max", -math.inf)):
        extreme = getattr(ratios, kind)().item() if ratios.numel() else default
        extreme = reduce(torch.tensor([extreme]), kind).item()
        metrics[f"importance_ratio/{kind}"] = extreme if math.isfinite(extreme) else math.nan
    return {PREFIX + name: value for name, value in metrics.items()}


def token_sums(values_B_T: dict[str, torch.Tensor], mask_B_T: torch.Tensor, mixed_B: torch.Tensor) -> torch.Tensor:
    """
    Sums over the tokens of each source, to be reduced over the processes and read by [`token_means`].

    Args:
        values_B_T (`dict[str, torch.Tensor]` of shape `(B, T)` each):
            Per-token values.
        mask_B_T (`torch.Tensor` of shape `(B, T)`):
            Tokens that count.
        mixed_B (`torch.Tensor` of shape `(B,)`, `bool`):
            Whether a row is mixed (or a trajectory).

    Returns:
        `torch.Tensor` of shape `(2, 1 + len(values))`: a row a source, its tokens and its sums.
    """
    rows = []
    for selected in (~mixed_B, mixed_B):
        mask = mask_B_T.bool() & selected.unsqueeze(1)
        rows.append(torch.stack([mask.sum().float(), *(values[mask].float().sum() for values in values_B_T.values())]))
    return torch.stack(rows)


def token_means(sums: torch.Tensor, names: list[str], sources: tuple[str, str] = SOURCES) -> dict[str, float]:
    """Means by source from the (reduced) sums of [`token_sums`]."""
    metrics = {}
    for source, (tokens, *values) in zip(sources, sums.tolist(), strict=True):
        if tokens:
            metrics |= {f"{PREFIX}{source}/{name}": v / tokens for name, v in zip(names, values, strict=True)}
    return metrics
