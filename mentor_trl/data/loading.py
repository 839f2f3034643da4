"""From a Hub id, a file or a folder to the splits of a dataset; what cannot be read is named with its fix."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SetupError


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class DataError(SetupError):
    """A dataset or a data option cannot be used as it is; the message names the fix."""


def is_data_file(path: Path) -> bool:
    """Whether the name of a file says that it is read here."""
    return path.suffix.lower() in FILE_FORMATS


def load_dataset_dict(name: str, config: str | None = None, streaming: bool = False) -> "DatasetDict":
    """
    Load every split of a dataset.

    Args:
        name (`str`):
            Hub id, path of a `.json`, `.jsonl`, `.parquet` or `.csv` file, or path of a folder: one written by
            `save_to_disk`, or one that holds data files.
        config (`str`, *optional*):
            Configuration name of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream the rows instead of loading them.

    Returns:
        [`~datasets.DatasetDict`]: the splits. A single file gives one split, `train`.

    Raises:
        [`DataError`]: naming the file or folder that cannot be read, and the fix.
    """
    from datasets import load_dataset

    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, config, streaming)
    file_format = FILE_FORMATS.get(path.suffix.lower())
    if path.is_file():
        if file_format is None:
            raise DataError(f"{name}: files of type '{path.suffix}' cannot be read; use one of {sorted(FILE_FORMATS)}")
        load = lambda: load_dataset(file_format, data_files={"train": str(path)}, streaming=streaming)
        return read(load, name, f"make it a valid {file_format} file", path=path if file_format == "json" else None)
    if file_format or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"Dataset file or folder {name} does not exist (working directory: {Path.cwd()})")
    return read(
        lambda: load_dataset(name, name=config, streaming=streaming),
        name,
        "check the Hub id, `dataset_config` and the connection, or give the path of a local file or folder",
    )


def _load_folder(path: Path, config: str | None, streaming: bool) -> "DatasetDict":
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if not any(path.iterdir()):
        raise DataError(f"Dataset folder {path} is empty; put data files ({', '.join(FILE_FORMATS)}) into it")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        dataset = read(lambda: load_from_disk(str(path)), path, "write it again with `save_to_disk`")
        dataset = DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset
        return dataset if not streaming else DatasetDict({k: v.to_iterable_dataset() for k, v in dataset.items()})
    # The card of a cloned repository declares configurations; a plain folder of files has none.
    config = config if (path / "README.md").exists() else None
    return read(
        lambda: load_dataset(str(path), name=config, streaming=streaming),
        path,
        f"put data files of one type ({', '.join(FILE_FORMATS)}) into it, or a folder written by `save_to_disk`",
    )


def read(load: Callable[[], Any], name: str | Path, fix: str, path: Path | None = None) -> Any:
    """Call `load`; whatever it raises becomes a [`DataError`] of one line that names the dataset and the fix."""
    # `datasets` raises a dozen unrelated types here (pyarrow, fsspec, Hub and builder errors).
    try:
        return load()
    except Exception as error:
        where = _first_bad_json_line(path) if path else ""
        cause = error.__cause__ or error
        raise DataError(f"Dataset {name} cannot be read: {where or _first_line(cause)}; {fix}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _first_bad_json_line(path: Path) -> str:
    if path.stat().st_size == 0:
        return "the file is empty"
    if path.suffix.lower() != ".jsonl":
        return ""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"line {number} is not valid JSON ({error})"
            if not isinstance(row, dict):
                return f"line {number} is not a JSON object"
    return ""


def select_split(dataset: "DatasetDict", split: str, option: str) -> "Dataset":
    """
    Return one split of a dataset.

    Args:
        dataset ([`~datasets.DatasetDict`]):
            The splits.
        split (`str`):
            Name of the split.
        option (`str`):
            Name of the option that `split` comes from, for the error message.
    """
    if split not in dataset:
        splits = ", ".join(f"'{name}'" for name in dataset)
        raise DataError(f"The dataset has no split '{split}', only {splits}; set `{option}` to one of them")
    return dataset[split]


def find_column(
    columns: list[str], names: tuple[str, ...], option: str, dataset: str, near: tuple[str, ...] = ()
) -> str:
    """
    Return the first of `names` that is a column.

    Args:
        columns (`list[str]`):
            Columns that there are.
        names (`tuple[str, ...]`):
            Names that the column may have.
        option (`str`):
            Option that names the column, for the error message.
        dataset (`str`):
            What the error message calls the dataset.
        near (`tuple[str, ...]`, *optional*):
            Usual names, which the error message proposes.

    Raises:
        [`DataError`]: naming the columns that there are and the option to set.
    """
    for name in names:
        if name in columns:
            return name
    found = [column for column in near if column in columns] or difflib.get_close_matches(names[0], columns)
    wanted = f"column '{names[0]}'" if len(names) == 1 else f"column named {' or '.join(names)}"
    example = f", for example --{option} {found[0]}" if found else ""
    raise DataError(
        f"There is no {wanted} in {dataset}, only {columns}; set `{option}` to the column that holds it{example}"
    )
