"""From a Hub id, a file or a folder to the splits of a dataset, and their columns; errors name the fix."""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SetupError


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_LONG = re.compile(r"-?\d{16,}")
_TYPES = f"{', '.join(FILE_FORMATS)}, or one of them compressed ({', '.join(COMPRESSIONS)})"


class DataError(SetupError):
    """A dataset or a data option cannot be used as it is; the message names the fix."""


def file_type(path: Path) -> str | None:
    """Return the ending that says how a file is read, without that of its compression, or `None`."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    return endings[-1] if endings and endings[-1] in FILE_FORMATS else None


def load_dataset_dict(name: str, config: str | None = None, streaming: bool = False) -> "DatasetDict":
    """
    Load every split of a dataset; a single file gives one, `train`.

    Args:
        name (`str`):
            Hub id, path of a `.json`, `.jsonl`, `.parquet`, `.csv` or `.tsv` file (also compressed, as `.jsonl.gz`),
            or path of a folder: one written by `save_to_disk`, or one that holds data files.
        config (`str`, *optional*):
            Configuration name of a Hub dataset.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream the rows instead of loading them.

    Raises:
        [`DataError`]: naming the file or folder that cannot be read, and the fix.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, config, streaming)
    ending = file_type(path)
    if path.is_file():
        if ending is None:
            raise DataError(f"{name}: files of type '{path.suffix}' cannot be read; use {_TYPES}")
        return _load_files({"train": [str(path)]}, streaming)
    where = f"working directory: {Path.cwd()}{_near(path)}"
    if ending or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"Dataset file or folder {name} does not exist ({where})")
    return read_dataset(
        lambda: _load_repository(name, config, streaming),
        f"There is no file or folder {name} ({where}), and the Hub dataset {name}",
        "check the Hub id, `dataset_config` and the connection, or give the path of a local file or folder",
    )


def _load_repository(name: str, config: str | None, streaming: bool) -> "DatasetDict":
    from datasets import load_dataset

    dataset = load_dataset(name, name=config, streaming=streaming)
    if not any(rows.info.builder_name == "csv" for rows in dataset.values()):
        return dataset
    # Read by pandas' defaults, the answers `None` and `N/A` are gone.
    return load_dataset(name, name=config, streaming=streaming, keep_default_na=False, na_values=[""])


def _near(path: Path) -> str:
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def _load_files(files: dict[str, list[str]], streaming: bool) -> "DatasetDict":
    from datasets import DatasetDict, IterableDatasetDict

    splits = {split: _load_split(paths, streaming) for split, paths in files.items()}
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def _load_split(paths: list[str], streaming: bool) -> "Dataset":
    from datasets import load_dataset

    name, kind = f"Dataset {', '.join(paths)}", FILE_FORMATS[file_type(Path(paths[0]))]
    fix = f"make it a valid {kind} file" if len(paths) == 1 else f"give its {kind} files the same columns"
    if kind == "json":
        read_dataset(lambda: _check_beginning(paths), name, fix)
    options = _csv_options(paths) if kind == "csv" else {}
    load = lambda: load_dataset(kind, data_files=paths, split="train", streaming=streaming, **options)
    rows = read_dataset(load, name, fix, paths if kind == "json" else [])
    if streaming or kind == "parquet":
        return rows
    return _with_numbers(rows) if kind == "csv" else _with_literals(rows, paths)


def _check_beginning(paths: list[str]) -> None:
    # Arrow's reader of JSON crashes the process where a file holds `null` alone.
    import fsspec

    for path in paths:
        with fsspec.open(path, "rb", compression="infer") as file:
            beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf").strip()
        if not beginning:
            raise ValueError("the file is empty, or begins with blank lines")
        if beginning[:1] not in b"{[":
            raise ValueError(f"it begins with {beginning[:20]!r}, and not with a JSON object or list")


def _with_literals(rows: "Dataset", paths: list[str]) -> "Dataset":
    """
    Make text of columns that hold numbers beside text, or integers that are too large, as each cell is written.

    `datasets` reads such a column as JSON in JSON, where the text `007` is 7 and `[1,2]` a list, or as floats.
    """
    import pyarrow.compute as pc
    from datasets import Json, Value

    def may_be_lost(name: str, feature: Any) -> bool:
        if getattr(feature, "dtype", None) != "float64":
            return isinstance(feature, Json)
        return (pc.max(pc.abs(rows.data.column(name))).as_py() or 0) >= 2**53

    names = [name for name, feature in rows.features.items() if may_be_lost(name, feature)]
    parsed = [row or {} for path in paths for row in _parse(path)] if names else []
    order = rows.column_names
    for name in names:
        cells = [row.get(name) for row in parsed]
        is_text = len(cells) == len(rows) and all(cell is None or isinstance(cell, str) for cell in cells)
        if is_text and (isinstance(rows.features[name], Json) or any(_LONG.fullmatch(cell or "") for cell in cells)):
            rows = rows.add_column("", cells, feature=Value("string")).remove_columns(name).rename_column("", name)
    return rows.select_columns(order)


def _parse(path: str) -> list[dict[str, Any]]:
    """Read a file of JSON with every number as the text that stands there."""
    import fsspec

    def load(text: str) -> Any:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda _: None)

    with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig") as file:
        text = file.read()
    return load(text) if text.lstrip().startswith("[") else [load(line) for line in text.split("\n") if line.strip()]


