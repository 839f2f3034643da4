"""A round over drafts as pure tensors, without an engine."""

import pytest
import torch

from mentor_trl.objective import branch_weight, entropy_from_logps
from mentor_trl.vllm_plugin.mixing import RowTensors, exponential_race, policy_probs, sample_round
from statistics_helpers import misfit


V, B, K = 5, 40_000, 2


def options(gamma: float, rule: str = "entropy", share: float = 0.0, score: bool = True) -> RowTensors:
    every = torch.ones(B, dtype=torch.bool)
    return RowTensors(torch.full((B,), gamma), torch.full((B,), share), every & score, {rule: every})


def run(policy: torch.Tensor, expert: torch.Tensor, rows: RowTensors):
    """B rows of K drafts, whose distributions differ from step to step."""
    torch.manual_seed(0)
    row, step = torch.arange(B).repeat_interleave(K), torch.arange(K).repeat(B)
    probs = policy_probs(policy[step], torch.ones(B * K), V)
    drafts, index, temperature = exponential_race(probs), torch.arange(B * K), torch.ones(B * K)
    return sample_round(drafts, probs, expert[step], index, row, step, temperature, rows, (B, K + 1))


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    # the expert has two ids more, which no one may sample
    return 1.5 * torch.randn(K, V, generator=generator), 1.5 * torch.randn(K, V + 2, generator=generator)


@pytest.mark.parametrize(
    ("gamma", "rule", "share"), [(2.0, "entropy", 0.0), (1.0, "random", 0.3), (1.0, "always", 0.0)]
)
def test_rounds_are_exact(gamma, rule, share, logits):
    policy, expert = logits
    found = run(policy, expert, options(gamma, rule, share))
    p, s = policy.double().softmax(-1), expert[:, :V].double().softmax(-1)
    w = branch_weight(entropy_from_logps(p.log()), gamma, rule, share)
    m = (1 - w[:, None]) * p + w[:, None] * s
    labels = [(y, bool(z), bool(r)) for y, (z, r) in zip(found.tokens[:, 0].tolist(), found.values[:, 0, 4:].tolist())]
    outcomes = {(y, False, False): ((1 - w[0]) * p[0, y]).item() for y in range(V)}
    outcomes |= {(y, True, False): (w[0] * torch.minimum(p[0, y], s[0, y])).item() for y in range(V)}
    outcomes |= {(y, True, True): (w[0] * (s[0, y] - p[0, y]).clamp(min=0)).item() for y in range(V)}
    assert misfit([(labels, outcomes)]) <= 1.0
    second = found.tokens[:, 1]
    kept = second[second >= 0].tolist()
    assert misfit([(kept, dict(enumerate(m[1].tolist())))]) <= 1.0
    # a row ends behind its first replacement, and no token follows the last draft
    assert torch.equal(second < 0, found.values[:, 0, 5] == 1.0)
    assert (found.tokens[:, K] == -1).all()


def test_rows_of_the_plain_policy_do_not_read_the_expert(logits):
    found = run(logits[0], torch.full((K, V), torch.nan), options(float("inf")))
    assert (found.tokens[:, :K] >= 0).all() and found.values[:, :K, 3].isnan().all()
    assert (found.values[:, :K, 4:] == 0.0).all()


def test_equal_models_never_replace(logits):
    found = run(logits[0], logits[0], options(1e-6))
    assert (found.values[:, :K, 4] == 1.0).all() and (found.values[:, :K, 5] == 0.0).all()
