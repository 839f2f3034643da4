r"""
The mixed policy m = (1 - w) p + w s of a policy p and an expert s over one vocabulary (Eq. 6-8 of
[MENTOR](https://huggingface.co/papers/2510.04140)), sampled as a coin and a coupling.

Drawing y ~ m is: draft y ~ p and flip a coin z ~ Bernoulli(w). With z = 0 the draft stands. With z = 1 (a *branch
point*) the draft is coupled maximally with s: it stands with probability min(1, s(y) / p(y)) and is else replaced by a
draw from (s - p)+. The committed token is then an exact sample of s at branch points, and of m overall. The residual
(s - p)+ does not depend on w.

Shapes: `...` is any batch shape and `V` the vocabulary. Probabilities are natural logarithms (nats) in float32 or
float64; -inf is a probability of exactly 0.
"""

from collections.abc import Callable

import torch


def match_vocabulary(logits: torch.Tensor, size: int, num_tokens: int | None = None) -> torch.Tensor:
    """
    Bring an expert's logits `(..., V_expert)` to the policy's vocabulary size, where the embeddings are padded
    differently; -inf where the expert has no token. Rows from `num_tokens` on, the number of ids that the tokenizer
    defines, are padding, which the expert never emits.

    Example:
    ```python
    >>> match_vocabulary(torch.zeros(4), 5, num_tokens=3)
    tensor([0., 0., 0., -inf, -inf])
    ```
    """
    keep = min(logits.size(-1), size, num_tokens or size)
    return torch.nn.functional.pad(logits[..., :keep], (0, size - keep), value=float("-inf"))


def entropy_from_logps(logps: torch.Tensor) -> torch.Tensor:
    """Entropy H = -sum p log p in nats, `(...)`, of normalized log-probabilities `(..., V)`; -inf is allowed."""
    return torch.special.entr(logps.exp()).sum(dim=-1)


BRANCH_RULES: dict[str, Callable[..., torch.Tensor]] = {
    "entropy": lambda entropy, gamma, share, near: (entropy / gamma).clamp(0.0, 1.0),
    "threshold": lambda entropy, gamma, share, near: (entropy >= gamma).to(entropy.dtype),
    "random": lambda entropy, gamma, share, near: share,
    "sentence": lambda entropy, gamma, share, near: torch.where(near, share, torch.zeros_like(share)),
    "always": lambda entropy, gamma, share, near: torch.ones_like(entropy),
}
"""
Weight w of the expert from the policy's entropy H, the threshold gamma (nats), a share, and whether a sentence begins.
"""


def branch_weight(
    entropy: torch.Tensor,
    gamma: torch.Tensor | float,
    rule: str = "entropy",
    share: torch.Tensor | float = 0.0,
    near: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Weight w of the expert at a token (Eq. 7). `gamma = inf` is the plain policy (w = 0) under every rule.

    Args:
        entropy (`torch.Tensor` of shape `(...)`):
            Policy entropy H in nats.
        gamma (`torch.Tensor` broadcastable to `(...)`, or `float`):
            Entropy threshold in nats, positive.
        rule (`str`, *optional*, defaults to `"entropy"`):
            `"entropy"`: min(1, H / gamma). `"threshold"`: 1 where H >= gamma, else 0. `"random"`: `share`, whatever
            H is. `"sentence"`: `share` at the first tokens of a sentence, else 0. `"always"`: 1.
        share (`torch.Tensor` or `float`, *optional*, defaults to `0.0`):
            Weight of the rules `"random"` and `"sentence"`.
        near (`torch.Tensor` of shape `(...)`, `bool`, *optional*):
            Which tokens are the first of a sentence, see
            [`~mentor_trl.objective.near_sentence_end`]; only the rule `"sentence"` reads it.

    Returns:
        `torch.Tensor` of shape `(...)` with values in [0, 1].

    Raises:
        `ValueError`: if there is no such rule.

    Example:
    ```python
    >>> branch_weight(torch.tensor([0.0, 0.5, 2.0]), 1.0)
    tensor([0.0000, 0.5000, 1.0000])
    ```
    """
    if rule not in BRANCH_RULES:
        raise ValueError(f"Unknown branch rule {rule!r}; choose one of {', '.join(map(repr, BRANCH_RULES))}.")
    gamma = torch.as_tensor(gamma, dtype=entropy.dtype, device=entropy.device).expand_as(entropy)
    share = torch.as_tensor(share, dtype=entropy.dtype, device=entropy.device).expand_as(entropy)
    weight = BRANCH_RULES[rule](entropy, gamma, share, near)
    return torch.where(gamma.isinf(), torch.zeros_like(weight), weight)


def draw_coin(weight: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw z ~ Bernoulli(w), `(...)` `bool`. A weight of 0 never branches and a weight of 1 always does."""
    return torch.rand(weight.shape, generator=generator, device=weight.device) < weight


def acceptance_probability(logp: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """
    Probability min(1, s(y) / p(y)) that a draft y ~ p stands at a branch point, from log p(y) (finite, as y was drawn
    from p) and log s(y) (may be -inf), `(...)` each.
    """
    return (logs - logp).clamp(max=0.0).exp()


def residual(probs: torch.Tensor, expert_probs: torch.Tensor) -> torch.Tensor:
    """
    Unnormalized residual (s - p)+ `(..., V)` of probabilities, from which a rejected draft is replaced. Its mass is
    the total variation of p, s.
    """
    return (expert_probs - probs).clamp(min=0.0)


def couple(
    draft: torch.Tensor, logps: torch.Tensor, logs: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Maximal coupling at branch points: given drafts y ~ p `(N,)` and the log-probabilities of policy and expert
    `(N, V)`, return tokens distributed exactly as s that differ from the drafts as rarely as possible, `(N,)`, and
    whether each one replaced its draft, `(N,)` `bool`.
    """
    index = draft.unsqueeze(-1)
    accept = acceptance_probability(logps.gather(-1, index), logs.gather(-1, index)).squeeze(-1)
    uniform = torch.rand(accept.shape, generator=generator, device=accept.device, dtype=accept.dtype)
    rejected = (uniform >= accept).nonzero().squeeze(-1)
    tokens, replaced = draft.clone(), torch.zeros_like(draft, dtype=torch.bool)
    if rejected.numel() == 0:
        return tokens, replaced
    mass = residual(logps[rejected].exp(), logs[rejected].exp())
    # p = s up to rounding leaves nothing to draw from: the draft already is a sample of s
    some = mass.sum(dim=-1) > 0.0
    rejected, mass = rejected[some], mass[some]
    if rejected.numel():
        tokens[rejected] = torch.multinomial(mass, 1, generator=generator).squeeze(-1)
        replaced[rejected] = True
    return tokens, replaced


def mixture_logps(logp: torch.Tensor, logs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    log m(y) = log((1 - w) p(y) + w s(y)), `(...)`, from log p(y), log s(y) and w in [0, 1]. log s is not read where
    w = 0, where it may be NaN.
    """
    mixed = torch.logaddexp(torch.log1p(-weight) + logp, weight.log() + logs)
    return torch.where(weight == 0.0, logp, torch.where(weight == 1.0, logs, mixed))
