"""Writing a dataset: parquet files and a card, in the layout of a Hub repository, or a folder of `save_to_disk`."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading import DataError
from .account import Report
from .settings import OutputArguments


if TYPE_CHECKING:
    from datasets import DatasetDict


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
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise DataError(f"The output folder {path} cannot be made inside {above}; choose another `output_dir`")


def write_dataset(dataset: "DatasetDict", card: str, args: OutputArguments) -> list[str]:
    """
    Write a dataset and its card to a folder, to the Hub, or to both, and return where it is.

    The folder appears only when everything is in it.
    """
    check_output(args)
    target = Path(args.output_dir).expanduser() if args.output_dir else None
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target and target.parent, prefix=".mentor-trl-data-"))
    try:
        folder.chmod(0o755)
        if args.output_format == "arrow":
            dataset.save_to_disk(str(folder))
        else:
            for split, rows in dataset.items():
                rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
        (folder / "README.md").write_text(card, encoding="utf-8")
        if target is None:
            return [_upload(folder, args)]
        os.replace(folder, target)  # also over an empty folder
    except OSError as error:
        raise DataError(f"The dataset cannot be written to {folder.parent}: {error}; make room there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # The folder is in place by now: a failed upload loses nothing.
    return [str(target)] + ([_upload(target, args)] if args.push_to_hub else [])


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


_CARD = """---
{header}
---

# {title}

Made with [mentor_trl](https://huggingface.co/papers/2510.04140) for training with TRL:

```bash
{command}
```

Splits: {splits}. Columns of `{first}`: {columns}.

{options}

## What became of the rows

{report}
"""


def make_card(
    title: str, command: str, report: Report, dataset: "DatasetDict", args: Any, output: OutputArguments
) -> str:
    """Return the card: how the data were made (every option that has a value), and what became of every row."""
    from huggingface_hub import DatasetCardData

    files = [{"split": split, "path": f"data/{split}-*"} for split in dataset]
    configs = {"configs": [{"config_name": "default", "data_files": files}]}
    header = DatasetCardData(
        task_categories=["text-generation"],
        tags=["mentor-trl", "trl", "grpo"],
        **(configs if output.output_format == "parquet" else {}),
    )
    first = next(iter(dataset))
    options = {name: value for name, value in vars(args).items() if value not in (None, False, [])}
    return _CARD.format(
        header=header.to_yaml(),
        title=title,
        command=command,
        splits=", ".join(f"`{split}` ({len(rows):,} rows)" for split, rows in dataset.items()),
        first=first,
        columns=", ".join(f"`{column}`" for column in dataset[first].column_names),
        options="\n".join(f"- `{name}`: `{value}`" for name, value in options.items()),
        report=report.markdown(),
    )
