import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from mentor_trl.rewards import grading, grading_worker
from mentor_trl.rewards.grading import Grader, Verdict


TRUE, FALSE = Verdict(True), Verdict(False)
posix = pytest.mark.skipif(os.name != "posix", reason="signals and fork are POSIX")

# Speaks the protocol without math-verify: an answer that begins with "!" is Python for the worker to run.
SCRIPTED_WORKER = """
import json, os, signal, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if task["gold"].startswith("!"):
        exec(task["gold"][1:])
    print(json.dumps({"gold": True}), flush=True)
    if task["answer"].startswith("!"):
        exec(task["answer"][1:])
    print(json.dumps({"correct": task["gold"] == task["answer"], "retire": task["answer"] == "retire"}), flush=True)
"""


@pytest.fixture
def scripted(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(SCRIPTED_WORKER)
    with Grader(timeout=1.0, num_workers=2) as grader:
        grader.command = [sys.executable, str(path)]
        yield grader


def pids(grader):
    return [worker.process.pid for worker in grader._workers]


@pytest.mark.parametrize("fault, failure", [("!time.sleep(60)", "timeout"), ("!os._exit(3)", "crash")])
def test_a_failure_costs_one_verdict_and_keeps_the_order(scripted, fault, failure):
    pairs = [(str(i), fault if i % 7 == 3 else str(i // 2 * 2)) for i in range(20)]
    expected = [Verdict(False, failure) if i % 7 == 3 else Verdict(i % 2 == 0) for i in range(20)]
    assert scripted.grade(pairs) == expected


@posix
def test_a_killed_worker_is_replaced(scripted):
    kill = "!os.kill(os.getpid(), signal.SIGKILL)"
    assert scripted.grade([("1", kill), ("2", "2")]) == [Verdict(False, "crash"), TRUE]
    assert scripted.grade([("3", "3"), ("4", "5")]) == [TRUE, FALSE]


@posix
def test_a_worker_killed_while_idle_fails_no_answer(scripted):
    assert scripted.grade([("1", "1"), ("2", "2")]) == [TRUE, TRUE]
    for worker in scripted._workers:
        worker.process.kill()
        worker.process.wait()
    assert scripted.grade([("3", "3"), ("4", "5")]) == [TRUE, FALSE]


@pytest.mark.parametrize("fault, failure", [("!time.sleep(60)", "timeout"), ("!os._exit(3)", "crash")])
def test_a_fatal_gold_answer_is_paid_for_once_a_worker(scripted, fault, failure, tmp_path):
    log = tmp_path / "log"
    gold = f"!open({str(log)!r}, 'a').write('x'); {fault[1:]}"
    verdicts = scripted.grade([(gold, str(i)) for i in range(40)] + [("1", "1")])
    assert verdicts == [Verdict(None, failure)] * 40 + [TRUE]
    assert len(log.read_text()) <= scripted.num_workers


def test_repeated_pairs_are_graded_once_but_failures_are_tried_again(scripted, tmp_path):
    log = tmp_path / "log"
    note = f"!open({str(log)!r}, 'a').write('x')"
    assert scripted.grade([("1", note)] * 5) == [FALSE] * 5
    assert scripted.grade([("1", note)]) == [FALSE]
    assert log.read_text() == "x"
    crash = f"{note}; os._exit(3)"
    for _ in range(2):
        assert scripted.grade([("1", crash)] * 5) == [Verdict(False, "crash")] * 5
    assert log.read_text() == "xxx"


def test_a_retiring_worker_is_replaced_without_loss(scripted):
    scripted.num_workers = 1
    assert scripted.grade([("1", "1")]) == [TRUE]
    before = pids(scripted)
    assert scripted.grade([("retire", "retire"), ("2", "2")]) == [TRUE, TRUE]
    assert len(pids(scripted)) == 1 and pids(scripted) != before


def test_the_cache_is_bounded(scripted, monkeypatch):
    monkeypatch.setattr(grading, "CACHE_SIZE", 3)
    scripted.grade([(str(i), "0") for i in range(10)])
    assert len(scripted._cache) == 3


def test_threads_take_turns(scripted):
    results = {}

    def work(index):
        results[index] = scripted.grade([(f"{index}.{i}", f"{index}.{i * (i % 2)}") for i in range(30)])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {index: [Verdict(i % 2 == 1 or i == 0) for i in range(30)] for index in range(4)}


def test_an_interrupted_call_leaves_no_busy_worker(scripted, monkeypatch):
    def interrupt(batch):
        raise KeyboardInterrupt

    assert scripted.grade([("1", "1"), ("2", "2")]) == [TRUE, TRUE]
    with monkeypatch.context() as patch:
        patch.setattr(scripted, "_collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scripted.grade([("3", "!time.sleep(60)"), ("4", "4")])
    assert not any(worker.task for worker in scripted._workers)
    assert scripted.grade([("5", "6"), ("7", "8")]) == [FALSE, FALSE]


def test_a_worker_that_never_starts_is_an_error_not_a_reward(scripted):
    scripted.command = [sys.executable, "-c", "raise SystemExit(1)"]
    with pytest.raises(RuntimeError, match="failed to start"):
        scripted.grade([("1", "1")])


def test_a_slow_start_is_no_timeout(scripted):
    path = scripted.command[1]
    with open(path) as file:
        source = file.read()
    with open(path, "w") as file:
        file.write("import time; time.sleep(2)\n" + source)
    assert scripted.grade([("1", "1")]) == [TRUE]


def test_missing_math_verify_names_the_mend(monkeypatch):
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        Grader().grade([("1", "1")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grader(**arguments)


@posix
@pytest.mark.parametrize("end", ["close", "forget"])
def test_no_process_is_left(scripted, end):
    scripted.grade([(str(i), "!time.sleep(60)" if i == 0 else "0") for i in range(8)])
    started = pids(scripted)
    assert started
    if end == "close":
        scripted.close()
        assert scripted._workers == []
    else:
        other = Grader(num_workers=1)
        other.grade([("1", "1")])
        started = pids(other)
        del other
    for pid in started:
        with pytest.raises(ProcessLookupError):  # a zombie would still be found
            os.kill(pid, 0)


@posix
def test_a_forked_child_has_workers_of_its_own(scripted):
    assert scripted.grade([("1", "1"), ("2", "2")]) == [TRUE, TRUE]
    before = pids(scripted)
    child = os.fork()
    if child == 0:
        try:
            fine = scripted.grade([("3", "3"), ("4", "5")]) == [TRUE, FALSE] and not set(before) & set(pids(scripted))
            scripted.close()
            os._exit(0 if fine else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert scripted.grade([("6", "6"), ("7", "8")]) == [TRUE, FALSE]
    assert pids(scripted) == before


@pytest.fixture(scope="module")
def grader():
    with Grader(timeout=2.0, num_workers=2) as grader:
        yield grader


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "99999999!", r"\binom{10^{9}}{5\cdot 10^8}", "{" * 100_000])
def test_answers_that_hang_math_verify(grader, answer):
    assert grader.grade([("72", "72.0"), ("72", answer), ("72", "71")]) == [TRUE, Verdict(False, "timeout"), FALSE]


def test_a_full_batch_keeps_its_order(grader):
    pairs = [(str(i), rf"\frac{{{2 * i + (i % 3 == 0)}}}{{2}}") for i in range(512)]
    assert grader.grade(pairs) == [Verdict(i % 3 != 0) for i in range(512)]


def test_any_text_survives_the_protocol(grader):
    answers = ["a\nb", "\ud800", "\x00", '"}', "é", " "]
    assert grader.grade([("72", answer) for answer in answers]) == [FALSE] * len(answers)


def test_memory_is_bounded():
    limit = 600 * 1024**2
    with Grader(timeout=20.0, num_workers=1, memory_limit=limit) as small:
        assert small.grade([("72", "72.0")]) == [TRUE]
        if not os.path.exists("/proc/self/limits"):
            pytest.skip("needs /proc")
        with open(f"/proc/{small._workers[0].process.pid}/limits") as limits:
            line = next(line for line in limits if line.startswith("Max address space"))
        assert int(line.split()[3]) == limit


def test_a_bloated_worker_says_so():
    assert grading_worker._is_bloated(0) is False
    if os.path.exists("/proc/self/statm"):
        assert grading_worker._is_bloated(1)
        assert not grading_worker._is_bloated(2**60)


def run_python(source, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=120, **kwargs
    )


def test_the_worker_imports_neither_torch_nor_this_package():
    done = run_python(
        f"""
        import runpy, sys
        worker = runpy.run_path({grading_worker.__file__!r})
        assert worker["is_correct"]("72", "72.0")
        loaded = {{name.partition(".")[0] for name in sys.modules}}
        print(sorted(loaded & {{"torch", "transformers", "trl", "mentor_trl"}}))
        """
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_script_without_main_guard_ends_cleanly():
    done = run_python(
        """
        import sys
        from mentor_trl.rewards.grading import Grader
        print("once", Grader(num_workers=2).grade([("72", "72.0"), ("1", "2")]))
        print(sys.stdin.read())
        """,
        input="untouched",
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [f"once {[TRUE, FALSE]}", "untouched"]


@posix
def test_workers_end_when_their_parent_is_killed():
    done = run_python(
        """
        import os, signal
        from mentor_trl.rewards.grading import Grader
        grader = Grader(num_workers=1)
        grader.grade([("72", "72.0")])
        print(grader._workers[0].process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert done.returncode == -signal.SIGKILL
    # The pipe of its standard error is ours: the end of `run_python` already means that the worker holds it no more.
    pid, deadline = int(done.stdout), time.monotonic() + 20
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
