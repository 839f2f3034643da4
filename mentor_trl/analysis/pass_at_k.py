"""pass@k curves from sampled responses."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..errors import SetupError
from .runs import group_by_label
from .samples import Sample, SampleSet
from .statistics import mean_interval, pass_at_k


def pass_at_k_curves(sets: Sequence[SampleSet], ks: Sequence[int] | None = None) -> pd.DataFrame:
    """
    pass@k of each task and label: the mean over the prompts of the unbiased estimates.

    Args:
        sets (`Sequence[SampleSet]`):
            Samples with `correct`. Where a label has several sets (seeds), a prompt's estimates are averaged first.
        ks (`Sequence[int]`, *optional*):
            Numbers of tries. Without them: 1, 2, 4, ... and the smallest number of samples a prompt, task by task.

    Returns:
        `pd.DataFrame` with the columns `task`, `label`, `k`, `prompts`, `value`, `low` and `high` (95% interval over
        the prompts: how well this set of prompts stands for others of its kind).

    Raises:
        [`SetupError`]: if a row has no `correct`, or a k exceeds the samples of a prompt.
    """
    rows = []
    for label, group in group_by_label(sets).items():
        for task in dict.fromkeys(sample.task for one in group for sample in one.samples):
            by_prompt: dict[str, list[Sample]] = {}
            for one in group:
                seen = set()
                for sample in one.samples:
                    if sample.task == task:
                        _check(one, sample, seen)
                        by_prompt.setdefault(sample.doc_id, []).append(sample)
            counts = [[(len(one.correct), sum(one.correct)) for one in samples] for samples in by_prompt.values()]
            least = min(total for prompt in counts for total, _ in prompt)
            for k in _default_ks(least) if ks is None else sorted(set(ks)):
                if not 1 <= k <= least:
                    raise SetupError(
                        f"pass@{k} of {label!r} on {task!r} cannot be estimated: a prompt has {least} samples. "
                        f"Choose k from 1 to {least}, or sample more."
                    )
                values = [np.mean([pass_at_k(total, right, k) for total, right in prompt]) for prompt in counts]
                rows.append((task, label, k, len(values), *mean_interval(values)))
    return pd.DataFrame(rows, columns=["task", "label", "k", "prompts", "value", "low", "high"])


def _check(one: SampleSet, sample: Sample, seen: set[str]) -> None:
    where = f"prompt {sample.doc_id!r} of {sample.task!r} in {one.path}"
    if sample.correct is None:
        raise SetupError(f"There is no `correct` for {where}; pass@k needs it. `mentor-trl eval` writes it.")
    if sample.doc_id in seen:
        raise SetupError(f"There are two rows of {where}. Are two evaluations in one folder? Give them one by one.")
    seen.add(sample.doc_id)


def _default_ks(most: int) -> list[int]:
    """
    ```python
    >>> _default_ks(32), _default_ks(6)
    ([1, 2, 4, 8, 16, 32], [1, 2, 4, 6])

    ```
    """
    return sorted({*(2**power for power in range(most.bit_length())), most})
