"""
Grading of answers in worker processes that may hang, crash or run out of memory without harm to the training process.

math-verify hands text written by a language model to sympy. `9^{9^{9^{9}}}` keeps it busy forever, inside a C call
that no signal handler interrupts, and math-verify's own timeouts work on the main thread only. Here each answer has a
deadline after which its worker is killed and replaced. The workers are plain subprocesses: nothing is forked from a
process that holds a GPU, and no user script is imported a second time.
"""

import importlib.util
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path


MAX_DEFAULT_WORKERS = 4
START_TIMEOUT = 120.0
MAX_FAILED_STARTS = 3
CACHE_SIZE = 65536

Task = tuple[str, str, bool]  # gold answer, answer, whether the rules apply


@dataclass(frozen=True)
class Verdict:
    """
    Whether an answer is correct; `None` when its gold answer cannot be parsed. Where the verifier gave no verdict,
    `failure` is `"timeout"` or `"crash"`, and `correct` is `False`, or `None` if it did not get past the gold answer.
    """

    correct: bool | None
    failure: str | None = None


class _Worker:
    """One subprocess and the thread that moves its replies to a queue as `(worker, reply)`, `None` at the end."""

    def __init__(self, command: list[str], replies: queue.SimpleQueue):
        # Unbuffered pipes: a lock inside a buffer could stay held in a forked child. A session of its own: an
        # interrupt typed at the terminal is for the training process, which then closes its workers.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self.ready = False
        self.task: Task | None = None
        self.gold_parsed = False
        self.late = math.inf  # when its task has run for half of its time, so that a replacement starts
        self.deadline: float | None = time.monotonic() + START_TIMEOUT
        self._reader = threading.Thread(target=self._read, args=(replies,), daemon=True)
        self._reader.start()

    def _read(self, replies: queue.SimpleQueue) -> None:
        rest = b""
        while chunk := self.process.stdout.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                replies.put((self, json.loads(line)))
        replies.put((self, None))

    def send(self, task: Task, timeout: float) -> None:
        gold, answer, rules = task
        line = json.dumps({"gold": gold, "answer": answer, "rules": rules, "timeout": timeout}).encode() + b"\n"
        view = memoryview(line)
        while view:
            view = view[self.process.stdin.write(view) :]
        now = time.monotonic()
        self.task, self.gold_parsed, self.late, self.deadline = task, False, now + timeout / 2, now + timeout

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if threading.current_thread() is not self._reader:  # a collected grader is finalized on any thread
            self._reader.join()
        self.process.stdin.close()
        self.process.stdout.close()

    def forget(self) -> None:
        """Lets go of a worker that belongs to the parent of this forked process."""
        self.process.returncode = 0
        self.process.stdin.close()
        self.process.stdout.close()


@dataclass
class _Batch:
    """The state of one call of [`Grader.grade`]."""

    waiting: deque[Task]
    verdicts: dict[Task, Verdict]
    # Gold answers that brought a worker down: their other answers need not pay for it again.
    fatal_golds: dict[str, Verdict] = field(default_factory=dict)


