"""`mentor-trl data hints`: a dataset whose training prompts hold the beginning of their trajectories."""

import warnings
from typing import TYPE_CHECKING

from mentor_trl.rewards import extract_boxed

from ..hints import add_hints
from ..loading import DataError
from .account import Report
from .settings import HintArguments
from .sources import load_rows, load_tokenizer, name_of


if TYPE_CHECKING:
    from datasets import DatasetDict


def prepare_hints(args: HintArguments) -> "tuple[DatasetDict, Report]":
    """Put hints into the prompts of one split, and into its column `hint`; a [`DataError`] names what is wrong."""
    if not 0 < args.fraction <= 1:
        raise DataError(f"`fraction` is {args.fraction}; it must be above 0 and up to 1")
    splits, rows = load_rows(args, ["prompt", "trajectory"])
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report counts the rows without a trajectory
        hinted = add_hints(rows, args.fraction, "trajectory", name_of(args), tokenizer, args.part)
    report, hints = Report(loaded=len(rows)), list(hinted["hint"])
    given = [hint for hint in hints if hint is not None]
    if args.drop_without_trajectory:
        report.steps.append(("no trajectory to take a hint from", len(hints) - len(given)))
        hinted = hinted.filter(lambda hint: hint is not None, input_columns="hint", load_from_cache_file=False)
    report.facts += [
        ("prompts with a hint", f"{len(given):,} of {len(hints):,}"),
        ("hints that hold a complete `\\boxed{}`", f"{sum(extract_boxed(hint) is not None for hint in given):,}"),
        ("longest hint", f"{max(map(len, given)):,} characters"),
    ]
    splits[args.dataset_split] = hinted
    return splits, report
