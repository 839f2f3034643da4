"""Coins that anyone can predict, and that nevertheless fall as coins do."""

import pytest
import torch
from scipy.stats import chi2, norm

from mentor_trl.objective import coin_uniforms, request_seed


SIGNIFICANCE = 1e-6
MASK = (1 << 64) - 1


def reference(seed: int, position: int) -> float:
    """SplitMix64 in Python's integers."""

    def mixed(bits: int) -> int:
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & MASK
        return bits ^ (bits >> 31)

    return (mixed(mixed(seed) + (position + 1) * 0x9E3779B97F4A7C15 & MASK) >> 40) / 2**24


def test_python_predicts_them():
    seeds = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**53 + 1, 2**62 - 1]
    positions = [0, 1, 7, 4095, 131_072]
    found = coin_uniforms(torch.tensor(seeds).unsqueeze(1), torch.tensor(positions))
    assert found.dtype == torch.float32
    assert found.tolist() == [[reference(seed, at) for at in positions] for seed in seeds]


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_small_integers_and_devices_do_not_matter(device):
    seeds, positions = torch.arange(1000), torch.arange(1000).flip(0)
    expected = coin_uniforms(seeds, positions)
    found = coin_uniforms(seeds.int().to(device), positions.int().to(device))
    assert torch.equal(found.cpu(), expected)


@pytest.fixture(scope="module")
def grid() -> torch.Tensor:
    """Of neighbouring seeds (rows) and positions (columns)."""
    return coin_uniforms(torch.arange(1000).unsqueeze(1), torch.arange(200)).double()


def test_uniform(grid):
    counts = torch.histc(grid, bins=256, min=0.0, max=1.0)
    expected = grid.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < chi2.isf(SIGNIFICANCE, 255)
    assert 0.0 <= grid.min() and grid.max() < 1.0


@pytest.mark.parametrize("lag", [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0)])
def test_neighbours_are_independent(grid, lag):
    first, second = grid, grid.roll(lag, (0, 1))
    cells = torch.histc((first * 16).floor() * 16 + (second * 16).floor(), bins=256, min=0.0, max=256.0)
    expected = grid.numel() / 256
    assert ((cells - expected) ** 2 / expected).sum() < chi2.isf(SIGNIFICANCE, 255)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_rows_branch_as_often_as_their_weight_says(grid, share):
    """Not only in the mean: numbers of branch points of rows, and of positions, vary as binomial ones do."""
    coins = (grid < share).double()
    for counts, trials in ((coins.sum(1), grid.size(1)), (coins.sum(0), grid.size(0))):
        statistic = ((counts - trials * share) ** 2 / (trials * share * (1 - share))).sum()
        freedom = len(counts)
        assert abs((statistic - freedom) / (2 * freedom) ** 0.5) < norm.isf(SIGNIFICANCE)


def test_seeds_of_requests():
    found = {
        request_seed(row, at, role, attempt)
        for row in range(20)
        for at in range(50)
        for role in ("policy", "expert")
        for attempt in range(2)
    }
    assert len(found) == 4000 and all(0 <= seed < 2**63 for seed in found)
    assert request_seed(3, 5, "expert") == request_seed(3, 5, "expert", 0)
    with pytest.raises(ValueError, match="'critic'.*'policy', 'expert'"):
        request_seed(3, 5, "critic")
