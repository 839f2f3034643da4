"""The tables of completions: those of evaluations apart from those of training."""

import re
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from trl import GRPOConfig


SINGLE, BY_NAME = ("images", "prompt", "completion", "advantages"), ("rewards", "extra")


def new_logs() -> dict[str, Any]:
    """What [`~trl.GRPOTrainer`] collects for a table, empty."""
    return {name: deque() for name in SINGLE} | {name: defaultdict(deque) for name in BY_NAME}


def replace_last(values: deque, new: list[Any]) -> None:
    """Put values in the place of as many that came last."""
    for _ in range(min(len(new), len(values))):
        values.pop()
    values.extend(new)


def printed(args: GRPOConfig) -> int:
    """Number of rollouts that `log_completions` prints at a time, one unless told otherwise."""
    count = 1 if args.num_completions_to_print is None else args.num_completions_to_print
    return count if args.log_completions else 0


@contextmanager
def evaluation_table(output_dir: str, step: int, logs: dict[str, float]) -> Iterator[None]:
    """
    TRL names a table by the step alone: give the one that is written inside the name of its evaluation, and keep that
    of training.
    """
    name = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "eval")
    folder = Path(output_dir, "completions")
    table = folder / f"completions_{step:05d}.parquet"
    kept = table.rename(table.with_suffix(".training")) if table.exists() else None
    try:
        yield
    finally:
        if table.exists():
            safe = re.sub(r"[^\w.-]+", "-", name)  # a dataset may be called `openai/gsm8k`
            table.replace(folder / f"completions_{safe}_{step:05d}.parquet")
        if kept is not None:
            kept.rename(table)


@contextmanager
def evaluation_log(trainer: Any, logs: dict[str, float]) -> Iterator[bool]:
    """
    The log of an evaluation, or the summary that ends training and follows one at the last step, which has no rows.
    Gives whether this process writes a table.
    """
    wanted, rows = trainer.log_completions, len(trainer._logs["prompt"])
    trainer.log_completions = wanted and rows > 0
    writes = trainer.log_completions and trainer.accelerator.is_main_process
    table = evaluation_table(trainer.args.output_dir, trainer.state.global_step, logs) if writes else nullcontext()
    try:
        with table:
            yield writes
    finally:
        trainer.log_completions = wanted
