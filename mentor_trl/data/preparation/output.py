"""Writing a data set: parquet files and a card, in the layout of a Hub repository, or a folder of `save_to_disk`."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mentor_trl.data.loading import DataError

from .report import Report


if TYPE_CHECKING:
    from datasets import DatasetDict

SHARD_BYTES = 500 * 1000**2


@dataclass
class OutputArguments:
    """
    Arguments about where a data set goes.

    Args:
        output_dir (`str`, *optional*):
            Folder to make.
        output_format (`str`, *optional*, defaults to `"parquet"`):
            `parquet` is the layout of a Hub repository, for `load_dataset` and `mentor-trl train`; `arrow` is that of
            `save_to_disk`, for `load_from_disk` and `mentor-trl train`.
        push_to_hub (`str`, *optional*):
            Id of the Hub dataset to upload to.
        private (`bool`, *optional*, defaults to `False`):
            Whether a Hub dataset that is made anew is private.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder to make."})
    output_format: Literal["parquet", "arrow"] = field(
        default="parquet",
        metadata={
            "help": "`parquet` is the layout of a Hub repository, for `load_dataset` and `mentor-trl train`; `arrow` "
            "is that of `save_to_disk`, for `load_from_disk` and `mentor-trl train`."
        },
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Id of the Hub dataset to upload to."})
    private: bool = field(default=False, metadata={"help": "Whether a Hub dataset that is made anew is private."})


def check_output(args: OutputArguments) -> None:
    """Refuse an output that cannot be written, before any work is done."""
    if not args.output_dir and not args.push_to_hub:
        raise DataError("No output is given; set `output_dir` to a new folder, `push_to_hub` to a Hub id, or both")
    if args.push_to_hub and args.output_format != "parquet":
        raise DataError("`push_to_hub` uploads parquet; leave `output_format` at parquet")
    if args.output_dir:
        path = Path(args.output_dir).expanduser()
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise DataError(f"The output folder {path} already exists; choose another `output_dir`, or remove it")


def write_dataset(dataset: "DatasetDict", card: str, args: OutputArguments) -> list[str]:
    """
    Write a data set to a folder, to the Hub, or to both.

    Args:
        dataset ([`~datasets.DatasetDict`]):
            The splits.
        card (`str`):
            Text of its card, without the YAML header.
        args ([`OutputArguments`]):
            Where it goes. The folder appears only when everything is in it.

    Returns:
        `list[str]`: where it is now.
    """
    check_output(args)
    target = Path(args.output_dir).expanduser() if args.output_dir else None
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    places = []
    with _new_folder(target.parent if target else None) as folder:
        _write_files(dataset, folder, args.output_format)
        header = _header(dataset, args.output_format)
        (folder / "README.md").write_text(f"---\n{header}\n---\n\n{card}", encoding="utf-8")
        if target is not None:
            if target.exists():
                target.rmdir()
            os.replace(folder, target)
            places.append(str(target))
        # The folder is in place by now: a failed upload loses nothing.
        if args.push_to_hub:
            places.append(_upload(target or folder, args))
    return places


@contextmanager
def _new_folder(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=".mentor-trl-data-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_files(dataset: "DatasetDict", folder: Path, output_format: str) -> None:
    if output_format == "arrow":
        dataset.save_to_disk(str(folder))
        return
    (folder / "data").mkdir()
    for split, rows in dataset.items():
        shards = max(1, math.ceil(rows.data.nbytes * len(rows) / max(1, rows.data.num_rows) / SHARD_BYTES))
        for index in range(shards):
            name = f"{split}-{index:05d}-of-{shards:05d}.parquet"
            rows.shard(shards, index, contiguous=True).to_parquet(str(folder / "data" / name))


def _header(dataset: "DatasetDict", output_format: str) -> str:
    from huggingface_hub import DatasetCardData

    options = {}
    if output_format == "parquet":
        files = [{"split": split, "path": f"data/{split}-*"} for split in dataset]
        options["configs"] = [{"config_name": "default", "data_files": files}]
    data = DatasetCardData(task_categories=["text-generation"], tags=["mentor-trl", "trl", "grpo"], **options)
    return data.to_yaml()


def _upload(folder: Path, args: OutputArguments) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(args.push_to_hub, repo_type="dataset", private=args.private or None, exist_ok=True)
        api.upload_folder(
            repo_id=args.push_to_hub,
            repo_type="dataset",
            folder_path=str(folder),
            commit_message="Upload dataset made with mentor-trl data",
            delete_patterns=["data/*"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(
            f"The data could not be uploaded to `push_to_hub` {args.push_to_hub!r}: {error}; log in with `hf auth "
            "login`, check the id, or give `output_dir` alone"
        ) from error
    return f"https://huggingface.co/datasets/{args.push_to_hub}"


def make_card(title: str, command: str, report: Report, dataset: "DatasetDict", notes: list[str]) -> str:
    """
    Return the text of the card: how the data were made, and what became of every row.

    Args:
        title (`str`):
            Title.
        command (`str`):
            The command line.
        report ([`~mentor_trl.data.preparation.report.Report`]):
            The counts.
        dataset ([`~datasets.DatasetDict`]):
            The splits.
        notes (`list[str]`):
            Sources and filters, one a line.
    """
    splits = ", ".join(f"`{split}` ({len(rows):,} rows)" for split, rows in dataset.items())
    columns = ", ".join(f"`{column}`" for column in dataset["train"].column_names)
    return "\n".join(
        [
            f"# {title}",
            "",
            "Made with [mentor_trl](https://huggingface.co/papers/2510.04140) for training with TRL:",
            "",
            "```bash",
            command,
            "```",
            "",
            f"Splits: {splits}. Columns of `train`: {columns}.",
            "",
            *[f"- {note}" for note in notes],
            "",
            "## What became of the rows",
            "",
            report.markdown(),
            "",
        ]
    )
