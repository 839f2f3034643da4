"""What goes to the Hub: the model and what tells about it, not the traces that training leaves beside it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from ..errors import SetupError


if TYPE_CHECKING:
    from ..config import MentorGRPOConfig


# `ConnectionError` is what the offline mode raises
HUB_ERRORS = (httpx.HTTPError, ConnectionError, LocalTokenNotFoundError, HFValidationError)
# Rollout records, and TRL's tables of completions
TRACES = ("rollouts", "completions")


def withheld(args: "MentorGRPOConfig", folder: str | Path) -> list[str]:
    """
    What stays behind when a folder of a run is pushed, beside what transformers leaves out.

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration. With a `hub_token` the file `training_args.bin`, which holds it, stays behind, too.
        folder (`str` or `Path`):
            Folder that is pushed: the output folder or a checkpoint. Nothing is withheld of folders elsewhere.

    Returns:
        `list[str]`: patterns for [`~huggingface_hub.HfApi.upload_folder`].
    """
    output, folder = Path(args.output_dir).resolve(), Path(folder).resolve()
    if not folder.is_relative_to(output):
        return []
    patterns = ["training_args.bin"] if args.hub_token else []
    if folder != output:
        return patterns
    traces = [output / name for name in TRACES]
    if args.vllm_weight_sync_dir is not None:
        traces.append(Path(args.vllm_weight_sync_dir).resolve())
    inside = [trace.relative_to(output).as_posix() for trace in traces if output in trace.parents]
    return [*patterns, *(f"{name}/*" for name in inside)]


@contextmanager
def model_files_only(args: "MentorGRPOConfig") -> Iterator[None]:
    """
    Leave out what [`withheld`] names while the Trainer pushes; its own list of exceptions is fixed.

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration.
    """
    upload = HfApi.upload_folder

    def upload_part(self, *, folder_path, ignore_patterns=None, **kwargs):
        given = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or [])
        patterns = [*given, *withheld(args, folder_path)] or None
        return upload(self, folder_path=folder_path, ignore_patterns=patterns, **kwargs)

    HfApi.upload_folder = upload_part
    try:
        yield
    finally:
        HfApi.upload_folder = upload


def make_repository(args: "MentorGRPOConfig") -> str:
    """
    Make the repository that a run pushes to, as the Trainer does once the models are loaded.

    Args:
        args ([`MentorGRPOConfig`]):
            Configuration.

    Returns:
        `str`: its id.

    Raises:
        [`SetupError`]: if the Hub cannot be reached or refuses.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        made = HfApi().create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True)
    except HUB_ERRORS as error:
        raise SetupError(
            f"`push_to_hub` is true, but the repository {name!r} cannot be made on the Hub: {one_line(error)}; log in "
            "(`hf auth login`), check `hub_model_id` and the connection, or set `push_to_hub` to false and push later"
        ) from error
    return made.repo_id


def one_line(error: Exception) -> str:
    """An error's text without line breaks; those of the Hub have several lines."""
    return " ".join(str(error).split()) or type(error).__name__


def is_hub_id(name: str) -> bool:
    """
    Whether a name is that of a repository rather than of a file or folder here.

    >>> [is_hub_id(name) for name in ("openai/gsm8k", "/data/train.jsonl", "./rows", "rows/train.jsonl", "a/b/c")]
    [True, False, False, False, False]
    """
    local = name.startswith((".", "~", "/")) or Path(name).suffix in (".json", ".jsonl", ".parquet", ".csv")
    return not local and name.count("/") <= 1 and not os.path.exists(name)
