"""Which of the generations of an OpenR1-Math row become expert trajectories."""

from typing import TYPE_CHECKING, Any

from ..loading import DataError
from .account import Funnel


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATIONS, CORRECT, COMPLETE = "generations", "correctness_math_verify", "is_reasoning_complete"

INCORRECT = "no generation that math-verify marked correct"
INCOMPLETE = "no such generation whose reasoning is complete"


def keep_generations(
    funnel: Funnel, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, num_proc: int | None = None
) -> None:
    """
    Keep the rows that have a generation which is marked correct, complete and of `max_tokens` tokens at most.

    The indices of those generations become the funnel's column `chosen`.
    """
    from datasets import Features, List, Value

    too_long = f"no such generation of {max_tokens:,} tokens at most"

    def choose(row: dict[str, Any]) -> dict[str, Any]:
        generations, marks = row[GENERATIONS] or [], row[CORRECT] or []
        if marks and len(generations) != len(marks):
            raise DataError(
                f"A row has {len(generations)} `{GENERATIONS}` and {len(marks)} marks in `{CORRECT}`; fix the row"
            )
        correct = [i for i, mark in enumerate(marks) if mark and generations[i]]
        whole = row.get(COMPLETE) or [True] * len(marks)
        complete = [i for i in correct if whole[i]]
        # A tokenizer's warning that a text is longer than the model's context is no news here.
        options = {"add_special_tokens": False, "verbose": False}
        chosen = [i for i in complete if len(tokenizer(generations[i], **options).input_ids) <= max_tokens]
        reason = INCORRECT if not correct else INCOMPLETE if not complete else None if chosen else too_long
        return {"chosen": chosen, "reason": reason}

    columns = [column for column in (GENERATIONS, CORRECT, COMPLETE) if column in funnel.dataset.column_names]
    choice = funnel.dataset.select_columns(columns).map(
        choose,
        remove_columns=columns,
        features=Features({"chosen": List(Value("int64")), "reason": Value("string")}),
        num_proc=num_proc,
        load_from_cache_file=False,
        desc="Measuring generations",
    )
    funnel.columns |= {"chosen": list(choice["chosen"]), "reason": list(choice["reason"])}
    for step in (INCORRECT, INCOMPLETE, too_long):
        funnel.keep(step, [reason != step for reason in funnel.columns["reason"]])
    if COMPLETE not in columns:
        funnel.report.facts.append((f"column `{COMPLETE}`", "absent, so that no generation was dropped for it"))
    number = sum(map(len, funnel.columns["chosen"]))
    funnel.report.facts.append(("generations that pass, over all rows", f"{number:,}"))
