"""How often responses contain the words of reasoning."""

import re
from collections.abc import Sequence

import pandas as pd

from ..errors import SetupError
from ..evaluation.pass_at_k import estimate
from .runs import group_by_label
from .samples import SampleSet


# The list of the paper's appendix, in its order.
REASONING_WORDS = (
    "wait",
    "okay",
    "verify",
    "check",
    "alternatively",
    "but",
    "similarly",
    "find",
    "therefore",
    "since",
    "given",
    "then",
    "consider",
    "however",
)


def count_words(responses: Sequence[str], words: Sequence[str] = REASONING_WORDS) -> dict[str, int]:
    """
    Number of responses that contain each word, as a whole word, in upper or lower case.

    Args:
        responses (`Sequence[str]`):
            Texts.
        words (`Sequence[str]`, *optional*):
            Words; those of the paper if not given. A word is whole where no letter, digit or underscore touches it,
            as with `grep -w`: "checks" is not "check".

    ```python
    >>> count_words(["Wait, but why?", "await; checks", "but: wait. WAIT"], ["wait", "but", "check"])
    {'wait': 2, 'but': 2, 'check': 0}

    ```
    """
    return {word: sum(_contain(word, responses)) for word in words}


def _contain(word: str, responses: Sequence[str]) -> list[int]:
    """1 for each response that contains the word, else 0."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    return [int(pattern.search(text) is not None) for text in responses]


def word_rates(
    sets: Sequence[SampleSet],
    words: Sequence[str] = REASONING_WORDS,
    all_completions: bool = False,
    source: str | None = None,
) -> pd.DataFrame:
    """
    Share of the responses that contain each word, for each label.

    Args:
        sets (`Sequence[SampleSet]`):
            Samples; those of one label are counted together.
        words (`Sequence[str]`, *optional*):
            Words; those of the paper if not given.
        all_completions (`bool`, *optional*, defaults to `False`):
            Whether all responses to a prompt count, rather than the first alone. The rate is then the mean over the
            prompts of their shares.
        source (`str`, *optional*):
            Only rows of this source of a completions table.

    Returns:
        `pd.DataFrame` with the columns `label`, `word`, `responses`, `count`, `rate`, `low` and `high` (95% interval
        over the prompts, of [`~mentor_trl.evaluation.pass_at_k.estimate`]; with one response a prompt it is Wilson's).
    """
    rows = []
    for label, group in group_by_label(sets).items():
        samples = [sample for one in group for sample in one.samples if source in (None, sample.source)]
        texts = [sample.completions[: None if all_completions else 1] for sample in samples]
        if not texts:
            found = sorted({str(sample.source) for one in group for sample in one.samples})
            raise SetupError(f"{group[0].path} has no row of source {source!r}; its sources: {', '.join(found)}.")
        for word in words:
            found = [_contain(word, of_prompt) for of_prompt in texts]
            rate = estimate(found)
            rows.append((label, word, sum(map(len, texts)), sum(map(sum, found)), rate.value, rate.low, rate.high))
    return pd.DataFrame(rows, columns=["label", "word", "responses", "count", "rate", "low", "high"])
