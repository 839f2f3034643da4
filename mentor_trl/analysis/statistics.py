"""Estimators and their intervals."""

import math
from collections.abc import Sequence

import numpy as np


Z_95 = 1.959963984540054


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """
    Unbiased estimate of the probability that at least one of `k` samples is right, 1 - C(n - c, k) / C(n, k)
    (https://huggingface.co/papers/2107.03374).

    Args:
        num_samples (`int`):
            Number n of samples.
        num_correct (`int`):
            Number c of right ones.
        k (`int`):
            Number of tries, at most n.

    ```python
    >>> pass_at_k(4, 1, 2)
    0.5

    ```
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"There are {num_correct} right samples of {num_samples}.")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_samples} samples a prompt; k is at least 1.")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def wilson_interval(share: float, total: float) -> tuple[float, float]:
    """
    95% interval of a share (Wilson's): it stays within 0 and 1 and has a width at both ends.

    Args:
        share (`float`):
            Observed share.
        total (`float`):
            Number of observations, or the number of independent ones that is worth as much.

    ```python
    >>> [round(bound, 3) for bound in wilson_interval(0.5, 10)]
    [0.237, 0.763]

    ```
    """
    z2 = Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """
    Mean of values between 0 and 1, one a prompt, and its 95% interval: Wilson's with the number of yes-or-no
    observations whose mean would have the standard error of these values.

    ```python
    >>> [round(number, 3) for number in mean_interval([0.0, 0.0, 1.0, 1.0] * 25)]
    [0.5, 0.403, 0.597]
    >>> [round(number, 3) for number in mean_interval([0.0] * 30)]
    [0.0, 0.0, 0.114]

    ```
    """
    values = np.asarray(values, dtype=float)
    mean, count = float(values.mean()), len(values)
    error = float(values.var(ddof=1)) / count if count > 1 else 0.0
    effective = mean * (1.0 - mean) / error if error > 0.0 else float(count)
    return (mean, *wilson_interval(mean, effective))
