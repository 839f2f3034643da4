import itertools
import random
import subprocess
import sys
from fractions import Fraction
from statistics import fmean

import pytest

from mentor_trl.evaluation.pass_at_k import average, estimate, ks_to_report, pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_equals_the_share_of_subsets_with_a_correct_sample(num_samples):
    for num_correct in range(num_samples + 1):
        grades = [1] * num_correct + [0] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(grades, k))
            share = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(float(share), abs=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, 5), "pass@5 cannot be estimated from 4 samples; draw at least 5"),
        ((4, 1, 0), "pass@0 cannot be estimated from 4 samples; draw at least 1"),
        ((4, 5, 1), "5 of 4 samples cannot be correct"),
        ((4, -1, 1), "-1 of 4 samples cannot be correct"),
    ],
)
def test_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


def test_mean_over_problems():
    correct = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert estimate(correct).value == pytest.approx((0.5 + 0 + 0.25) / 3)
    assert estimate(correct, k=2).value == pytest.approx((5 / 6 + 0 + 1 / 2) / 3)


def test_one_sample_a_problem_gives_wilsons_interval():
    result = estimate([[1]] * 7 + [[0]] * 3)
    # By hand: z = 1.959964, (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    assert (result.low, result.high) == pytest.approx((0.396775, 0.892209), abs=1e-5)


def test_no_and_all_correct_keep_an_interval():
    none, everything = estimate([[0] * 8] * 30), estimate([[1] * 8] * 30)
    assert none.value == none.low == 0 and 0.05 < none.high < 0.2
    assert everything.value == everything.high == 1 and everything.low == pytest.approx(1 - none.high)


def test_samples_of_one_problem_are_not_independent():
    # The same number of samples and of correct ones, but here they agree within a problem
    clustered = estimate([[1] * 8] * 15 + [[0] * 8] * 15)
    mixed = estimate([[1, 0] * 4] * 30)
    assert clustered.value == mixed.value
    assert clustered.high - clustered.low > 2 * (mixed.high - mixed.low)


@pytest.mark.parametrize("shape, k", [((1.0, 1.0), 1), ((0.2, 0.8), 1), ((0.1, 2.0), 1), ((1.0, 1.0), 4)])
def test_interval_covers_the_truth(shape, k):
    rng = random.Random(0)
    truth = fmean(1 - (1 - rng.betavariate(*shape)) ** k for _ in range(50_000))
    covered = 0
    for _ in range(300):
        rates = [rng.betavariate(*shape) for _ in range(30)]
        result = estimate([[int(rng.random() < rate) for _ in range(8)] for rate in rates], k)
        covered += result.low <= truth <= result.high
    # 95% nominal; a binomial count of 300 with that mean falls below 275 once in 400 times
    assert covered >= 275


def test_average_of_sets():
    one, other = estimate([[1], [0], [1], [1]]), estimate([[0], [0], [0], [1]])
    result = average([one, other])
    assert result.value == pytest.approx(0.5)
    assert result.stderr == pytest.approx((one.stderr**2 + other.stderr**2) ** 0.5 / 2)
    assert result.low == pytest.approx(0.5 - ((0.75 - one.low) ** 2 + (0.25 - other.low) ** 2) ** 0.5 / 2)
    assert result.high == pytest.approx(1 - result.low)  # each set mirrors the other


@pytest.mark.parametrize("rate", [0.002, 0.3])
def test_interval_of_an_average_covers_the_truth(rate):
    rng, covered = random.Random(0), 0
    for _ in range(300):
        result = average([estimate([[int(rng.random() < rate)] for _ in range(size)]) for size in (30, 40, 300)])
        covered += result.low <= rate <= result.high
    assert covered >= 275


def test_ks():
    assert ks_to_report(1) == [1] and ks_to_report(32) == [1, 2, 4, 8, 16, 32] and ks_to_report(6) == [1, 2, 4, 6]


def test_estimates_need_no_harness():
    code = "import sys; sys.modules['lm_eval'] = sys.modules['torch'] = None; import mentor_trl.evaluation.pass_at_k"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
