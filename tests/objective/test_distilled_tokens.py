"""What an expert's log-probabilities make of the policy's tokens, by hand and by enumeration."""

import math

import pytest
import torch

from mentor_trl.objective import distillation_advantages, preference_weights, reverse_kl, score_gap


NAN, INF = math.nan, math.inf


def test_advantages_are_log_ratios_where_they_count():
    logs = torch.tensor([[math.log(0.6), -INF, -INF, NAN], [math.log(0.1), NAN, 0.0, NAN]])
    logp = torch.tensor(
        [[math.log(0.2), math.log(0.5), NAN, NAN], [math.log(0.4), 0.0, -50.0, -INF]], requires_grad=True
    )
    where = torch.tensor([[True, True, False, False], [True, False, True, False]])
    found = distillation_advantages(logs, logp, where)
    assert found.tolist() == [
        pytest.approx([math.log(3), -20.0, 0.0, 0.0]),
        pytest.approx([math.log(0.25), 0.0, 20.0, 0.0]),
    ]
    assert not found.requires_grad


def test_weights_have_the_geometric_mean_1_in_each_row():
    logs = torch.tensor([[0.9, 0.02, 0.3, 0.0], [0.4, 0.1, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]).log()
    logp = torch.tensor([[0.1, 0.2, 0.2, 0.5], [0.2, 0.1, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]]).log()
    logs[1, 2:] = logp[1, 3:] = NAN
    where = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    found = preference_weights(logs, logp, where, clip=3.0)
    clipped = [3.0, 1 / 3, 1.5, 1 / 3]  # the last is of a token that the expert never writes
    mean = (3.0 / 3 * 1.5 / 3) ** 0.25
    assert found[0].tolist() == pytest.approx([ratio / mean for ratio in clipped])
    assert found[1].tolist() == pytest.approx([math.sqrt(2.0), 1 / math.sqrt(2.0), 1.0, 1.0])
    assert found[2].tolist() == [1.0] * 4
    assert preference_weights(logs, logp, where, clip=1.0).tolist() == [pytest.approx([1.0] * 4)] * 3


def logits(seed: int, rows: int = 3, size: int = 9) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2.0)


def gradient(logits: torch.Tensor, function) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits.log_softmax(-1)).sum(), logits)[0]


@pytest.mark.parametrize("top_k", [0, 1, 4, 9])
def test_the_divergence_and_its_gradient_are_those_of_the_sum(top_k):
    logs = logits(1).log_softmax(-1)

    def by_hand(logp):
        p, s = logp.exp(), logs.exp()
        if 0 < top_k < 9:
            first = p.argsort(descending=True)[:, :top_k]
            p, s = (torch.cat([q.gather(1, first), 1 - q.gather(1, first).sum(1, keepdim=True)], 1) for q in (p, s))
        return (p * (p.log() - s.log())).sum(-1)

    logp = logits(0).log_softmax(-1)
    torch.testing.assert_close(reverse_kl(logp, logs, top_k), by_hand(logp))
    found, expected = (gradient(logits(0), f) for f in (lambda logp: reverse_kl(logp, logs, top_k), by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert (reverse_kl(logs, logs, top_k).abs() < 1e-9).all()


def test_drawn_tokens_have_the_gradient_of_the_divergence_in_expectation():
    """Also where the expert never writes a token, as the log ratio has the same bound."""
    logs = logits(1).log_softmax(-1)
    logs[0, 2] = logs[1, 5] = -INF

    def expectation(logp):
        where = torch.ones(logp.shape, dtype=torch.bool)
        return -(logp.detach().exp() * distillation_advantages(logs, logp, where).double() * logp).sum(-1)

    found = gradient(logits(0), expectation)
    assert found.isfinite().all() and found.norm() > 0.1
    torch.testing.assert_close(gradient(logits(0), lambda logp: reverse_kl(logp, logs)), found, rtol=1e-5, atol=1e-6)


def test_tokens_that_neither_writes_do_not_count():
    both = torch.tensor([[0.5, 0.5, 0.0]]).log().requires_grad_()
    value = reverse_kl(both, torch.tensor([[0.25, 0.75, 0.0]]).log())
    assert value.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@pytest.mark.parametrize(
    ("student", "teacher", "gap"),
    [(0.3, 0.9, 2 / 3), (0.9, 0.9, 0.0), (1.0, 0.9, 0.0), (0.0, 0.0, 1.0), (0.2, -1.0, 1.0)],
)
def test_the_gap_closes_at_parity(student, teacher, gap):
    assert score_gap(student, teacher) == pytest.approx(gap)
