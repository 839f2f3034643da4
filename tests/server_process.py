"""Servers and other programs that tests start: each in a process group of its own, which is ended with the test."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from mentor_trl.vllm_server.keys import key_of


# Servers that run now: a failing test prints the ends of their logs
RUNNING: list["Server"] = []
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_TARGET_DEVICE": "cpu",
}
# Keys of the servers go here, for which clients look in the test's own environment
STATE = tempfile.TemporaryDirectory()
os.environ["XDG_STATE_HOME"] = STATE.name
# For tiny models: a key-value cache of 64 MiB
SERVER_OPTIONS = {
    "--dtype": "float32",
    "--max-model-len": "64",
    "--kv-cache-memory-bytes": str(2**26),
    "--gpu-memory-utilization": "0.05",
}


class Server:
    """
    A command that serves at `url`, an address of this machine; its output goes to the file `log`. `environment` is
    added to that of the tests.
    """

    def __init__(
        self, command: list[str], log: Path, port: int | None = None, environment: dict[str, str] | None = None
    ):
        self.command, self.log = command, Path(log)
        self.environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        RUNNING.append(self)

    @property
    def headers(self) -> dict[str, str]:
        """What a request needs to be let through."""
        return {"Authorization": f"Bearer {key_of(self.url)}"}

    def kill(self) -> None:
        """End the process and all that it started."""
        # the group outlives its first process: a crashed server may have left workers behind
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        if self in RUNNING:
            RUNNING.remove(self)

    def tail(self, characters: int = 4000) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-characters:]

    def wait_until_ready(self, seconds: float = 300.0) -> None:
        """Return as soon as the server answers; fail with the end of its log where it ended or `seconds` passed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"The server ended with {self.process.returncode}. Its log:\n{self.tail()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(f"The server did not answer for {seconds:.0f} s. Its log:\n{self.tail()}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(command: list[str], log: Path, port: int | None = None, **options) -> Iterator[Server]:
    """A server, killed at the end whatever happens; `options` are those of [`Server`]."""
    server = Server(command, log, port, **options)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def serving_models(policy: str, expert: str | None, log: Path, *options: str, ready: bool = True) -> Iterator[Server]:
    """
    `mentor-trl serve` of two folders, or of the policy's alone, at a free port, up by default; `options` are added to
    `SERVER_OPTIONS`.
    """
    port = free_port()
    command = [sys.executable, "-m", "mentor_trl.cli", "serve", "--policy", policy]
    command += [] if expert is None else ["--expert", expert]
    command += ["--port", str(port), "--enforce-eager", *(word for pair in SERVER_OPTIONS.items() for word in pair)]
    with serving([*command, *options], log, port) as server:
        if ready:
            server.wait_until_ready()
        yield server


@contextmanager
def serving_expert(folder: str, log: Path, *options: str, ready: bool = True) -> Iterator[Server]:
    """`mentor-trl serve` of an expert alone: a stock vLLM server."""
    port = free_port()
    command = [sys.executable, "-m", "mentor_trl.cli", "serve", "--expert", folder, "--port", str(port)]
    command += ["--enforce-eager", *(word for pair in SERVER_OPTIONS.items() for word in pair)]
    with serving([*command, *options], log, port) as server:
        if ready:
            server.wait_until_ready()
        yield server
