"""The tables of completions: those of evaluations apart from those of training."""

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..trainer import MentorGRPOTrainer


def new_logs() -> dict[str, Any]:
    """What [`~trl.GRPOTrainer`] collects for a table, empty."""
    return {
        "images": deque(),
        "prompt": deque(),
        "completion": deque(),
        "rewards": defaultdict(deque),
        "advantages": deque(),
        "extra": defaultdict(deque),
    }


@contextmanager
def evaluation_table(trainer: "MentorGRPOTrainer", name: str) -> Iterator[None]:
    """
    TRL names its table by the step alone: give that of an evaluation its own name, and keep training's.

    Args:
        trainer ([`MentorGRPOTrainer`]):
            Trainer, which logs inside.
        name (`str`):
            Name of the evaluation.
    """
    folder, log_completions = Path(trainer.args.output_dir, "completions"), trainer.log_completions
    table = folder / f"completions_{trainer.state.global_step:05d}.parquet"
    # The summary that ends training comes in this mode as well, after an evaluation at the last step
    trainer.log_completions = log_completions and len(trainer._logs["prompt"]) > 0
    writes = trainer.accelerator.is_main_process and trainer.log_completions
    kept = table.rename(table.with_suffix(".kept")) if writes and table.exists() else None
    try:
        yield
    finally:
        trainer.log_completions = log_completions
        if writes and table.exists():
            table.replace(folder / f"completions_{name}_{trainer.state.global_step:05d}.parquet")
        if kept is not None:
            kept.rename(table)
