import math

import pytest
import torch

from mentor_trl.objective import (
    acceptance_probability,
    branch_weight,
    couple,
    draw_coin,
    entropy_from_logps,
    match_vocabulary,
    mixture_logps,
    residual,
)
from statistics_helpers import misfit


INF = math.inf
P = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
S = torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def check(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype))


def test_entropy_of_known_distributions():
    check(entropy_from_logps(torch.tensor([0.25] * 4).log()), math.log(4))
    check(entropy_from_logps(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()), [math.log(2), 0.0])
    check(entropy_from_logps(P.log()), -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)))


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("entropy", [0.0, 0.25, 1.0, 1.0]),
        ("threshold", [0.0, 0.0, 1.0, 1.0]),
        ("random", [0.3, 0.3, 0.3, 0.3]),
        ("always", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_branch_weight(rule, expected):
    entropy = torch.tensor([0.0, 0.5, 2.0, 7.0])
    check(branch_weight(entropy, 2.0, rule, share=0.3), expected)
    # gamma = inf is the plain policy, under every rule and row by row
    check(branch_weight(entropy, INF, rule, share=0.3), [0.0] * 4)
    gamma = torch.tensor([2.0, INF, 2.0, INF])
    check(branch_weight(entropy, gamma, rule, share=0.3), [expected[0], 0.0, expected[2], 0.0])


def test_branch_weight_refuses_unknown_rule():
    with pytest.raises(ValueError, match="'entropy', 'threshold', 'random', 'sentence', 'always'"):
        branch_weight(torch.ones(1), 1.0, "sometimes")


def test_match_vocabulary():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    check(match_vocabulary(logits, 4), [[1.0, 2.0, 3.0, 4.0]])
    check(match_vocabulary(logits, 6), [[1.0, 2.0, 3.0, 4.0, -INF, -INF]])
    check(match_vocabulary(logits, 3), [[1.0, 2.0, 3.0]])
    check(match_vocabulary(logits, 6, num_tokens=3), [[1.0, 2.0, 3.0, -INF, -INF, -INF]])
    check(match_vocabulary(logits, 3, num_tokens=2), [[1.0, 2.0, -INF]])
    check(match_vocabulary(logits, 5, num_tokens=5), [[1.0, 2.0, 3.0, 4.0, -INF]])


def test_coin_respects_the_ends_and_the_weight():
    assert not draw_coin(torch.zeros(100_000), generator()).any()
    assert draw_coin(torch.ones(100_000), generator()).all()
    coins = draw_coin(torch.full((100_000,), 0.3), generator())
    # five standard deviations of a mean of 100,000 coins
    assert abs(coins.double().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 100_000)
    assert torch.equal(coins, draw_coin(torch.full((100_000,), 0.3), generator()))


def test_mixture_by_hand():
    check(mixture_logps(P.log(), S.log(), torch.full_like(P, 0.5)).exp(), [0.3, 0.3, 0.3, 0.1])
    check(mixture_logps(P.log(), S.log(), torch.full_like(P, 0.25)).exp(), [0.4, 0.3, 0.25, 0.05])


def test_residual_and_acceptance_by_hand():
    check(residual(P, S), [0.0, 0.0, 0.2, 0.2])
    check(acceptance_probability(P[:3].log(), S[:3].log()), [0.2, 1.0, 1.0])
    assert acceptance_probability(torch.tensor(0.0), torch.tensor(-INF)) == 0.0


@pytest.mark.parametrize("w", [0.0, 0.02, 0.5, 0.97, 1.0])
def test_identities(w):
    """The coin and the coupling are the paper's acceptance and residual (Eq. 8)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        p, s = torch.randn(2, 50, 9, dtype=torch.float64).mul(2).softmax(-1)
    m = (1 - w) * p + w * s
    weight = torch.full_like(p, w)
    torch.testing.assert_close(mixture_logps(p.log(), s.log(), weight), m.log())
    # acceptance: min(1, m / p) = 1 - w + w min(1, s / p)
    accept = 1 - w + w * acceptance_probability(p.log(), s.log())
    torch.testing.assert_close(accept, (m / p).clamp(max=1.0))
    assert accept.min() >= 1 - w
    # residual: (m - p)+ = w (s - p)+, with the total variation as its mass
    torch.testing.assert_close(w * residual(p, s), (m - p).clamp(min=0.0))
    torch.testing.assert_close(residual(p, s).sum(-1), (p - s).abs().sum(-1) / 2)


def test_zero_probabilities_and_extreme_weights():
    #                       p only  s only  neither  both
    logp = torch.tensor([0.0, -INF, -INF, math.log(0.5)])
    logs = torch.tensor([-INF, 0.0, -INF, math.log(0.25)])
    for w, mixture in [
        (0.0, [0.0, -INF, -INF, math.log(0.5)]),
        (0.5, [math.log(0.5), math.log(0.5), -INF, math.log(0.375)]),
        (1.0, [-INF, 0.0, -INF, math.log(0.25)]),
    ]:
        weight = torch.full((4,), w)
        check(mixture_logps(logp, logs, weight), mixture)


def test_unknown_expert_is_not_read_where_the_weight_is_zero():
    logp, logs = torch.tensor([-0.5, -0.5]), torch.tensor([torch.nan, torch.nan])
    weight = torch.tensor([0.0, 0.5])
    mixed = mixture_logps(logp, logs, weight)
    assert mixed[0] == -0.5 and mixed[1].isnan()


def test_couple_draws_from_the_expert():
    """Tokens follow s, differ from the draft with probability TV = .4, and (draft, token) is the maximal coupling."""
    n = 50_000
    draft = torch.multinomial(P, n, replacement=True, generator=generator(1))
    logps, logs = P.log().expand(n, 4), S.log().expand(n, 4)
    token, replaced = couple(draft, logps, logs, generator(2))
    assert torch.equal(replaced, token != draft)
    joint = {(y, y): min(P[y], S[y]).item() for y in range(4)}
    # only draft 0 is ever given up (p - s = .4), for 2 or 3 with .2 each
    joint |= {(0, 2): 0.2, (0, 3): 0.2}
    assert misfit([(list(zip(draft.tolist(), token.tolist())), joint)]) <= 1.0
    again, _ = couple(draft, logps, logs, generator(2))
    assert torch.equal(token, again)


def test_couple_replaces_what_the_expert_never_says():
    logps, logs = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.0, 0.0, 1.0]]).log()
    draft = torch.tensor([0, 1] * 500)
    token, replaced = couple(draft, logps.expand(1000, 3), logs.expand(1000, 3), generator())
    assert (token == 2).all() and replaced.all()
    assert draft.tolist() == [0, 1] * 500


def test_couple_keeps_the_draft_where_nothing_is_left_to_draw_from():
    n = 20_000
    draft = torch.randint(4, (n,), generator=generator())
    logps = S.log().expand(n, 4)
    token, replaced = couple(draft, logps, logps.clone(), generator())
    assert torch.equal(token, draft) and not replaced.any()
    # s below p everywhere, as rounding can make it: drafts are rejected and (s - p)+ is exactly zero
    token, replaced = couple(draft, logps, logps - 0.01, generator())
    assert torch.equal(token, draft) and not replaced.any()


def test_couple_without_branch_points():
    empty = torch.zeros((0, 4))
    token, replaced = couple(torch.zeros(0, dtype=torch.long), empty, empty)
    assert token.shape == replaced.shape == (0,)
