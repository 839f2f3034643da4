"""
Exact distributions of tiny models by enumeration, and tests of samples against them.

An engine is a callable `sample(policy, expert, request) -> MixedRollout`. To put another engine through the same
statistics, add it to `ENGINES`.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from itertools import product

import torch
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM

from mentor_trl.rollout import LocalSampler, MixedRequest, MixedRollout


# Chance that a correct sampler fails one test. Seeds are fixed, so a test that passes once always does.
SIGNIFICANCE = 1e-6

Engine = Callable[..., MixedRollout]


def sample_local(policy, expert, request: MixedRequest, **options) -> MixedRollout:
    options = {"rollout_batch_size": 8192, **options}
    with LocalSampler(expert, **options).session(policy) as session:
        return session.sample(request)


ENGINES: dict[str, Engine] = {
    "local-draft-1": partial(sample_local, draft_length=1),
    "local-draft-2": partial(sample_local, draft_length=2),
    "local-draft-4-refill": partial(sample_local, draft_length=4, rollout_batch_size=500),
    "local-draft-8": partial(sample_local, draft_length=8),
    "local-adaptive-refill": partial(sample_local, draft_length=8, adaptive_draft_length=True, rollout_batch_size=500),
}


def make_peaked_model(seed: int, vocab_size: int = 4, spread: float = 0.4, **config) -> LlamaForCausalLM:
    """A tiny Llama whose next-token distributions are far from uniform, and far from those of another seed."""
    settings = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": spread,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **settings)).eval()


@torch.no_grad()
def forward_logps(model, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The model's own `(B, T, V)` log-probabilities in float64, without any cache."""
    logits = model(input_ids=ids, use_cache=False).logits
    return (logits.double() / temperature).log_softmax(-1)


def expert_weight(entropy: float, gamma: float, rule: str, share: float, near: bool = False) -> float:
    if gamma == math.inf:
        return 0.0
    return {
        "entropy": min(1.0, entropy / gamma),
        "threshold": float(entropy >= gamma),
        "random": share,
        "sentence": share * near,
        "always": 1.0,
    }[rule]


class Tree:
    """
    Next-token distributions p and s and weight w after every prefix of one row of a request, up to `length` tokens.
    """

    def __init__(self, policy, expert, request: MixedRequest, row: int = 0, length: int | None = None):
        self.length = length or request.max_new_tokens
        self.stop = set(request.stop_token_ids)
        prompt = request.prompt_ids[row]
        tokens = [token for token in range(policy.config.vocab_size) if token not in self.stop]
        paths = list(product(tokens, repeat=self.length - 1))
        ids = torch.tensor([[*prompt, *path] for path in paths])
        p = forward_logps(policy, ids, request.temperature).exp()[:, len(prompt) - 1 :]
        s = forward_logps(expert, ids, request.temperature).exp()[:, len(prompt) - 1 :]
        entropy = torch.special.entr(p).sum(-1)
        self.p, self.s, self.w, self.entropy = {}, {}, {}, {}
        for i, path in enumerate(paths):
            for t in range(self.length):
                if path[:t] in self.p:
                    continue
                self.p[path[:t]], self.s[path[:t]] = p[i, t].tolist(), s[i, t].tolist()
                self.entropy[path[:t]] = entropy[i, t].item()
                near = not set(request.sentence_ids).isdisjoint([*prompt, *path[:t]][-request.span :])
                self.w[path[:t]] = expert_weight(
                    entropy[i, t].item(), request.gamma[row], request.branch_rule, request.share, near
                )

    def m(self, prefix: tuple[int, ...]) -> list[float]:
        w = self.w[prefix]
        return [(1 - w) * p + w * s for p, s in zip(self.p[prefix], self.s[prefix])]

    def total_variation(self, prefix: tuple[int, ...] = ()) -> float:
        return sum(max(s - p, 0.0) for p, s in zip(self.p[prefix], self.s[prefix]))

    def outcomes(self, prefix: tuple[int, ...]) -> list[tuple[tuple[int, bool, bool], float]]:
        """(token, branch, replaced) and its probability, from the coin and the coupling themselves."""
        found = []
        for y, (p, s) in enumerate(zip(self.p[prefix], self.s[prefix])):
            w = self.w[prefix]
            found.append(((y, False, False), (1 - w) * p))
            found.append(((y, True, False), w * min(p, s)))
            found.append(((y, True, True), w * max(s - p, 0.0)))
        return found

    def joint(self, step: Callable[[tuple[int, ...]], Iterable[tuple[Hashable, float]]]) -> dict[tuple, float]:
        """Joint distribution of whole rows, from `step(prefix)`: labels (of which a tuple begins with the token)."""
        done, pending = {}, [((), (), 1.0)]
        while pending:
            prefix, labels, chance = pending.pop()
            for label, share in step(prefix):
                token = label[0] if isinstance(label, tuple) else label
                entry = (*prefix, token), (*labels, label), chance * share
                if len(entry[0]) == self.length or token in self.stop:
                    done[entry[1]] = entry[2]
                elif entry[2] > 0.0:
                    pending.append(entry)
        return done

    def mixed(self) -> dict[tuple, float]:
        return self.joint(lambda prefix: enumerate(self.m(prefix)))

    def policy(self) -> dict[tuple, float]:
        return self.joint(lambda prefix: enumerate(self.p[prefix]))

    def expert(self) -> dict[tuple, float]:
        return self.joint(lambda prefix: enumerate(self.s[prefix]))


