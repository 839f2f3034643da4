"""
From graded samples to pass@k with a confidence interval.

The samples of one problem are not independent draws of a score, so problems, not samples, are what an interval counts:
every problem gives one value in [0, 1], and the spread of these values says how far their mean can be trusted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, pi, sqrt, tan
from statistics import NormalDist, fmean, variance


PRIOR = 0.25
Z = NormalDist().inv_cdf(0.975)  # of an interval of 95%


@dataclass(frozen=True)
class Estimate:
    """
    A mean over problems, between 0 and 1, with the ends of its interval and its standard error. The latter is 0 for a
    single problem, whose interval still has a width.
    """

    value: float
    low: float
    high: float
    stderr: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """
    Unbiased estimate of the probability that one of `k` samples is correct, from `num_samples` of which `num_correct`
    are: `1 - C(n - c, k) / C(n, k)` ([Chen et al., 2021](https://huggingface.co/papers/2107.03374), Eq. 1).

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2)
    (0.25, 0.5)
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_samples} samples; draw at least {max(k, 1)}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} of {num_samples} samples cannot be correct")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def estimate(correct: Sequence[Sequence[int]], k: int = 1) -> Estimate:
    """
    Estimate pass@k over the problems of a set, of which `correct` holds 0 or 1 for each sample; with `k=1` this is the
    average accuracy of all samples, avg@n.

    The interval is Wilson's with the effective sample size of a clustered sample (Korn and Graubard, 1998; Franco et
    al., 2019), see [`effective_sample_size`]. With one sample a problem it is Wilson's interval; it keeps its width
    where every problem fails or every problem is solved.
    """
    if not correct:
        raise ValueError("No problem is given; pass the grades of one problem at least")
    values = [pass_at_k(len(grades), sum(grades), k) for grades in correct]
    return estimate_mean(values, sum(len(grades) for grades in correct))


def estimate_mean(values: Sequence[float], num_samples: int) -> Estimate:
    """Mean over problems of one value in [0, 1] each, with the interval of [`estimate`]."""
    mean = fmean(values)
    size = effective_sample_size(values, num_samples)
    centre = (mean + Z * Z / (2.0 * size)) / (1.0 + Z * Z / size)
    half = Z * sqrt(mean * (1.0 - mean) / size + (Z / (2.0 * size)) ** 2) / (1.0 + Z * Z / size)
    stderr = sqrt(variance(values, mean) / len(values)) if len(values) > 1 else 0.0
    return Estimate(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)), stderr)


def effective_sample_size(values: Sequence[float], num_samples: int) -> float:
    """
    Number of independent trials that would leave the mean of `values` as uncertain as it is: `m (1 - m) / se^2`.

    It lies between the number of problems (no value in [0, 1] varies more than a coin) and that of samples. The
    variance over problems is smoothed by a quarter of a problem that is always solved and of one that never is, and
    `se` is widened from the normal to Student's quantile: without both, intervals of 30 problems are too narrow where
    nearly all problems fail or are solved.
    """
    mean, count = fmean(values), len(values)
    squares = sum((value - mean) ** 2 for value in values) + PRIOR * (mean**2 + (1.0 - mean) ** 2)
    error = squares / (count - 1 + 2 * PRIOR) / count
    freedom = max(count - 1, 1)
    # Student's quantile by the Cornish-Fisher expansion
    t = Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    size = mean * (1.0 - mean) / error * (Z / t) ** 2
    return min(max(size, float(count)), float(num_samples))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """
    Average over independent sets, each with the same weight. The squares of their intervals' arms add up (MOVER; Zou
    and Donner, 2008), so that the interval keeps its width where every set is failed or solved.
    """
    value = fmean(one.value for one in estimates)
    together = lambda parts: sqrt(sum(part**2 for part in parts)) / len(estimates)
    below, above = (
        together(one.value - one.low for one in estimates),
        together(one.high - one.value for one in estimates),
    )
    return Estimate(value, value - below, value + above, together(one.stderr for one in estimates))


def over_runs(values: Sequence[float]) -> Estimate:
    """
    Mean of several runs' figures, with Student's interval: how far it would move with other runs.

    >>> one = over_runs([0.4, 0.5, 0.6])
    >>> round(one.low, 3), round(one.high, 3)
    (0.252, 0.748)
    """
    mean, stderr = fmean(values), sqrt(variance(values) / len(values))
    half = student_quantile(len(values) - 1) * stderr
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), stderr)


def student_quantile(freedom: int) -> float:
    """
    The 0.975 quantile of Student's distribution: exact for one and two degrees of freedom, else by an expansion that
    is off by less than 0.2%.

    >>> [round(student_quantile(freedom), 2) for freedom in (1, 2, 3, 9)]
    [12.71, 4.3, 3.18, 2.26]
    """
    if freedom == 1:
        return tan(0.475 * pi)
    if freedom == 2:
        return 0.95 * sqrt(2.0 / (1.0 - 0.95**2))
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def ks_to_report(num_samples: int) -> list[int]:
    """
    The powers of two up to `num_samples`, and `num_samples` itself.

    >>> ks_to_report(12)
    [1, 2, 4, 8, 12]
    """
    powers = [2**i for i in range(num_samples.bit_length())]
    return sorted({*powers, num_samples})
