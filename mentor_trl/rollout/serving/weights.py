"""Handing a policy's weights over through a folder that trainer and server share."""

import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch


SHARD_BYTES = 4 << 30
# Folders of a run's weights: a random name, its machine, process and start, and the number of the push
RUN_FOLDER = re.compile(r"[0-9a-f]{8}\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.(?P<started>\d+)-\d+(\.partial)?")


def write_weights(
    weights: Iterable[tuple[str, torch.Tensor]], folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write weights as safetensors files. The folder appears under its name only when it is complete."""
    from safetensors.torch import save_file

    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)  # a server loads nothing that others can write
    shard, size, count = {}, 0, 0

    def flush():
        nonlocal shard, size, count
        save_file(shard, partial / f"model-{count:05d}.safetensors")
        shard, size, count = {}, 0, count + 1

    for name, tensor in weights:
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
        # A copy, since safetensors refuses names that share storage (tied embeddings)
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    flush()
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def remove_weights(root: str | Path, run_id: str, keep: str | None = None) -> None:
    """Remove the weights that a run has written for its servers, except those of the version `keep`."""
    for folder in Path(root).glob(f"{run_id}-*"):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


def new_run_id() -> str:
    """A name for the weights of a run, which tells whose they are."""
    return f"{uuid.uuid4().hex[:8]}.{_host()}.{os.getpid()}.{int(psutil.Process().create_time())}"


def remove_dead_weights(root: str | Path) -> None:
    """
    Remove what runs of this user have left behind that were killed. Runs on other machines, and in other containers,
    are not known to be dead.
    """
    for folder in Path(root).glob("*-*"):
        run = RUN_FOLDER.fullmatch(folder.name)
        if run and run["host"] == _host() and folder.lstat().st_uid == os.geteuid():
            if not _lives(int(run["pid"]), int(run["started"])):
                shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int, started: int) -> bool:
    """Whether a process runs, and is not a later one of the same number."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 60
    except (psutil.NoSuchProcess, OverflowError):
        return False


def _host() -> str:
    """Digest of this machine's name and of the numbering of processes in it, which a container has of its own."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return hashlib.sha256(f"{socket.gethostname()} {processes}".encode()).hexdigest()[:8]
