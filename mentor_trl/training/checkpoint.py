"""What a run needs, beyond the Trainer's own checkpoint, to resume to the same numbers."""

import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import get_sampler
from transformers import TrainerCallback

from ..errors import SetupError
from ..random_state import rng_state, set_rng_state
from .tables import BY_NAME, SINGLE


LOGS = tuple(name for name in SINGLE if name != "images")
# Columns of the rows that version 0.1 kept; a row of either was of the second source
_FORMER_SOURCES = ("mentor_mixed", "mentor_trajectory")


class RunCallback(TrainerCallback):
    """
    What happens where a run begins, and where an optimizer step does.

    If a step dies, the weights are still those of its beginning, and so must be the rest of a checkpoint: `state` and
    the random states are remembered as they were then.

    Args:
        forget_weights (`Callable[[], None]`):
            Called where training begins and ends: TRL tells the weights that an engine has by their step, and those
            of another run or of the best step may have it.
        capture (`Callable[[], dict]`, *optional*):
            Gives the state to remember.
    """

    def __init__(self, forget_weights: Callable[[], None], capture: Callable[[], dict[str, Any]] | None = None):
        self.forget_weights, self.capture = forget_weights, capture
        self.epochs_to_skip = 0
        self.state: dict[str, Any] | None = None
        self.rng: tuple | None = None

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.forget_weights()
        # TRL's sampler draws a permutation an epoch, from a generator that a resumed run starts anew
        sampler = get_sampler(train_dataloader) if self.epochs_to_skip else None
        if getattr(sampler, "shuffle", False):
            for _ in range(self.epochs_to_skip):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        self.epochs_to_skip = 0

    def on_train_end(self, args, state, control, **kwargs):
        self.forget_weights()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.capture is not None:
            self.state, self.rng = self.capture(), rng_state()

    def restore_rng(self) -> None:
        """Set the random states of the beginning of the step."""
        set_rng_state(self.rng)


def save_state(folder: str, state: dict[str, Any], rank: int, num_processes: int) -> None:
    """
    Save the state of a process.

    TRL keeps the phase inside a rollout batch and what is left of it in memory only, and samples the batch again on
    resuming; its metrics of a logging window that is under way would be lost as well.
    """
    path = _path(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = {"buffered_inputs": state["buffered_inputs"], "num_processes": num_processes}
    plain = {name: _plain(value) for name, value in state.items() if name not in rest}
    part = path.with_suffix(".part")  # nobody who is killed here leaves half a file
    torch.save(plain | rest, part)
    part.replace(path)


def load_state(folder: str, rank: int, num_processes: int, device: torch.device) -> dict[str, Any] | None:
    """
    Read what [`save_state`] saved.

    Raises:
        [`SetupError`]: if the checkpoint holds the rest of a rollout batch of another number of processes.
    """
    # Without a shared disk each node has the files of its own processes only
    path = next((path for path in (_path(folder, rank), _path(folder, 0)) if path.exists()), None)
    if path is None:
        warnings.warn(
            f"{folder} has no {_path(folder, rank).name}, so MentorGRPOTrainer did not save it: alpha and gamma start "
            "anew, and the rollouts of a batch that was under way are sampled again.",
            stacklevel=2,
        )
        return None
    state = torch.load(path, map_location=device, weights_only=True)
    saved_by = state.pop("num_processes")
    if state["buffered_inputs"] is not None and saved_by != num_processes:
        raise SetupError(
            f"{folder} was saved by {saved_by} processes in the middle of a rollout batch, and there are "
            f"{num_processes} now. Resume with {saved_by} processes, or from a checkpoint at the end of a rollout "
            "batch."
        )
    return _current(state)


def resume_advice(folder: str, save_only_model: bool) -> str:
    """What to do with the checkpoint that a failing run leaves."""
    if save_only_model:
        return f"{folder} holds the model alone (`save_only_model`), which is not enough to resume."
    return f"Resume it from {folder}."


def _current(state: dict[str, Any]) -> dict[str, Any]:
    """A state of version 0.1 under the names of today."""
    if "guidance" in state:
        state["algorithm"] = state.pop("guidance")
    for row in state["buffered_inputs"] or ():
        for name in _FORMER_SOURCES:
            if name in row:
                row["mentor_source"] = row.pop(name).long()
    return state


def _path(folder: str, rank: int) -> Path:
    return Path(folder, f"mentor_state_{rank}.pt")


def _plain(value: Any) -> Any:
    """Reward functions log values of any type, and a checkpoint is read as plain data only."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def copy_logs(logs: dict[str, Any]) -> dict[str, Any]:
    """Rows that wait for their table."""
    return {name: list(logs[name]) for name in LOGS} | {
        name: {column: list(values) for column, values in logs[name].items()} for name in BY_NAME
    }


def restore_logs(logs: dict[str, Any], saved: dict[str, Any]) -> None:
    """Put back what [`copy_logs`] copied, in the place of what there is."""
    for name in LOGS:
        logs[name].clear()
        logs[name].extend(saved[name])
    for name in BY_NAME:
        for values in logs[name].values():
            values.clear()
        for column, values in saved[name].items():
            logs[name][column].extend(values)