def project(distribution: dict[tuple, float], function: Callable[[tuple], Hashable]) -> dict[Hashable, float]:
    """Distribution of a function of the outcome."""
    projected: dict[Hashable, float] = {}
    for outcome, chance in distribution.items():
        key = function(outcome)
        projected[key] = projected.get(key, 0.0) + chance
    return projected


def chi_square(samples: list[Hashable], distribution: dict[Hashable, float]) -> tuple[float, int]:
    """
    Pearson's statistic and its degrees of freedom. Cells with an expectation below 5 are pooled; an outcome that
    cannot happen makes the statistic infinite.
    """
    assert abs(sum(distribution.values()) - 1.0) < 1e-6
    observed, total = Counter(samples), len(samples)
    if any(distribution.get(outcome, 0.0) <= 0.0 for outcome in observed):
        return math.inf, max(len(distribution) - 1, 1)
    cells = sorted((total * chance, observed[outcome]) for outcome, chance in distribution.items() if chance > 0.0)
    pooled_expected, pooled_observed, kept = 0.0, 0, []
    for expected, count in cells:
        if expected < 5.0 or 0.0 < pooled_expected < 5.0:
            pooled_expected, pooled_observed = pooled_expected + expected, pooled_observed + count
        else:
            kept.append((expected, count))
    if pooled_expected > 0.0:
        kept.append((pooled_expected, pooled_observed))
    return sum((count - expected) ** 2 / expected for expected, count in kept), len(kept) - 1


def misfit(groups: Iterable[tuple[list[Hashable], dict[Hashable, float]]]) -> float:
    """
    Summed chi-square of independent groups of samples over the largest value that chance allows: 1 or less where the
    samples may come from the distributions.
    """
    statistic, freedom = 0.0, 0
    for samples, distribution in groups:
        value, degrees = chi_square(samples, distribution)
        statistic, freedom = statistic + value, freedom + degrees
    if freedom == 0:
        return statistic
    return statistic / chi2.isf(SIGNIFICANCE, freedom)


def sequences(rollout: MixedRollout) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in rollout.completion_ids]


def labelled(rollout: MixedRollout) -> list[tuple[tuple[int, bool, bool], ...]]:
    """Rows as (token, branch, replaced)."""
    return [
        tuple((y, z, r) for y, z, r in zip(ids, branch, replaced))
        for ids, branch, replaced in zip(
            rollout.completion_ids, rollout.branch.tolist(), rollout.replaced.tolist(), strict=True
        )
    ]
