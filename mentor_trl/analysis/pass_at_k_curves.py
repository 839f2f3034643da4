"""pass@k curves from sampled responses."""

from collections.abc import Sequence
from statistics import fmean

import pandas as pd

from ..errors import SetupError
from ..evaluation.pass_at_k import estimate_mean, ks_to_report, pass_at_k
from .runs import group_by_label
from .samples import Sample, SampleSet


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
        the prompts, of [`~mentor_trl.evaluation.pass_at_k.estimate`]: how well this set of prompts stands for others
        of its kind).

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
            drawn = sum(total for prompt in counts for total, _ in prompt)
            least = min(total for prompt in counts for total, _ in prompt)
            for k in ks_to_report(least) if ks is None else sorted(set(ks)):
                if not 1 <= k <= least:
                    raise SetupError(
                        f"pass@{k} of {label!r} on {task!r} cannot be estimated: a prompt has {least} samples. "
                        f"Choose k from 1 to {least}, or sample more."
                    )
                values = [fmean(pass_at_k(total, right, k) for total, right in prompt) for prompt in counts]
                found = estimate_mean(values, drawn)
                rows.append((task, label, k, len(values), found.value, found.low, found.high))
    return pd.DataFrame(rows, columns=["task", "label", "k", "prompts", "value", "low", "high"])


def _check(one: SampleSet, sample: Sample, seen: set[str]) -> None:
    where = f"prompt {sample.doc_id!r} of {sample.task!r} in {one.path}"
    if sample.correct is None:
        raise SetupError(f"There is no `correct` for {where}; pass@k needs it. `mentor-trl eval` writes it.")
    if sample.doc_id in seen:
        raise SetupError(f"There are two rows of {where}. Are two evaluations in one folder? Give them one by one.")
    seen.add(sample.doc_id)
