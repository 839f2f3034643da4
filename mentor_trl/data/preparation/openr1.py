"""Which of the generations of an OpenR1-Math row become expert trajectories."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mentor_trl.data.loading import DataError


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

GENERATIONS, CORRECT, COMPLETE = "generations", "correctness_math_verify", "is_reasoning_complete"

INCORRECT = "no generation that math-verify marked correct"
INCOMPLETE = "no such generation whose reasoning is complete"


@dataclass
class GenerationChooser:
    """
    Chooses the generations that math-verify marked correct, that are complete, and that are short enough.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that measures the generations.
        max_tokens (`int`):
            Tokens that a generation may have.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_tokens: int

    @property
    def too_long(self) -> str:
        """The reason of rows whose generations are all too long."""
        return f"no such generation of {self.max_tokens:,} tokens at most"

    @property
    def reasons(self) -> list[str]:
        """Every reason for which a row is dropped."""
        return [INCORRECT, INCOMPLETE, self.too_long]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        chosen = [self._correct(generations, marks) for generations, marks in zip(batch[GENERATIONS], batch[CORRECT])]
        reasons = [None if indices else INCORRECT for indices in chosen]
        if COMPLETE in batch:
            chosen = [
                [i for i in indices if marks is None or marks[i]] for indices, marks in zip(chosen, batch[COMPLETE])
            ]
        reasons = [reason or (None if indices else INCOMPLETE) for reason, indices in zip(reasons, chosen)]
        texts = [generations[i] for generations, indices in zip(batch[GENERATIONS], chosen) for i in indices]
        lengths = iter(self._lengths(texts))
        chosen = [[i for i in indices if next(lengths) <= self.max_tokens] for indices in chosen]
        reasons = [reason or (None if indices else self.too_long) for reason, indices in zip(reasons, chosen)]
        return {"chosen": chosen, "reason": reasons}

    def _correct(self, generations: list[str] | None, marks: list[bool] | None) -> list[int]:
        generations, marks = generations or [], marks or []
        if marks and len(generations) != len(marks):
            raise DataError(
                f"A row has {len(generations)} `{GENERATIONS}` and {len(marks)} marks in `{CORRECT}`; mend the row"
            )
        return [i for i, mark in enumerate(marks) if mark and generations[i]]

    def _lengths(self, texts: list[str]) -> list[int]:
        if not texts:
            return []
        # A tokenizer's warning that a text is longer than the model's context is no news here.
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def choose_generations(dataset: "Dataset", chooser: GenerationChooser, num_proc: int | None = None) -> "Dataset":
    """
    Choose among the generations of every row.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with the columns `generations`, `correctness_math_verify` and, where known, `is_reasoning_complete`.
        chooser ([`GenerationChooser`]):
            What chooses.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        [`~datasets.Dataset`]: for each row `chosen` (`list[int]`), the indices of its generations, and `reason`
        (`str` or `None`), why none is left.
    """
    from datasets import Features, List, Value

    columns = [column for column in (GENERATIONS, CORRECT, COMPLETE) if column in dataset.column_names]
    return dataset.select_columns(columns).map(
        chooser,
        batched=True,
        batch_size=64,
        remove_columns=columns,
        features=Features({"chosen": List(Value("int64")), "reason": Value("string")}),
        num_proc=num_proc,
        load_from_cache_file=False,
        desc="Measuring generations",
    )
