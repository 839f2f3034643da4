import math

import pytest
import torch

from mentor_trl.objective import Gap


def take(gap: Gap, *groups: tuple[list[float], list[float]]) -> bool:
    """A batch of groups, each with its on-policy and its mixed rewards."""
    rewards = torch.tensor([reward for on, mixed in groups for reward in (*on, *mixed)])
    mixed_N = torch.tensor([source for on, mixed in groups for source in [False] * len(on) + [True] * len(mixed)])
    return gap.add(rewards, mixed_N, len(groups[0][0]) + len(groups[0][1]))


def test_one_batch_by_hand():
    gap = Gap()
    take(gap, ([0, 0], [1, 1]), ([0, 1], [1, 0]), ([1, 1], [1, 0]), ([0, 0], [0, 1]))
    # differences 1, 0, -.5, .5: mean .25, squares of the deviations .5625 + .0625 + .5625 + .0625
    assert gap.mean("difference") == 0.25 and gap.mean("on") == 0.375 and gap.mean("mixed") == 0.625
    assert gap.standard_error == pytest.approx(math.sqrt(1.25 / 3 / 4))
    # two more groups of differences 1 and -1
    assert gap.half_width == pytest.approx(1.644854 * math.sqrt(1.25 / 3 / 4 + 2 / 16), rel=1e-6)
    assert (gap.lower + gap.upper) / 2 == pytest.approx(0.25) and gap.upper - gap.lower == pytest.approx(
        2 * gap.half_width
    )
    assert gap.gain == pytest.approx(0.4)


def test_batches_are_smoothed_by_hand():
    gap = Gap(smoothing=0.5)
    take(gap, ([0, 0], [1, 1]), ([0, 1], [1, 1]))
    take(gap, ([1, 1], [1, 1]))
    weights, differences = [0.5, 0.5, 1.0], [1.0, 0.5, 0.0]
    mean = sum(w * d for w, d in zip(weights, differences)) / 2
    spread = sum(w * (d - mean) ** 2 for w, d in zip(weights, differences)) / 2
    groups = 2.0**2 / (0.25 + 0.25 + 1.0)
    assert gap.mean("difference") == pytest.approx(mean) and gap.effective == pytest.approx(groups)
    assert gap.standard_error == pytest.approx(math.sqrt(spread / (groups - 1)))
    assert gap.mean("success") == pytest.approx((0 * 0.5 + 0.5 * 0.5 + 1.0) / 2)


def test_what_does_not_count():
    gap = Gap()
    nan = math.nan
    assert not take(gap, ([nan, nan], [1, 1]), ([0, 1], [nan, nan]))
    assert gap.sums is None and gap.upper == math.inf and gap.lower == -math.inf and gap.gain == 1.0
    assert take(gap, ([nan, 1], [1, nan]), ([nan, nan], [1, 1]))
    # a single group has no spread
    assert gap.mean("difference") == 0.0 and gap.standard_error == gap.upper == math.inf
    assert gap.mean("success") == 1.0


def test_alpha_at_a_sparse_start():
    gap = Gap()
    take(gap, ([0, 0], [0, 0]), ([0, 0], [0, 0]))
    assert gap.gain == 1.0
    take(gap, ([0, 0.1], [0.1, 0.1]), ([0, 0.1], [0, 0.1]))  # a reward for the form alone
    assert gap.gain == 1.0
    take(gap, ([0, 0], [1, 0]), ([0, 0], [0, 0]))
    assert gap.gain == 1.0


@pytest.mark.parametrize(
    "groups, reward_range, expected",
    [
        ([([0, 1], [1, 1])], 1.0, 0.5),
        ([([1, 1], [1, 0])], 1.0, 0.0),
        ([([1, 1], [0, 0])], 1.0, 0.0),
        ([([0.5, 0.5], [2.0, 2.0])], 1.0, 0.75),  # a ratio has no range
        ([([-1, 1], [1, 1])], 2.0, 0.5),
        ([([-1, 1], [-1, -1])], 2.0, 0.0),
        ([([-1, 1], [1, 1])], 0.5, 1.0),  # the gain does not exceed 1
    ],
)
def test_gain_by_hand(groups, reward_range, expected):
    gap = Gap(reward_range=reward_range)
    take(gap, *groups)
    assert gap.gain == pytest.approx(expected)


def test_negative_rewards_are_remembered():
    gap = Gap(smoothing=0.0)
    take(gap, ([-1, 1], [1, 1]))
    take(gap, ([0, 1], [1, 1]))
    assert gap.gain == pytest.approx(0.5)
    take(gap, ([0.5, 0.5], [0.75, 0.75]))
    assert gap.gain == pytest.approx(0.25)  # and not 1/3


@pytest.mark.parametrize("prompts", [8, 32, 128])
@pytest.mark.parametrize("on, mixed", [(0.8, 0.8), (0.02, 0.05)])
def test_the_upper_bound_holds(prompts, on, mixed):
    """Among many runs, the bound lies below the true difference in about 5% or fewer."""
    generator = torch.Generator().manual_seed(prompts)
    mixed_N = torch.arange(8 * prompts) % 8 >= 4
    share_N = torch.where(mixed_N, mixed, on)
    missed = 0
    for _ in range(200):
        gap = Gap()
        for _ in range(12):
            gap.add(torch.bernoulli(share_N, generator=generator), mixed_N, 8)
        missed += gap.upper < mixed - on
    assert missed <= 20


def test_state_round_trip():
    first, second = Gap(), Gap()
    second.load_state_dict(first.state_dict())
    assert second == first
    take(first, ([-1, 0], [1, 1]), ([0, 1], [1, 1]))
    second.load_state_dict(first.state_dict())
    assert second == first
    take(first, ([0, 0], [1, 1]))
    assert second != first