class Grader(AbstractContextManager):
    r"""
    A pool of worker processes that compare answers with gold answers by math-verify.

    Workers start at the first call, stay until [`Grader.close`] or the end of the process, and are replaced when they
    hang, crash or grow. A pool serves any thread; calls from several threads take turns. A forked child starts workers
    of its own.

    `n` answers that hang add at most `ceil(n / num_workers)` rounds to a call. A round takes `timeout` seconds, and
    what the start of a worker takes beyond `timeout / 2`, which is when the replacement of one that hangs starts.

    `timeout` is for parsing one gold answer, and again for grading one answer; starting a worker does not count. There
    are as many workers as CPU cores, 4 at most, unless `num_workers` says otherwise. `memory_limit` bounds the address
    space of a worker in bytes, where the system can limit it; 0 is no limit.

    >>> with Grader() as grader:
    ...     grader.grade([(r"\frac{1}{2}", "0.5"), ("72", "9^{9^{9^{9}}}")])
    [Verdict(correct=True, failure=None), Verdict(correct=False, failure='timeout')]
    """

    def __init__(self, timeout: float = 5.0, num_workers: int | None = None, memory_limit: int = 1024**3):
        if timeout <= 0:
            raise ValueError(f"timeout must be positive, got {timeout}. Pass the seconds one answer may take.")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}.")
        self.timeout = timeout
        self.num_workers = num_workers or min(MAX_DEFAULT_WORKERS, os.cpu_count() or 1)
        self.command = [sys.executable, str(Path(__file__).with_name("grading_worker.py")), str(memory_limit)]
        self._cache: dict[Task, Verdict] = {}
        self._workers: list[_Worker] = []
        self._reset()
        _graders.add(self)
        # Also runs at the end of the process.
        weakref.finalize(self, _stop_workers, self._workers)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._replies: queue.SimpleQueue = queue.SimpleQueue()
        self._failed_starts = 0

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. A later call of [`Grader.grade`] starts new ones."""
        with self._lock:
            _stop_workers(self._workers)

    def grade(self, pairs: Iterable[tuple[str, str]], rules: bool = True) -> list[Verdict]:
        r"""
        Compares gold answers with answers, both without `\boxed{}`, by the rules of docs/grading.md or by math-verify
        alone; one verdict a pair, in their order.
        """
        tasks = [(gold, answer, rules) for gold, answer in pairs]
        with self._lock:
            verdicts = {task: self._cache[task] for task in tasks if task in self._cache}
            batch = _Batch(deque(task for task in dict.fromkeys(tasks) if task not in verdicts), verdicts)
            self._failed_starts = 0
            try:
                while batch.waiting or any(worker.task for worker in self._workers):
                    self._dispatch(batch)
                    self._collect(batch)
            finally:
                for worker in [worker for worker in self._workers if worker.task]:
                    self._drop(worker)
            # A failure may be the machine's fault, so that the same answer is tried again next time.
            self._cache |= {task: verdict for task, verdict in batch.verdicts.items() if verdict.failure is None}
            while len(self._cache) > CACHE_SIZE:
                del self._cache[next(iter(self._cache))]
            return [batch.verdicts[task] for task in tasks]

    def _dispatch(self, batch: _Batch) -> None:
        busy = [worker for worker in self._workers if worker.task is not None]
        late = sum(worker.late <= time.monotonic() for worker in busy)
        while len(self._workers) - late < min(self.num_workers, len(busy) - late + len(batch.waiting)):
            if importlib.util.find_spec("math_verify") is None:
                raise ImportError("Grading needs math-verify. Install it with `pip install math-verify`.")
            self._workers.append(_Worker(self.command, self._replies))
        idle = [worker for worker in self._workers if worker.ready and worker.task is None]
        for worker in idle[: self.num_workers - len(busy)]:
            while batch.waiting and batch.waiting[0][0] in batch.fatal_golds:
                task = batch.waiting.popleft()
                batch.verdicts[task] = batch.fatal_golds[task[0]]
            if not batch.waiting:
                return
            try:
                worker.send(batch.waiting[0], self.timeout)
                batch.waiting.popleft()
            except OSError:  # it died while idle, which is no answer's fault
                self._drop(worker)

    def _collect(self, batch: _Batch) -> None:
        now = time.monotonic()
        moments = [worker.deadline for worker in self._workers if worker.deadline is not None]
        moments += [worker.late for worker in self._workers if now < worker.late < math.inf]
        if not moments:
            return
        try:
            worker, reply = self._replies.get(timeout=max(0.0, min(moments) - now))
        except queue.Empty:
            now = time.monotonic()
            for worker in [worker for worker in self._workers if worker.deadline is not None]:
                if worker.deadline <= now:
                    self._fail(worker, "timeout", batch)
            return
        if worker not in self._workers:
            return
        if reply is None:
            self._fail(worker, "crash", batch)
        elif "ready" in reply:
            worker.ready, worker.deadline, self._failed_starts = True, None, 0
        elif "gold" in reply:
            worker.gold_parsed, worker.deadline = True, time.monotonic() + self.timeout
        else:
            batch.verdicts[worker.task] = Verdict(reply["correct"])
            worker.task, worker.late, worker.deadline = None, math.inf, None
            if reply["retire"]:
                self._drop(worker)

    def _fail(self, worker: _Worker, failure: str, batch: _Batch) -> None:
        task, ready = worker.task, worker.ready
        self._drop(worker)
        if not ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"The grading worker failed to start {MAX_FAILED_STARTS} times in a row. Its own error is above; "
                    f"run `{' '.join(self.command)} < /dev/null` to see it again."
                )
        elif task is not None:
            batch.verdicts[task] = Verdict(False if worker.gold_parsed else None, failure)
            if not worker.gold_parsed:
                batch.fatal_golds[task[0]] = batch.verdicts[task]

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.stop()

    def _after_fork(self) -> None:
        while self._workers:
            self._workers.pop().forget()
        self._reset()


def _stop_workers(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


_graders: "weakref.WeakSet[Grader]" = weakref.WeakSet()
_default: Grader | None = None


def get_grader() -> Grader:
    """The grader of this process that the reward functions use: that of [`set_grader`], or one with the defaults."""
    global _default
    if _default is None:
        _default = Grader()
    return _default


def set_grader(grader: Grader | None) -> Grader | None:
    """
    Makes the reward functions use another grader, or for `None` one with the defaults. The grader used so far is
    returned, and not closed.

    >>> previous = set_grader(Grader(timeout=10.0, num_workers=8))
    """
    global _default
    previous, _default = _default, grader
    return previous


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [grader._after_fork() for grader in list(_graders)])
