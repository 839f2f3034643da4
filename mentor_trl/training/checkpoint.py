"""What a run needs, beyond the Trainer's own checkpoint, to resume to the same numbers."""

import warnings
from collections import defaultdict, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..errors import SetupError
from ..experts.load import rng_state, set_rng_state


if TYPE_CHECKING:
    from ..trainer import MentorGRPOTrainer

_LOGS = ("prompt", "completion", "advantages")
_LOG_COLUMNS = ("rewards", "extra")


def _path(folder: str, rank: int) -> Path:
    return Path(folder, f"mentor_state_{rank}.pt")


class StepStart(TrainerCallback):
    """
    Remembers what [`save_state`] saves as it was when the optimizer step under way began. If that step dies, the
    weights are still those of its beginning, and so must be the rest of a checkpoint.

    Args:
        trainer ([`MentorGRPOTrainer`]):
            Trainer.
    """

    def __init__(self, trainer: "MentorGRPOTrainer"):
        self.trainer = trainer
        self.state: dict[str, Any] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # TRL tells weights that the engine has by their step, and those of another run or of the best step may have it
        self.trainer._last_loaded_step = -1

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._last_loaded_step = -1

    def on_step_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        logs = trainer.logs_by_mode["train"]
        self.state = {
            "guidance": trainer.guidance.state_dict(),
            "step": trainer._step,
            "buffered_inputs": trainer._buffered_inputs,
            "tokens": trainer.state.num_input_tokens_seen,
            "rng": rng_state(),
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
            "logs": {name: list(logs[name]) for name in _LOGS}
            | {name: {key: list(values) for key, values in logs[name].items()} for name in _LOG_COLUMNS},
        }

    def restore(self) -> None:
        """Go back to the beginning of the step."""
        trainer, state = self.trainer, self.state
        trainer.guidance.load_state_dict(state["guidance"])
        trainer._step, trainer._buffered_inputs = state["step"], state["buffered_inputs"]
        trainer.state.num_input_tokens_seen = state["tokens"]
        trainer._metrics["train"] = defaultdict(list, state["metrics"])
        set_rng_state(state["rng"])
        logs = trainer.logs_by_mode["train"]
        for name in _LOGS:
            logs[name].clear()
        for name in _LOG_COLUMNS:
            for values in logs[name].values():
                values.clear()
        _restore_logs(logs, state["logs"])


def save_last_step(trainer: "MentorGRPOTrainer", step_start: StepStart | None) -> None:
    """
    Save a checkpoint of the last finished optimizer step, for a run that is about to end with an error.

    Args:
        trainer ([`MentorGRPOTrainer`]):
            Trainer.
        step_start ([`StepStart`], *optional*):
            State to go back to, if a step was under way.
    """
    step = trainer.state.global_step
    if step == 0:
        return
    if step_start is not None and step_start.state is not None:
        step_start.restore()
    trainer._save_checkpoint(trainer.model, trial=None)
    folder = Path(trainer._get_output_dir(trial=None), f"checkpoint-{step}")
    mend = f"Resume it from {folder}."
    if trainer.args.save_only_model:
        mend = f"{folder} holds the model alone (`save_only_model`), which is not enough to resume."
    warnings.warn(f"The run ends here. {mend}", stacklevel=2)


def save_state(trainer: "MentorGRPOTrainer", folder: str) -> None:
    """
    Save, for each process, the guidance, the phase inside the rollout batch, and what is left of that batch.

    TRL keeps the phase (`_step`) and the generated batch in memory only, and samples the batch again on resuming; its
    metrics of a logging window that is under way would be lost as well.

    Args:
        trainer ([`MentorGRPOTrainer`]):
            Trainer.
        folder (`str`):
            Checkpoint folder.
    """
    generate_every = trainer.args.steps_per_generation * trainer.num_iterations
    logs = trainer.logs_by_mode["train"]
    state = {
        "guidance": trainer.guidance.state_dict(),
        "step": trainer._step,
        "num_processes": trainer.accelerator.num_processes,
        "epochs": int(trainer.state.epoch + 1e-6),
        "metrics": dict(trainer._metrics["train"]),
        "buffered_inputs": trainer._buffered_inputs if trainer._step % generate_every else None,
        "logs": None,
    }
    if trainer.log_completions:
        state["logs"] = {name: list(logs[name]) for name in _LOGS}
        state["logs"] |= {name: {key: _plain(values) for key, values in logs[name].items()} for name in _LOG_COLUMNS}
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(state, _path(folder, trainer.accelerator.process_index))


def load_state(trainer: "MentorGRPOTrainer", folder: str) -> None:
    """
    Restore what [`save_state`] saved.

    Args:
        trainer ([`MentorGRPOTrainer`]):
            Trainer, with its train dataloader made.
        folder (`str`):
            Checkpoint folder.

    Raises:
        `ValueError`: if the checkpoint holds the rest of a rollout batch of another number of processes.
    """
    rank, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    # Without a shared disk each node has the files of its own processes only
    path = next((path for path in (_path(folder, rank), _path(folder, 0)) if path.exists()), None)
    if path is None:
        warnings.warn(
            f"{folder} has no {_path(folder, rank).name}, so MentorGRPOTrainer did not save it: alpha and gamma start "
            "anew, and the rollouts of a batch that was under way are sampled again.",
            stacklevel=2,
        )
        return
    state = torch.load(path, map_location=trainer.accelerator.device, weights_only=True)
    if state["buffered_inputs"] is not None and state["num_processes"] != count:
        raise SetupError(
            f"{folder} was saved by {state['num_processes']} processes in the middle of a rollout batch, and there "
            f"are {count} now. Resume with {state['num_processes']} processes, or from a checkpoint at the end of a "
            "rollout batch."
        )
    trainer.guidance.load_state_dict(state["guidance"])
    if trainer.sampler is not None and trainer.sampler.expert is None and not trainer.guidance.over:
        raise SetupError(
            f"{folder} is from a time when rollouts were mixed, and this trainer has freed its expert since. Build a "
            "new trainer to go back."
        )
    trainer._step = state["step"]
    trainer._buffered_inputs = state["buffered_inputs"]
    trainer._metrics["train"] = defaultdict(list, state["metrics"])
    _skip_epochs(trainer.train_sampler, state["epochs"])
    if trainer.log_completions and state["logs"] is not None:
        _restore_logs(trainer.logs_by_mode["train"], state["logs"])


def _plain(value: Any) -> Any:
    """Reward functions log values of any type, and a checkpoint is read as plain data only."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _skip_epochs(sampler, epochs: int) -> None:
    """TRL's sampler draws a permutation an epoch, from a generator that a resumed run starts anew."""
    if getattr(sampler, "shuffle", False):
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def _restore_logs(logs: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in _LOGS:
        logs[name].extend(saved[name])
    for name in _LOG_COLUMNS:
        for column, values in saved[name].items():
            logs[name][column].extend(values)
