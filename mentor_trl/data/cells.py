"""Which column of a dataset holds something, and what its cells say."""

import difflib
import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from mentor_trl.rewards.answers import extract_solution, gold_answer

from .loading import DataError


if TYPE_CHECKING:
    from datasets import Dataset


_DOLLAR = re.compile(r"(?<!\\)\$")


def answer_text(value: Any, where: str = "The answer") -> str | None:
    """
    Return what a cell says as text, or `None` where it says nothing. A list is all of its answers.

    >>> answer_text(27.0), answer_text(0.00001), answer_text(["3", 5]), answer_text(float("nan"))
    ('27', '0.00001', '3, 5', None)
    """
    if isinstance(value, (list, tuple)):
        parts = [answer_text(part, where) for part in value]
        return ", ".join(parts) if parts and all(parts) else None
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    if isinstance(value, dict):
        raise DataError(f"{where} is a record of {sorted(value)}; name one of its fields, as `column.field`")
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        kind = type(value).__name__
        raise DataError(f"{where} is {value!r:.100}, of type {kind}, not text or a number; write it as text")
    if value != value:
        return None
    if isinstance(value, float) and abs(value) >= 2**53:
        digits = "is no number" if math.isinf(value) else "may have lost digits"
        raise DataError(f"{where} is the float {value!r}, which {digits}; write it as text, in quotes")
    if isinstance(value, float):
        value = int(value) if value.is_integer() else Decimal(repr(value))
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def answer_of(value: Any, delimiter: str | None = None, where: str = "The answer") -> str | None:
    r"""
    Return the bare answer that a cell holds (see [`gold_answer`]), or what follows the last `delimiter`.

    >>> answer_of(27.0), answer_of(r"So it is $\boxed{\frac{1}{2}}$."), answer_of(["$3$", "5"]), answer_of("2 #### 2")
    ('27', '\\frac{1}{2}', '3, 5', '2')
    """
    if isinstance(value, (list, tuple)):
        value = [_DOLLAR.sub("", part) if isinstance(part, str) else part for part in value]
    text = answer_text(value, where)
    return (extract_solution(text or "", delimiter) or None) if delimiter else gold_answer(text)


def text_of(value: Any, where: str) -> str | None:
    """Return a cell that must be text, or `None` where it is empty."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where} is of type {type(value).__name__}, not text; write it as text")
    return value or None


def find_column(
    columns: list[str], names: tuple[str, ...], option: str, dataset: str, near: tuple[str, ...] = ()
) -> str:
    """Return the first of `names` that is a column; an error says which `option` to set, with `near` names first."""
    for name in names:
        if name in columns:
            return name
    found = [column for column in near if column in columns] or difflib.get_close_matches(names[0], columns)
    wanted = f"column '{names[0]}'" if len(names) == 1 else f"column named {' or '.join(names)}"
    example = f", for example --{option} {found[0]}" if found else ""
    raise DataError(
        f"There is no {wanted} in {dataset}, only {columns}; set `{option}` to the column that holds it{example}"
    )


def column_paths(dataset: "Dataset") -> list[str]:
    """Return the columns, and the fields of those that are records, as `column.field`."""
    first = next(iter(dataset))
    features = dataset.features or first

    def walk(name: str, feature: Any) -> list[str]:
        fields = feature.items() if isinstance(feature, dict) else []
        return [name, *(path for field, inner in fields for path in walk(f"{name}.{field}", inner))]

    # The fields of a `Json` column are known from its values alone.
    kinds = {name: kind if isinstance(kind, dict) else first[name] for name, kind in features.items()}
    return [path for name, kind in kinds.items() for path in walk(name, kind)]


def cell(row: dict[str, Any], path: str) -> Any:
    """Return the cell of a column or of a field, `column.field`; `None` where the record is not there."""
    if path in row or "." not in path:
        return row.get(path)
    column, _, field = path.partition(".")
    record = row.get(column)
    return cell(record, field) if isinstance(record, dict) else None


def widen(dataset: "Dataset", column: str) -> "Dataset":
    """Return the dataset with a column of short floats as the numbers that they stand for: 7.1, not 7.0999999."""
    from datasets import Value

    if getattr((dataset.features or {}).get(column), "dtype", None) not in ("float16", "float32"):
        return dataset
    return dataset.cast_column(column, Value("string")).cast_column(column, Value("float64"))
