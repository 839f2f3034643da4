"""
The process that runs math-verify for [`~grading.Grader`].

It is started by file path and imports neither `mentor_trl` nor torch, so that it is ready in about a second. It reads
one JSON object a line on standard input (`gold`, `answer`, `rules`, `timeout`) and writes two lines: `{"gold": true}`
once the gold answer is parsed, so that a hang can be blamed on the right side, then `correct` (null when the gold
answer cannot be parsed) and `retire`. It ends at the end of its input, hence with its parent.
"""

import json
import logging
import os
import signal
import sys
import types
from contextlib import suppress


if not __package__:  # started by path: a package of its own, without the modules above it
    __package__ = "mentor_grading"
    sys.modules[__package__] = types.ModuleType(__package__)
    sys.modules[__package__].__path__ = [os.path.dirname(os.path.abspath(__file__))]

# Seconds beyond a task's own timeout after which a worker whose parent is gone ends itself.
ORPHAN_GRACE = 5.0


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

    from .comparison import is_correct, is_correct_to_math_verify, parse, parse_gold

    logging.disable(logging.CRITICAL)
    parse("1")
    replies.write('{"ready": true}\n')
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)

    for line in sys.stdin:
        task = json.loads(line)
        _arm_alarm(2 * task["timeout"] + ORPHAN_GRACE)
        usable = bool(parse_gold(task["gold"]))
        replies.write('{"gold": true}\n')
        compare = is_correct if task["rules"] else is_correct_to_math_verify
        correct = compare(task["gold"], task["answer"]) if usable else None
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
