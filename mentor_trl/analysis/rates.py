"""How often sampled responses are right (pass@k), and how often they contain the words of reasoning."""

import re
from collections.abc import Sequence
from statistics import fmean

import pandas as pd

from ..errors import SetupError
from ..evaluation.pass_at_k import estimate, estimate_mean, ks_to_report, pass_at_k
from .runs import group_by_label
from .samples import Sample, SampleSet


# The list of the paper's appendix, in its order.
REASONING_WORDS = (
    *("wait", "okay", "verify", "check", "alternatively", "but", "similarly"),
    *("find", "therefore", "since", "given", "then", "consider", "however"),
)


def word_rates(
    sets: Sequence[SampleSet],
    words: Sequence[str] = REASONING_WORDS,
    all_completions: bool = False,
    source: str | None = None,
) -> pd.DataFrame:
    """Share of the responses that contain each word, for each label."""
    rows = []
    for label, group in group_by_label(sets).items():
        samples = [sample for one in group for sample in one.samples if source in (None, sample.source)]
        texts = [sample.completions[: None if all_completions else 1] for sample in samples]
        if not texts:
            found = sorted({str(sample.source) for one in group for sample in one.samples})
            raise SetupError(f"{group[0].path} has no row of source {source!r}; its sources: {', '.join(found)}.")
        for word in words:
            pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
            found = [[int(pattern.search(text) is not None) for text in of_prompt] for of_prompt in texts]
            rate = estimate(found)
            rows.append((label, word, sum(map(len, texts)), sum(map(sum, found)), rate.value, rate.low, rate.high))
    return pd.DataFrame(rows, columns=["label", "word", "responses", "count", "rate", "low", "high"])


def pass_at_k_curves(sets: Sequence[SampleSet], ks: Sequence[int] | None = None) -> pd.DataFrame:
    """pass@k of each task and label: the mean over the prompts of the unbiased estimates."""
    rows = []
    for label, group in group_by_label(sets).items():
        for task in dict.fromkeys(sample.task for one in group for sample in one.samples):
            by_prompt: dict[str, list[tuple[int, int]]] = {}
            for one in group:
                for sample in _graded(one, task):
                    by_prompt.setdefault(sample.doc_id, []).append((len(sample.correct), sum(sample.correct)))
            totals = [total for counts in by_prompt.values() for total, _ in counts]
            for k in ks_to_report(min(totals)) if ks is None else sorted(set(ks)):
                if not 1 <= k <= min(totals):
                    raise SetupError(
                        f"pass@{k} of {label!r} on {task!r} cannot be estimated: a prompt has {min(totals)} samples. "
                        f"Choose k from 1 to {min(totals)}, or sample more."
                    )
                values = [fmean(pass_at_k(*one, k) for one in counts) for counts in by_prompt.values()]
                found = estimate_mean(values, sum(totals))
                rows.append((task, label, k, len(values), found.value, found.low, found.high))
    return pd.DataFrame(rows, columns=["task", "label", "k", "prompts", "value", "low", "high"])


def _graded(one: SampleSet, task: str) -> list[Sample]:
    """The samples of a task, which are graded and of different prompts."""
    samples, seen = [sample for sample in one.samples if sample.task == task], set()
    for sample in samples:
        where = f"prompt {sample.doc_id!r} of {task!r} in {one.path}"
        if sample.correct is None:
            raise SetupError(f"There is no `correct` for {where}; pass@k needs it. `mentor-trl eval` writes it.")
        if sample.doc_id in seen:
            raise SetupError(f"There are two rows of {where}; give two evaluations in one folder one by one.")
        seen.add(sample.doc_id)
    return samples
