import math

import pytest
import torch
from trl.trainer.utils import nanstd

from mentor_trl.objective import mixed_policy_advantages


NAN = math.nan
STD = math.sqrt(0.5)  # of the rewards 0 and 1


def advantages(rewards, mixed, num_generations=4, alpha=1.0, **options):
    mixed = torch.tensor([bool(flag) for flag in mixed])
    return mixed_policy_advantages(torch.tensor(rewards), mixed, num_generations, alpha, **options)


def check(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def trl_advantages(rewards, num_generations, scale_rewards):
    """As `GRPOTrainer` writes it."""
    mean = torch.nanmean(rewards.view(-1, num_generations), dim=1).repeat_interleave(num_generations, dim=0)
    result = rewards - mean
    if scale_rewards == "group":
        std = nanstd(rewards.view(-1, num_generations), dim=1).repeat_interleave(num_generations, dim=0)
        result = result / (std + 1e-4)
    elif scale_rewards == "batch":
        result = result / (nanstd(rewards).expand_as(rewards) + 1e-4)
    return result


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("num_generations", [2, 4, 12])
def test_without_mixed_rows_equals_trl_bit_for_bit(scale_rewards, num_generations):
    rewards = torch.rand(48, generator=torch.Generator().manual_seed(0))
    rewards[:num_generations] = 0.7  # no spread in this group
    actual = mixed_policy_advantages(
        rewards, torch.zeros(48, dtype=torch.bool), num_generations, alpha=0.3, scale_rewards=scale_rewards
    )
    assert torch.equal(actual, trl_advantages(rewards, num_generations, scale_rewards))


def test_group_by_hand():
    # on-policy rewards 1 and 0: mean .5, standard deviation sqrt(.5)
    unit = 0.5 / (STD + 1e-4)
    check(advantages([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1]), [unit, -unit, 0.5, 0.0])
    # wherever the mixed rows stand
    check(advantages([1.0, 1.0, 0.0, 0.0], [1, 0, 0, 1]), [0.5, unit, -unit, 0.0])


def test_alpha_and_range_act_on_mixed_rows_only():
    unit = 0.5 / (STD + 1e-4)
    check(advantages([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], alpha=0.5), [unit, -unit, 0.25, 0.0])
    check(advantages([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], alpha=0.5, reward_range=2.0), [unit, -unit, 0.125, 0.0])
    check(advantages([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], alpha=0.0), [unit, -unit, 0.0, 0.0])


def test_mixed_rewards_do_not_enter_the_statistics():
    first = advantages([1.0, 0.0, 5.0, -3.0], [0, 0, 1, 1])
    second = advantages([1.0, 0.0, 0.5, 0.5], [0, 0, 1, 1])
    assert torch.equal(first[:2], second[:2])
    check(first[2:], [4.5, 0.0])


def test_mixed_success_of_an_unsolved_prompt():
    check(advantages([0.0, 0.0, 1.0, 0.0], [0, 0, 1, 1]), [0.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_scaling_acts_on_on_policy_rows_only(scale_rewards):
    rewards, mixed = [1.0, 0.0, 1.0, 4.0, 0.0, 2.0], [0, 0, 1, 0, 0, 1]
    # groups: (1, 0 | 1) with mean .5, and (4, 0 | 2) with mean 2; deviations of the batch's 1, 0, 4, 0: mean 1.25,
    # squares .0625 + 1.5625 + 7.5625 + 1.5625 = 10.75, over 3
    scales = {"group": (STD, math.sqrt(8.0)), "batch": (math.sqrt(10.75 / 3),) * 2, "none": (1.0 - 1e-4,) * 2}
    a, b = (scale + 1e-4 for scale in scales[scale_rewards])
    actual = advantages(rewards, mixed, num_generations=3, scale_rewards=scale_rewards)
    check(actual, [0.5 / a, -0.5 / a, 0.5, 2.0 / b, -2.0 / b, 0.0])


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_undefined_rewards(scale_rewards):
    """Rows without a reward have advantage 0 and change nothing for the others; no NaN comes out."""

    def of(rewards, mixed):
        # a second, complete group keeps the batch's standard deviation defined
        result = advantages(rewards + [1.0, 0.0, 0.0, 1.0], mixed + [0, 0, 1, 1], scale_rewards=scale_rewards)
        assert not result.isnan().any()
        return result[:4].tolist()

    # an on-policy row, and a mixed row
    known = of([1.0, 0.0, NAN, 1.0], [0, 0, 0, 1])
    assert known[0] > 0.0 and known[0] == -known[1] and known[2:] == [0.0, 0.5]
    assert of([1.0, 0.0, NAN, 1.0], [0, 0, 1, 1])[2:] == [0.0, 0.5]
    # no on-policy reward: no baseline
    assert of([NAN, NAN, 1.0, 0.0], [0, 0, 1, 1]) == [0.0, 0.0, 0.0, 0.0]
    # nothing at all
    assert of([NAN, NAN, NAN, NAN], [0, 0, 1, 1]) == [0.0, 0.0, 0.0, 0.0]
    # a single on-policy reward is its own mean, and still a baseline
    assert of([0.25, NAN, 1.0, 0.0], [0, 0, 1, 1]) == [0.0, 0.0, 0.75, 0.0]
    # only mixed rows: their own mean is the baseline
    assert of([1.0, NAN, 1.0, 0.0], [1, 1, 1, 1]) == pytest.approx([1 / 3, 0.0, 1 / 3, 0.0])


def test_undefined_batch_spread():
    # a single on-policy reward in the whole batch
    check(advantages([0.25, NAN, 1.0, 0.0], [0, 0, 1, 1], scale_rewards="batch"), [0.0, 0.0, 0.75, 0.0])


@pytest.mark.parametrize(
    ("scale", "rewards", "mixed", "by"),
    [
        # on-policy 1, 0, and the group's 1, 0, 1, 0: squares 4 * .25 over 3
        ("std", [1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], STD + 1e-4),
        ("group_std", [1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], math.sqrt(1 / 3) + 1e-4),
        # no on-policy success: gain 1, and the group's 0, 0, 1, 0: mean .25, squares .75 over 3
        ("std", [0.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], 1e-4),
        ("group_std", [0.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], 0.5 + 1e-4),
        # only mixed rows: one spread for both
        ("std", [0.0, 1.0, 1.0, 0.0], [1, 1, 1, 1], math.sqrt(1 / 3) + 1e-4),
        ("group_std", [0.0, 1.0, 1.0, 0.0], [1, 1, 1, 1], math.sqrt(1 / 3) + 1e-4),
    ],
)
def test_mixed_advantages_by_a_standard_deviation(scale, rewards, mixed, by):
    plain = advantages(rewards, mixed, alpha=0.5)
    scaled = advantages(rewards, mixed, alpha=0.5, mixed_scale=scale, reward_range=3.0)
    rows = torch.tensor(mixed).bool()
    assert torch.equal(scaled[~rows], plain[~rows]) and (plain[rows] > 0.0).any()
    torch.testing.assert_close(scaled[rows], plain[rows] / by)


def test_a_group_of_mixed_rows_by_hand():
    check(advantages([1.0, 0.0, 0.0, 1.0, 0.5, 0.0], [1, 1, 1, 0, 0, 1], 3)[:3], [2 / 3, 0.0, 0.0])


@pytest.mark.parametrize("options", [{"scale_rewards": "median"}, {"mixed_scale": "median"}])
def test_unknown_scaling_is_refused(options):
    with pytest.raises(ValueError, match="'median'; choose"):
        advantages([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], **options)
