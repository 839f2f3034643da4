"""When guidance ends and comes back, on rewards that are given."""

import math

import pytest
import torch

from mentor_trl.algorithms.guidance import Guidance
from mentor_trl.algorithms.withdrawal import Withdrawal
from mentor_trl.objective import Gap


MIXED = torch.tensor([False, False, True, True])


def hear(withdrawal: Withdrawal, on: list[float], mixed: list[float], groups: int = 100) -> dict[str, float]:
    """A batch of equal groups; without mixed rewards all rows are on-policy."""
    rewards = torch.tensor([*on, *mixed]).repeat(groups)
    mixed_N = MIXED.repeat(groups) if mixed else torch.zeros(len(rewards), dtype=torch.bool)
    return withdrawal.observe(rewards, mixed_N, len(rewards) // groups)


def test_withdrawn_after_patience():
    withdrawal = Withdrawal(Gap(smoothing=0.0), margin=0.05, patience=2)
    # 100 equal differences d: half width 1.645 sqrt(2) / 100 = .0233
    heard = hear(withdrawal, [1, 1], [1, 1])
    assert heard["upper_bound"] == pytest.approx(0.023262, rel=1e-4) and heard["standard_error"] == 0.0
    assert heard["withdrawn"] == 0.0 and heard["difference"] == 0.0 and heard["success"] == 1.0
    hear(withdrawal, [1, 1], [1, 1.1])  # .05 + .0233: patience starts anew
    hear(withdrawal, [1, 1], [1, 1])
    assert not withdrawal.withdrawn and withdrawal.below == 1
    assert hear(withdrawal, [1, 1], [1, 1])["withdrawn"] == 0.0
    assert withdrawal.withdrawn and not withdrawal.over and withdrawal.alpha(1.0) == 0.0


@pytest.mark.parametrize(
    "on, mixed, margin, groups, withdrawn",
    [
        ([0, 0], [0, 0], 0.05, 10_000, False),  # a sparse start, however sure
        ([0, 0.4], [0, 0], 0.05, 10_000, False),  # rewards without success
        ([1, 1], [1, 1], 0.02, 100, False),  # not sure enough
        ([1, 1], [1, 1], 0.03, 100, True),
        ([1, 0], [1, 0], 0.03, 100, False),  # a share of the successes
        ([1, 0], [1, 0], 0.06, 100, True),
        ([1, 1], [0, 0], 0.03, 100, True),  # the expert is worse
        ([1, 1], [], 0.03, 100, False),  # nothing to compare
    ],
)
def test_when_it_is_withdrawn(on, mixed, margin, groups, withdrawn):
    withdrawal = Withdrawal(Gap(smoothing=0.0), margin=margin, patience=1)
    hear(withdrawal, on, mixed, groups)
    assert withdrawal.withdrawn is withdrawn


def test_probes_bring_it_back():
    withdrawal = Withdrawal(Gap(smoothing=0.5), margin=0.08, patience=1, probe_every=3)
    hear(withdrawal, [1, 1], [1, 1])
    assert withdrawal.withdrawn
    seen = []
    for mixed in ([1, 1], [1.1, 1.1], [1.2, 1.2]):
        for rested in (False, False, True):
            assert withdrawal.probe is rested and withdrawal.alpha(1.0) == 0.0
            heard = hear(withdrawal, [1, 1], mixed if withdrawal.probe else [])
            assert heard["withdrawn"] == 1.0 and ("difference" in heard) is rested
        seen.append((withdrawal.withdrawn, heard["difference"]))
    # what was known before the withdrawal is forgotten: means of 0; 0, .1; 0, .1, .2 with weights 1/4, 1/2, 1
    assert [flag for flag, _ in seen] == [True, True, False]
    assert [value for _, value in seen] == pytest.approx([0.0, 0.1 / 1.5, 0.25 / 1.75])
    assert withdrawal.alpha(0.5) == 0.5
    withdrawal.gap_exponent = 2.0
    assert withdrawal.alpha(0.5) == pytest.approx(0.5 * (1 - 1 / (1 + 0.25 / 1.75)) ** 2)
    assert not withdrawal.probe and hear(withdrawal, [1, 1], [2, 2])["withdrawn"] == 0.0


def test_without_probes_it_is_over():
    withdrawal = Withdrawal(Gap(smoothing=0.0), patience=1, probe_every=0)
    assert not withdrawal.over
    hear(withdrawal, [1, 1], [1, 1])
    assert withdrawal.over
    for _ in range(50):
        assert not withdrawal.probe
        hear(withdrawal, [1, 1], [])


def test_groups_that_are_not_compared():
    withdrawal = Withdrawal()
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, *[math.nan] * 4, *[1.0] * 4, 0.0, 0.0, 1.0, 1.0])
    mixed = torch.cat([MIXED, MIXED, torch.zeros(4, dtype=torch.bool), MIXED])
    assert withdrawal.observe(rewards, mixed, 4)["difference"] == 0.75


def test_what_guidance_does_with_it():
    rule = lambda: Withdrawal(Gap(smoothing=0.0), patience=1, gap_exponent=1.0)
    guidance = Guidance(schedule="adaptive", alpha_0=0.5, withdrawal=rule())
    assert (guidance.alpha, guidance.mixes, guidance.probe, guidance.over) == (0.5, True, False, False)
    guidance.batches = 10**6
    hear(guidance.withdrawal, [1, 0], [0, 0], groups=2)
    assert (guidance.alpha, guidance.mixes) == (0.0, True)  # still compared
    hear(guidance.withdrawal, [1, 1], [1, 1])
    assert (guidance.alpha, guidance.mixes, guidance.probe, guidance.over) == (0.0, False, False, False)
    for _ in range(19):
        hear(guidance.withdrawal, [1, 1], [])
    assert (guidance.alpha, guidance.mixes, guidance.probe) == (0.0, True, True)
    second = Guidance(schedule="adaptive", alpha_0=0.5, withdrawal=rule())
    second.load_state_dict(guidance.state_dict())
    assert second == guidance
    assert Guidance(schedule="adaptive", alpha_0=0.0, withdrawal=Withdrawal()).over
