"""
The process that runs math-verify for [`~grading.Grader`].

It is started by file path and imports neither `mentor_trl` nor torch, so that it is ready in about a second. It reads
one JSON object a line on standard input (`gold`, `answer`, `timeout`) and writes two lines: `{"gold": true}` once the
gold answer is parsed, so that a hang can be blamed on the right side, then `correct` (null when the gold answer cannot
be parsed) and `retire`. It ends at the end of its input, hence with its parent.
"""

import json
import logging
import math
import os
import re
import signal
import sys
from contextlib import suppress
from functools import lru_cache


# Seconds beyond a task's own timeout after which a worker whose parent is gone ends itself.
ORPHAN_GRACE = 5.0
# math-verify rounds to six decimals, to which all numbers well below this one are the same.
TINY = 1e-3

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,},?\s+[A-Za-z]{2,},?\s+[A-Za-z]{2,}")
_BARE_POINT = re.compile(r"(?<=\d)\.(?=\s*(?:$|[/)\],;+*-]))")
_EXPONENT = re.compile(r"(?<![\w.])(\d+\.?\d*)[eE]([+-]?\d+)(?![\w.])")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def strip_delimiters(text: str) -> str:
    r"""
    Removes the math delimiters that enclose a whole answer.

    Example:
    ```python
    >>> strip_delimiters(r"$\frac43$")
    '\\frac43'
    >>> strip_delimiters("$a$ and $b$")
    '$a$ and $b$'
    ```
    """
    text = text.strip()
    for start, end in _DELIMITERS:
        inner = text[len(start) : len(text) - len(end)]
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end) and start not in inner:
            return inner.strip()
    return text


def as_text(answer: str) -> str:
    r"""
    Reduces an answer to its words, for a comparison that needs no mathematics.

    Example:
    ```python
    >>> as_text(r"\text{ Evelyn}.")
    'evelyn'
    ```
    """
    return " ".join(_TEXT.sub(r"\1", answer).split()).rstrip(".").casefold()


def is_prose(gold: str) -> bool:
    r"""
    Tells a sentence, in which math-verify has to look for the answer, from a bare answer.

    Example:
    ```python
    >>> is_prose("So the answer is 72"), is_prose(r"\text{two red balls}"), is_prose("72 dollars")
    (True, False, False)
    ```
    """
    return _PROSE.search(_TEXT.sub("", gold)) is not None


def _parse_boxed(answer: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    answer = _EXPONENT.sub(r"\1 \\times 10^{\2}", strip_delimiters(answer))  # `4.5e33`: to math-verify, Euler's number
    answer = _BARE_POINT.sub("", answer)  # `5.` and `1./3` are numbers, but not to math-verify
    # The answer goes back into a box because math-verify reads a bare `1,2` as the number 1.2 and no bare `\frac43`.
    return parse(rf"\boxed{{{answer}}}", extraction_config=[config], parsing_timeout=None)


@lru_cache(maxsize=1024)
def parse_gold(gold: str) -> tuple:
    r"""
    Parses a gold answer, given bare or inside a sentence.

    Args:
        gold (`str`):
            Gold answer, without its `\boxed{}`.

    Returns:
        `tuple`:
            What math-verify made of it; empty when it made nothing of it.
    """
    from math_verify import parse

    found = parse(gold, parsing_timeout=None) if is_prose(gold) else []
    found = found or _parse_boxed(gold)
    # A lone string is math-verify's fallback for LaTeX it could not read. Words are a gold answer all the same.
    if all(isinstance(item, str) for item in found) and not re.fullmatch(r"[^\W\d_][\w\s'.-]*", as_text(gold)):
        return ()
    return tuple(found)


def is_correct(gold: str, answer: str) -> bool:
    r"""
    Compares an answer with a gold answer that [`parse_gold`] can parse.

    Args:
        gold (`str`):
            Gold answer.
        answer (`str`):
            Content of the completion's last `\boxed{}`.

    Returns:
        `bool`:
            Whether they are the same text, or equal for math-verify.
    """
    from math_verify import verify

    if as_text(strip_delimiters(gold)) == as_text(strip_delimiters(answer)):
        return True
    gold_items, answer_items = list(parse_gold(gold)), _parse_boxed(answer)
    if not verify(gold_items, answer_items, timeout_seconds=None):
        return False
    value, other = _number(gold_items), _number(answer_items)
    if value is None or other is None or value == 0 or abs(value) >= TINY:
        return True
    return math.isclose(value, other, rel_tol=1e-6)


def _number(items: list) -> float | None:
    try:
        return float(items[0])
    except (IndexError, TypeError, ValueError, OverflowError):
        return None


def _limit_resources(memory_limit: int) -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_limit > 0:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = memory_limit if hard == resource.RLIM_INFINITY else min(memory_limit, hard)
        with suppress(ValueError, OSError):  # macOS refuses
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _is_bloated(memory_limit: int) -> bool:
    # Not ru_maxrss: on Linux a new process inherits it from the one that started it, here the training process.
    try:
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return False
    return 0 < memory_limit < 2 * size


def _arm_alarm(seconds: float) -> None:
    # The default action of SIGALRM ends the process even inside a C call that never returns to the interpreter.
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _serve(memory_limit: int) -> None:
    # Whatever the libraries print must not reach the protocol.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _limit_resources(memory_limit)

    import math_verify  # noqa: F401  # imported before the first task, so that no task pays for it

    logging.disable(logging.CRITICAL)
    _parse_boxed("1")
    replies.write('{"ready": true}\n')
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)

    for line in sys.stdin:
        task = json.loads(line)
        _arm_alarm(2 * task["timeout"] + ORPHAN_GRACE)
        usable = bool(parse_gold(task["gold"]))
        replies.write('{"gold": true}\n')
        correct = is_correct(task["gold"], task["answer"]) if usable else None
        _arm_alarm(0)
        # A worker that once grew large may fail answers for want of memory: it retires before it can.
        retire = _is_bloated(memory_limit)
        replies.write(json.dumps({"correct": correct, "retire": retire}) + "\n")
        if retire:
            break


if __name__ == "__main__":
    # The script's own folder would put this package's module names before everybody else's.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    _serve(int(sys.argv[1]))
