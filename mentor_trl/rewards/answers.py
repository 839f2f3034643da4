"""Where the answer stands: in a completion, and in the solution column of a dataset."""

import re
from typing import Any


THINK_START, THINK_END = "<think>", "</think>"

_THOUSANDS = re.compile(r"[-+]?\$?\d{1,3}(,\d{3})+(\.\d+)?%?")
# Braces that delimit: `\{`, `\}` and the line break `\\` are skipped, but `\\boxed{` (an escaped backslash) is a box.
# Without braces the box holds a number, a command or a symbol; in "the \boxed asked for" it is a word about boxes.
_BRACES = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)"
    r"|\\(?:boxed|fbox)\s+(?P<bare>[+-]?[\d.][^\s{}$]*|\\(?!boxed|fbox)[A-Za-z]+[^\s$]*|[B-HJ-Zb-z](?![A-Za-z]))"
    r"|\\(?:\\(?!boxed|fbox)|[{}])"
    r"|(?P<open>\{)|(?P<close>\})"
)


def extract_boxed(text: str) -> str | None:
    r"""
    Returns the content of the last complete box of a text that is not empty.

    Args:
        text (`str`):
            Text to search for `\boxed{...}`, `\fbox{...}` and `\boxed 5`. A box that is never closed, as in a
            truncated completion, is passed over.

    Returns:
        `str`, *optional*:
            The content, stripped, or `None` when there is no such box.

    Example:
    ```python
    >>> from mentor_trl.rewards import extract_boxed

    >>> extract_boxed(r"First \boxed{1}, then \boxed{\frac{4}{3}}.")
    '\\frac{4}{3}'
    ```
    """
    last_start, content = -1, None
    opened: list[tuple[int, int] | None] = []  # start of the box and of its content; None for a brace of its own
    for match in _BRACES.finditer(text):
        if match["box"]:
            opened.append((match.start(), match.end()))
        elif match["bare"]:
            if match.start() > last_start:
                last_start, content = match.start(), match["bare"].rstrip(".,;:")
        elif match["open"]:
            opened.append(None)
        elif match["close"] and opened:
            box = opened.pop()
            if box is not None and box[0] > last_start and text[box[1] : match.start()].strip():
                last_start, content = box[0], text[box[1] : match.start()].strip()
    return content


def completion_text(completion: str | list[dict]) -> str:
    """Returns what the assistant says as one string, with reasoning that TRL has parsed out of it put back."""
    if isinstance(completion, str):
        return completion
    parts = []
    for message in completion:
        if message.get("role", "assistant") != "assistant":
            continue
        reasoning = message.get("reasoning_content") or message.get("thinking")
        if reasoning:
            parts.append(f"{THINK_START}{reasoning}{THINK_END}")
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "".join(block.get("text") or "" for block in content)
        parts.append(content)
    return "".join(parts)


def final_answer(text: str) -> str | None:
    r"""Returns what the last `\boxed{}` after the last `</think>` holds, or `None` when there is none."""
    return extract_boxed(text.rpartition(THINK_END)[2])


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


def gold_answer(solution: Any) -> str | None:
    r"""
    Returns the bare answer of a cell of a solution column: an answer as text or number, a list of answers, a worked
    solution that ends in `\boxed{}`, or one in GSM8K's notation, which ends in `#### 72`.

    >>> gold_answer(27.0), gold_answer(r"So it is $\boxed{\frac{1}{2}}$."), gold_answer(["3", "5"]), gold_answer(" ")
    ('27', '\\frac{1}{2}', '3, 5', None)
    """
    if isinstance(solution, (list, tuple)):
        parts = [gold_answer(part) for part in solution]
        return ", ".join(parts) if parts and all(parts) else None
    if solution is None or isinstance(solution, bool):
        return None
    if isinstance(solution, float) and solution.is_integer():
        solution = int(solution)
    text = str(solution)
    boxed = final_answer(text)
    if boxed is not None or "\\boxed" in text:
        return boxed
    after_mark = extract_solution(text, "####")
    return (text.strip() if after_mark is None else after_mark) or None


def is_gradable(gold: str) -> bool:
    r"""
    Whether anything could equal a gold answer: it says something, and its braces close.

    >>> is_gradable("No solution"), is_gradable("???"), is_gradable(r"\frac{1}{")
    (True, False, False)
    """
    depth = 0
    for brace in re.findall(r"\\[{}]|[{}]", gold):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0 and any(one.isalnum() or one in "∅\\" for one in gold)
