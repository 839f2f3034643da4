"""What goes to the Hub: the model and what tells about it, not the traces that training leaves beside it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import transformers.trainer
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, LocalTokenNotFoundError

from ..config import MentorGRPOConfig
from ..errors import SetupError
from ..training.console import LOG_FILE
from .recipe import FILE


# `ConnectionError` is what the offline mode raises
HUB_ERRORS = (httpx.HTTPError, ConnectionError, LocalTokenNotFoundError, HFValidationError, LocalEntryNotFoundError)
# Rollout records, TRL's tables of completions, the log, and the recipe that names folders of this machine
TRACES = ("rollouts/*", "completions/*", LOG_FILE, FILE)


def withheld(args: MentorGRPOConfig, folder: str | Path) -> list[str]:
    """
    Patterns of what stays behind when a folder of a run is pushed, beside what transformers leaves out: in the output
    folder the traces of training, everywhere in it `training_args.bin` if that holds a `hub_token`.
    """
    output, folder = Path(args.output_dir).resolve(), Path(folder).resolve()
    if not folder.is_relative_to(output):
        return []
    patterns = ["training_args.bin"] if args.hub_token else []
    if folder != output:
        return patterns
    sync = Path(args.vllm_weight_sync_dir or "/").resolve()
    inside = [f"{sync.relative_to(output).as_posix()}/*"] if output in sync.parents else []
    return [*patterns, *TRACES, *inside]


class _RunApi(HfApi):
    """The Hub as the Trainer of a run sees it: what [`withheld`] names is not uploaded."""

    def __init__(self, args: MentorGRPOConfig):
        super().__init__(library_name="transformers", library_version=transformers.__version__)
        self.args = args

    def upload_folder(self, *, folder_path: str, ignore_patterns: list[str] | None = None, **kwargs: Any) -> Any:
        patterns = [*(ignore_patterns or []), *withheld(self.args, folder_path)] or None
        return super().upload_folder(folder_path=folder_path, ignore_patterns=patterns, **kwargs)


@contextmanager
def model_files_only(args: MentorGRPOConfig) -> Iterator[None]:
    """Leave out what [`withheld`] names while the Trainer pushes: the client that it takes from its module is ours."""
    shared = transformers.trainer.hf_api
    transformers.trainer.hf_api = lambda: _RunApi(args)
    try:
        yield
    finally:
        transformers.trainer.hf_api = shared


def make_repository(args: MentorGRPOConfig) -> str:
    """Make the repository that a run pushes to, as the Trainer does once the models are loaded; returns its id."""
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
