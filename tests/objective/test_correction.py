import math

import pytest
import torch

from mentor_trl.objective import correction_weights, fold_correction, mixture_logps


INF, NAN = math.inf, math.nan


def weights(ratios, **options):
    log_ratio = torch.tensor([ratios], dtype=torch.float64).log()
    return correction_weights(log_ratio, torch.ones_like(log_ratio, dtype=torch.bool), **options)[0]


def check(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), rtol=1e-6, atol=1e-7)


RATIOS = [0.0625, 0.25, 1.0, 4.0, 16.0]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.5, 0.25**0.25, 1.0, 1.0, 1.0]),
        ({"exponent": 0.0}, [1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"exponent": 1.0}, [0.0625, 0.25, 1.0, 1.0, 1.0]),
        ({"exponent": 1.0, "cap": INF}, RATIOS),
        ({"exponent": 0.5, "cap": 4.0}, [0.25, 0.5, 1.0, 2.0, 2.0]),
        ({"exponent": 1.0, "cap": 0.25}, [0.0625, 0.25, 0.25, 0.25, 0.25]),
        ({"kind": "clip", "floor": 0.5, "cap": 2.0}, [0.5, 0.5, 1.0, 2.0, 2.0]),
        ({"kind": "clip"}, [0.0625, 0.25, 1.0, 1.0, 1.0]),
        ({"kind": "mask"}, [0.0625, 0.25, 1.0, 0.0, 0.0]),
        ({"kind": "mask", "cap": 5.0}, [0.0625, 0.25, 1.0, 4.0, 0.0]),
        ({"kind": "saturate"}, [0.0625 / 0.1625, 0.25 / 0.35, 1 / 1.1, 4 / 4.1, 16 / 16.1]),
        ({"kind": "saturate", "constant": 1.0}, [1 / 17, 0.2, 0.5, 0.8, 16 / 17]),
    ],
)
def test_kinds_by_hand(options, expected):
    check(weights(RATIOS, **options), expected)


def test_extreme_ratios_stay_finite():
    # p = 0, and s = 0 (which never happens at a branch point): log ratios are clamped to +-20
    extreme = [0.0, INF]
    check(weights(extreme, exponent=1.0, cap=INF), [math.exp(-20), math.exp(20)])
    check(weights(extreme, exponent=0.0), [1.0, 1.0])
    check(weights(extreme), [math.exp(-5), 1.0])
    check(weights(extreme, kind="clip", cap=2.0), [math.exp(-20), 2.0])
    check(weights(extreme, kind="mask"), [math.exp(-20), 0.0])
    check(weights(extreme, kind="saturate"), [math.exp(-20) / 0.1, 1.0])
    single = correction_weights(torch.tensor([[1e4, -1e4]]), torch.tensor([[True, True]]), cap=INF, exponent=1.0)
    assert single.dtype == torch.float32 and single.isfinite().all()


@pytest.mark.parametrize("kind", ["temper", "clip", "mask", "saturate"])
def test_other_tokens_are_not_read(kind):
    log_ratio = torch.tensor([[NAN, -1.0, INF], [-1.0, NAN, -1.0]], requires_grad=True)
    where = torch.tensor([[False, True, False], [False, False, False]])
    rho = correction_weights(log_ratio, where, kind=kind)
    assert rho[~where].eq(1.0).all() and 0.0 < rho[0, 1] < 1.0
    assert not rho.requires_grad


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'temper', 'clip', 'mask', 'saturate'"):
        weights([1.0], kind="plain")


def test_fold_by_hand():
    rho = torch.tensor([[1.0, 0.5, 1.0], [0.25, 1.0, 0.0]])
    check(fold_correction(torch.tensor([2.0, -4.0]), rho), [[2.0, 1.0, 2.0], [-1.0, -4.0, 0.0]])


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_folding_multiplies_the_clipped_term(advantage):
    ratio, rho = torch.tensor([[0.5, 1.0, 1.1, 2.0]]), torch.tensor([[1.0, 0.3, 0.0, 0.7]])

    def clipped(advantages):
        return torch.min(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)

    A = torch.tensor([advantage])
    torch.testing.assert_close(clipped(fold_correction(A, rho)), rho * clipped(A.unsqueeze(1)))


# Importance sampling: one prefix, p and s over five tokens, f any function of the token


def problem(weight):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        p, s = torch.randn(2, 5, dtype=torch.float64).mul(1.5).softmax(-1)
        f = torch.randn(5, dtype=torch.float64)
    return p, s, torch.tensor(weight, dtype=torch.float64), f


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.6, 1.0])
def test_conditional_ratio_recovers_the_policy(weight):
    """Sum over token and coin of P(y, z) rho(y, z) f(y) = E_p f, with rho = p / s at z = 1 and 1 at z = 0."""
    p, s, w, f = problem(weight)
    chance = torch.stack([(1 - w) * p, w * s])
    log_ratio = (p.log() - s.log()).expand(2, 5).clone()
    log_ratio[0] = NAN  # the expert was not asked
    where = torch.tensor([[False], [True]]).expand(2, 5)
    rho = correction_weights(log_ratio, where, exponent=1.0, cap=INF)
    torch.testing.assert_close((chance * rho * f).sum(), (p * f).sum())
    if weight > 0.0:
        uncorrected = (chance * f).sum()
        assert abs(uncorrected - (p * f).sum()) > 0.01


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.6, 1.0])
def test_mixture_ratio_recovers_the_policy(weight):
    p, s, w, f = problem(weight)
    logm = mixture_logps(p.log(), s.log(), w.expand(5))
    rho = correction_weights((p.log() - logm).unsqueeze(0), torch.ones(1, 5, dtype=torch.bool), exponent=1.0, cap=INF)
    torch.testing.assert_close((logm.exp() * rho[0] * f).sum(), (p * f).sum())
    if weight < 1.0:
        assert rho.max() <= 1 / (1 - weight) + 1e-12


def test_mixture_ratio_has_the_lower_variance():
    p, s, w, f = problem(0.4)
    logm = mixture_logps(p.log(), s.log(), w.expand(5))
    mixture = (logm.exp() * (p / logm.exp() * f) ** 2).sum()
    conditional = ((1 - w) * p * f**2).sum() + (w * s * (p / s * f) ** 2).sum()
    assert mixture < conditional