def _csv_options(paths: list[str]) -> dict[str, Any]:
    """All cells as text: `None`, `N/A` and numbers of many digits are what somebody wrote."""
    import pandas as pd
    from datasets import Features, Value

    separator = "\t" if file_type(Path(paths[0])) == ".tsv" else ","
    read = lambda: pd.read_csv(paths[0], sep=separator, header=None, nrows=2, dtype=str, encoding="utf-8-sig")
    header = read_dataset(read, f"Dataset {paths[0]}", "make it a valid csv file in UTF-8").iloc[0]
    columns = [f"Unnamed: {i}" if pd.isna(name) else name for i, name in enumerate(header)]  # as pandas calls them
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"Dataset {paths[0]} has the column '{twice}' twice; rename or remove one of them")
    other = next((mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]), None)
    if other is not None:
        raise DataError(
            f"Dataset {paths[0]} has the one column {columns[0]!r}, as its separator seems to be {other!r}; separate "
            "the columns by commas, or by tabs in a .tsv file"
        )
    features = Features({column: Value("string") for column in columns})
    return {"sep": separator, "keep_default_na": False, "na_values": [""], "features": features}


def _with_numbers(rows: "Dataset") -> "Dataset":
    """Make numbers of the columns of text that are numbers throughout, and stay what they are as text."""
    import pyarrow as pa
    from datasets import Value

    for name in rows.column_names:
        text = rows.data.column(name).cast(pa.string())
        for kind in ("int64", "float64"):
            try:
                same = text.cast(kind).cast(pa.string()).equals(text)
            except pa.ArrowInvalid:
                continue
            if same and text.null_count < len(text):
                rows = rows.cast_column(name, Value(kind))
                break
    return rows


def _load_folder(path: Path, config: str | None, streaming: bool) -> "DatasetDict":
    from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset_builder, load_from_disk

    name, fix = f"Dataset {path}", f"put data files of one type into it ({_TYPES}), or what `save_to_disk` writes"
    inside = read_dataset(lambda: sorted(entry for entry in path.rglob("*") if entry.is_file()), name, fix)
    entries = [entry.relative_to(path) for entry in inside]
    entries = [entry for entry in entries if not any(part.startswith(".") for part in entry.parts)]
    if not entries:
        raise DataError(f"Dataset folder {path} is empty; {fix}")
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        dataset = read_dataset(lambda: load_from_disk(str(path)), name, "write it again with `save_to_disk`")
        dataset = DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset
        if streaming:
            return IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in dataset.items()})
        return dataset
    if (path / "README.md").exists():  # the card of a cloned repository may declare configurations
        return read_dataset(lambda: _load_repository(str(path), config, streaming), name, fix)
    data = [entry for entry in entries if file_type(entry)]
    kinds = {"tsv" if file_type(entry) == ".tsv" else FILE_FORMATS[file_type(entry)]: str(entry) for entry in data}
    if not kinds:
        raise DataError(f"Dataset folder {path} holds no data file, only {entries[0]}; {fix}")
    if len(kinds) > 1:
        files = ", ".join(kinds.values())
        raise DataError(f"Dataset folder {path} holds files of several types ({files}); keep one type, or name a file")
    files = read_dataset(lambda: load_dataset_builder(str(path)).config.data_files, name, fix)
    return _load_files({str(split): list(map(str, paths)) for split, paths in files.items()}, streaming)


def read_dataset(load: Callable[[], Any], name: str, fix: str, paths: Sequence[str] = ()) -> Any:
    """Call `load`; whatever it raises becomes a [`DataError`] of one line, with the first bad line of `paths`."""
    # `datasets` raises a dozen unrelated types here (pyarrow, fsspec, Hub and builder errors).
    try:
        return load()
    except Exception as error:
        where = next(filter(None, map(_first_bad_json_line, paths)), None) or _cause(error.__cause__ or error)
        raise DataError(f"{name} cannot be read: {where}; {fix}") from error


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    if any(part in text for part in ("corresponds to no data", "No columns to parse", "BatchSize must be greater")):
        return "it has no rows"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text in UTF-8 ({text})"
    if "too big" in text:
        return f"it holds an integer of more than 64 bits, which must be text, in quotes ({text})"
    twice = re.search(r"Multiple matches for FieldRef\.Name\((.+?)\)", text)
    if twice:
        return f"it has the column '{twice[1]}' twice"
    return text if type(error) is ValueError and text else f"{type(error).__name__}: {text}"


def _first_bad_json_line(name: str) -> str | None:
    import fsspec

    path = Path(name)
    if file_type(path) != ".jsonl":
        return None
    with fsspec.open(name, "rt", compression="infer", encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except (json.JSONDecodeError, RecursionError) as error:
                return f"{path.name}: line {number} is not valid JSON ({error})"
            if not isinstance(row, dict):
                return f"{path.name}: line {number} is not a JSON object"
    return None


def select_split(dataset: "DatasetDict", split: str, option: str) -> "Dataset":
    """Return one split of a dataset; `option`, for the error message, is the option that names it."""
    if split not in dataset:
        splits = ", ".join(f"'{name}'" for name in dataset)
        raise DataError(f"The dataset has no split '{split}', only {splits}; set `{option}` to one of them")
    return dataset[split]
