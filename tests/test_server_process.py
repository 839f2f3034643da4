"""What tests stand on that start servers: no server is left behind, and a failure shows its log."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server_process import RUNNING, free_port, serving


# Starts another process and says its id
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
print(child.pid, flush=True)
"""


def is_running(pid: int) -> bool:
    try:
        # a process that ended and that nobody has asked about yet is a zombie
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["child.wait()", "sys.exit(3)"], ids=["running", "crashed"])
def test_processes_of_a_server_end_with_it(end, tmp_path):
    with serving([sys.executable, "-c", PARENT + end], log := tmp_path / "log.txt") as server:
        deadline = time.monotonic() + 60.0
        while not (log.read_text().endswith("\n") and (end == "child.wait()" or server.process.poll() is not None)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child = int(log.read_text())
        assert is_running(child)
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server not in RUNNING and server.process.returncode is not None
    server.kill()


def test_a_server_that_ends_is_told_at_once_with_its_log(tmp_path):
    command = [sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]
    with pytest.raises(AssertionError, match=r"ended with 3[\s\S]*no such model"):
        with serving(command, tmp_path / "log.txt", free_port()) as server:
            server.wait_until_ready()


def test_a_server_that_never_answers_is_given_up_with_its_log(tmp_path):
    command = [sys.executable, "-c", "import time; print('still loading'); time.sleep(99)"]
    with pytest.raises(AssertionError, match=r"did not answer for 1 s[\s\S]*still loading"):
        with serving(command, tmp_path / "log.txt", free_port()) as server:
            while not server.tail():
                time.sleep(0.02)
            server.wait_until_ready(seconds=1.0)


def test_a_failure_shows_the_logs_of_running_servers(tmp_path):
    (tmp_path / "test_it.py").write_text("""
import sys, time
import pytest
from server_process import serving

@pytest.fixture
def server(tmp_path):
    with serving([sys.executable, "-c", "print('out of ' + 'memory'); input()"], tmp_path / "log.txt") as server:
        server.process.wait()
        yield server

def test_it(server):
    assert 1 == 2
""")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in (Path(__file__).parent, *sys.path)),
    }
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, str(tmp_path / "test_it.py")], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "End of the log of http://127.0.0.1" in done.stdout
    assert "out of memory" in done.stdout
