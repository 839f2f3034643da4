"""What the cell of an answer column says."""

import re
from typing import Any


_THOUSANDS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?%?")


def extract_solution(text: str, delimiter: str) -> str | None:
    """
    Return what follows the last `delimiter` in `text`, or `None` where there is none.

    >>> extract_solution("She sold 24 + 1,000 clips. #### 1,024", "####")
    '1024'
    >>> extract_solution("The pair is #### (1,024)", "####")
    '(1,024)'
    """
    _, found, solution = text.rpartition(delimiter)
    if not found:
        return None
    solution = solution.strip()
    return solution.replace(",", "") if _THOUSANDS.fullmatch(solution) else solution


def answer_text(value: Any) -> str | None:
    """
    Return what a cell says as text, or `None` where it says nothing.

    >>> answer_text(27.0), answer_text(["3", 5]), answer_text(" ")
    ('27', '3, 5', None)
    """
    if isinstance(value, (list, tuple)):
        parts = [answer_text(part) for part in value]
        return ", ".join(parts) if parts and all(parts) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or isinstance(value, bool):
        return None
    return str(value).strip() or None
