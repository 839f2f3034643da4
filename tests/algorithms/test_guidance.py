import math

import pytest
import torch

from mentor_trl.algorithms.guidance import Guidance
from mentor_trl.objective import alpha_at, entropy_threshold


def test_alpha_by_hand():
    assert [alpha_at(k, "cosine", 1.0, 4) for k in range(6)] == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0]
    )
    assert [alpha_at(k, "linear", 2.0, 4) for k in range(6)] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0, 0.0])
    assert [alpha_at(k, "constant", 0.7, 4) for k in (0, 4, 1000)] == [0.7, 0.7, 0.7]
    # the paper's schedule
    assert alpha_at(0) == 1.0 and alpha_at(60) == pytest.approx(0.5) and alpha_at(120) == 0.0
    assert alpha_at(119) > 0.0


def test_alpha_without_decay_steps():
    assert alpha_at(0, "cosine", 1.0, 0) == alpha_at(0, "linear", 1.0, 0) == 0.0


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'cosine', 'linear', 'constant'"):
        alpha_at(0, "step")


def test_threshold_by_hand():
    entropies = torch.tensor([4.0, 0.0, 1.0, 3.0, 2.0])
    assert entropy_threshold(entropies, 0.5) == 2.0
    # position .95 x 4 = 3.8 between 3 and 4
    assert entropy_threshold(entropies, 0.95) == pytest.approx(3.8)
    assert entropy_threshold(entropies, 0.0) == 0.1
    assert entropy_threshold(entropies, 1.0) == 4.0
    assert entropy_threshold(torch.tensor([1.25]), 0.95) == 1.25


@pytest.mark.parametrize("quantile", [0.0, 0.05, 0.5, 0.8, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_threshold_equals_torch_quantile(quantile, count):
    entropies = torch.rand(count, generator=torch.Generator().manual_seed(count)) * 3
    expected = torch.quantile(entropies.double(), quantile).item()
    assert entropy_threshold(entropies, quantile, minimum=0.0) == pytest.approx(expected, rel=1e-12)
    assert entropy_threshold(entropies.bfloat16(), quantile, 0.0) == pytest.approx(expected, rel=2e-2, abs=1e-2)


def test_threshold_floor_and_fixed_value():
    entropies = torch.tensor([0.0, 0.0, 0.01])
    assert entropy_threshold(entropies) == 0.1
    assert entropy_threshold(entropies, minimum=1.5) == 1.5
    assert entropy_threshold(torch.tensor([2.0]), minimum=1.5) == 2.0
    assert entropy_threshold(entropies, fixed=0.02) == 0.02
    assert entropy_threshold(torch.zeros(0), fixed=0.02) == 0.02


def test_threshold_needs_a_token():
    with pytest.raises(ValueError, match="at least one on-policy token"):
        entropy_threshold(torch.zeros(0))


def test_guidance_over_a_run():
    guidance = Guidance(schedule="linear", alpha_0=0.8, decay_steps=2, quantile=0.5)
    assert guidance.alpha == 0.8 and not guidance.over
    guidance.update(torch.tensor([0.0, 1.0, 4.0]))
    # gamma is the median, weights are 0, 1, 1
    assert guidance.gamma == 1.0 and guidance.share == pytest.approx(2 / 3)
    guidance.batches = 1
    assert guidance.alpha == pytest.approx(0.4) and not guidance.over
    guidance.batches = 2
    assert guidance.alpha == 0.0 and guidance.over
    assert not Guidance(schedule="constant", batches=10**6).over
    assert Guidance(schedule="constant", alpha_0=0.0).over


def test_guidance_with_fixed_threshold():
    guidance = Guidance(fixed=2.0)
    guidance.update(torch.tensor([1.0, 4.0]))
    assert guidance.gamma == 2.0 and guidance.share == 0.75
    guidance.update(torch.zeros(0))
    assert guidance.gamma == 2.0 and guidance.share == 0.0


def test_guidance_state_round_trip():
    first = Guidance(quantile=0.5, batches=7)
    first.update(torch.tensor([0.5, 1.0, 4.0]))
    second = Guidance(quantile=0.5)
    second.load_state_dict(first.state_dict())
    assert second == first
