"""Which checkpoint a run goes on from, and whether it is whole."""

import json
import re
import struct
import warnings
import zipfile
from pathlib import Path

from ..errors import SetupError


STATE = "trainer_state.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "pytorch_model_fsdp*", "global_step*")
_PICKLED = ("*.pt", "*.pth", "*.bin")


def usable_checkpoint(given: str | bool | None, output_dir: str) -> str | bool | None:
    """
    The checkpoint to resume from: the given folder, or for `True` the newest whole one in `output_dir`, with a warning
    for each that is passed over; `None` where no checkpoint is whole, and what was given where there is none at all.

    Raises:
        [`SetupError`]: naming the file that is missing or cannot be read.
    """
    if isinstance(given, (str, Path)):
        problem = find_problem(given)
        if problem is not None:
            raise SetupError(f"The checkpoint {given} cannot be resumed: {problem}. Resume from another one.")
        return str(given)
    if given is not True:
        return given
    found = sorted(
        (int(match.group(1)), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    )
    for _, path in reversed(found):
        problem = find_problem(path)
        if problem is None:
            return str(path)
        warnings.warn(f"The checkpoint {path} is passed over: {problem}.", stacklevel=3)
    if found:
        warnings.warn(f"No checkpoint in {output_dir} is whole: the run starts from the beginning.", stacklevel=3)
        return None
    return given


def find_problem(folder: str | Path) -> str | None:
    """What keeps a checkpoint from being resumed: a file that was cut off while it was written, or is not there."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    # The Trainer writes it last
    if not (folder / STATE).exists():
        return f"{STATE} is missing, so it was not finished"
    for path in sorted(folder.glob("*.json")):
        problem = _problem_of_json(path)
        if problem is not None:
            return problem
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return "it holds no weights"
    for path in sorted(folder.glob("*.safetensors")):
        if not _is_whole_safetensors(path):
            return f"{path.name} is cut off"
    for path in sorted({path for pattern in _PICKLED for path in folder.glob(pattern)}):
        if path.name != "training_args.bin" and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None


def _problem_of_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read ({error})"
    if path.name.endswith(".index.json"):
        shards = sorted(set(content.get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (path.parent / shard).exists()]
        if missing:
            return f"{missing[0]} is missing, which {path.name} names"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    size = path.stat().st_size
    if size < 8:
        return False
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return size == 8 + length + end


def warn_of_missing(folder: str | Path, rank: int, num_processes: int) -> None:
    """Warn of files without which a resumed run goes on to other numbers."""
    folder = Path(folder)
    rng = "rng_state.pth" if num_processes == 1 else f"rng_state_{rank}.pth"
    parts = {"optimizer.pt": "the optimizer starts anew", "scheduler.pt": "the learning rate starts anew"}
    parts |= {rng: "random numbers differ from those of a run without a break"}
    sharded = any(any(folder.glob(pattern)) for pattern in ("global_step*", "optimizer_*", "pytorch_model_fsdp*"))
    for name, what in parts.items():
        if not (folder / name).exists() and not (sharded and name != rng):
            warnings.warn(f"The checkpoint {folder} has no {name}: {what}.", stacklevel=2)


def check_one_batch(dataset, generation_batch_size: int, num_generations: int) -> None:
    """
    Check that a dataset makes at least one rollout batch, of which every one is complete.

    Raises:
        [`SetupError`]: if it does not, in which case no step would be made.
    """
    needed = generation_batch_size // num_generations
    if hasattr(dataset, "__len__") and len(dataset) < needed:
        raise SetupError(
            f"`train_dataset` has {len(dataset)} prompts and a rollout batch takes {needed} "
            f"(`generation_batch_size={generation_batch_size}` rows of `num_generations={num_generations}` each), so "
            "no step would be made. Lower `per_device_train_batch_size`, `gradient_accumulation_steps` or "
            "`steps_per_generation`, or use more prompts."
        )


def check_expert_kept(gone: bool, checkpoint: str) -> None:
    """
    Raises:
        [`SetupError`]: if a checkpoint needs an expert that this trainer has freed.
    """
    if gone:
        raise SetupError(
            f"{checkpoint} is from a time when rollouts were mixed, and this trainer has freed its expert since. "
            "Build a new trainer to go back."
        )
