"""
One round of the mixed policy over the drafts of a batch, in plain tensor operations.

N drafts of B rows, request-major; V token ids that both models know. Only at branch points is the expert's
distribution computed, and only for rows that lose a draft the residual.
"""

from dataclasses import dataclass

import torch

from ..objective import acceptance_probability, branch_weight, draw_coin, residual


@dataclass
class Round:
    """What a round commits; S is the longest draft."""

    tokens: torch.Tensor  # `(B, S)`, -1 behind the last one of a row
    values: torch.Tensor  # `(B, S, 6)`: H, w, log p, log s (NaN where the expert was not asked), coin and replaced


@dataclass
class RowTensors:
    """Options of the B rows as tensors, and the branch rules that occur."""

    gamma: torch.Tensor  # `(B,)`: entropy thresholds
    share: torch.Tensor  # `(B,)`: weights of the rules `"random"` and `"sentence"`
    score: torch.Tensor  # `(B,)`, `bool`: rows whose log s is wanted at every token with w > 0
    rules: dict[str, torch.Tensor]  # for each rule, the `(B,)` `bool` mask of its rows


def exponential_race(weights: torch.Tensor) -> torch.Tensor:
    """Draw an index in proportion to each row of `weights (..., V)`, without a synchronisation of the device."""
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=-1)


def policy_probs(logits: torch.Tensor, temperature: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The policy's distribution `(N, V)`, in float32, over the ids that both models know."""
    return (logits[:, :num_tokens].float() / temperature.unsqueeze(-1)).softmax(dim=-1)


def row_weights(
    entropy: torch.Tensor, row: torch.Tensor, options: RowTensors, near: torch.Tensor | None = None
) -> torch.Tensor:
    """Weight w `(N,)` of each draft under its row's rule, from the policy's entropies and the places `(N,)`."""
    gamma, share = options.gamma[row], options.share[row]
    weight = torch.zeros_like(entropy)
    for rule, mask in options.rules.items():
        weight = torch.where(mask[row], branch_weight(entropy, gamma, rule, share, near), weight)
    return weight


def sample_round(
    drafts: torch.Tensor,
    probs: torch.Tensor,
    expert_logits: torch.Tensor,
    logit_index: torch.Tensor,
    row: torch.Tensor,
    step: torch.Tensor,
    temperature: torch.Tensor,
    options: RowTensors,
    shape: tuple[int, int],
    near: torch.Tensor | None = None,
) -> Round:
    """
    Flip the coins, couple the drafts at branch points with the expert, and cut each row behind its first replacement.

    `drafts (N,)` were drawn from `probs (N, V)`. They stand at position `step (N,)` of `row (N,)`, have `temperature
    (N,)`, and the expert's logits for them are those at `logit_index (N,)` of `expert_logits (L, V_expert)`; `shape`
    is `(B, S)`, and `near (N,)` says, for the rule `"sentence"`, which are the first of a sentence.
    """
    V = probs.size(-1)
    drafts = drafts.long()
    entropy = torch.special.entr(probs).sum(dim=-1)
    weight = row_weights(entropy, row, options, near)
    coin = draw_coin(weight)
    logp = probs.gather(1, drafts.unsqueeze(1)).squeeze(1).log()
    logs = torch.full_like(logp, torch.nan)
    tokens, replaced = drafts.clone(), torch.zeros_like(coin)

    asked = (coin | (options.score[row] & (weight > 0.0))).nonzero().squeeze(1)
    if asked.numel():
        expert = (expert_logits[logit_index[asked], :V].float() / temperature[asked].unsqueeze(1)).log_softmax(-1)
        logs[asked] = expert.gather(1, drafts[asked].unsqueeze(1)).squeeze(1)
        accept = acceptance_probability(logp[asked], logs[asked])
        lost = coin[asked] & (torch.rand_like(accept) >= accept)
        first = _first_of_each_row(lost.nonzero().squeeze(1), asked, row)
        mass = residual(probs[asked[first]], expert[first].exp())
        # p = s up to rounding leaves nothing to draw from: the draft already is a sample of s
        some = mass.sum(-1) > 0.0
        first, mass = first[some], mass[some]
        at, new = asked[first], exponential_race(mass)
        tokens[at], replaced[at] = new, True
        logs[at] = expert[first].gather(1, new.unsqueeze(1)).squeeze(1)
        logp[at] = probs[at].gather(1, new.unsqueeze(1)).squeeze(1).log()

    values = torch.stack([entropy, weight, logp, logs, coin.float(), replaced.float()], dim=-1)
    return _cut(tokens, values, replaced, row, step, shape)


def _first_of_each_row(lost: torch.Tensor, asked: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Of the lost drafts (positions in `asked`, ascending), those that come first in their row."""
    if lost.numel() == 0:
        return lost
    owner = row[asked[lost]]
    first = torch.ones_like(owner, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    return lost[first]


def _cut(tokens, values, replaced, row, step, shape: tuple[int, int]) -> Round:
    """Lay N drafts out as `(B, S)` and drop what lies behind a replaced one."""
    dense = torch.full(shape, -1, dtype=torch.long, device=tokens.device)
    lost = torch.zeros(shape, dtype=torch.long, device=tokens.device)
    laid = torch.full((*shape, values.size(-1)), torch.nan, device=tokens.device)
    dense[row, step], lost[row, step], laid[row, step] = tokens, replaced.long(), values
    behind = lost.cumsum(1) - lost > 0
    return Round(dense.masked_fill(behind, -1), laid)
